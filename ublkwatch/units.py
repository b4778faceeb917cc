"""Start a server by systemd: as a transient service in a slice of its own, asked for over D-Bus.

So it has a cgroup, a journal and limits of its own, none of our sandbox, and outlives our stop,
restart and upgrade. Type=exec for all: the FIFO and the READY socket are ours under both launchers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jeepney import DBusAddress, MatchRule, Message

from ublkwatch import cgroup, outside, transient
from ublkwatch.bus import USUAL, Bus, BusError, Patience
from ublkwatch.care import Job
from ublkwatch.fork import how
from ublkwatch.homes import last_lines
from ublkwatch.host import OURS
from ublkwatch.identity import Identity
from ublkwatch.transient import Properties

_log = logging.getLogger("ublkwatch")

_NAME = "org.freedesktop.systemd1"
_UNITS = "/org/freedesktop/systemd1/unit/"
_MANAGER = DBusAddress("/org/freedesktop/systemd1", _NAME, f"{_NAME}.Manager")
_EXISTS = f"{_NAME}.UnitExists"
_JOURNAL_S = 10.0
_LOOK_S = 0.01
_JOBS_KEPT = 1000
_CLD_EXITED = 1
# What systemd(1), "Process Exit Codes", says of a command that was never executed.
_STEPS = {200: "CHDIR", 202: "FDS", 203: "EXEC", 205: "LIMITS", 206: "OOM_ADJUST", 208: "STDIN",
          209: "STDOUT", 214: "SETSCHEDULER", 216: "GROUP", 217: "USER", 219: "CGROUP"}  # fmt: skip


class UnitStarter:
    """Servers as units of systemd."""

    def __init__(
        self, homes: Mapping[str, Path], host: Path = OURS, patience: Patience = USUAL
    ) -> None:
        """``homes`` of our former life say which processes systemd started then.

        ``host`` is where systemd's root is seen from here.
        """
        self._host = host
        self._patience = patience
        self._bus = Bus(self._signalled, patience)
        self._jobs: dict[str, asyncio.Future[str]] = {}
        self._pids: dict[int, Path] = {}
        self._tidying: set[asyncio.Task[None]] = set()
        self._reading = asyncio.Semaphore(4)  # the journal, when many servers fail at once
        for home in homes.values():
            if (remembered := _remembered(home)) and remembered[1]:
                self._pids[remembered[1]] = home

    async def connect(self) -> None:
        """Be connected to the system bus; OSError within two seconds if that cannot be."""
        jobs = MatchRule(type="signal", sender=_NAME, interface=_MANAGER.interface,
                         member="JobRemoved", path=_MANAGER.object_path)  # fmt: skip
        await self._bus.connect([(_MANAGER, "Subscribe")], jobs)

    async def version(self) -> str:
        """Ask systemd which one it is; OSError if it does not answer."""
        await self.connect()
        return str((await self._bus.properties(_MANAGER, _MANAGER.interface))["Version"])

    async def state(self) -> str:
        """Ask systemd for the state of the host: "running", "stopping"...; OSError."""
        await self.connect()
        return str((await self._bus.properties(_MANAGER, _MANAGER.interface))["SystemState"])

    async def start(
        self, tag: str, home: Path, job: Job, identity: Identity, environment: dict[str, str]
    ) -> int:
        """Start the job and return its pid; OSError says why it did not start."""
        # For reading and writing: then no end of file comes when the last other writer is gone.
        stdin = os.open(home / "stdin", os.O_RDWR | os.O_CLOEXEC)
        try:
            properties = transient.service(
                job, identity, environment, stdin, self._patience.start_s
            )
            # Never the name of the server beside it: who ends one unit would end both.
            name = f"{job.name}-standby-{tag}" if job.spare else job.name
            name, path = await self._start_transient(tag, home, name, properties)
        finally:
            os.close(stdin)
        return await self._started(home, name, path)

    async def start_named(self, tag: str, home: Path, name: str) -> int:
        """Start a unit that exists, and return its main process; OSError if it runs already."""
        del tag
        if "." not in name:
            name += ".service"
        _remember(home, name, 0, named=True)
        unit = await self._unit(name)
        group = self._group(unit)
        if group is not None and cgroup.populated(group):
            raise OSError(f"unit {name}: has processes still: {sorted(cgroup.pids(group))}")
        with contextlib.suppress(BusError):
            await self._bus.call(_MANAGER, "ResetFailedUnit", "s", (name,))
        # One that is active without any process would not be started again.
        method = "RestartUnit" if unit["ActiveState"] == "active" else "StartUnit"
        (path,) = await self._bus.call(_MANAGER, method, "ss", (name, "replace"))
        return await self._started(home, name, path, named=True)

    async def set_apart(self, pid: int) -> None:
        """Put a child of ours into a scope of its own, so that no stop of our unit waits for it.

        OSError where that cannot be done.
        """
        await self.connect()
        await self._transient(f"ublkwatch-worker-{pid}.scope", transient.scope(pid))

    def started(self, pid: int) -> bool:
        """Tell whether a process is one that systemd started for us."""
        return pid in self._pids

    async def autopsy(self, home: Path, pid: int) -> tuple[str, int | None, str]:
        """Say how a process ended, its exit code, and its last words; "unknown" if late.

        Only a unit's first process is waited for by systemd: of any other, nobody knows.
        """
        said: tuple[str, int | None] = ("unknown", None)
        words = ""
        with contextlib.suppress(OSError):
            async with asyncio.timeout(self._patience.autopsy_s):
                name = (_remembered(home) or ("", 0, False))[0]
                await self.connect()
                while name:
                    service = await self._bus.properties(_address(name), f"{_NAME}.Service")
                    if service["ExecMainPID"] != pid:
                        break
                    if service["ExecMainCode"]:
                        said = _ending(service["ExecMainCode"], service["ExecMainStatus"])
                        words = await self._words(name)
                        break
                    await asyncio.sleep(_LOOK_S)
        self._pids.pop(pid, None)
        return *said, words

    async def group(self, home: Path) -> Path | None:
        """Ask for the control group of an attempt's unit; None where there is none."""
        if (remembered := _remembered(home)) is None:
            return None
        await self.connect()
        return self._group(await self._unit(remembered[0]))

    async def put_away(self, home: Path) -> None:
        """Let systemd forget the unit of an attempt that is over; a named one is not ours."""
        remembered = _remembered(home)
        if remembered is None or remembered[2]:
            return
        with contextlib.suppress(OSError):
            await self.connect()
            await self._clear(remembered[0])

    def discard(self, home: Path) -> None:
        """Let systemd forget, some time, the unit of a home that is about to be removed."""
        remembered = _remembered(home)
        if remembered is not None and not remembered[2]:
            task = asyncio.get_running_loop().create_task(self._discard(remembered[0]))
            self._tidying.add(task)
            task.add_done_callback(self._tidying.discard)

    async def _discard(self, name: str) -> None:
        with contextlib.suppress(OSError):
            await self.connect()
            await self._clear(name)

    def close(self) -> None:
        """Hang up; the units live on."""
        self._bus.close()

    # --- starting --------------------------------------------------------------------------------

    async def _start_transient(
        self, tag: str, home: Path, name: str, properties: Properties
    ) -> tuple[str, str]:
        """Start a service under its stable name; where that is taken, under one of the attempt."""
        clock = asyncio.get_running_loop().time
        unit, deadline = unit_name(name), clock() + self._patience.leftover_s
        while True:
            _remember(home, unit, 0)  # first: should we die now, our successor knows where to look
            try:
                path = await self._transient(unit, properties)
            except BusError as error:
                if error.name != _EXISTS or unit != unit_name(name):
                    raise
                if clock() < deadline:
                    await self._clear(unit)
                    await asyncio.sleep(_LOOK_S)
                    continue
                unit = unit_name(f"{name}-{tag}")
                _log.warning("unit %s is not gone yet; %s is started", unit_name(name), unit)
            else:
                _forfeit(home, unit)
                return unit, path

    async def _transient(self, name: str, properties: Properties) -> str:
        """Have systemd make and start a unit; return its job."""
        (path,) = await self._bus.call(
            _MANAGER, "StartTransientUnit", "ssa(sv)a(sa(sv))", (name, "fail", properties, [])
        )
        return str(path)

    async def _clear(self, name: str) -> None:
        """Have systemd forget a unit whose processes have all ended; with others it is let be."""
        unit = await self._unit(name)
        group = self._group(unit)
        if group is not None and cgroup.populated(group):
            return
        calls: list[tuple[str, str, tuple[str, ...]]] = [("UnrefUnit", "s", (name,))]
        if unit["ActiveState"] == "failed":
            calls.append(("ResetFailedUnit", "s", (name,)))
        elif unit["ActiveState"] == "active":  # its first process exited 0, the others since
            calls.append(("StopUnit", "ss", (name, "replace")))
        for method, signature, arguments in calls:
            with contextlib.suppress(BusError):
                await self._bus.call(_MANAGER, method, signature, arguments)

    async def _started(self, home: Path, name: str, path: str, *, named: bool = False) -> int:
        """Wait for the job; return the pid and remember where the unit's processes are."""
        result = await self._result(path)
        service = await self._bus.properties(_address(name), f"{_NAME}.Service")
        pid = int(service["ExecMainPID"])
        if result != "done" or not pid:
            status = service["ExecMainStatus"]
            step = f", at step {_STEPS[status]}" if status in _STEPS else ""
            words = await self._words(name)
            raise OSError(f"unit {name}: {service['Result']}{step}{f': {words}' if words else ''}")
        if (group := self._group(service)) is not None:
            (home / "cgroup").write_text(str(group))
        _remember(home, name, pid, named=named)
        self._pids = {old: where for old, where in self._pids.items() if where.exists()}
        self._pids[pid] = home
        return pid

    async def _result(self, path: str) -> str:
        """Wait for the end of a job: "done", or what else systemd calls it."""
        job = self._job(path)
        try:
            async with asyncio.timeout(self._patience.start_s):
                while not job.done():
                    await asyncio.wait([job], timeout=1)
                    await self.connect()  # OSError, if the bus has gone; its news are lost then
        except TimeoutError:
            raise OSError(f"no end of systemd's job in {self._patience.start_s:g} s") from None
        finally:
            self._jobs.pop(path, None)
        return job.result()

    def _job(self, path: str) -> asyncio.Future[str]:
        """Return what will be the result of a job: its end may be told before we ask."""
        if path not in self._jobs:
            while len(self._jobs) >= _JOBS_KEPT:  # other people's jobs are told of, too
                self._jobs.pop(next(iter(self._jobs)))
            self._jobs[path] = asyncio.get_running_loop().create_future()
        return self._jobs[path]

    def _signalled(self, message: Message) -> None:
        if len(message.body) == 4:  # JobRemoved: id, job, unit, result
            job = self._job(message.body[1])
            if not job.done():
                job.set_result(message.body[3])

    # --- asking ----------------------------------------------------------------------------------

    async def _unit(self, name: str) -> dict[str, Any]:
        """Return ActiveState, and the ControlGroup of a service."""
        unit = await self._bus.properties(_address(name), f"{_NAME}.Unit")
        service = await self._bus.properties(_address(name), f"{_NAME}.Service")
        return {**unit, "ControlGroup": service.get("ControlGroup", "")}

    def _group(self, unit: Mapping[str, Any]) -> Path | None:
        top = cgroup.root(self._host)
        return Path(f"{top}{unit['ControlGroup']}") if unit["ControlGroup"] and top else None

    async def _words(self, name: str) -> str:
        """Return the last lines that a unit's processes printed in this life of it."""
        unit = await self._bus.properties(_address(name), f"{_NAME}.Unit")
        # Not by InvocationID: journald looks it up when it reads a line, and if the process has
        # ended by then it finds none.
        began_s = int(unit["InactiveExitTimestamp"]) / 1e6
        match = (f"_SYSTEMD_UNIT={name}", f"--since=@{began_s:.6f}")
        for pause_s in (0.05, 0.2):  # the journal may be a moment behind
            async with self._reading:
                output = await _journal(*match)
            if words := last_lines(output):
                return words
            await asyncio.sleep(pause_s)
        return ""


async def _journal(*match: str) -> bytes:
    command = ("journalctl", "--quiet", "--no-pager", "--output=cat", "--lines=5", *match)
    with contextlib.suppress(OSError):  # words are worth no wait, and no failure: TimeoutError, too
        async with asyncio.timeout(_JOURNAL_S):
            return (await outside.run(command, output=True))[1]
    return b""


def unit_name(name: str) -> str:
    """Return the service of a server of that name; what systemd does not allow is escaped."""
    escaped = re.sub(r"[^A-Za-z0-9:_.-]", lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", name)
    return f"ublkwatch-{escaped[:200]}.service"


def _address(name: str) -> DBusAddress:
    """Return the object of a unit: whatever is no letter or digit is _ and its number in hex."""
    escaped = re.sub(rb"[^A-Za-z0-9]", lambda found: b"_%02x" % ord(found[0]), name.encode())
    if escaped[:1].isdigit():
        escaped = b"_%02x" % escaped[0] + escaped[1:]
    return DBusAddress(_UNITS + escaped.decode(), _NAME)


def _ending(code: int, status: int) -> tuple[str, int | None]:
    return how(status if code == _CLD_EXITED else -status)


def _remember(home: Path, name: str, pid: int, *, named: bool = False) -> None:
    """Keep in an attempt's home where its processes are, for our next life."""
    fresh = home / "unit.new"
    fresh.write_text(f"{name} {pid} {'named' if named else 'transient'}\n")
    fresh.rename(home / "unit")


def _forfeit(home: Path, name: str) -> None:
    """Let no older attempt take for its own what runs under a name from now on."""
    for other in home.parent.iterdir():
        if other.name != home.name and not other.is_symlink():
            remembered = _remembered(other)
            if remembered is not None and remembered[0] == name:
                for file in ("unit", "cgroup"):
                    (other / file).unlink(missing_ok=True)


def _remembered(home: Path) -> tuple[str, int, bool] | None:
    """Return unit, pid (0: not known yet), and whether it is somebody else's unit."""
    with contextlib.suppress(OSError, ValueError):
        name, pid, kind = (home / "unit").read_text().split()
        return name, int(pid), kind == "named"
    return None
