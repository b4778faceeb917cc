"""A host goes down, or comes up, with a file system on a ublk device whose server is lost.

A part of `full` only. tests/going_down.py and coming_up.py are the guest's side; what is judged
here is what the guest has left: its journal to the very end, and the disk's image.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import coming_up
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


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "share").mkdir()
    run("mkfs.ext4", "-q", tmp_path / "disk.img", "64M")
    return tmp_path / "disk.img"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("root", "python", "begin"), [HOST, TRIXIE], ids=["here", "Debian 13"])
def test_a_file_system_is_unmounted_through_its_server_and_nothing_is_recovered(
    image: Path, root: tuple[str, ...], python: str, begin: tuple[str, ...]
) -> None:
    share = image.with_name("share")
    lab(image, root, *begin, python, TOP / "tests/going_down.py", share)
    goes_down_in_order(share, image)


@pytest.mark.timeout(1800)
def test_a_boot_goes_on_though_the_server_of_a_file_system_is_lost_in_it(image: Path) -> None:
    share = image.with_name("share")
    with tempfile.TemporaryDirectory(prefix="booting-", dir=TOP / "build") as name:
        root = Path(name) / "root"
        run("cp", "-al", TOP / "build/trixie", root)  # nothing in it is written to
        (root / "usr/lib/python3/dist-packages/us.pth").write_text(f"{TOP}\n")
        units = root / "usr/lib/systemd/system"
        for path, text in coming_up.files():
            (units / path).parent.mkdir(exist_ok=True)
            (units / path).write_text(text)
        for path, names in coming_up.WANTED.items():
            (units / path).mkdir(exist_ok=True)
            for each in names:
                (units / path / each).symlink_to(f"../{each}")
        options = ("--root", str(root), "--rw", str(TOP))
        lab(image, options, "/usr/bin/python3", TOP / "tests/coming_up.py", share)
    goes_down_in_order(share, image)


def lab(image: Path, root: tuple[str, ...], *command: str | Path) -> None:
    """Run it in a guest that is shut down as a machine is; status 0 says: in order, and in time."""
    guest = (sys.executable, "lab/lab.py", "run", "--kernel", "new", "--init", "systemd", *root)
    given = ("--disk", image, "--rw", image.with_name("share"))
    run(*guest, "--timeout", "1500", "--shutdown", *given, "--", *command)


def goes_down_in_order(share: Path, image: Path) -> None:
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
