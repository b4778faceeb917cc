"""A drill's rounds, with real processes as servers, a real store, and the machine's own record."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import schema
from hypothesis import given
from hypothesis import strategies as st
from patience import until

from ublkwatch import rounds, scratch, server
from ublkwatch.drilling import Drill, Round, percentile
from ublkwatch.model import Phase, Reason, Record, ServerId
from ublkwatch.store import Store


class Stage:
    """Servers that sleep, and a store in which somebody says what became of them."""

    def __init__(self, home: Path) -> None:
        self.runtime_dir = home / "run"
        self.store = Store(self.runtime_dir, home / "state")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.record = Record(dev_id=0, instance="i/1", phase=Phase.WATCHING, server=self.start())
        self.store.save_record(self.record)

    def start(self) -> ServerId:
        self.processes.append(subprocess.Popen(["/bin/sleep", "600"]))
        pid = self.processes[-1].pid
        ticks = server._start_ticks(pid)
        assert ticks is not None
        return ServerId(pid, ticks, server.read_boot_id())

    async def play(self, recover: Callable[[Record, float], Record | None], times: int) -> None:
        """Wait for a kill, and have the record say what ``recover`` makes of it."""
        for _ in range(times):
            process = self.processes[-1]
            await until(lambda: process.poll() is not None, "killed")  # noqa: B023 - at once
            record = recover(self.record, time.monotonic())
            if record is None:
                self.store.drop_record(0)
                return
            self.record = record
            self.store.save_record(self.record)

    def recovered(self, record: Record, now: float) -> Record:
        return replace(
            record,
            server=self.start(),
            recoveries=record.recoveries + 1,
            detected_by="pidfd",
            attempts=1,
            marks=(("lost", now), ("draining", now), ("probation", now + 0.25)),
            last_held_s=0.25,
        )

    def drill(
        self, recover: Callable[[Record, float], Record | None], count: int, times: int
    ) -> tuple[Drill, list[str]]:
        told: list[str] = []

        async def both() -> Drill:
            played = asyncio.create_task(self.play(recover, times))
            report = await rounds.drill(
                self.runtime_dir,
                0,
                count,
                timeout_s=5,
                scratch=False,
                may_fail=False,
                tell=told.append,
            )
            await played
            return report

        return asyncio.run(both()), told


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    for process in stage.processes:
        process.kill()
        process.wait()
    stage.store.close()


def test_every_round_kills_the_server_of_then_and_is_timed(stage: Stage) -> None:
    report, told = stage.drill(stage.recovered, 2, 2)
    assert report.trouble == ""
    assert [each.killed_pid for each in report.rounds] == [p.pid for p in stage.processes[:2]]
    assert [process.poll() for process in stage.processes] == [-9, -9, None]
    for each in report.rounds:
        assert 0 <= each.detection_s < 5
        assert each.recovery_s == pytest.approx(each.detection_s + 0.25)
        names, times = zip(*each.timeline, strict=True)
        assert names == ("lost", "draining", "probation")
        assert times == pytest.approx((0, 0, 0.25))
    assert told[0].startswith(f"kill 1: process {stage.processes[0].pid}; detected after ")
    document = json.loads(json.dumps(report.document()))
    assert document["ok"]
    assert schema.complaints(document, schema.of("drill")) == []
    assert document["percentiles"]["held_s"] == dict.fromkeys(["p50", "p90", "p99", "p100"], 0.25)
    assert "held       p50 250 ms, p90 250 ms" in report.summary()
    assert report.summary().endswith("2 of 2 kills recovered")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"phase": Phase.FAILED, "reason": Reason.NOT_READY}, "failed: the server was not ready"),
        ({"phase": Phase.HELD, "reason": Reason.HELD}, "not recovered from: held"),
        ({"server": ServerId(7, 7, "b")}, "kill 1: somebody else brought it back"),
        ({"server": None, "phase": Phase.DRAINING}, "not recovered from in 5 s: draining"),
        (None, "kill 1 was not recovered from: it is gone"),
    ],
)
def test_a_kill_that_is_not_recovered_from_ends_the_drill(
    stage: Stage, changes: dict[str, object] | None, says: str
) -> None:
    def story(record: Record, _now: float) -> Record | None:
        return None if changes is None else replace(record, **changes)  # type: ignore[arg-type]

    report, _ = stage.drill(story, 3, 1)
    assert report.rounds == []
    assert says in report.trouble
    assert not report.document()["ok"]
    assert schema.complaints(report.document(), schema.of("drill")) == []


def test_a_process_that_took_the_servers_number_is_not_killed(stage: Stage) -> None:
    assert stage.record.server
    other = replace(stage.record.server, start_ticks=1)
    assert not server.end(other)
    assert not server.end(replace(stage.record.server, boot_id="another"))
    assert stage.processes[0].poll() is None
    stage.store.save_record(replace(stage.record, server=other))
    report, _ = stage.drill(stage.recovered, 1, 0)
    assert "has ended by itself" in report.trouble


@given(st.lists(st.floats(0, 100), min_size=1, max_size=200), st.sampled_from([50, 90, 99, 100]))
def test_a_percentile_is_a_value_that_so_many_are_not_above(
    values: list[float], share: int
) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) * 100 >= share * len(values)
    assert sum(value < found for value in values) * 100 < share * len(values)


# --- the I/O -------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(64 * scratch.BLOCK)
    return path


def test_the_io_verifies_what_it_has_written(disk: Path) -> None:
    command = [sys.executable, "-m", "ublkwatch.scratch", str(disk)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"{}\n"
        process.stdin.close()
        met = json.loads(process.stdout.readline())
    assert process.returncode == 0
    assert met["written"] >= 1
    assert met["verified"] >= 2
    assert (met["corrupt"], met["errors"]) == (0, {})


def test_a_block_that_was_changed_or_lost_is_found(disk: Path) -> None:
    fd = os.open(disk, os.O_RDWR | os.O_DIRECT)
    try:
        io = scratch.Scratch(fd)
        while len(io._held) < 8:
            assert io.turn()
        good = io.document()["corrupt"]
        for block in list(io._held)[:3]:
            with disk.open("r+b") as file:
                file.seek(block * scratch.BLOCK + 100)
                file.write(b"not what was written")
        io.verify_all()
        assert (good, io.document()["corrupt"]) == (0, 3)
    finally:
        os.close(fd)


def test_io_that_fails_is_counted_and_what_it_left_is_not_judged(disk: Path) -> None:
    fd = os.open(disk, os.O_RDWR | os.O_DIRECT)
    io = scratch.Scratch(fd)
    while len(io._held) < 8:
        io.turn()
    os.close(fd)
    assert not io.turn()
    assert io.document()["errors"] == {"EBADF": 1}
    held = len(io._held)
    assert held in (7, 8)
    io.verify_all()
    assert io.document()["errors"] == {"EBADF": 1 + held}


def test_io_on_what_is_no_disk_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ublkwatch.scratch", str(tmp_path / "none")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["trouble"].endswith("/none: No such file or directory")


def test_figures_need_a_round() -> None:
    assert Drill("ublkb0", 0.0, 3).figures() == {}
    only = Round(1, 2, 3, "poll", 0.1, 0.2, 0.3, 1, ())
    figures = Drill("ublkb0", 0.0, 3, [only]).figures()
    assert figures["detection_s"]["p99"] == 0.1
