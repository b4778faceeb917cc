"""The trail of events, in real files; and what the kernel's log says of the OOM killer."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from ublkwatch import kmsg, trail
from ublkwatch.trail import Trail

FULL = 1 << 20


def event(number: int, dev_id: int | None = 0) -> dict[str, Any]:
    return {"kind": "transition", "at": float(number), "dev_id": dev_id, "text": f"n{number}"}


def everything(runtime_dir: Path) -> list[dict[str, Any]]:
    with contextlib.closing(Trail(runtime_dir)) as reader:
        return reader.last(None)


def numbers(events: list[dict[str, Any]]) -> list[int]:
    return [int(each["at"]) for each in events]


def test_nothing_has_happened_yet(tmp_path: Path) -> None:
    reader = Trail(tmp_path)
    assert reader.last(5) == reader.more() == []
    trail.add(tmp_path, [event(1)])
    assert reader.more() == [{"schema_version": 1} | event(1)]
    reader.close()


def test_the_last_events_come_first_and_then_those_that_follow(tmp_path: Path) -> None:
    trail.add(tmp_path, map(event, range(10)))
    reader = Trail(tmp_path)
    assert numbers(reader.last(3)) == [7, 8, 9]
    assert reader.more() == []
    trail.add(tmp_path, [event(10), event(11)])
    assert numbers(reader.more()) == [10, 11]
    assert numbers(everything(tmp_path)) == list(range(12))
    reader.close()


def test_who_asks_for_some_devices_gets_no_others(tmp_path: Path) -> None:
    trail.add(tmp_path, [event(1, 0), event(2, 7), event(3, None), event(4, 7)])
    reader = Trail(tmp_path, [7])
    assert numbers(reader.last(1)) == [4]
    trail.add(tmp_path, [event(5, 0), event(6, 7)])
    assert numbers(reader.more()) == [6]
    reader.close()


def test_the_files_are_bounded_and_who_follows_loses_nothing(tmp_path: Path) -> None:
    reader, seen = Trail(tmp_path), []
    padding = "x" * 10_000
    for number in range(400):
        trail.add(tmp_path, [event(number) | {"text": padding}])
        seen += numbers(reader.more())
    assert seen == list(range(400))
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) < FULL + 20_000
    kept = numbers(everything(tmp_path))
    assert kept == list(range(kept[0], 400))
    reader.close()


def test_what_came_to_the_old_file_last_is_read_before_the_new_one(tmp_path: Path) -> None:
    trail.add(tmp_path, [event(1) | {"text": "x" * FULL}])
    reader = Trail(tmp_path)
    assert numbers(reader.more()) == [1]
    with (tmp_path / trail.NAME).open("a") as file:
        file.write('{"at": 2, "dev_id": 0}\n')
    trail.add(tmp_path, [event(3)])
    assert numbers(reader.more()) == [2, 3]
    reader.close()


def test_a_line_that_is_being_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / trail.NAME
    reader = Trail(tmp_path)
    path.write_text('{"at": 1, "dev')
    assert reader.more() == []
    with path.open("a") as file:
        file.write('_id": 0}\n{"at": 2, broken\n{"at": 3, "dev_id": 1}\n')
    assert numbers(reader.more()) == [1, 3]
    reader.close()


def test_everybody_may_read_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        trail.add(tmp_path, [event(1)])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / trail.NAME).stat().st_mode) == 0o644


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / trail.NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        trail.add(tmp_path, [event(1)])
    assert not (tmp_path / "elsewhere").exists()


# --- the OOM killer -------------------------------------------------------------------------------

LOG = """\
6,100,50000000,-;something else: Killed process 7 (x)
3,101,60000000,-;Out of memory: Killed process 1234 (ublk.loop) total-vm:9kB, anon-rss:9kB
 SUBSYSTEM=block
3,102,70000000,-;Memory cgroup out of memory: Killed process 55 (a (b) c) total-vm:9kB
"""


@pytest.mark.parametrize(
    ("pid", "since", "killed"),
    [
        *((1234, 0.0, True), (1234, 59.0, True), (1234, 61.0, False)),
        *((55, 65.0, True), (123, 0.0, False), (7, 0.0, False)),
    ],
)
def test_whom_the_oom_killer_ended_and_when(
    tmp_path: Path, pid: int, since: float, *, killed: bool
) -> None:
    log = tmp_path / "kmsg"
    log.write_text(LOG)
    assert kmsg.oom_killed(pid, since, log) is killed


def test_where_the_kernels_log_is_not_for_us_nobody_knows(tmp_path: Path) -> None:
    assert not kmsg.oom_killed(1234, 0.0, tmp_path / "none")


def test_a_log_that_has_no_more_lines_does_not_keep_us(tmp_path: Path) -> None:
    fifo = tmp_path / "kmsg"
    os.mkfifo(fifo)
    writer = os.open(fifo, os.O_RDWR)  # as /dev/kmsg: no end of file, EAGAIN
    os.write(writer, LOG.encode())
    assert kmsg.oom_killed(55, 0.0, fifo)
    os.close(writer)
