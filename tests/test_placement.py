"""What lies on a ublk device, told from a /proc and a /sys made of files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from ublkwatch import placement


class Disk(NamedTuple):
    name: str
    number: str


class Host:
    """A host's /proc and /sys, and as much of its files as is needed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._mounts: list[tuple[int, str]] = []  # number, point
        self._lines: list[str] = []
        self._disks = 0
        for name in ("proc/self", "sys/dev/block", "sys/class/block", "sys/fs/btrfs", "dev"):
            (root / name).mkdir(parents=True)
        self.swap()

    def disk(
        self,
        name: str,
        slaves: tuple[str, ...] = (),
        partition_of: str = "",
        loop: str = "",
        zram: str = "",
    ) -> Disk:
        self._disks += 1
        where = f"devices/virtual/block/{partition_of + '/' if partition_of else ''}{name}"
        home = self.root / "sys" / where
        home.mkdir(parents=True)
        if partition_of:
            (home / "partition").write_text("1\n")
        if slaves:
            (home / "slaves").mkdir()
            for slave in slaves:
                (home / "slaves" / slave).symlink_to(f"../../{slave}")
        if loop:
            (home / "loop").mkdir()
            (home / "loop/backing_file").write_text(f"{loop}\n")
        if zram:
            (home / "backing_dev").write_text(f"{zram}\n")
        number = f"259:{self._disks}"
        (self.root / "sys/dev/block" / number).symlink_to(f"../../{where}")
        (self.root / "sys/class/block" / name).symlink_to(f"../../{where}")
        (self.root / "dev" / name).touch()
        return Disk(name, number)

    def mount(self, point: str, on: Disk | str, kind: str = "ext4", options: str = "rw") -> None:
        """Mount a disk, or what is on none; the last one mounted at a place is what is seen."""
        parent = 0
        for number, where in self._mounts:
            if point == where or point.startswith(where.rstrip("/") + "/"):
                parent = number
        number = len(self._mounts) + 20
        device, source = (on.number, f"/dev/{on.name}") if isinstance(on, Disk) else ("0:9", on)
        self._mounts.append((number, point))
        escaped = point.replace(" ", "\\040")
        self._lines.append(
            f"{number} {parent} {device} / {escaped} rw shared:1 - {kind} {source} {options}"
        )
        (self.root / "proc/self/mountinfo").write_text("\n".join(self._lines) + "\n")

    def number(self, point: str) -> int:
        return {where: number for number, where in self._mounts}[point]

    def plain(self) -> None:
        """Mount a root that is on no ublk device, and what there is beside it."""
        self.mount("/", self.disk("sda"))
        for point, kind in (("/proc", "proc"), ("/sys", "sysfs"), ("/run", "tmpfs")):
            self.mount(point, kind, kind)
        self.mount("/dev", "udev", "devtmpfs")

    def swap(self, *areas: str) -> None:
        lines = [f"{area} partition 1048572 0 -2" for area in areas]
        text = "\n".join(["Filename Type Size Used Priority", *lines])
        (self.root / "proc/swaps").write_text(text + "\n")

    def file(self, path: str) -> str:
        made = self.root / path.lstrip("/")
        made.parent.mkdir(parents=True, exist_ok=True)
        made.touch()
        return path

    def link(self, path: str, target: str) -> str:
        made = self.root / path.lstrip("/")
        made.parent.mkdir(parents=True, exist_ok=True)
        made.symlink_to(target)
        return path

    def chain(self, path: str) -> tuple[str, ...]:
        found = placement.findings({"it": path}, self.root, swap=False)
        return found[0].chain if found else ()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_what_is_elsewhere_is_no_finding(host: Host) -> None:
    host.plain()
    host.disk("ublkb0")
    host.file("/var/lib/ublkwatch/specs/0.json")
    for path in ("/var/lib/ublkwatch", "/run/ublkwatch", "/not/there", "/", "relative"):
        assert host.chain(path) == ()


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        ([], ("ublkb0",)),
        (["partition"], ("/dev/ublkb0p1", "ublkb0")),
        (["dm"], ("/dev/dm-0", "ublkb0")),
        (["md", "dm"], ("/dev/dm-0", "/dev/md127", "ublkb0")),
        (["partition", "bcache", "dm"], ("/dev/dm-0", "/dev/bcache0", "/dev/ublkb0p1", "ublkb0")),
    ],
)
def test_a_file_system_lies_on_what_its_device_is_stacked_on(
    host: Host, stack: list[str], expected: tuple[str, ...]
) -> None:
    host.plain()
    top = host.disk("ublkb0")
    other = host.disk("sdb")
    names = {"dm": "dm-0", "md": "md127", "bcache": "bcache0"}
    for kind in stack:
        if kind == "partition":
            top = host.disk(f"{top.name}p1", partition_of=top.name)
        else:
            top = host.disk(names[kind], slaves=(other.name, top.name))
    host.mount("/srv", top)
    assert host.chain("/srv/state") == ("ext4", *expected)
    (found,) = placement.findings({"the state directory": "/srv/state"}, host.root, swap=False)
    assert str(found) == f"the state directory /srv/state is on ext4, on {', on '.join(expected)}"
    assert found.device == "ublkb0"


def test_a_loop_device_lies_where_its_file_does(host: Host) -> None:
    host.plain()
    host.mount("/srv", host.disk("ublkb7"))
    host.mount("/image", host.disk("loop0", loop="/srv/disk.img (deleted)"))
    part = host.disk("loop0p2", partition_of="loop0")
    host.mount("/part", part)
    below = ("/dev/loop0", "/srv/disk.img", "ext4", "ublkb7")
    assert host.chain("/image/x") == ("ext4", *below)
    assert host.chain("/part/x") == ("ext4", "/dev/loop0p2", *below)


@pytest.mark.parametrize("layer", ["lowerdir=/a:/srv/l:/b", "upperdir=/srv/u", "workdir=/srv/w"])
def test_an_overlay_lies_on_each_of_its_layers(host: Host, layer: str) -> None:
    host.plain()
    host.mount("/srv", host.disk("ublkb0"))
    host.mount("/merged", "overlay", "overlay", f"rw,{layer},index=off")
    host.mount("/other", "overlay", "overlay", "rw,lowerdir=/a:/b,upperdir=/c,workdir=/d")
    assert host.chain("/merged/x") == ("overlay", "ext4", "ublkb0")
    assert host.chain("/other/x") == ()


def test_btrfs_lies_on_all_its_devices(host: Host) -> None:
    host.plain()
    host.disk("ublkb0")
    host.disk("sdb")
    devices = host.root / "sys/fs/btrfs/some-uuid/devices"
    devices.mkdir(parents=True)
    for name in ("sdb", "ublkb0"):
        (devices / name).symlink_to("elsewhere")
    host.mount("/srv", "/dev/sdb", "btrfs")
    assert host.chain("/srv/x") == ("btrfs", "ublkb0")


def test_an_external_journal_counts(host: Host) -> None:
    host.plain()
    host.disk("ublkb0")
    host.mount("/srv", host.disk("sdb"), "xfs", "rw,attr2,logdev=/dev/ublkb0,noquota")
    assert host.chain("/srv/x") == ("xfs", "ublkb0")


def test_links_are_followed_where_they_may_be_looked_at(host: Host) -> None:
    host.plain()
    host.mount("/srv", host.disk("ublkb0"))
    host.link("/var/lib/ublkwatch", "../../data/uw")
    host.link("/data", "/srv/data")
    assert host.chain("/var/lib/ublkwatch/specs") == ("ext4", "ublkb0")
    host.link("/var/run", "/run")
    assert host.chain("/var/run/../srv/x") == ("ext4", "ublkb0")
    host.link("/round", "/and")
    host.link("/and", "/round")
    assert host.chain("/round/x") == ()


def test_the_last_mount_at_a_place_is_what_is_seen(host: Host) -> None:
    host.plain()
    disk = host.disk("ublkb0")
    host.mount("/srv", disk)
    host.mount("/srv", "tmpfs", "tmpfs")
    assert host.chain("/srv/x") == ()
    host.mount("/a b", "tmpfs", "tmpfs")
    host.mount("/a b", disk)
    assert host.chain("/a b/x") == ("ext4", "ublkb0")


def test_memory_mounted_on_a_root_that_is_on_ublk_is_memory(host: Host) -> None:
    host.mount("/", host.disk("ublkb0"))
    host.mount("/run", "tmpfs", "tmpfs")
    host.mount("/deep/er/tmp", "tmpfs", "tmpfs")
    assert host.chain("/run/ublkwatch") == ()
    assert host.chain("/deep/er/tmp/x") == ()
    for path in ("/", "/usr/bin/python3", "/deep/er/x", "/deep/er/tmp/../x", "/deep/er/tmp/../.."):
        assert host.chain(path) == ("ext4", "ublkb0")


def test_nothing_on_the_device_is_looked_at(host: Host) -> None:
    host.plain()
    host.mount("/srv", host.disk("ublkb0"))
    host.mount("/image", host.disk("loop0", loop="/srv/disk.img"))
    host.link("/to", "/srv/a/b")
    for way_out in ("/srv/a", "/image/x"):  # who looks at these is led elsewhere
        host.link(way_out, "/elsewhere")
    for path in ("/srv/a", "/srv", "/to/c", "/image/x/y", "/srv/../srv/a", "/srv/a/../../var"):
        assert host.chain(path)


def test_what_we_have_open_is_asked_by_its_mount_and_not_by_its_name(host: Host) -> None:
    host.plain()
    host.mount("/srv", host.disk("ublkb0"))
    host.link("/proc/self/fd/2", "/srv/log")
    info = host.root / "proc/self/fdinfo/2"
    info.parent.mkdir()

    def found(mount: int) -> list[str]:
        info.write_text(f"pos:\t0\nflags:\t02\nmnt_id:\t{mount}\nino:\t7\n")
        return [str(each) for each in placement.findings({"the log": 2}, host.root, swap=False)]

    assert found(host.number("/srv")) == ["the log /srv/log is on ext4, on ublkb0"]
    assert found(host.number("/")) == []
    assert found(999) == [], "one from outside of our root, or a pipe"


def test_swap_is_asked_about(host: Host) -> None:
    host.plain()
    host.disk("ublkb0")
    host.disk("dm-3", slaves=("ublkb0",))
    host.mount("/srv", host.disk("ublkb1"))
    host.link("/dev/mapper/vg-swap", "../dm-3")
    host.swap("/dev/sda", "/dev/dm-3", "/dev/mapper/vg-swap", "/srv/swap\\040file")
    found = placement.findings({}, host.root, swap=True)
    assert [str(each) for each in found] == [
        "swap /dev/dm-3 is on /dev/dm-3, on ublkb0",
        "swap /dev/mapper/vg-swap is on /dev/dm-3, on ublkb0",
        "swap /srv/swap file is on ext4, on ublkb1",
    ]


def test_zram_that_writes_back_lies_on_its_device(host: Host) -> None:
    host.plain()
    host.disk("ublkb0")
    host.disk("zram0", zram="/dev/ublkb0")
    host.disk("zram1", zram="none")
    host.swap("/dev/zram0", "/dev/zram1")
    (found,) = placement.findings({}, host.root, swap=True)
    assert found.chain == ("/dev/zram0", "/dev/ublkb0", "ublkb0")


def test_in_a_chroot_what_is_below_is_asked_of_the_directory_itself(host: Host) -> None:
    # Only what is mounted inside is shown: the directory that is / here is in no mount of the list.
    real = host.root.stat().st_dev
    number = f"{os.major(real)}:{os.minor(real)}"
    host.disk("ublkb0")
    target = host.root / "sys/dev/block" / number
    target.unlink(missing_ok=True)
    target.symlink_to("../../devices/virtual/block/ublkb0")
    host.mount("/proc", "proc", "proc")
    host.mount("/run", "tmpfs", "tmpfs")
    expected = () if number.startswith("0:") else ("a file system", "ublkb0")
    assert host.chain("/usr") == expected
    assert host.chain("/run/ublkwatch") == ()


def test_what_lies_upon_itself_ends(host: Host) -> None:
    host.plain()
    host.disk("dm-1", slaves=("dm-2",))
    host.mount("/srv", host.disk("dm-2", slaves=("dm-1",)))
    host.mount("/image", host.disk("loop0", loop="/image/x"))
    assert host.chain("/srv/x") == ()
    assert host.chain("/image/x") == ()


def test_without_proc_and_sys_nothing_is_guessed(tmp_path: Path) -> None:
    assert placement.findings({"it": "/srv"}, tmp_path, swap=True) == []
