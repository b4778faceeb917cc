"""A host goes down with a file system on a ublk device: it is unmounted through its server.

A part of `full` only. tests/going_down.py is the guest's side; what is judged here is
what the guest has left: its journal to the very end, and the disk's image.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from going_down import BEGINS, KEPT

TOP = Path(__file__).parent.parent


def run(*command: str | Path) -> bytes:
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    done = subprocess.run(
        list(map(str, command)), cwd=TOP, env=environment, capture_output=True, check=False
    )
    said = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0, f"{command}: status {done.returncode}: {said}"
    return done.stdout


# This host's systemd, with the tests' Python; and Debian 13's, whose Python is told of us.
HOST = ((), sys.executable, ())
TRIXIE = (
    ("--root", "build/trixie", "--rw", str(TOP)),
    "/usr/bin/python3",
    ("sh", "-c", f'echo "{TOP}" >/usr/lib/python3/dist-packages/us.pth; exec "$@"', "sh"),
)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("root", "python", "begin"), [HOST, TRIXIE], ids=["here", "Debian 13"])
def test_a_file_system_is_unmounted_through_its_server_and_nothing_is_recovered(
    tmp_path: Path, root: tuple[str, ...], python: str, begin: tuple[str, ...]
) -> None:
    share, image = tmp_path / "share", tmp_path / "disk.img"
    share.mkdir()
    run("mkfs.ext4", "-q", image, "64M")

    lab = (sys.executable, "lab/lab.py", "run", "--kernel", "new", "--init", "systemd", *root)
    guest = (python, TOP / "tests/going_down.py", share)
    # Status 0: it went down in order, and in time.
    given = ("--disk", image, "--rw", share)
    run(*lab, "--timeout", "900", "--shutdown", *given, "--", *begin, *guest)

    before, _, after = (share / "journal").read_text(errors="replace").partition(BEGINS)
    assert "-> watching" in before, "else ublkwatch had no part in it"
    lines = after.splitlines()
    stopped = place(lines, "ublkwatch", "stopped; the servers live on")
    assert stopped < place(lines, "EXT4-fs (ublkb0): unmounting filesystem")
    told = [line for line in lines if "ublk 0:" in line or "ublkwatch-ublkb0" in line]
    assert told == [], "its server was neither stopped nor brought back"
    bad = ("timed out", "I/O error", "Failed unmounting /srv/disk", "hung", "blocked for")
    assert [line for line in lines if any(word in line for word in bad)] == []

    assert re.search(rb"^Filesystem state: +clean$", run("dumpe2fs", "-h", image), re.MULTILINE)
    run("e2fsck", "-fn", image)
    assert run("debugfs", "-R", "cat /kept", image) == KEPT


def place(lines: list[str], *words: str) -> int:
    """Return where the line with all these words is."""
    found = [at for at, line in enumerate(lines) if all(word in line for word in words)]
    assert len(found) == 1, f"{words}: {found} in\n" + "\n".join(lines)
    return found[0]
