"""kublk, the kernel's own ublk test server: built from Debian's source package of the newest line.

A server that nobody here has written, and that recovers by a command of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from archive import Archive
from base import LabError, cache_directory, me, output_of, say, staging

SUITES: Final = ("trixie-backports", "sid")
SOURCE_PACKAGE: Final = r"linux-source-7\.\d+"
FOLDER: Final = "tools/testing/selftests/ublk"
# The folder also has a small program of its own, which is no part of the server.
STANDALONE: Final = "metadata_size.c"


def fetch_kublk(cache: Path, archive: Archive) -> None:
    """Build kublk into the cache; the newest kernel's headers are there already."""
    package, version = archive.newest(SOURCE_PACKAGE)
    with staging(cache) as stage:
        say(f"fetching {package} {version} for kublk (about 170 MB)")
        archive.unpack([f"{package}={version}", "liburing-dev/sid"], stage)
        say("building kublk")
        tree = next(stage.glob("usr/src/linux-source-*.tar.xz"), None)
        library = next(stage.rglob("liburing.a"), None)
        if tree is None or library is None:
            raise LabError(f"{package} holds no source tree, or liburing-dev no static library")
        # Of the whole kernel, one folder; all cores, as the archive is read to its end.
        output_of(
            ["tar", "-x", "-I", "xz -T0", "-C", stage, "-f", tree, "--wildcards", f"*/{FOLDER}/*"]
        )
        folder = next(stage.glob(f"*/{FOLDER}"))
        home = stage / "home"
        home.mkdir()
        includes = (cache / "headers/usr/include", stage / "usr/include")
        output_of(
            [
                *("cc", "-O2", "-w", "-D_GNU_SOURCE", "-o", home / "kublk"),
                *(part for include in includes for part in ("-isystem", include)),
                *sorted(path for path in folder.glob("*.c") if path.name != STANDALONE),
                *(library, "-lpthread"),
            ]
        )
        home.rename(cache / "kublk")


def kublk() -> Path:
    """Return where kublk is, or say how to get it."""
    program = cache_directory() / "kublk/kublk"
    if not program.is_file():
        raise LabError(f"kublk is not at {program}; get it: {me()} setup")
    return program
