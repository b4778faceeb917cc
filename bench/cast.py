"""The processes of the benchmark: reference servers, ublkwatch, and how busy they are.

Every wait has a deadline, and who ends before his time is quoted.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from ublkwatch.ctrl import CtrlError, UblkCtrl

DEADLINE_S = 300.0
PROBATION_S = 0.2  # not on the way to LIVE; ublkwatch's default would only make the run longer
SERVER = (sys.executable, "-m", "ublkwatch.demo.server", "--target", "null")
_POLL_S = 0.02
_QUIET_S = 0.1
_CHAR_DEVICES = Path("/sys/class/ublk-char")


T = TypeVar("T")


class BenchError(Exception):
    """The run cannot go on, or would measure something else than it says."""


async def wait_for(
    condition: Callable[[], T | None], what: str, said: Callable[[], str] = lambda: ""
) -> T:
    """Wait until it returns something true, and return that."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise BenchError(f"waited {DEADLINE_S:g} s for {what}, in vain\n{said()}")
        await asyncio.sleep(_POLL_S)
    return found


async def said_by(proc: asyncio.subprocess.Process, seconds: float = DEADLINE_S) -> bytes:
    """Return the next line of a program; nothing where it ended, or is too late."""
    assert proc.stdout is not None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            return await proc.stdout.readline()
    return b""


# --- devices -------------------------------------------------------------------------------------


def free_ids(count: int) -> list[int]:
    """Return ids that no device has; on a host there may be others' devices."""
    found = (n for n in range(1 << 20) if not (_CHAR_DEVICES / f"ublkc{n}").exists())
    return [next(found) for _ in range(count)]


@contextlib.asynccontextmanager
async def devices(  # noqa: PLR0913, PLR0917 - what a device is
    ctrl: UblkCtrl,
    home: Path,
    dev_ids: Sequence[int],
    queues: int,
    depth: int,
    server: tuple[str, ...] = SERVER,
) -> AsyncIterator[int]:
    """Make devices on one reference server; yields its pid, deletes them in the end."""
    log = home / f"server-{dev_ids[0]}.log"
    arguments = ["--create", ",".join(map(str, dev_ids)), "--recovery", "reissue", "--size", "64M"]
    arguments += ["--queues", str(queues), "--depth", str(depth)]
    first = _start([*server, *arguments], log)

    def live() -> bool:
        if first.poll() is not None:
            raise BenchError(f"the server ended with status {first.returncode}: {log.read_text()}")
        return log.read_text().count("LIVE") == len(dev_ids)

    try:
        await wait_for(live, "the devices to be LIVE", log.read_text)
        yield first.pid
    finally:
        first.kill()
        first.wait()
        for dev_id in dev_ids:
            await _remove(ctrl, dev_id)


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output)


async def _remove(ctrl: UblkCtrl, dev_id: int) -> None:
    """Stop the device, which ends the server that it may have got since, and delete it."""
    try:
        await ctrl.stop_dev(dev_id, timeout_s=DEADLINE_S)
        await ctrl.del_dev(dev_id, timeout_s=DEADLINE_S)
    except CtrlError as error:
        if error.errno != errno.ENODEV:
            raise BenchError(f"{error}; {_processes()}") from error


def end_servers(home: Path) -> None:
    """End the servers that were started from there, attached or not: their devices go next."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("NOTIFY_SOCKET", "").startswith(f"{home}/"):
                process.kill()
                process.wait(DEADLINE_S)


def _processes() -> str:
    """Name the processes that are there, for the one who has to find out."""
    return str([(process.pid, process.info) for process in psutil.process_iter(["cmdline"])])


# --- ublkwatch -----------------------------------------------------------------------------------


class Supervisor:
    """`ublkwatch run` with its defaults, over some devices."""

    def __init__(
        self,
        home: Path,
        dev_ids: Iterable[int],
        rule: Mapping[str, object] | None = None,
        top: Mapping[str, object] | None = None,
    ) -> None:
        """``rule``: the keys of each device's table, where a command for a null target is not all.

        ``top``: keys of the configuration that are not the defaults.
        """
        self.home = home
        self.dev_ids = tuple(dev_ids)
        self._config = home / "ublkwatch.toml"
        self._log = home / "ublkwatch.log"
        tables = "".join(
            f"[[device]]\ndev_id = {dev_id}\n{_toml(rule or {'command': SERVER})}"
            for dev_id in self.dev_ids
        )
        self._config.write_text(
            f'runtime_dir = "{home}/run"\nstate_dir = "{home}/state"\n{_toml(top or {})}'
            f"[metrics]\nport = 0\n[recovery]\nprobation_s = {PROBATION_S}\n{tables}"
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[Supervisor]:
        command = [sys.executable, "-m", "ublkwatch", "run", "--config", str(self._config)]
        self._proc = _start(command, self._log)
        try:
            yield self
        finally:
            self._proc.terminate()
            try:
                self._proc.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                self._proc.kill()
                self._proc.wait()

    def said(self) -> str:
        """Return its log."""
        return f"ublkwatch's log:\n{self._log.read_text()}"

    def device(self, dev_id: int) -> dict[str, Any] | None:
        """Return what its status document says of a device; BenchError when that is given up."""
        if self._proc.poll() is not None:
            raise BenchError(f"ublkwatch ended, status {self._proc.returncode}; {self.said()}")
        with contextlib.suppress(FileNotFoundError):
            document = json.loads((self.home / "run/status.json").read_text())
            for device in document["devices"]:
                if device["dev_id"] == dev_id:
                    if device["phase"] == "failed":
                        raise BenchError(f"ublk {dev_id} FAILED: {device}; {self.said()}")
                    return dict(device)
        return None

    async def watching(self, dev_id: int, recoveries: int) -> dict[str, Any]:
        """Wait until it watches the device again, after so many recoveries."""

        def settled() -> dict[str, Any] | None:
            device = self.device(dev_id)
            good = device and (device["phase"], device["recoveries"]) == ("watching", recoveries)
            return device if good else None

        return await wait_for(settled, f"ublk {dev_id} to be watched", self.said)

    async def spared(self, dev_id: int) -> None:
        """Wait until a standby waits for its line."""

        def waits() -> bool:
            return (self.device(dev_id) or {}).get("standby") == "waiting"

        await wait_for(waits, f"a standby of ublk {dev_id}", self.said)

    async def learnt(self, dev_ids: Iterable[int]) -> None:
        """Wait until it watches the devices and has kept all that a recovery needs."""
        for dev_id in dev_ids:
            await self.watching(dev_id, 0)
            spec = self.home / f"state/specs/{dev_id}.json"
            await wait_for(spec.exists, f"ublkwatch to learn ublk {dev_id}", self.said)

    def processes(self) -> dict[str, int]:
        """Return the pids of the daemon and of its control worker, of which there must be one."""
        workers = []
        for child in psutil.Process(self._proc.pid).children():
            with contextlib.suppress(psutil.Error):  # a zombie is one that was retired
                if "ublkwatch.ctrl_worker" in child.cmdline():
                    workers.append(child.pid)
        if len(workers) != 1:
            raise BenchError(f"ublkwatch has {len(workers)} control workers; {self.said()}")
        return {"daemon": self._proc.pid, "worker": workers[0]}


def _toml(keys: Mapping[str, object]) -> str:
    """Write strings, numbers, lists and booleans: as JSON has them, they are TOML as well."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())


# --- what processes take -------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """What a process has taken so far, and the memory it has now."""

    cpu_s: float
    voluntary_switches: int
    rss_bytes: int
    pss_bytes: int | None

    @classmethod
    def of(cls, pid: int) -> Usage:
        process = psutil.Process(pid)
        times = process.cpu_times()
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            pss = int(rollup.split("\nPss:")[1].split()[0]) << 10
        except OSError:
            pss = None
        return cls(
            cpu_s=times.user + times.system,
            voluntary_switches=sum(_switches(task) for task in _tasks(pid)),
            rss_bytes=process.memory_info().rss,
            pss_bytes=pss,
        )


def _tasks(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def _switches(task: Path) -> int:
    with contextlib.suppress(OSError):  # a thread that ended meanwhile
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                return int(line.split()[1])
    return 0


def ran_ns(pids: Iterable[int]) -> int:
    """Return for how long these processes' threads have run, ever."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in _tasks(pid):
                total += int((task / "schedstat").read_text().split()[0])
    return total


async def quiet(pids: Iterable[int]) -> None:
    """Wait until none of these processes has run for a while: no work of before is in the way."""
    pids = list(pids)
    ran, since = ran_ns(pids), time.monotonic()
    deadline = since + DEADLINE_S
    while time.monotonic() - since < _QUIET_S:
        await asyncio.sleep(_POLL_S)
        if (now := ran_ns(pids)) != ran:
            ran, since = now, time.monotonic()
        if time.monotonic() > deadline:
            raise BenchError(f"processes {pids} are never quiet")
