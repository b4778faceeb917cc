"""The hands: perform the machine's effects on the world, and post what came of them as facts.

Each effect that takes time is a task of its own, so that no device waits for another. Every error
that the world can answer with becomes a fact; what is left is a bug, and harms one device.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from ublkwatch.care import Care, Job, Spec
from ublkwatch.events import (
    AttemptOver,
    Cancel,
    Decide,
    Decided,
    Effect,
    EndAttempt,
    EndReplied,
    Event,
    FindHolders,
    FindServer,
    HoldersFound,
    Kill,
    ReadInfo,
    SendEnd,
    SendStart,
    SendStop,
    ServerFound,
    Spawn,
    Spawned,
    SpawnFailed,
    StartReplied,
    StopReplied,
    Transition,
    Watch,
    WriteLine,
)
from ublkwatch.model import DevInfo, Policy, QueueConfig, Record, ServerId

_log = logging.getLogger("ublkwatch")

_PARAMS_TIMEOUT_S = 10.0
_COMMAND_S = 10.0  # what one control command may take beyond the retries and waits that it has


class Ctrl(Protocol):
    """ctrl.UblkCtrl, as far as it never sleeps on a device."""

    async def get_dev_info(self, dev_id: int) -> DevInfo: ...


class Workers(Protocol):
    """ctrl_worker.Workers."""

    async def call(
        self, command: str, dev_id: int, key: str, *, timeout_s: float, **arguments: float
    ) -> dict[str, Any]: ...
    def cancel(self, key: str) -> None: ...


class Servers(Protocol):
    """server.Servers."""

    def identify(self, pid: int) -> ServerId | None: ...
    def watch(self, server: ServerId) -> None: ...
    def kill(self, server: ServerId) -> None: ...
    def tagged(self, tag: str) -> list[ServerId]: ...
    async def end_tagged(self, tag: str) -> None: ...


class Launcher(Protocol):
    """launch.Launcher."""

    async def start(self, tag: str, job: Job) -> int: ...
    def listen(self, tag: str) -> None: ...
    def write_line(self, tag: str, line: str) -> None: ...
    def unread(self, tag: str) -> bool: ...
    def how_ended(self, pid: int) -> tuple[str, int | None]: ...
    async def decide(
        self, command: tuple[str, ...], about: dict[str, str], timeout_s: float
    ) -> tuple[str, int | None]: ...
    async def shutting_down(self) -> bool: ...
    def last_words(self, tag: str) -> str: ...
    def keep_only(self, tags: set[str]) -> None: ...
    def trim(self) -> None: ...


class Store(Protocol):
    """store.Store."""

    def save_record(self, record: Record) -> None: ...
    def drop_record(self, dev_id: int) -> None: ...
    def save_spec(self, spec: Spec) -> None: ...


@dataclass
class Edges:
    """The world, as the monitor reaches it."""

    ctrl: Ctrl
    workers: Workers
    servers: Servers
    launcher: Launcher
    store: Store
    dev_ids: Callable[[], set[int]]
    instance: Callable[[int], str | None]
    holds: Callable[[int, str], bool]
    holders: Callable[[str], str]
    publish: Callable[[Transition], None]
    clock: Callable[[], float]
    wall: Callable[[], float]
    chance: Callable[[], float]


class Caller(Protocol):
    """monitor.Monitor, as far as the performer speaks to it."""

    def post(self, dev_id: int, event: Event) -> None: ...
    def quarantine(self, dev_id: int, error: BaseException) -> None: ...
    async def read(self, dev_id: int) -> None: ...
    def policy(self, dev_id: int) -> Policy: ...


class Performer:
    """Performs effects, one task each."""

    def __init__(
        self,
        edges: Edges,
        cares: dict[int, Care],
        specs: dict[int, Spec],
        monitor: Caller,
    ) -> None:
        """Work for ``monitor``; ``specs`` grows as devices are learnt."""
        self._edges = edges
        self._cares = cares
        self._specs = specs
        self._monitor = monitor
        self._tasks: set[asyncio.Task[None]] = set()
        self._current: dict[int, str] = {}  # the attempt, by device, whose server may be started
        self._forks: dict[int, asyncio.Lock] = {}  # held while a server is being started
        self._ending: set[str] = set()  # attempts whose processes are being ended just now
        self._learning: dict[int, asyncio.Lock] = {}
        self._works: dict[type[Effect], Callable[[Record], Coroutine[Any, Any, None]]] = {
            Spawn: self._start_server,
            SendStart: self._send_start,
            FindHolders: self._find_holders,
            FindServer: self._find_server,
            EndAttempt: self._end_attempt,
            SendStop: self._send_stop,
            Decide: self._decide,
        }

    def close(self) -> None:
        """Stop everything under way; the servers live on."""
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
                edges.servers.kill(effect.server)
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
                    self._current[dev_id] = tag
                elif isinstance(effect, EndAttempt):
                    self._current.pop(dev_id, None)
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

    async def _start_server(self, record: Record) -> None:
        dev_id, seq, tag = record.dev_id, record.seq, tag_of(record)
        try:
            await self._learn(record)
            async with self._fork(dev_id):
                if self._current.get(dev_id) != tag:
                    return  # the attempt has ended meanwhile
                job = Job(f"ublkb{dev_id}", self._cares[dev_id].command)
                pid = await self._edges.launcher.start(tag, job)
        except OSError as error:
            self._monitor.post(dev_id, SpawnFailed(seq, str(error)))
            return
        server = self._edges.servers.identify(pid)
        if server is None:
            how, _ = self._edges.launcher.how_ended(pid)
            words = self._edges.launcher.last_words(tag)
            self._monitor.post(dev_id, SpawnFailed(seq, f"{how}: {words}" if words else how))
        else:
            self._monitor.post(dev_id, Spawned(seq, server))

    def _fork(self, dev_id: int) -> asyncio.Lock:
        return self._forks.setdefault(dev_id, asyncio.Lock())

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
        spec, info = self._specs.get(record.dev_id), record.info
        care = self._cares.get(record.dev_id)
        if info is None or care is None or (spec and spec.instance == record.instance):
            return
        answer = await self._edges.workers.call(
            "GET_PARAMS", record.dev_id, f"params {record.dev_id}", timeout_s=_PARAMS_TIMEOUT_S
        )
        queue = QueueConfig(
            nr_hw_queues=info.nr_hw_queues,
            queue_depth=info.queue_depth,
            max_io_buf_bytes=info.max_io_buf_bytes,
            flags=int(info.flags),
            params=answer["params"],
        )
        spec = Spec(record.dev_id, record.instance, queue)
        self._specs[record.dev_id] = spec
        try:
            await asyncio.to_thread(self._edges.store.save_spec, spec)
        except OSError as error:
            _log.warning("ublk %d: spec not saved: %s", record.dev_id, error)

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
        care = self._cares.get(record.dev_id)
        if care is None or not care.decider:
            self._monitor.post(record.dev_id, Decided(record.seq, None, "none is configured"))
            return
        about = {
            "UBLKWATCH_DEVICE": f"ublkb{record.dev_id}",
            "UBLKWATCH_DEV_ID": str(record.dev_id),
            "UBLKWATCH_REASON": record.reason.name if record.reason else "",
            "UBLKWATCH_DETAIL": record.detail,
            "UBLKWATCH_ATTEMPTS": str(record.attempts),
        }
        how, code = await self._edges.launcher.decide(
            care.decider, about, care.policy.exec_timeout_s
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
            await self._learn(record)
            self._write_line(record, self._specs[record.dev_id])
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
        who = await asyncio.to_thread(self._edges.holders, f"/dev/ublkc{record.dev_id}")
        self._monitor.post(record.dev_id, HoldersFound(record.seq, who))

    async def _find_server(self, record: Record) -> None:
        node, tag = f"/dev/ublkc{record.dev_id}", tag_of(record)
        found = await asyncio.to_thread(self._edges.servers.tagged, tag)
        holding = [server for server in found if self._edges.holds(server.pid, node)]
        self._monitor.post(record.dev_id, ServerFound(record.seq, holding[0] if holding else None))

    async def _end_attempt(self, record: Record) -> None:
        tag = tag_of(record)
        if tag in self._ending:  # the machine asks again and again; a search is going on already
            return
        self._ending.add(tag)
        try:
            async with asyncio.timeout(self._monitor.policy(record.dev_id).stop_timeout_s):
                async with self._fork(record.dev_id):  # a server that is just being started
                    await self._edges.servers.end_tagged(tag)
            unread = self._edges.launcher.unread(tag)
            self._monitor.post(record.dev_id, AttemptOver(record.seq, unread))
        except TimeoutError:
            pass  # the machine's own deadline speaks of it
        finally:
            self._ending.discard(tag)


def tag_of(record: Record) -> str:
    """Name an attempt so that no other of this boot is called the same."""
    return f"{record.dev_id}-{record.instance.rpartition('/')[2]}-{record.seq}"
