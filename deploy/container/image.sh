#!/bin/sh
# Makes build/ublkwatch-VERSION.oci.tar, an OCI archive: `make image`, as root.
#
# No image is pulled. The base is made of Debian's packages, unless BASE names one that is to be
# pulled, or is there; the wheels are fetched beforehand, checked by their hashes. All files carry
# the time of the last commit, and none that of the build.
set -eu

suite=${SUITE:-trixie}
cd "$(dirname "$0")/../.."
[ "$(id -u)" = 0 ] || { echo "image: run this as root" >&2; exit 1; }
missing=
# Programs, and Debian's packages where these are called otherwise; the last four are for its use, and tests.
for program in buildah mmdebstrap podman crun skopeo ip:iproute2; do
    command -v "${program%:*}" >/dev/null || missing="$missing ${program#*:}"
done
if [ "$missing" ]; then
    echo "image: installing$missing" >&2
    apt-get update -qq
    # shellcheck disable=SC2086 - a list of words
    DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends $missing >/dev/null
fi

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' ublkwatch/__init__.py)
# Of the last commit, so that who builds it again gets the same files.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
work=$PWD/build/image
archive=$PWD/build/ublkwatch-$version.oci.tar
mkdir -p "$work/wheels"
rm -f "$archive"

# vfs and chroot: that works in a container, too.
builder() {
    verb=$1
    shift
    buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$verb" "$@"
}
cleanup() {
    builder rm --all >/dev/null 2>&1 || true
    rm -rf "$work/storage" "$work/run"
}
trap cleanup EXIT

for list in requirements build-requirements; do
    .venv/bin/python -m pip download --quiet --require-hashes --only-binary :all: \
        --dest "$work/wheels" -r "deploy/container/$list.txt"
done

if [ -z "${BASE:-}" ]; then
    if [ ! -f "$work/$suite.tar" ]; then
        echo "image: making a base of Debian $suite; $work/$suite.tar is kept: remove it for a newer one" >&2
        mmdebstrap --quiet --format=tar --variant=essential --include=python3,python3-venv \
            --dpkgopt='path-exclude=/usr/share/doc/*' \
            --dpkgopt='path-include=/usr/share/doc/*/copyright' \
            --dpkgopt='path-exclude=/usr/share/man/*' \
            --dpkgopt='path-exclude=/usr/share/locale/*' \
            "$suite" "$work/$suite.new"
        mv "$work/$suite.new" "$work/$suite.tar"
    fi
    container=$(builder from scratch)
    builder add --quiet "$container" "$work/$suite.tar" / >/dev/null
    builder commit --quiet --timestamp "$SOURCE_DATE_EPOCH" "$container" ublkwatch-base >/dev/null
    builder rm "$container" >/dev/null
    BASE=localhost/ublkwatch-base
    pull=never
fi

builder build --quiet --isolation chroot --pull="${pull:-missing}" \
    --ignorefile deploy/container/Containerfile.dockerignore \
    --volume "$work/wheels:/wheels:ro" --timestamp "$SOURCE_DATE_EPOCH" \
    --build-arg "BASE=$BASE" --build-arg "VERSION=$version" \
    --build-arg "PIP_OPTIONS=--no-index --find-links=/wheels" \
    --file deploy/container/Containerfile --tag "ublkwatch:$version" .
builder push --quiet "localhost/ublkwatch:$version" "oci-archive:$archive:ublkwatch:$version"
echo "$archive"
