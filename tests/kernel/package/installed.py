"""What the tests of installations share: a host's shell, the service, and what it says."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).parents[3]
STATUS = Path("/run/ublkwatch/status.json")
STATE = Path("/var/lib/ublkwatch")
CONFIG = Path("/etc/ublkwatch/ublkwatch.toml")
DEADLINE_S = 300.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(*command: str | Path, **environment: str) -> str:
    """Run it as a shell of root's would; it must succeed."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=TOP,
        env={"PATH": PATH, "DEBIAN_FRONTEND": "noninteractive"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{journal()}"
    return done.stdout.strip()


def journal() -> str:
    command = ["journalctl", "-q", "-o", "cat", "-u", "ublkwatch", "-n", "40"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {DEADLINE_S:g} s: {what}\n{journal()}")
        time.sleep(0.2)


def main_pid() -> int:
    return int(run("systemctl", "show", "--value", "-p", "MainPID", "ublkwatch"))


def device(supervisor: int = 0) -> dict[str, Any]:
    """Return device 0 as this supervisor has it, or the service; empty before it has written."""
    try:
        document = json.loads(STATUS.read_text())
    except FileNotFoundError:
        return {}
    if document["supervisor_pid"] != (supervisor or main_pid()):
        return {}
    return next((each for each in document["devices"] if each["dev_id"] == 0), {})


def watched(recoveries: int) -> int:
    """Wait until the device is well after so many recoveries, and return its server's pid."""
    wanted = {"phase": "watching", "state": "LIVE", "recoveries": recoveries}
    until(lambda: wanted.items() <= device().items(), f"watched after {recoveries} recoveries")
    return int(device()["server_pid"])


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/exe").exists()


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Have systemd wait for a service on a machine that is emulated, beside others."""
    drop_in = Path("/run/systemd/system/ublkwatch.service.d/test.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nWatchdogSec=120\nTimeoutStartSec=600\n")
    try:
        yield
    finally:
        drop_in.unlink()
        drop_in.parent.rmdir()
