"""`ublkwatch run` as tests see it: started, asked by its status document, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ublkwatch.model import TAG_VARIABLE

# Several guests share few, emulated CPUs: this bounds only hangs.
DEADLINE_S = 300.0
# Python's start may take ten times as long as it should; where no test is about it, that must not
# cost an attempt.
PATIENCE = dict.fromkeys(
    ("ready_timeout_s", "drain_timeout_s", "start_timeout_s", "attach_timeout_s"), 200
)
SERVER = (sys.executable, "-m", "ublkwatch.demo.server")
UBLKWATCH = (sys.executable, "-m", "ublkwatch")


def processes(matching: Callable[[psutil.Process], bool]) -> set[int]:
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # it ends while it is looked at
            if matching(process):
                found.add(process.pid)
    return found


def tagged() -> set[int]:
    """Return the pids of all servers that ublkwatch started."""
    return processes(lambda process: TAG_VARIABLE in process.environ())


def worker_of(pid: int) -> int:
    """Return the pid of a daemon's control worker."""
    found: list[int] = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):  # a server or a hook that ends meanwhile
            if "ublkwatch.ctrl_worker" in child.cmdline():
                found.append(child.pid)
    (worker,) = found
    return worker


class Shown:
    """What a daemon shows, wherever it runs: what it logs, and its runtime directory."""

    def __init__(self, runtime: Path, log: Path) -> None:
        self.runtime = runtime
        self.log = log
        self.proc: subprocess.Popen[bytes] | None = None  # it, or what runs as long as it does

    def pid(self) -> int | None:
        """Return the daemon's pid; None while there is none."""
        return None if self.proc is None else self.proc.pid

    def wait(self) -> int:
        """Wait until it has ended, and return its exit status."""
        assert self.proc is not None
        status = self.proc.wait(DEADLINE_S)
        self.proc = None
        return status

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def said_of(self, dev_id: int) -> list[str]:
        """Return the lines of its log that are about this device."""
        return [line for line in self.said().splitlines() if f" ublk {dev_id}: " in line]

    # --- what it shows ---------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return the document of the daemon that runs now; empty before it wrote one."""
        with contextlib.suppress(FileNotFoundError):
            document: dict[str, Any] = json.loads((self.runtime / "status.json").read_text())
            if document["supervisor_pid"] == self.pid():
                return document
        return {"devices": []}

    def device(self, dev_id: int = 0) -> dict[str, Any] | None:
        found = [each for each in self.status()["devices"] if each["dev_id"] == dev_id]
        return found[0] if found else None

    def until(self, what: str, dev_id: int = 0, **wanted: object) -> dict[str, Any]:
        """Wait until the device's document has these values, and return it."""
        return self.until_true(
            what, lambda now: all(now[key] == value for key, value in wanted.items()), dev_id
        )

    def until_true(
        self, what: str, holds: Callable[[dict[str, Any]], bool], dev_id: int = 0
    ) -> dict[str, Any]:
        """Wait until ``holds`` is true of the device's document, and return it."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            now = self.device(dev_id)
            if now is not None and holds(now):
                return now
            if self.proc is not None and self.proc.poll() is not None:
                break
            time.sleep(0.05)
        pytest.fail(f"{what}: {self.device(dev_id)}\n{self.said()}")

    def until_gone(self, dev_id: int = 0) -> None:
        """Wait until a daemon that runs shows the device no more."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if "written_at" in self.status() and self.device(dev_id) is None:
                return
            time.sleep(0.05)
        pytest.fail(f"ublk {dev_id} is still shown: {self.device(dev_id)}\n{self.said()}")

    def until_written(self) -> None:
        """Wait until a daemon that runs has written its first document."""
        self._until(lambda: "written_at" in self.status(), "it shows something")

    def until_tagged(self, *pids: int) -> None:
        """Wait until these are all servers that ublkwatch started: one that it killed has ended."""
        self._until(lambda: tagged() == set(pids), f"{set(pids)} are its servers, and no others")

    def until_said(self, text: str) -> None:
        self._until(lambda: text in self.said(), f"it says {text!r}")

    def until_exists(self, path: Path) -> None:
        self._until(path.exists, f"{path} exists")

    def until_empty(self, path: Path) -> None:
        self._until(lambda: not path.read_text(), f"{path} is empty")

    def until_no_workers(self) -> None:
        """Wait until no control worker is left, of whatever supervisor."""

        def none() -> bool:
            worker = "ublkwatch.ctrl_worker"
            return not processes(lambda p: worker in p.cmdline() and p.status() != "zombie")

        self._until(none, "no control worker is left")

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"not in time: {what}\n{self.said()}")
            time.sleep(0.2)

    def watching(self, dev_id: int = 0) -> dict[str, Any]:
        return self.until(f"ublk {dev_id} watched", dev_id, phase="watching", state="LIVE")

    # --- the crash -------------------------------------------------------------------------------

    def kill_server(self, dev_id: int = 0) -> dict[str, Any]:
        """SIGKILL the server that it watches; return the document from before."""
        before = self.watching(dev_id)
        pidfd = os.pidfd_open(before["server_pid"])
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        return before

    def recovered(self, before: dict[str, Any]) -> dict[str, Any]:
        """Wait for the recovery from that crash: LIVE, under a new server."""
        after = self.until(
            "recovered",
            before["dev_id"],
            phase="watching",
            state="LIVE",
            recoveries=before["recoveries"] + 1,
        )
        assert after["server_pid"] != before["server_pid"]
        return after


class Supervisor(Shown):
    """One configuration; start() and stop() may be repeated."""

    def __init__(
        self,
        home: Path,
        commands: dict[int, list[str]],
        recovery: str = "",
        command: tuple[str, ...] = (),
        top: str = "",
    ) -> None:
        """``command`` is what is run instead of `ublkwatch run --config`, as long as it is set.

        ``recovery`` is the rest of the [recovery] table, and more tables behind it; what it does
        not say of PATIENCE is as that has it.
        """
        said = recovery.partition("[[")[0]
        patience = "".join(
            f"{key} = {value}\n" for key, value in PATIENCE.items() if key not in said
        )
        super().__init__(home / "run", home / "ublkwatch.log")
        self.home = home
        self.config = home / "ublkwatch.toml"
        self.command = command
        self.config.write_text(
            f'runtime_dir = "{home}/run"\nstate_dir = "{home}/state"\npoll_interval_s = 0.5\n'
            f"{top}\n[metrics]\nport = 0\n[recovery]\nprobation_s = 0.3\n{patience}{recovery}\n"
            + "".join(
                f"[[device]]\ndev_id = {dev_id}\ncommand = {json.dumps(command)}\n"
                for dev_id, command in commands.items()
            )
        )

    def start(self) -> Supervisor:
        with self.log.open("ab") as log:
            self.proc = subprocess.Popen(
                [*(self.command or (*UBLKWATCH, "run", "--config")), str(self.config)], stderr=log
            )
        return self

    def stop(self) -> None:
        """SIGTERM; it must end in time, and well."""
        assert self.proc is not None
        self.proc.terminate()
        assert self.wait() == 0, self.said()

    def reload(self) -> None:
        """SIGHUP."""
        assert self.proc is not None
        self.proc.send_signal(signal.SIGHUP)

    def order(self, verb: str, *words: str) -> None:
        """Run another verb of ublkwatch's; it must succeed."""
        command = [*UBLKWATCH, verb, "--config", str(self.config), *words]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert done.returncode == 0, done.stderr + self.said()

    def kill(self) -> None:
        if self.proc is not None:
            self.proc.kill()
            self.proc.wait(DEADLINE_S)
            self.proc = None
