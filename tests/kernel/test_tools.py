"""The operator's tools over the real driver: doctor, stop, drill."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

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


def ublkwatch(supervisor: Supervisor, *arguments: str) -> int:
    return cli.main([*arguments, "--config", str(supervisor.config)])


def findings(supervisor: Supervisor, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Return what the doctor says, by how bad it is."""
    capsys.readouterr()
    code = ublkwatch(supervisor, "doctor", "--json")
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] == (code == Exit.OK)
    said: dict[str, list[str]] = {}
    for each in document["findings"]:
        said.setdefault(each["level"], []).append(f"{each['about']}: {each['what']}")
    return said


def test_a_mounted_disk_is_not_stopped_and_a_free_one_is(
    *,
    server: Servers,
    watch: Watch,
    control: Control,
    generation: Generation,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = tmp_path_factory.mktemp("mounted")
    server((0, 1), target="ram")
    supervisor = watch({0: "ram", 1: "ram"})
    supervisor.watching()
    subprocess.run(["mkfs.ext2", "-q", "/dev/ublkb0"], check=True, timeout=DEADLINE_S)
    subprocess.run(["mount", "/dev/ublkb0", where], check=True, timeout=DEADLINE_S)
    # In a mount namespace of its own it stays mounted when it is unmounted here.
    holder = subprocess.Popen(["unshare", "--mount", "sleep", "600"])
    try:
        wait_until(
            lambda: b"sleep" in Path(f"/proc/{holder.pid}/cmdline").read_bytes().split(b"\0")[0],
            DEADLINE_S,
            "it has its own namespace",
        )
        assert ublkwatch(supervisor, "stop", "0", "--yes") == Exit.REFUSED
        subprocess.run(["umount", where], check=True, timeout=DEADLINE_S)
        assert ublkwatch(supervisor, "stop", "0", "--yes") == Exit.REFUSED
        assert ublkwatch(supervisor, "drill", "0", "--yes") == Exit.REFUSED
    finally:
        subprocess.run(["umount", "-q", where], check=False, timeout=DEADLINE_S)
        holder.kill()
        holder.wait()
    said = capsys.readouterr().err.splitlines()
    assert f"stop ublkb0: refused: it is in use: mounted on {where} (process " in said[0]
    assert f"mounted on {where} (process {holder.pid} sees it); nothing was done" in said[1]
    assert f"drill ublkb0: refused: it is in use: mounted on {where} (process " in said[2]
    assert control.info(0).state == DevState.LIVE

    wait_until(  # what was mounted last is let go of in the background
        lambda: ublkwatch(supervisor, "stop", "0", "--yes") == Exit.OK, DEADLINE_S, "stopped"
    )
    command = "TRY_STOP_DEV" if generation is Generation.G3 else "STOP_DEV"
    assert f"  stopped by {command}: /dev/ublkb0 is removed" in capsys.readouterr().out
    assert control.info(0).state == DevState.DEAD
    supervisor.until_gone(0)
    assert "is recovered" not in "".join(supervisor.said_of(0))
    assert not [line for line in supervisor.said_of(0) if "draining" in line]

    supervisor.stop()
    with Path("/dev/ublkb1").open("rb"):
        assert ublkwatch(supervisor, "stop", "1", "--yes") == Exit.REFUSED
    assert "/dev/ublkb1 is open in process " in capsys.readouterr().err
    assert ublkwatch(supervisor, "stop", "1", "--yes") == Exit.OK
    assert control.info(1).state == DevState.DEAD


@pytest.mark.usefixtures("no_block_errors")
def test_a_machine_that_the_doctor_finds_well_is_drilled_and_a_closed_gate_is_named(
    server: Servers,
    watch: Watch,
    generation: Generation,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server(target="ram")
    supervisor = watch({0: "ram"})
    before = supervisor.watching()
    well = findings(supervisor, capsys)
    assert "bad" not in well, well
    assert "unseen" not in well, well
    text = "\n".join(well["ok"])
    for part in (
        f", {generation.name}'s rules",
        "module: ublk_drv is loaded",
        f"daemon: process {supervisor.status()['supervisor_pid']} runs, since 2",
        "devices: 1 would be recovered",
    ):
        assert part in text, text
    assert ublkwatch(supervisor, "features", "--json") == Exit.OK
    features = json.loads(capsys.readouterr().out)
    assert features["generation"] == generation.name
    assert ("SAFE_STOP_DEV" in features["names"]) == (generation is Generation.G3)
    assert "USER_RECOVERY_REISSUE" in features["names"]
    assert features["unknown_bits"] == []
    assert schema.complaints(features, schema.of("features")) == []

    file = tmp_path / "report.json"
    words = ("drill", "ublkb0", "--rounds", "2", "--scratch", "--yes", "--report", str(file))
    assert ublkwatch(supervisor, *words, "--dry-run") == Exit.OK
    assert supervisor.watching()["server_pid"] == before["server_pid"]
    assert ublkwatch(supervisor, *words) == Exit.OK, capsys.readouterr().out
    told = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report["ok"]
    assert schema.complaints(report, schema.of("drill")) == []
    assert len(report["rounds"]) == 2
    assert report["rounds"][0]["killed_pid"] == before["server_pid"]
    assert len({each["new_pid"] for each in report["rounds"]} - {before["server_pid"]}) == 2
    met = report["scratch"]
    assert (met["corrupt"], met["errors"]) == (0, {})
    assert met["verified"] >= met["written"] > 3
    for each in report["rounds"]:
        assert 0 < each["held_s"] < each["recovery_s"] < DEADLINE_S
    assert met["longest_s"] >= min(each["held_s"] for each in report["rounds"]) / 2
    assert "2 of 2 kills recovered" in told
    assert supervisor.watching()["recoveries"] == 2
    assert "drill, asked by uid 0 (root)" in supervisor.said()

    gate = Path("/proc/sys/kernel/io_uring_disabled")
    gate.write_text("2")
    try:
        closed = findings(supervisor, capsys)
        assert ublkwatch(supervisor, "features") == Exit.UNAVAILABLE
    finally:
        gate.write_text("0")
    what = "kernel.io_uring_disabled = 2: nobody may use io_uring"
    assert closed["bad"] == [f"io_uring: {what}"]
    assert f"features: {what}; try: sysctl kernel.io_uring_disabled=0" in capsys.readouterr().err

    supervisor.stop()
    assert ublkwatch(supervisor, "version") == Exit.OK
    assert findings(supervisor, capsys)["bad"] == [
        "daemon: ublkwatch is not running: no crash is recovered"
    ]
