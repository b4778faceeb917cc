"""What /proc/diskstats says of idle disks: as sysfs has it, and as the same objects."""

from __future__ import annotations

from pathlib import Path

from ublkwatch.diskstats import Idle
from ublkwatch.model import Traffic

ZEROS = " 0" * 17


def line(name: str, reads: int = 0, inflight: int = 0) -> str:
    return f" 259 0 {name} {reads} 0 0 0 5 0 0 0 {inflight} 0 0 2 0 0 0 1 0"


def test_idle_disks_are_told_with_what_they_have_completed(tmp_path: Path) -> None:
    path = tmp_path / "diskstats"
    lines = [line("sda", 9), line("ublkb0", 3), line("ublkb0p1", 3), line("ublkb12", 4, inflight=1)]
    path.write_text("\n".join([*lines, "nonsense", line("ublkbx")]) + "\n")
    assert Idle(path)() == {0: Traffic(0, 3 + 5 + 2 + 1)}


def test_older_kernels_have_fewer_numbers(tmp_path: Path) -> None:
    path = tmp_path / "diskstats"
    path.write_text(" 259 0 ublkb0 1 0 0 0 2 0 0 0 0 0 0\n")
    assert Idle(path)() == {0: Traffic(0, 3)}


def test_who_is_as_before_is_the_same_object(tmp_path: Path) -> None:
    path = tmp_path / "diskstats"
    idle = Idle(path)
    path.write_text(f"{line('ublkb0', 1)}\n{line('ublkb1', 1)}\n")
    first = dict(idle())
    assert idle() == first
    path.write_text(f"{line('ublkb0', 1)}\n{line('ublkb1', 2)}\n")
    second = idle()
    assert second[0] is first[0]
    assert second[1] == Traffic(0, 10)
    path.write_text(f"{line('ublkb0', 1, inflight=2)}\n")
    assert idle() == {}


def test_where_there_is_no_such_file_nothing_is_known(tmp_path: Path) -> None:
    assert Idle(tmp_path / "none")() == {}


def test_a_file_that_was_mounted_there_is_not_the_kernels(tmp_path: Path) -> None:
    path = tmp_path / "diskstats"
    path.symlink_to("/proc/diskstats")  # as near as one comes to that without a mount
    assert Idle(path)() == {}
    assert Idle(path)._read() == b""
    assert Idle()._read() != b""
