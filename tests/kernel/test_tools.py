"""The operator's tools over the real driver: doctor, features, drill, stop.

One story, since a supervisor's start takes longest where all is emulated.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import schema
from conftest import DEADLINE_S, wait_until
from supervisor import Supervisor

from ublkwatch import cli
from ublkwatch.model import Generation
from ublkwatch.uapi import DevState
from ublkwatch.verbs import Exit

if TYPE_CHECKING:
    from conftest import Control, Servers

    Watch = Callable[..., Supervisor]


@dataclass
class Operator:
    """Somebody at a terminal."""

    supervisor: Supervisor
    capsys: pytest.CaptureFixture[str]

    def run(self, *arguments: str) -> int:
        return cli.main([*arguments, "--config", str(self.supervisor.config)])

    def reads(self) -> tuple[str, str]:
        """Return what was printed since: standard output, and standard error."""
        return tuple(self.capsys.readouterr())  # type: ignore[return-value]

    def asks_the_doctor(self) -> dict[str, list[str]]:
        """Return what the doctor says, by how bad it is."""
        self.reads()
        code = self.run("doctor", "--json")
        document = json.loads(self.reads()[0])
        assert document["healthy"] == (code == Exit.OK)
        said: dict[str, list[str]] = {}
        for each in document["findings"]:
            said.setdefault(each["level"], []).append(f"{each['about']}: {each['what']}")
        return said


def test_what_operators_have_in_their_hands_on_the_real_driver(
    *,
    server: Servers,
    watch: Watch,
    control: Control,
    generation: Generation,
    tmp_path_factory: pytest.TempPathFactory,
    no_block_errors: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del no_block_errors
    server((0, 1), target="ram")
    supervisor = watch({0: "ram", 1: "ram"})
    operator = Operator(supervisor, capsys)
    supervisor.watching(0)
    supervisor.watching(1)
    the_doctor_finds_the_machine_well(operator, generation)
    a_drill_kills_verifies_and_reports(operator, tmp_path_factory.mktemp("drill") / "report.json")
    a_closed_gate_is_named(operator)
    a_mounted_disk_is_not_stopped(operator, control, tmp_path_factory.mktemp("mounted"))
    a_free_disk_is_stopped_and_that_is_no_crash(operator, control, generation)
    without_a_daemon_the_doctor_says_so_and_stop_stops(operator, control)


def the_doctor_finds_the_machine_well(operator: Operator, generation: Generation) -> None:
    well = operator.asks_the_doctor()
    assert "bad" not in well, well
    assert "unseen" not in well, well
    text = "\n".join(well["ok"])
    pid = operator.supervisor.status()["supervisor_pid"]
    for part in (
        f", {generation.name}'s rules",
        "module: ublk_drv is loaded",
        f"daemon: process {pid} runs, since 2",
        "devices: 2 would be recovered",
    ):
        assert part in text, text
    assert operator.run("features", "--json") == Exit.OK
    features = json.loads(operator.reads()[0])
    assert schema.complaints(features, schema.of("features")) == []
    assert features["generation"] == generation.name
    assert ("SAFE_STOP_DEV" in features["names"]) == (generation is Generation.G3)
    assert "USER_RECOVERY_REISSUE" in features["names"]
    assert features["unknown_bits"] == []


def a_drill_kills_verifies_and_reports(operator: Operator, file: Path) -> None:
    before = operator.supervisor.watching(1)
    words = ("drill", "ublkb1", "--rounds", "2", "--scratch", "--yes", "--report", str(file))
    assert operator.run(*words, "--dry-run") == Exit.OK
    assert operator.supervisor.watching(1)["server_pid"] == before["server_pid"]
    assert operator.run(*words) == Exit.OK, operator.reads()
    report: dict[str, Any] = json.loads(file.read_text())
    assert schema.complaints(report, schema.of("drill")) == []
    assert report["ok"]
    pids = [before["server_pid"], *(each["new_pid"] for each in report["rounds"])]
    assert [each["killed_pid"] for each in report["rounds"]] == pids[:2]
    assert len(set(pids)) == 3
    met = report["scratch"]
    assert (met["corrupt"], met["errors"]) == (0, {})
    assert met["verified"] >= met["written"] > 3
    held = [each["held_s"] for each in report["rounds"]]
    assert all(0 < each["held_s"] < each["recovery_s"] for each in report["rounds"])
    assert met["longest_s"] >= min(held) / 2
    assert "2 of 2 kills recovered" in operator.reads()[0]
    assert operator.supervisor.watching(1)["recoveries"] == 2
    assert "drill, asked by uid 0 (root)" in operator.supervisor.said()


def a_closed_gate_is_named(operator: Operator) -> None:
    gate = Path("/proc/sys/kernel/io_uring_disabled")
    gate.write_text("2")
    try:
        closed = operator.asks_the_doctor()
        assert operator.run("features") == Exit.UNAVAILABLE
    finally:
        gate.write_text("0")
    what = "kernel.io_uring_disabled = 2: nobody may use io_uring"
    assert closed["bad"] == [f"io_uring: {what}"]
    assert f"features: {what}; try: sysctl kernel.io_uring_disabled=0" in operator.reads()[1]


def a_mounted_disk_is_not_stopped(operator: Operator, control: Control, where: Path) -> None:
    operator.supervisor.watching(0)  # the drill's server was this device's, too
    subprocess.run(["mkfs.ext2", "-q", "/dev/ublkb0"], check=True, timeout=DEADLINE_S)
    subprocess.run(["mount", "/dev/ublkb0", where], check=True, timeout=DEADLINE_S)
    # In a mount namespace of its own it stays mounted when it is unmounted here.
    holder = subprocess.Popen(["unshare", "--mount", "sleep", "600"])
    try:
        name = Path(f"/proc/{holder.pid}/comm")
        wait_until(lambda: name.read_text() == "sleep\n", DEADLINE_S, "it has its own namespace")
        assert operator.run("stop", "0", "--yes") == Exit.REFUSED
        subprocess.run(["umount", where], check=True, timeout=DEADLINE_S)
        assert operator.run("stop", "0", "--yes") == Exit.REFUSED
        assert operator.run("drill", "0", "--yes") == Exit.REFUSED
    finally:
        subprocess.run(["umount", "-q", where], check=False, timeout=DEADLINE_S)
        holder.kill()
        holder.wait()
    said = operator.reads()[1].splitlines()
    assert f"stop ublkb0: refused: it is in use: mounted on {where} (process " in said[0]
    assert f"mounted on {where} (process {holder.pid} sees it); nothing was done" in said[1]
    assert f"drill ublkb0: refused: it is in use: mounted on {where} (process " in said[2]
    assert control.info(0).state == DevState.LIVE


def a_free_disk_is_stopped_and_that_is_no_crash(
    operator: Operator, control: Control, generation: Generation
) -> None:
    told = len(operator.supervisor.said_of(0))
    wait_until(  # what was mounted last is let go of in the background
        lambda: operator.run("stop", "0", "--yes") == Exit.OK, DEADLINE_S, "stopped"
    )
    command = "TRY_STOP_DEV" if generation is Generation.G3 else "STOP_DEV"
    assert f"  stopped by {command}: /dev/ublkb0 is removed" in operator.reads()[0]
    assert control.info(0).state == DevState.DEAD
    operator.supervisor.until_gone(0)
    assert not [line for line in operator.supervisor.said_of(0)[told:] if "draining" in line]


def without_a_daemon_the_doctor_says_so_and_stop_stops(
    operator: Operator, control: Control
) -> None:
    operator.supervisor.watching(1)
    operator.supervisor.stop()
    bad = operator.asks_the_doctor()["bad"]
    assert bad == ["daemon: ublkwatch is not running: no crash is recovered"]
    with Path("/dev/ublkb1").open("rb"):
        assert operator.run("stop", "1", "--yes") == Exit.REFUSED
    assert "/dev/ublkb1 is open in process " in operator.reads()[1]
    assert operator.run("stop", "1", "--yes") == Exit.OK
    assert control.info(1).state == DevState.DEAD
