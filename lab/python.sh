#!/bin/sh
# Makes .venv with the project and its development tools; installs Debian's Python where there is none.
set -eu

usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Debian's own first, which the package runs under too: it is built with optimisations, and where all
# is emulated that is a third of the time. A shell's python3 may be built without.
python=${UBLKWATCH_PYTHON:-/usr/bin/python3}
if ! usable "$python" && [ -z "${UBLKWATCH_PYTHON:-}" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "lab: installing Debian's Python" >&2
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq python3 python3-venv >/dev/null
    fi
    usable "$python" || python=python3
fi
if ! usable "$python"; then
    echo "lab: $python is not Python 3.11 with venv: Debian 12 or later, and as root or after" \
        "apt-get install --yes python3 python3-venv" >&2
    exit 125
fi

echo "lab: making .venv" >&2
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
.venv/bin/python -m pip install --quiet --disable-pip-version-check --group dev --editable .
