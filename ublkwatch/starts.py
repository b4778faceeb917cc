"""Starting servers: asked first, so many at once, and one for all devices of a group.

A part of the hands (perform.py): what it takes from the wish for a server to its process. Nothing
is started for an attempt that has ended meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from ublkwatch.care import Care, Job, Origin, Spec, filled
from ublkwatch.events import Event, Ready, Spawned, SpawnFailed
from ublkwatch.lanes import Lanes
from ublkwatch.model import Phase, Reason, Record, ServerId, SpawnVerdict

# A slot is kept until the server is up, but not longer: a bad one must not keep others waiting.
_SLOT_S = 5.0
_GO = 0  # what pre_recover says by its exit status
_VERDICTS = {75: SpawnVerdict.LATER, 78: SpawnVerdict.PARK}


class Launcher(Protocol):
    """launch.Launcher, as far as it starts servers."""

    async def start(self, tag: str, job: Job) -> int: ...
    def join(self, tag: str, root: str) -> None: ...
    def root(self, tag: str) -> str: ...
    def known(self, tag: str) -> bool: ...
    async def decide(
        self, command: tuple[str, ...], about: dict[str, str], timeout_s: float
    ) -> tuple[str, int | None]: ...


class Kept(Protocol):
    """kept.Kept."""

    def keep(self, dev_id: int, paths: tuple[str, ...]) -> None: ...
    def restore(self, dev_id: int, paths: tuple[str, ...]) -> None: ...
    def drop(self, dev_id: int) -> None: ...


class Standbys(Protocol):
    """standbys.Standbys, as far as starts ask for one."""

    def waits(self, name: str) -> bool: ...
    async def take(self, tag: str, name: str) -> ServerId | None: ...


class Caller(Protocol):
    """monitor.Monitor, as far as starts speak to it."""

    def post(self, dev_id: int, event: Event) -> None: ...
    def all_records(self) -> list[Record]: ...
    def care(self, dev_id: int) -> Care | None: ...


# How an attempt's process ended, its exit code, its last words.
Autopsy = Callable[[str, int], Awaitable[tuple[str, int | None, str]]]


@dataclass
class _Shared:
    """The process that serves a group."""

    root: str  # the attempt that it was started for
    server: ServerId
    ready: bool = False
    standby: bool = False  # it had been started beforehand


class Starts:
    """The servers that are being started."""

    def __init__(  # noqa: PLR0913 - each by its name
        self,
        *,
        launcher: Launcher,
        identify: Callable[[int], ServerId | None],
        autopsy: Autopsy,
        kept: Kept,
        lanes: Lanes,
        monitor: Caller,
        standbys: Standbys | None = None,
    ) -> None:
        """Work for ``monitor``."""
        self._standbys = standbys
        self._autopsy = autopsy
        self._launcher = launcher
        self._identify = identify
        self._kept = kept
        self._lanes = lanes
        self._monitor = monitor
        self._current: dict[int, str] = {}  # the attempt, by device, whose server may be started
        self._forks: dict[str, asyncio.Lock] = {}  # held while a server is being started
        self._slots: dict[str, Callable[[], None]] = {}  # what ends an attempt's turn in its lane
        self._shared: dict[str, _Shared] = {}  # by group

    def expect(self, dev_id: int, tag: str) -> None:
        """Take it that a server is wished for."""
        self._current[dev_id] = tag

    def ready(self, tag: str) -> None:
        """Take it that an attempt's server said READY=1."""
        for shared in self._shared.values():
            if shared.root == self._launcher.root(tag):
                shared.ready = True
        self.up(tag)

    def up(self, tag: str) -> None:
        """End the attempt's turn: the next server may start."""
        if (leave := self._slots.pop(tag, None)) is not None:
            leave()

    def forbid(self, dev_id: int) -> None:
        """Start nothing any more for the device's attempt, which is over."""
        if (tag := self._current.pop(dev_id, None)) is not None:
            self.up(tag)

    def fork(self, dev_id: int) -> asyncio.Lock:
        """Return what is held while a server for this device, or for its group, is started."""
        care = self._monitor.care(dev_id)
        name = f"group {care.group}" if care and care.group else f"{dev_id}"
        return self._forks.setdefault(name, asyncio.Lock())

    async def start(self, record: Record, tag: str, spec: Spec | None) -> None:
        """Start the server of an attempt, and post what came of it; OSError where it cannot be."""
        dev_id, care = record.dev_id, self._monitor.care(record.dev_id)
        if care is None or spec is None:
            raise FileNotFoundError("nothing says any more how to start its server")
        waits = care.standby and self._standbys and self._standbys.waits(job_name(care, dev_id))
        if waits:  # nothing is to be started, so it needs no turn
            if not await self._asked(record, care, spec):
                return
            async with self.fork(dev_id):
                if not self._wanted(dev_id, tag) or await self._given(record, tag, care):
                    return
        again = record.attempts > 1 and record.reason is not Reason.STANDBY_LOST
        leave = await self._lanes.enter(care.priority, again=again)
        self._slots[tag] = leave
        asyncio.get_running_loop().call_later(_SLOT_S, self.up, tag)
        try:
            if self._wanted(dev_id, tag) and (waits or await self._asked(record, care, spec)):
                async with self.fork(dev_id):
                    if self._wanted(dev_id, tag):
                        await self._start(record, tag, care, job_of(care, spec))
        except BaseException:
            self.up(tag)
            raise

    def _wanted(self, dev_id: int, tag: str) -> bool:
        if self._current.get(dev_id) == tag:
            return True
        self.up(tag)
        return False

    async def _asked(self, record: Record, care: Care, spec: Spec) -> bool:
        """Ask the operator's pre_recover whether a server may be started now."""
        if not care.hook:
            return True
        how, code = await self._launcher.decide(
            filled(care.hook, values(record.dev_id, care, spec)), about(record), care.hook_timeout_s
        )
        if code == _GO:
            return True
        verdict = _VERDICTS.get(code or 0, SpawnVerdict.HOOK_FAILED)
        self.up(tag_of(record))
        self._monitor.post(record.dev_id, SpawnFailed(record.seq, f"pre_recover: {how}", verdict))
        return False

    async def _start(self, record: Record, tag: str, care: Care, job: Job) -> None:
        """Start the process, or have the group's take one more device."""
        dev_id, seq = record.dev_id, record.seq
        if self._joins(record, tag, care):
            return
        if care.keep:
            await asyncio.to_thread(
                self._kept.restore, dev_id, filled(care.keep, values(dev_id, care, None))
            )
        pid = await self._launcher.start(tag, job)
        server = self._identify(pid)
        if server is None:
            self.up(tag)
            how, code, words = await self._autopsy(tag, pid)
            why = f"{how}: {words}" if words else how
            self._monitor.post(dev_id, SpawnFailed(seq, why, ran=True, code=code))
            return
        if care.group:
            self._shared[care.group] = _Shared(tag, server)
        self._monitor.post(dev_id, Spawned(seq, server))

    def _joins(self, record: Record, tag: str, care: Care) -> bool:
        """Have the group's process take one more device, where there is one."""
        shared = self._process_of(care.group) if care.group else None
        if shared is None:
            return False
        self._launcher.join(tag, shared.root)
        self.up(tag)
        self._monitor.post(record.dev_id, Spawned(record.seq, shared.server, shared.standby))
        if shared.ready:
            self._monitor.post(record.dev_id, Ready(record.seq))
        return True

    async def _given(self, record: Record, tag: str, care: Care) -> bool:
        """Give the attempt a process that there is: the group's, or the standby."""
        assert self._standbys is not None
        if self._joins(record, tag, care):
            return True
        server = await self._standbys.take(tag, job_name(care, record.dev_id))
        if server is None:
            return False
        if care.group:
            self._shared[care.group] = _Shared(self._launcher.root(tag), server, True, True)
        self._monitor.post(record.dev_id, Spawned(record.seq, server, standby=True))
        self._monitor.post(record.dev_id, Ready(record.seq))
        return True

    def _process_of(self, group: str) -> _Shared | None:
        """Return the group's process that lives; of a former life, too."""
        if (shared := self._shared.get(group)) is not None and self._lives(shared.server):
            return shared
        self._shared.pop(group, None)
        for record in self._monitor.all_records():  # of a former life
            care, server = self._monitor.care(record.dev_id), record.candidate or record.server
            ours = care and care.group == group and self._launcher.known(tag_of(record))
            if ours and server and self._lives(server):
                ready = record.ready or record.phase is not Phase.DRAINING
                return _Shared(self._launcher.root(tag_of(record)), server, ready, record.standby)
        return None

    def _lives(self, server: ServerId) -> bool:
        return self._identify(server.pid) == server


def tag_of(record: Record) -> str:
    """Name an attempt so that no other of this boot is called the same."""
    return f"{record.dev_id}-{record.instance.rpartition('/')[2]}-{record.seq}"


def about(record: Record) -> dict[str, str]:
    """Return what an operator's command is told of a device, in its environment."""
    return {
        "UBLKWATCH_DEVICE": f"ublkb{record.dev_id}",
        "UBLKWATCH_DEV_ID": str(record.dev_id),
        "UBLKWATCH_REASON": record.reason.name if record.reason else "",
        "UBLKWATCH_DETAIL": record.detail,
        "UBLKWATCH_ATTEMPTS": str(record.attempts),
    }


def values(dev_id: int, care: Care, spec: Spec | None) -> dict[str, str | int]:
    """Return what stands for the placeholders."""
    known: dict[str, str | int] = {
        "dev_id": dev_id,
        "char_dev": f"/dev/ublkc{dev_id}",
        "name": care.name or f"ublkb{dev_id}",
    }
    if spec is not None:
        known |= {
            "queues": spec.queue.nr_hw_queues,
            "depth": spec.queue.queue_depth,
            "max_io_buf_bytes": spec.queue.max_io_buf_bytes,
        }
    return known


def job_name(care: Care, dev_id: int) -> str:
    """Name the server of a device, or of its group."""
    return f"group-{care.group}" if care.group else f"ublkb{dev_id}"


def job_of(care: Care, spec: Spec) -> Job:
    """Return what is started for a device, or for its group."""
    known, run = values(spec.dev_id, care, spec), care.run
    run = replace(
        run,
        env=tuple((key, filled((value,), known)[0]) for key, value in run.env),
        unit=filled((run.unit,), known)[0],
    )
    name, command = job_name(care, spec.dev_id), filled(care.command, known)
    return Job(name, command, run, spec.origin or Origin())
