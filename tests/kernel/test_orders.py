"""Operators over the real driver: they hold, release and retry; and what giving up means."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import DEADLINE_S, wait_until
from supervisor import Supervisor, tagged
from test_modes import Disk

from ublkwatch import cli
from ublkwatch.uapi import DevState
from ublkwatch.verbs import Exit

if TYPE_CHECKING:
    from conftest import Control, Load, Servers

    Watch = Callable[..., Supervisor]


def failing(server: Servers, tmp_path: Path, fault: str, times: int) -> list[str]:
    """Return the command of a server that fails so many times, and is a good one then."""
    path = tmp_path / "faults"
    path.write_text(f"{fault}\n" * times)
    return [*server.target("null"), "--fault-file", str(path)]


def ublkwatch(supervisor: Supervisor, *arguments: str) -> int:
    return cli.main([*arguments, "--config", str(supervisor.config)])


@pytest.mark.usefixtures("no_block_errors")
def test_a_held_device_waits_until_it_is_released_and_loses_nothing(
    server: Servers,
    watch: Watch,
    fio: Load,
    control: Control,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server()
    supervisor = watch({0: "null"})
    supervisor.watching()
    reader = fio(rw="randread", verify=0, time_based=1, runtime=3600, rate_iops=200)
    reader.wait_progress()
    assert ublkwatch(supervisor, "hold", "/dev/ublkb0", "--reason", "new disk") == Exit.OK
    supervisor.until("the hold shows", held=True)
    before = supervisor.kill_server()
    shown = supervisor.until("held", phase="held", state="QUIESCED")
    assert shown["held_by"].startswith("uid 0 (root), pid ")
    assert shown["held_by"].endswith(": new disk")
    with Disk() as disk:
        read = disk.read()
        wait_until(read.waits, DEADLINE_S, "the read waits")
        capsys.readouterr()
        assert ublkwatch(supervisor, "explain", "0") == Exit.OK
        told = capsys.readouterr().out
        assert f"Held:    by {shown['held_by']}, until it is released" in told
        assert "Next:    nothing: it waits for `ublkwatch release 0`" in told
        assert ublkwatch(supervisor, "status", "-x") == Exit.UNHEALTHY
        told = capsys.readouterr().out
        assert told.startswith("1 device: 1 in trouble\n")
        assert "\n    do:   `ublkwatch release 0`\n" in told
        assert not read.done
        assert tagged() == set()
        assert control.info(0).state == DevState.QUIESCED
        assert ublkwatch(supervisor, "release", "ublkb0") == Exit.OK
        supervisor.recovered(before)
        assert read.outcome() == 0
    reader.wait_progress()
    reader.interrupt()
    reader.report()
    assert ublkwatch(supervisor, "retry", "0") == Exit.REFUSED
    assert "release, asked by uid 0 (root), pid " in supervisor.said()
    told_of_the_past(supervisor, capsys, before)


def told_of_the_past(
    supervisor: Supervisor, capsys: pytest.CaptureFixture[str], before: dict[str, Any]
) -> None:
    """See that page, history and events agree about one recovery that was held and released."""
    capsys.readouterr()
    assert ublkwatch(supervisor, "status", "ublkb0") == Exit.OK
    page = capsys.readouterr().out
    assert page.startswith("ublkb0: well; watching, LIVE, for ")
    assert re.search(r"^  Server  python\S*, pid \d+, up [\d.]+ s, since 20", page, re.MULTILINE)
    assert "noticed by pidfd; cause: SIGKILL; 1 attempt;" in page
    assert re.search(r"^    \+ +[\d,]+ ms  attaching  took [\d,]+ ms$", page, re.MULTILINE)
    wait_until(lambda: bool(recoveries(supervisor, capsys)), DEADLINE_S, "the history has it")
    (entry,) = recoveries(supervisor, capsys)
    assert (entry["result"], entry["cause"], entry["lost_pid"]) == (
        *("success", "signal"),
        before["server_pid"],
    )
    assert entry["asked_by"].startswith("uid 0 (root), pid ")
    phases = [each["phase"] for each in entry["phases"]]
    assert phases == ["held", "draining", "starting", "attaching", "probation"]
    assert entry["took_s"] == pytest.approx(sum(each["took_s"] for each in entry["phases"]))
    assert ublkwatch(supervisor, "history") == Exit.OK
    assert "recovered: I/O was held for " in capsys.readouterr().out
    assert ublkwatch(supervisor, "events", "--json", "--limit", "0") == Exit.OK
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    went = [each["to"] for each in events if each["kind"] == "transition"]
    assert went[-6:] == [*phases, "watching"]
    assert {each["order"] for each in events if each["kind"] == "order"} >= {"hold", "release"}
    assert events[0]["kind"] == "started"


def recoveries(supervisor: Supervisor, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert ublkwatch(supervisor, "history", "0", "--json") == Exit.OK
    entries = json.loads(capsys.readouterr().out)["history"]
    return [entry for entry in entries if entry["kind"] == "recovery"]


@pytest.mark.usefixtures("no_block_errors")
def test_a_device_that_was_given_up_comes_back_when_the_cause_is_mended_and_it_is_asked_for(
    server: Servers, watch: Watch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server()
    command = failing(server, tmp_path, "exit-at-start", 2)
    supervisor = watch({0: command}, "attempts_max = 2\nbackoff_base_s = 0.01")
    before = supervisor.watching()
    with Disk() as disk:
        supervisor.kill_server()
        failed = supervisor.until("given up", phase="failed", state="QUIESCED")
        assert failed["reason"] == "DIED_BEFORE_READY"
        read = disk.read()
        wait_until(read.waits, DEADLINE_S, "the read waits")
        assert ublkwatch(supervisor, "explain", "0") == Exit.OK
        assert "nothing by itself: it waits for `ublkwatch retry 0`" in capsys.readouterr().out
        assert ublkwatch(supervisor, "status") == Exit.UNHEALTHY
        page = capsys.readouterr().out
        assert re.search(r"^ublkb0 +QUIESCED +failed +- +.* 0 +you$", page, re.MULTILINE)
        assert "\n    why:  the server ended before it was ready (exit status " in page
        assert "\n    do:   `ublkwatch retry 0`\n" in page
        assert ublkwatch(supervisor, "retry", "0") == Exit.OK
        supervisor.recovered(before)
        assert read.outcome() == 0


@pytest.mark.parametrize(
    ("fault", "policy", "reason"),
    [
        ("exit-at-start", "attempts_max = 1\non_exhausted = 'fail'", "DIED_BEFORE_READY"),
        ("hang-at-start", "ready_timeout_s = 120\nhold_timeout_s = 3", "HOLD_TIMEOUT"),
    ],
    ids=["on_exhausted", "hold_timeout"],
)
def test_io_that_waits_ends_in_errors_where_the_operator_chose_so(
    *,
    server: Servers,
    watch: Watch,
    control: Control,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    policy: str,
    reason: str,
) -> None:
    server()
    supervisor = watch({0: failing(server, tmp_path, fault, 9)}, policy)
    supervisor.watching()
    with Disk() as disk:
        supervisor.kill_server()
        read = disk.read()
        assert read.outcome() == errno.EIO
    failed = supervisor.until("stopped", phase="failed", state="DEAD", stopped=True)
    assert failed["reason"] == reason
    assert failed["explanation"].startswith("given up and stopped, what waited ended in errors: ")
    wait_until(lambda: not Path("/dev/ublkb0").exists(), DEADLINE_S, "the disk is gone")
    assert control.info(0).state == DevState.DEAD
    supervisor.until_tagged()
    assert ublkwatch(supervisor, "explain", "0") == Exit.OK
    told = capsys.readouterr().out
    assert "all of it has ended in errors; the disk is removed" in told
    assert f"docs/recovery.md, {reason}" in told
    assert ublkwatch(supervisor, "retry", "0") == Exit.REFUSED
    assert "it was stopped; create it again by its own program" in capsys.readouterr().err
    control.remove(0)
    supervisor.until_gone()
