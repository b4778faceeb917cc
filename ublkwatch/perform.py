"""The hands: perform the machine's effects on the world, and post what came of them as facts.

Each effect that takes time is a task of its own, so that no device waits for another. Every error
that the world can answer with becomes a fact; what is left is a bug, and harms one device.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ublkwatch import ends, starts
from ublkwatch.care import Care, Origin, Spec, filled
from ublkwatch.events import (
    Cancel,
    Decide,
    Decided,
    Effect,
    EndAttempt,
    EndReplied,
    FindHolders,
    FindServer,
    HoldersFound,
    Kill,
    ReadInfo,
    SendEnd,
    SendStart,
    SendStop,
    Spawn,
    SpawnFailed,
    StartReplied,
    StopReplied,
    Transition,
    Watch,
    WriteLine,
)
from ublkwatch.lanes import Lanes
from ublkwatch.meter import Meter
from ublkwatch.model import DevInfo, QueueConfig, Record, ServerId, Traffic
from ublkwatch.rules import Unmanaged
from ublkwatch.standby import Terms
from ublkwatch.standbys import Standbys
from ublkwatch.starts import about, tag_of
from ublkwatch.symptoms import Thread

_log = logging.getLogger("ublkwatch")

_PARAMS_TIMEOUT_S = 10.0
_COMMAND_S = 10.0  # what one control command may take beyond the retries and waits that it has


class Ctrl(Protocol):
    """ctrl.UblkCtrl, as far as it never sleeps on a device."""

    async def get_dev_info(self, dev_id: int) -> DevInfo: ...
    async def get_dev_infos(self, dev_ids: Collection[int]) -> Mapping[int, DevInfo | OSError]: ...


class Workers(Protocol):
    """ctrl_worker.Workers."""

    async def call(
        self, command: str, dev_id: int, key: str, *, timeout_s: float, **arguments: float
    ) -> dict[str, Any]: ...
    def cancel(self, key: str) -> None: ...


class Launcher(starts.Launcher, ends.Launcher, Protocol):
    """launch.Launcher."""

    def listen(self, tag: str) -> None: ...
    def write_line(self, tag: str, line: str) -> None: ...
    async def shutting_down(self) -> bool: ...
    def keep_only(self, tags: set[str]) -> None: ...
    def trim(self) -> None: ...


class Store(Protocol):
    """store.Store."""

    def save_record(self, record: Record) -> None: ...
    def drop_record(self, dev_id: int) -> None: ...
    def save_spec(self, spec: Spec) -> None: ...


@dataclass(frozen=True, slots=True)
class Threads:
    """The threads of servers: which live, what they do, which serve queues, and when one ends."""

    alive: Callable[[int], set[int]]
    look: Callable[[int], dict[int, Thread]]
    declared: Callable[[DevInfo], tuple[int, ...]]
    watch: Callable[[ServerId, Iterable[int]], None]
    # Whether all of these would be told of by watch(), and have not ended.
    watched: Callable[[ServerId, Iterable[int]], bool] = lambda _server, _tids: False


@dataclass
class Edges:
    """The world, as the monitor reaches it."""

    ctrl: Ctrl
    workers: Workers
    servers: ends.Servers
    launcher: Launcher
    store: Store
    threads: Threads
    present: Callable[[], Mapping[int, int | None]]  # devices, each with what its disk's life is
    traffic: Callable[[int], Traffic | None]
    instance: Callable[[int], str | None]
    files: Callable[[int], Collection[str]]  # that a process has open
    publish: Callable[[Transition], None]
    clock: Callable[[], float]
    wall: Callable[[], float]
    chance: Callable[[], float]
    origin: Callable[[int], Origin | None]
    care: Callable[[DevInfo, Origin | None], Awaitable[Care | Unmanaged]]
    kept: starts.Kept
    lanes: Lanes
    standbys: Terms = field(default_factory=Terms)
    meter: Meter = field(default_factory=Meter)
    idle: Callable[[], Mapping[int, Traffic]] = dict  # traffic() of disks that have none just now
    beat: Callable[[float], None] = lambda _: None  # by how much the loop was late, at each poll


class Caller(ends.Caller, Protocol):
    """monitor.Monitor, as far as the performer speaks to it."""

    @property
    def changes(self) -> int: ...
    def records(self) -> list[Record]: ...
    def quarantine(self, dev_id: int, error: BaseException) -> None: ...
    async def read(self, dev_id: int) -> None: ...
    def origin(self, record: Record) -> Origin | None: ...


class Performer:
    """Performs effects, one task each."""

    def __init__(
        self,
        edges: Edges,
        specs: dict[int, Spec],
        monitor: Caller,
    ) -> None:
        """Work for ``monitor``; ``specs`` grows as devices are learnt."""
        self._edges = edges
        self._specs = specs
        self._monitor = monitor
        self._tasks: set[asyncio.Task[None]] = set()
        self.ends = ends.Ends(
            launcher=edges.launcher,
            servers=edges.servers,
            kept=edges.kept,
            files=edges.files,
            fork=lambda dev_id: self._starts.fork(dev_id),  # noqa: PLW0108 - which is made below
            monitor=monitor,
        )
        self.standbys = Standbys(
            terms=edges.standbys,
            launcher=edges.launcher,
            servers=edges.servers,
            end=self.ends.end,
            specs=specs,
            clock=edges.clock,
            monitor=monitor,
        )
        self._starts = starts.Starts(
            launcher=edges.launcher,
            identify=edges.servers.identify,
            autopsy=self.ends.autopsy,
            kept=edges.kept,
            lanes=edges.lanes,
            monitor=monitor,
            standbys=self.standbys,
        )
        self._learning: dict[int, asyncio.Lock] = {}
        self._works: dict[type[Effect], Callable[[Record], Coroutine[Any, Any, None]]] = {
            Spawn: self._start_server,
            SendStart: self._send_start,
            FindHolders: self._find_holders,
            FindServer: self.ends.find_server,
            EndAttempt: self.ends.end_attempt,
            SendStop: self._send_stop,
            Decide: self._decide,
        }

    def close(self) -> None:
        """Stop everything under way; the servers live on."""
        self.standbys.close()
        for task in self._tasks:
            task.cancel()

    def perform(self, record: Record, effect: Effect) -> None:
        """Begin an effect, in the order in which the machine wished for them."""
        dev_id, tag, edges = record.dev_id, tag_of(record), self._edges
        match effect:
            case ReadInfo():
                self.spawn(dev_id, self._monitor.read(dev_id))
            case Watch():
                edges.servers.watch(effect.server)
            case Kill():
                self.ends.kill(record, effect)
            case Cancel():  # a task, like what it cancels: which so is sent first
                self.spawn(dev_id, self._cancel(tag))
            case WriteLine():
                spec = self._specs.get(dev_id)
                if spec is not None and spec.instance == record.instance:
                    self._write_line(record, spec)
                else:
                    self.spawn(dev_id, self._learn_and_write_line(record))
            case SendEnd():
                self.spawn(dev_id, self._send_end(record, effect.pid))
            case _:
                if isinstance(effect, Spawn):
                    self._starts.expect(dev_id, tag)
                elif isinstance(effect, EndAttempt):
                    self._starts.forbid(dev_id)
                self.spawn(dev_id, self._works[type(effect)](record))

    def spawn(self, dev_id: int, work: Coroutine[Any, Any, None]) -> None:
        """Run work as a task of its own; a bug in it harms this device only."""
        task = asyncio.get_running_loop().create_task(work, name=f"ublk {dev_id}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(dev_id, done))

    def _ended(self, dev_id: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._monitor.quarantine(dev_id, error)

    async def _cancel(self, tag: str) -> None:
        self._edges.workers.cancel(tag)

    def ready(self, tag: str) -> None:
        """Take it that an attempt's server said READY=1."""
        self._starts.ready(tag)
        self.standbys.ready(tag)

    def up(self, tag: str) -> None:
        """Take it that an attempt's server serves."""
        self._starts.up(tag)

    def tidy(self, records: Iterable[Record]) -> None:
        """Remove what attempts that are over left behind; of these devices some are not."""
        kept = {tag_of(record) for record in records} | self.standbys.tags()
        self._edges.launcher.keep_only(kept)
        self._edges.launcher.trim()

    async def _start_server(self, record: Record) -> None:
        try:
            await self._learn(record)
            await self._starts.start(record, tag_of(record), self._specs.get(record.dev_id))
        except OSError as error:
            self._monitor.post(record.dev_id, SpawnFailed(record.seq, str(error)))

    async def learn_early(self, record: Record) -> None:
        try:
            await self._learn(record)
        except OSError as error:
            _log.warning("%s; tried again when its server is lost", error)

    async def _learn(self, record: Record) -> None:
        """Read and keep the queue config, once in the life of a device."""
        async with self._learning.setdefault(record.dev_id, asyncio.Lock()):
            await self._learn_alone(record)

    async def _learn_alone(self, record: Record) -> None:
        """Learn it, and what its server was, which another one may have changed."""
        spec, info = self._specs.get(record.dev_id), record.info
        care, origin = self._monitor.care(record.dev_id), self._monitor.origin(record)
        if info is None or care is None:
            return
        if care.keep:
            files = filled(care.keep, starts.values(record.dev_id, care, None))
            await asyncio.to_thread(self._edges.kept.keep, record.dev_id, files)
        if spec is None or spec.instance != record.instance:
            spec = Spec(record.dev_id, record.instance, await self._read_queue(info), origin)
        elif origin is None or spec.origin == origin:
            return
        else:
            spec = replace(spec, origin=origin)
        self._specs[record.dev_id] = spec
        try:
            await asyncio.to_thread(self._edges.store.save_spec, spec)
        except OSError as error:
            _log.warning("ublk %d: spec not saved: %s", record.dev_id, error)
            self._edges.meter.dropped("spec")

    async def _read_queue(self, info: DevInfo) -> QueueConfig:
        answer = await self._edges.workers.call(
            "GET_PARAMS", info.dev_id, f"params {info.dev_id}", timeout_s=_PARAMS_TIMEOUT_S
        )
        return QueueConfig(
            nr_hw_queues=info.nr_hw_queues,
            queue_depth=info.queue_depth,
            max_io_buf_bytes=info.max_io_buf_bytes,
            flags=int(info.flags),
            params=answer["params"],
        )

    async def _send_start(self, record: Record) -> None:
        busy_s = self._monitor.policy(record.dev_id).start_timeout_s
        error = await self._call(
            "START_USER_RECOVERY", record, timeout_s=busy_s + _COMMAND_S, busy_s=busy_s
        )
        self._monitor.post(record.dev_id, StartReplied(record.seq, error))

    async def _send_end(self, record: Record, pid: int) -> None:
        # It sleeps for as long as the machine lets it: that has the deadline, and cancels it.
        error = await self._call("END_USER_RECOVERY", record, timeout_s=_COMMAND_S, pid=pid)
        self._monitor.post(record.dev_id, EndReplied(record.seq, error))

    async def _send_stop(self, record: Record) -> None:
        timeout_s = self._monitor.policy(record.dev_id).stop_timeout_s
        error = await self._call("STOP_DEV", record, timeout_s=timeout_s)
        self._monitor.post(record.dev_id, StopReplied(record.seq, error))

    async def _decide(self, record: Record) -> None:
        care = self._monitor.care(record.dev_id)
        if care is None or not care.decider:
            self._monitor.post(record.dev_id, Decided(record.seq, None, "none is configured"))
            return
        command = filled(care.decider, starts.values(record.dev_id, care, None))
        how, code = await self._edges.launcher.decide(
            command, about(record), care.policy.exec_timeout_s
        )
        self._monitor.post(record.dev_id, Decided(record.seq, code, how))

    async def _call(
        self, command: str, record: Record, *, timeout_s: float, **arguments: float
    ) -> int:
        try:
            await self._edges.workers.call(
                command, record.dev_id, tag_of(record), timeout_s=timeout_s, **arguments
            )
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    async def _learn_and_write_line(self, record: Record) -> None:
        """Write the go for a device whose spec we died too early to keep."""
        try:
            info = record.info or await self._edges.ctrl.get_dev_info(record.dev_id)
            await self._learn(replace(record, info=info))
            if (spec := self._specs.get(record.dev_id)) is not None:
                self._write_line(record, spec)
        except OSError as error:
            _log.error("%s", error)

    def _write_line(self, record: Record, spec: Spec) -> None:
        """Write the go. Where it cannot be written nobody attaches, and the deadline sees that."""
        queue = spec.queue
        line = {
            "dev_id": record.dev_id,
            "char_device": f"/dev/ublkc{record.dev_id}",
            "queues": queue.nr_hw_queues,
            "depth": queue.queue_depth,
            "max_io_buf_bytes": queue.max_io_buf_bytes,
            "flags": queue.flags,
            "params": queue.params,
            "attempt": record.attempts,
        }
        try:
            self._edges.launcher.write_line(tag_of(record), json.dumps(line))
        except OSError as error:
            _log.error("ublk %d: line of attempt %d: %s", record.dev_id, record.seq, error)

    async def _find_holders(self, record: Record) -> None:
        began, node = self._edges.clock(), f"/dev/ublkc{record.dev_id}"
        free, who = await self._edges.servers.holders(node)
        self._monitor.post(record.dev_id, HoldersFound(record.seq, who, free, began))
