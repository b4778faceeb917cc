#!/bin/sh
# Makes .venv with the project and its development tools; installs Debian's Python where there is none.
set -eu

usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

python=${UBLKWATCH_PYTHON:-python3}
if ! usable "$python"; then
    if [ "$(id -u)" != 0 ]; then
        echo "lab: needs Python 3.11 with venv; try: apt-get install --yes python3 python3-venv" >&2
        exit 125
    fi
    echo "lab: installing Debian's Python" >&2
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq python3 python3-venv >/dev/null
    python=/usr/bin/python3
    usable "$python" || { echo "lab: Debian 12 or later is needed (Python 3.11)" >&2; exit 125; }
fi

echo "lab: making .venv" >&2
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
.venv/bin/python -m pip install --quiet --disable-pip-version-check --group dev --editable .
