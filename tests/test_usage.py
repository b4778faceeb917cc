"""Who uses a disk: a /proc and a /sys of our own, and what the real ones say of a real file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ublkwatch.usage import Usage, usage

FREE = "22 1 8:1 / / rw - ext4 /dev/sda1 rw"


class Root:
    """A machine with one disk, and processes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.write("sys/block/ublkb3/dev", "259:3\n")
        self.write("sys/block/ublkb3/ublkb3p1/dev", "259:4\n")
        self.write("proc/swaps", "Filename\t\tType\t\tSize\n/dev/sda2  partition  1  0  -2\n")
        self.process(1, "mnt:[1]")

    def write(self, name: str, text: str) -> Path:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def process(self, pid: int, space: str, *mounts: str, opens: tuple[str, ...] = ()) -> None:
        home = self.write(f"proc/{pid}/mountinfo", "\n".join((FREE, *mounts))).parent
        self.write(f"proc/{pid}/comm", "prog\n")
        for name in ("ns", "fd"):
            (home / name).mkdir()
        (home / "ns/mnt").symlink_to(space)
        for number, target in enumerate(opens):
            (home / f"fd/{number}").symlink_to(target)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_a_disk_that_nobody_uses_is_free(root: Root) -> None:
    root.process(9, "mnt:[1]", opens=("/dev/ublkb30", "/dev/ublkc3", "/srv/ublkb3.img"))
    root.write("sys/block/loop0/loop/backing_file", "/srv/ublkb3.img\n")
    assert usage(3, root.home) == Usage()
    assert str(usage(3, root.home)) == ""


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("30 22 259:3 / /mnt rw - ext4 /dev/ublkb3 rw", "/mnt"),
        ("30 22 259:4 / /a\\040b rw shared:1 - xfs /dev/ublkb3p1 rw", "/a b"),
        ("30 22 0:44 / /srv rw - btrfs /dev/ublkb3 rw", "/srv"),
    ],
)
def test_a_mount_in_any_namespace_is_seen(root: Root, line: str, where: str) -> None:
    root.process(70, "mnt:[2]", line)
    root.process(71, "mnt:[2]", line)
    assert usage(3, root.home).uses == (f"mounted on {where} (process 70 sees it)",)


def test_whatever_else_can_be_a_use_is_seen(root: Root) -> None:
    root.process(8, "mnt:[1]", opens=("/dev/ublkb3p1", "/ublkb3 (deleted)"))
    (root.home / "sys/block/ublkb3/holders/dm-0").mkdir(parents=True)
    (root.home / "sys/fs/btrfs/uuid/devices/ublkb3p1").mkdir(parents=True)
    root.write("sys/block/loop1/loop/backing_file", "/dev/ublkb3\n")
    root.write("proc/swaps", "Filename\n/dev/ublkb3p1  partition  1  0  -2\n")
    found = usage(3, root.home)
    assert found.uses == (
        "dm-0 is stacked on ublkb3",
        "ublkb3p1 is part of the btrfs uuid, which is mounted",
        "loop1 is a loop device on it",
        "/dev/ublkb3p1 is swapped on",
        "/dev/ublkb3p1 is open in process 8 (prog)",
        "/ublkb3 (deleted) is open in process 8 (prog)",
    )
    assert str(found).endswith("(prog), and 1 more")
    assert str(found).count(";") == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="for root, which can be nobody for a while")
def test_what_may_not_be_looked_at_is_counted(root: Root) -> None:
    for pid in (50, 51):
        root.process(pid, "mnt:[5]")
        for name in ("ns", "fd"):
            (root.home / f"proc/{pid}/{name}").chmod(0)
    for directory in (root.home, *root.home.parents):
        if directory.owner() != "root" or not directory.stat().st_mode & 0o005:
            directory.chmod(0o755)
        if directory == Path("/tmp"):
            break
    os.seteuid(65534)
    try:
        assert usage(3, root.home) == Usage((), 2)
    finally:
        os.seteuid(0)


def test_the_real_machine_can_be_looked_at() -> None:
    assert usage(1 << 19).uses == ()
