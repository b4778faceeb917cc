"""The shell around the machine: one inbox, step, save, perform, publish.

Promises, each with a test: one task steps every event; the record is committed before its effects
run, and if that fails nothing is performed; an effect is answered with its attempt's number;
effects of one device never wait for another's. The edges come in as Protocols: nothing here knows
a syscall, a file or a library.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ublkwatch import recovery
from ublkwatch.attempt import ATTEMPTING
from ublkwatch.events import (
    AttemptOver,
    Cancel,
    Effect,
    EndAttempt,
    EndReplied,
    Event,
    InfoMissing,
    InfoRead,
    Kill,
    ReadInfo,
    Ready,
    Resumed,
    SendEnd,
    SendStart,
    ServerExited,
    Spawn,
    Spawned,
    SpawnFailed,
    StartReplied,
    Transition,
    Watch,
    Woken,
    WriteLine,
)
from ublkwatch.model import (
    DevInfo,
    Phase,
    Policy,
    QueueConfig,
    Reason,
    Record,
    ServerId,
    Spec,
)
from ublkwatch.uapi import DevState

_log = logging.getLogger("ublkwatch")

_PARAMS_TIMEOUT_S = 10.0
_COMMAND_S = 10.0  # what one control command may take beyond the retries and waits that it has
_SAVE_RETRY_S = 1.0
_HOUSEKEEPING_S = 5.0


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

    async def start(self, tag: str, command: tuple[str, ...]) -> int: ...
    def listen(self, tag: str) -> None: ...
    def write_line(self, tag: str, line: str) -> None: ...
    def how_ended(self, pid: int) -> str: ...
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
    publish: Callable[[Transition], None]
    clock: Callable[[], float]
    wall: Callable[[], float]


class Monitor:
    """Keeps every device's record, and the order of things."""

    def __init__(
        self,
        edges: Edges,
        policy: Policy,
        commands: dict[int, tuple[str, ...]],
        records: dict[int, Record],
        specs: dict[int, Spec],
    ) -> None:
        """``records`` and ``specs`` are from a former life; ``policy`` is every device's base."""
        self._edges = edges
        self._policy = policy
        self._commands = commands
        self._former = records
        self._specs = specs
        self._records: dict[int, Record] = {}
        self._inbox: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._look = asyncio.Event()
        self.polls = 0

    # --- what others see -------------------------------------------------------------------------

    def records(self) -> list[Record]:
        """Return the devices as they are known now; those that are stopped are none."""
        return list(self._records.values())

    def policy(self, dev_id: int) -> Policy:
        """Return the policy of one device."""
        spec, record = self._specs.get(dev_id), self._records.get(dev_id)
        return replace(
            self._policy,
            has_spec=dev_id in self._commands,
            seen_live=bool(spec and record and spec.instance == record.instance),
        )

    def look(self) -> None:
        """Look at all devices now, and not only when the next poll is due."""
        self._look.set()

    def server_exited(self, server: ServerId) -> None:
        """Take the news of a watched process's end."""
        how = self._edges.launcher.how_ended(server.pid)
        for record in self.records():
            if server in (record.server, record.candidate):
                words = self._edges.launcher.last_words(_tag(record))
                said = f"{how}: {words}" if words and server == record.candidate else how
                self._post(record.dev_id, ServerExited(server, said))

    def ready(self, tag: str) -> None:
        """Take the news that an attempt's server waits for its line."""
        for record in self.records():
            if _tag(record) == tag:
                self._post(record.dev_id, Ready(record.seq))

    # --- the loop --------------------------------------------------------------------------------

    async def run(self, poll_interval_s: float) -> None:
        """Watch, for ever; cancel it to stop. The servers live on."""
        poll = asyncio.create_task(self._poll_for_ever(poll_interval_s))
        try:
            while True:
                dev_id, event = await self._inbox.get()
                self._take(dev_id, event)
        finally:
            poll.cancel()
            for timer in self._timers.values():
                timer.cancel()
            for task in self._tasks:
                task.cancel()

    def _post(self, dev_id: int, event: Event) -> None:
        self._inbox.put_nowait((dev_id, event))

    def _take(self, dev_id: int, event: Event) -> None:
        """Step one event: decide, commit, perform, publish."""
        before = self._records.get(dev_id)
        if before is None:
            return
        now = self._edges.clock()
        try:
            after, effects = recovery.step(before, event, now, self.policy(dev_id))
        except Exception:
            _log.exception("ublk %d: %r in phase %s", dev_id, event, before.phase.value)
            after, effects = _quarantined(before, now), ()
        if not self._commit(before, after, dev_id, event):
            return
        self._records[dev_id] = after
        if after.phase is Phase.GONE:
            self._forget(dev_id)
        else:
            self._arm(after)
            for effect in effects:
                self._perform(after, effect)
        if (before.phase, before.reason, before.seq) != (after.phase, after.reason, after.seq):
            name = type(event).__name__
            self._edges.publish(Transition(self._edges.wall(), now, before, after, name, effects))
        if after.phase is Phase.WATCHING and before.phase is not Phase.WATCHING:
            self._spawn(dev_id, self._learn_early(after))

    def _commit(self, before: Record, after: Record, dev_id: int, event: Event) -> bool:
        if _lasting(before) == _lasting(after) or after.phase is Phase.GONE:
            return True
        try:
            self._edges.store.save_record(after)
        except OSError as error:
            _log.error("ublk %d: record not saved (%s); nothing was done, trying again in %g s",
                       dev_id, error, _SAVE_RETRY_S)  # fmt: skip
            loop = asyncio.get_running_loop()
            loop.call_later(_SAVE_RETRY_S, self._post, dev_id, event)
            return False
        return True

    def _forget(self, dev_id: int) -> None:
        del self._records[dev_id]
        if timer := self._timers.pop(dev_id, None):
            timer.cancel()
        self._edges.store.drop_record(dev_id)

    def _arm(self, record: Record) -> None:
        if timer := self._timers.pop(record.dev_id, None):
            timer.cancel()
        if record.wake is not None:
            delay = max(0.0, record.wake - self._edges.clock())
            self._timers[record.dev_id] = asyncio.get_running_loop().call_later(
                delay, self._post, record.dev_id, Woken()
            )

    # --- looking ---------------------------------------------------------------------------------

    async def _poll_for_ever(self, interval_s: float) -> None:
        housekeeping = 0.0
        while True:
            self._look.clear()
            ids = self._edges.dev_ids() | self._records.keys() | self._former.keys()
            await asyncio.gather(*(self._read(dev_id) for dev_id in ids))
            self.polls += 1
            if self._edges.clock() >= housekeeping:
                self._edges.launcher.keep_only({_tag(record) for record in self.records()})
                self._edges.launcher.trim()
                housekeeping = self._edges.clock() + _HOUSEKEEPING_S
            try:
                async with asyncio.timeout(interval_s):
                    await self._look.wait()
            except TimeoutError:
                pass

    async def _read(self, dev_id: int) -> None:
        """GET_DEV_INFO, and what we make of a device that is new to us."""
        try:
            info = await self._edges.ctrl.get_dev_info(dev_id)
        except OSError as error:
            if error.errno == errno.ENODEV:
                self._abandon_former(dev_id)
                self._post(dev_id, InfoMissing())
            else:
                _log.warning("ublk %d: %s", dev_id, error)
            return
        instance = self._edges.instance(dev_id)
        record = self._records.get(dev_id)
        if instance is None and info.state is not DevState.DEAD:
            return  # its disk comes or goes just now; the next read sees which
        if record is None:
            if info.state is DevState.DEAD or instance is None:
                self._abandon_former(dev_id)
                return  # added and not started yet, or stopped: no disk, nothing to keep alive
            record = await self._meet(dev_id, instance)
        server = self._identify(info, record)
        self._post(dev_id, InfoRead(info, instance or record.instance, server))

    async def _meet(self, dev_id: int, instance: str) -> Record:
        former = self._former.get(dev_id)
        if former is None or former.instance != instance:
            self._abandon_former(dev_id)
            record = Record(dev_id=dev_id, instance=instance, since=self._edges.clock())
            self._records[dev_id] = record
            return record
        del self._former[dev_id]
        tag = _tag(former)
        found = await asyncio.to_thread(self._edges.servers.tagged, tag)
        candidates = [server for server in found if server != former.server]
        self._edges.launcher.listen(tag)
        self._records[dev_id] = former
        self._post(dev_id, Resumed(candidates[0] if candidates else None))
        return former

    def _abandon_former(self, dev_id: int) -> None:
        """End what an attempt of our former life left of a device that is gone."""
        former = self._former.pop(dev_id, None)
        if former is not None:
            self._edges.store.drop_record(dev_id)
            if former.phase in ATTEMPTING:
                self._spawn(dev_id, self._edges.servers.end_tagged(_tag(former)))

    def _identify(self, info: DevInfo, record: Record) -> ServerId | None:
        """Return the process that ublksrv_pid names, if it lives and really is the server.

        The number alone proves nothing: Linux before 6.17 stores what the server claimed.
        """
        if record.phase is not Phase.OBSERVED:
            for known in (record.server, record.candidate):
                if known is not None and known.pid == info.ublksrv_pid:
                    return known  # watched by pidfd: its end would have been told
        server = self._edges.servers.identify(info.ublksrv_pid)
        if server and self._edges.holds(server.pid, f"/dev/ublkc{info.dev_id}"):
            return server
        return None

    # --- doing -----------------------------------------------------------------------------------

    def _perform(self, record: Record, effect: Effect) -> None:
        dev_id, tag, edges = record.dev_id, _tag(record), self._edges
        match effect:
            case ReadInfo():
                self._spawn(dev_id, self._read(dev_id))
            case Watch():
                edges.servers.watch(effect.server)
            case Kill():
                edges.servers.kill(effect.server)
            case Spawn():
                self._spawn(dev_id, self._start_server(record))
            case SendStart():
                self._spawn(dev_id, self._send_start(record))
            case WriteLine():
                self._write_line(record)
            case SendEnd():
                self._spawn(dev_id, self._send_end(record, effect.pid))
            case Cancel():
                edges.workers.cancel(tag)
            case EndAttempt():
                self._spawn(dev_id, self._end_attempt(record))

    def _spawn(self, dev_id: int, work: Coroutine[Any, Any, None]) -> None:
        """Run work as a task of its own; a bug in it harms this device only."""
        task = asyncio.get_running_loop().create_task(work, name=f"ublk {dev_id}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(dev_id, done))

    def _ended(self, dev_id: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("ublk %d: %r", dev_id, error, exc_info=error)
            if (record := self._records.get(dev_id)) is not None:
                now = self._edges.clock()
                self._records[dev_id] = after = _quarantined(record, now)
                self._edges.publish(Transition(self._edges.wall(), now, record, after, "Bug"))

    async def _start_server(self, record: Record) -> None:
        dev_id, seq = record.dev_id, record.seq
        try:
            await self._learn(record)
            pid = await self._edges.launcher.start(_tag(record), self._commands[dev_id])
        except OSError as error:
            self._post(dev_id, SpawnFailed(seq, str(error)))
            return
        server = self._edges.servers.identify(pid)
        if server is None:
            how, words = (
                self._edges.launcher.how_ended(pid),
                self._edges.launcher.last_words(_tag(record)),
            )
            self._post(dev_id, SpawnFailed(seq, f"{how}: {words}" if words else how))
        else:
            self._post(dev_id, Spawned(seq, server))

    async def _learn_early(self, record: Record) -> None:
        try:
            await self._learn(record)
        except OSError as error:
            _log.warning("%s; tried again when its server is lost", error)

    async def _learn(self, record: Record) -> None:
        """Read and keep the queue config, once in the life of a device."""
        spec, info = self._specs.get(record.dev_id), record.info
        command = self._commands.get(record.dev_id)
        if info is None or command is None or (spec and spec.instance == record.instance):
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
        spec = Spec(record.dev_id, record.instance, queue, command)
        self._specs[record.dev_id] = spec
        try:
            await asyncio.to_thread(self._edges.store.save_spec, spec)
        except OSError as error:
            _log.warning("ublk %d: spec not saved: %s", record.dev_id, error)

    async def _send_start(self, record: Record) -> None:
        busy_s = self._policy.start_timeout_s
        error = await self._call(
            "START_USER_RECOVERY", record, timeout_s=busy_s + _COMMAND_S, busy_s=busy_s
        )
        self._post(record.dev_id, StartReplied(record.seq, error))

    async def _send_end(self, record: Record, pid: int) -> None:
        timeout_s = self._policy.attach_timeout_s + _COMMAND_S
        error = await self._call("END_USER_RECOVERY", record, timeout_s=timeout_s, pid=pid)
        self._post(record.dev_id, EndReplied(record.seq, error))

    async def _call(
        self, command: str, record: Record, *, timeout_s: float, **arguments: float
    ) -> int:
        try:
            await self._edges.workers.call(
                command, record.dev_id, _tag(record), timeout_s=timeout_s, **arguments
            )
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _write_line(self, record: Record) -> None:
        """Write the go. Where it cannot be written nobody attaches, and the deadline sees that."""
        queue = self._specs[record.dev_id].queue
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
            self._edges.launcher.write_line(_tag(record), json.dumps(line))
        except OSError as error:
            _log.error("ublk %d: line of attempt %d: %s", record.dev_id, record.seq, error)

    async def _end_attempt(self, record: Record) -> None:
        try:
            async with asyncio.timeout(self._policy.stop_timeout_s):
                await self._edges.servers.end_tagged(_tag(record))
        except TimeoutError:
            return  # the machine's own deadline speaks of it
        self._post(record.dev_id, AttemptOver(record.seq))


def _tag(record: Record) -> str:
    """Name an attempt so that no other of this boot is called the same."""
    return f"{record.dev_id}-{record.instance.rpartition('/')[2]}-{record.seq}"


def _lasting(record: Record) -> Record:
    """Return what of a record is worth a commit: not what the next read or timer tells anew."""
    return replace(record, info=None, agreed=0, wake=None)


def _quarantined(record: Record, now: float) -> Record:
    return replace(record, phase=Phase.FAILED, reason=Reason.INTERNAL_ERROR, since=now, wake=None)
