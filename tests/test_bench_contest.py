"""What the benchmark reads: the kernel's trace, its own options; and whom it lets take part."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from headers import include_directory

from bench import recovery
from bench.__main__ import SMOKE_S, machine, timeout
from bench.cast import BenchError
from bench.contest import Contest, Entrant, Round
from bench.contestant import Plain, Script, Stage
from bench.contestants import CONTESTANTS, Ublkwatch, lineups
from bench.lot import HANDOFFS, Kind, Lot, filled
from bench.mass import sample as mass_sample
from bench.options import SMOKE, Options
from bench.programs import build
from bench.scenarios import SCENARIOS, chosen
from bench.trace import moments
from bench.usual import no_systemd
from ublkwatch.config import parse
from ublkwatch.ctrl import UblkCtrl

TRACE = """# tracer: nop
          python-77      [001] .....    12.000100: sched_process_exec: filename=/usr/bin/python
           <...>-78      [000] .N...    12.000200: sched_process_exec: filename=/bin/sh
     iou-wrk-9-10        [000] .....    12.100000: start: (io_uring_cmd+0xc0/0x180 <- ublk) op=0xc0207510 dev=3
     iou-wrk-9-10        [000] .....    12.200000: start: (io_uring_cmd+0xc0/0x180 <- ublk) op=0xc0207510 dev=3
     iou-wrk-9-10        [000] .....    12.300000: start: (io_uring_cmd+0xc0/0x180 <- ublk) op=0xc0207510 dev=33
          python-77      [001] .....    12.500000: sys_sendto(fd: 4, buff: 7f, len: 7)
          python-81      [001] .....    12.550000: open: (ublk_ch_open+0x4/0x80 [ublk_drv])
          python-77      [001] .....    12.600000: sys_sendto(fd: 4, buff: 7f, len: 7)
     iou-wrk-9-10        [000] .....    12.900000: start: (io_uring_cmd+0xc0/0x180 <- ublk) op=0xc0207510 dev=3
 my [odd] name-79      [001] .....    13.000000: sys_sendto(fd: 4, buff: 7f, len: 7)
"""  # noqa: E501 - as it is


def test_the_trace_is_read_for_one_server_up_to_live() -> None:
    assert moments(TRACE, 77, 3, 12.8) == {
        "spawned": 12.0001, "ready": 12.5, "accepted": 12.2, "opened": 12.55,
    }  # fmt: skip
    assert moments(TRACE, 79, 33, 14.0) == {"ready": 13.0, "accepted": 12.3, "opened": 12.55}
    assert moments(TRACE, 7, 3, 12.0) == {}


def test_a_sample_counts_from_the_kill() -> None:
    seen = {"quiesced": 12.05, "live": 12.8, "pid": 77}
    told = {3: {"detected": 12.01, "attempts": 1}}
    got = recovery.sample(Round(12.0, {3: seen}, {"io": 12.81, "stall": 0.8}, told, 0.02), TRACE)
    assert got == pytest.approx({
        "spawned": 0.0001, "ready": 0.5, "accepted": 0.2, "opened": 0.55, "quiesced": 0.05,
        "live": 0.8, "io": 0.81, "detected": 0.01, "stall": 0.8, "cpu": 0.02, "attempts": 1,
    })  # fmt: skip


def test_what_was_not_seen_is_no_moment() -> None:
    """The witness looked too late for QUIESCED; what was traced before the kill is another's."""
    seen = {"quiesced": 0.0, "live": 12.8, "pid": 77}
    got = recovery.sample(Round(12.4, {3: seen}, {"io": 12.9, "stall": 0.5}, {}, 0.0), TRACE)
    assert "quiesced" not in got
    assert "spawned" not in got
    assert got["attempts"] == 1


def test_a_mass_crash_is_told_by_three_devices() -> None:
    devices = {n: {"quiesced": 1.0, "live": 10.0 + n, "pid": n} for n in (4, 1, 2, 3)}
    got = mass_sample(Round(10.0, devices, {}, {1: {"attempts": 2}, 2: {"attempts": 1}}, 0.5))
    assert got == {"first": 1.0, "median": 2.0, "last": 4.0, "cpu": 0.5, "again": 1}


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SMOKE, Options(only=("mass",), programs="/x")])
def test_options_reach_the_guest_as_they_are(options: Options) -> None:
    assert Options.loaded(options.dumped()) == options


def test_the_first_kind_of_each_hand_off_is_known() -> None:
    kinds = list(Options(queues=(1, 4)).kinds())
    assert len(kinds) == 8
    assert [kind for kind, first in kinds if first] == [Kind("managed"), Kind("delegated")]


def test_all_that_is_published_has_200_kills() -> None:
    assert Options().kills >= 200


def test_scenarios_are_chosen_by_name_and_place() -> None:
    everything = chosen(Options(), driver=True).keys() | chosen(Options(), driver=False).keys()
    assert everything == SCENARIOS.keys()
    assert list(chosen(SMOKE, driver=True)) == ["recovery"]
    assert not chosen(SMOKE, driver=False)


# --- contestants ---------------------------------------------------------------------------------

# Nothing here speaks with a kernel.
STAGE = Stage(cast("UblkCtrl", None), Path("/programs"), 8)


def lot(home: Path, kind: Kind, *dev_ids: int) -> Lot:
    return Lot(home, dev_ids or (5,), kind)


def test_commands_are_the_reference_servers_own() -> None:
    null, loop = (Lot(Path("/h"), (5,), Kind("delegated", each)) for each in ("null", "loop"))
    assert filled(null.recover, 5)[-4:] == ("--target", "null", "--recover", "5")
    assert filled(loop.attach, 5)[-4:] == ("--target", "loop", "--file", "/h/disk-5")
    assert null.command == null.recover
    assert Lot(Path("/h"), (5,), Kind("managed")).command == null.attach


@pytest.mark.parametrize("kind", [Kind(), Kind("delegated", "loop", 16), Kind(group=True)])
def test_ublkwatch_understands_what_it_is_told(tmp_path: Path, kind: Kind) -> None:
    standby = kind.handoff == "managed"
    Ublkwatch(STAGE, lot(tmp_path, kind, 5, 6), standby=standby)
    config = parse((tmp_path / "ublkwatch.toml").read_bytes(), "bench")
    cares = [each.care for each in config.rules]
    assert [each.policy.handoff.value for each in cares] == [kind.handoff] * 2
    assert [each.group for each in cares] == ["bench" if kind.group else ""] * 2
    assert [each.standby for each in cares] == [standby] * 2
    assert not config.profiles  # or it would care for the others' devices


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("handoff", HANDOFFS)
def test_everybody_takes_part_or_says_why_not(tmp_path: Path, name: str, handoff: str) -> None:
    contestant = CONTESTANTS[name](STAGE, lot(tmp_path, Kind(handoff)))
    reason = contestant.unfit()
    recover_only = name in ("shell-loop", "unit", "fixed-sleeps")
    if handoff == "managed" and recover_only:
        assert reason == "it has a recover command only"
    elif handoff == "delegated" and name == "ublkwatch-standby":
        assert reason == "no standby, which waits for a line"
    elif name in ("unit", "ublkwatch-units"):
        assert reason == no_systemd()
    else:
        assert reason == ""
    assert contestant.everywhere is not recover_only


def test_a_host_has_one_ublkwatch_at_a_time() -> None:
    contests = list(lineups(list(CONTESTANTS)))
    assert all(sum(name.startswith("ublkwatch") for name in names) == 1 for _, names in contests)
    assert {name for _, names in contests for name in names} == CONTESTANTS.keys()
    assert all("oracle" in names for _, names in contests)
    assert list(lineups(["oracle"])) == [("", ["oracle"])]
    with_it = ["ublkwatch-standby", "oracle"]
    assert list(lineups(with_it)) == [("ublkwatch-standby", with_it)], "alone it is no contest"


def test_each_round_begins_with_another_one() -> None:
    contest = Contest(STAGE)
    for name in "abc":
        contest.entrants[name] = Entrant(
            Plain(STAGE, lot(Path("/h"), Kind())), lot(Path("/h"), Kind())
        )
    assert ["".join(contest.order(number)) for number in (0, 1, 2, 3)] == [
        "abc",
        "bca",
        "cab",
        "abc",
    ]


def test_an_oracle_in_c_is_told_what_the_one_in_python_is(tmp_path: Path) -> None:
    """Both compile, start, take a device, and end with their standard input."""
    build(tmp_path, include_directory())
    for program in ((str(tmp_path / "oracle"),), (sys.executable, "-m", "bench.oracle")):
        done = subprocess.run(
            [*program, "group", "8", str(tmp_path), "/bin/true", "--target", "null"],
            input=b"", capture_output=True, check=False, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_program_that_does_not_compile_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "linux").mkdir()
    (tmp_path / "linux/ublk_cmd.h").write_text("#error no such kernel\n")
    with pytest.raises(BenchError, match="no such kernel"):
        build(tmp_path / "bin", tmp_path)


def test_a_script_must_end_well(tmp_path: Path) -> None:
    asyncio.run(Script("exit 0", tmp_path / "log").ended())
    with pytest.raises(BenchError, match="status 7: no disk"):
        asyncio.run(Script("echo no disk; exit 7", tmp_path / "log").ended())


# --- the command line ----------------------------------------------------------------------------


def test_a_guest_can_do_what_is_asked() -> None:
    """The lab understands it; systemd is there for those who need it, memory for many devices."""
    everything, smoke = (machine("new", None, each) for each in (Options(), SMOKE))
    assert "--possible-cpus 16 --init systemd" in " ".join(everything)
    assert "--memory 8G" in " ".join(everything)
    assert "--init" not in smoke
    assert "--memory 2G" in " ".join(smoke)
    assert "--memory 3G" in " ".join(machine("new", "3G", SMOKE))
    lab = Path(__file__).parents[1] / "lab/lab.py"
    known = subprocess.run([sys.executable, lab, "run", "--help"], capture_output=True, check=True)
    words = (word for word in everything if word.startswith("--"))
    assert all(word.encode() in known.stdout for word in words)


def test_a_run_is_bounded_by_what_it_has_to_do() -> None:
    assert timeout(SMOKE) == SMOKE_S
    assert timeout(replace(SMOKE, kills=200)) > 200 * 3 * 10
    assert timeout(Options()) > timeout(Options(only=("recovery",))) > timeout(SMOKE)
