"""Servers that live while I/O hangs in them: looked for with every poll.

A part of the shell. Two things are looked at: whether the device's requests flow, by the block
layer's counters, and whether the threads are there that the server declared to serve its queues.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakValueDictionary

from ublkwatch import symptoms
from ublkwatch.events import Event, ServerAils, ServerWell
from ublkwatch.model import Ailment, DevInfo, Phase, Policy, Record, ServerId, Traffic
from ublkwatch.perform import Edges
from ublkwatch.symptoms import Flow, Thread
from ublkwatch.together import Together
from ublkwatch.uapi import DevFlags, DevState

_log = logging.getLogger("ublkwatch")

_GAP_S = 0.5  # between two looks at its threads, which tell who is busy
_SURE_S = 0.25  # between two looks that both miss a thread: who ends, ends thread by thread
_AGAIN_S = 30.0  # until the cause of a stall that lasts is looked for anew
_FILES_S = 5.0  # that run files may take
_ASK_S = 2.0  # until it is asked what it declares: who has just come back needs the CPU
_ASK_MAX_S = 64.0  # who has declared no thread for so long will not


class Caller(Protocol):
    """monitor.Monitor, as far as it is spoken to from here."""

    def policy(self, dev_id: int) -> Policy: ...
    def post(self, dev_id: int, event: Event) -> None: ...
    async def read(self, dev_id: int) -> None: ...


@dataclass(eq=False)
class _Process:
    """A server, which may serve many devices: to look at its threads for each takes too long."""

    threads: Together[dict[int, Thread]]
    names: dict[int, str] = field(default_factory=dict)  # of its threads, at the first look


@dataclass
class _Patient:
    """What was seen of one server that serves one device."""

    server: ServerId
    process: _Process
    flow: Flow | None = None
    declared: tuple[int, ...] = ()
    asked: int = 0  # how often what it declares was asked for
    ask_at: float = 0.0
    again_at: float = 0.0  # when what was told is told anew, if it lasts
    attended: bool = False  # somebody looks at its threads just now
    # As of the last look that has found nothing to do: its record, and its disk's idle traffic.
    calm: tuple[Record, Traffic] | None = None


class Pulse:
    """Feels the pulse of every server that serves a device of ours."""

    def __init__(
        self,
        edges: Edges,
        monitor: Caller,
        spawn: Callable[[int, Coroutine[Any, Any, None]], None],
    ) -> None:
        """``spawn`` runs what takes time, about one device."""
        self._edges, self._threads = edges, edges.threads
        self._monitor, self._spawn = monitor, spawn
        self._patients: dict[int, _Patient] = {}
        self._processes: WeakValueDictionary[ServerId, _Process] = WeakValueDictionary()
        self._looked = 0.0
        self._alive: dict[int, set[int]] = {}  # threads by process, as of this look

    def look(self, records: Iterable[Record], beat_s: float) -> None:
        """Look at all devices that are served; ``beat_s`` is the longest time between two looks.

        Of one that is as calm as it was there is nothing to be seen.
        """
        patients, now, idle = {}, self._edges.clock(), self._edges.idle()
        self._alive = {}
        for record in records:
            live = record.info is not None and record.info.state is DevState.LIVE
            if record.phase is Phase.WATCHING and record.server and live:
                patient = self._patients.get(record.dev_id)
                if patient is None or patient.server != record.server:
                    process = self._process(record.server)
                    patient = _Patient(record.server, process, ask_at=now + _ASK_S)
                patients[record.dev_id] = patient
                traffic = idle.get(record.dev_id)
                if self._as_calm(patient, record, traffic, now):
                    continue
                try:
                    self._examine(record, patient, traffic, beat_s)
                except Exception as error:  # noqa: BLE001 - as below
                    _log.error("ublk %d: its server was not looked at: %r", record.dev_id, error)
        self._patients, self._looked = patients, now

    def _process(self, server: ServerId) -> _Process:
        async def look() -> dict[int, Thread]:
            """Look in a thread of ours: of its own there may be hundreds."""
            return await asyncio.to_thread(self._threads.look, server.pid)

        return self._processes.setdefault(server, _Process(Together(look)))

    def _as_calm(
        self, patient: _Patient, record: Record, traffic: Traffic | None, now: float
    ) -> bool:
        calm = patient.calm
        return (
            calm is not None
            and calm[0] is record
            and calm[1] is traffic
            and (not self._lacks(patient) if patient.declared else now < patient.ask_at)
        )

    def _lacks(self, patient: _Patient) -> bool:
        """Tell whether a thread that it declared is gone."""
        if not patient.declared or self._threads.watched(patient.server, patient.declared):
            return False
        pid = patient.server.pid
        if pid not in self._alive:
            self._alive[pid] = self._threads.alive(pid)
        return not self._alive[pid].issuperset(patient.declared)

    def _examine(
        self, record: Record, patient: _Patient, idle: Traffic | None, beat_s: float
    ) -> None:
        was_calm, patient.calm = patient.calm is not None, None
        if record.ill is not None and record.ill.condemned:
            return
        now, dev_id, server = self._edges.clock(), record.dev_id, patient.server
        before, traffic = patient.flow, idle or self._edges.traffic(dev_id)
        if was_calm and before is not None:  # until the last look
            before = replace(before, seen=self._looked)
        if traffic is not None:
            patient.flow = symptoms.observe(before, traffic, now, beat_s)
        still_s = patient.flow.still_s if patient.flow else 0.0
        stalled = record.ill is not None and record.ill.kind is Ailment.STALL
        if stalled and before is not None and not still_s:
            self._monitor.post(dev_id, ServerWell(server))
        if patient.attended:
            return
        timeout_s = self._monitor.policy(dev_id).stall_timeout_s
        again = now >= patient.again_at
        if self._lacks(patient):
            if again or record.ill is None or stalled:
                self._attend(dev_id, patient, self._find_lost(dev_id, patient))
        elif timeout_s and still_s >= timeout_s and again:
            self._attend(dev_id, patient, self._find_cause(record, patient, now - still_s))
        elif not patient.declared and now >= patient.ask_at and record.info is not None:
            pause_s = _ASK_S * (1 << patient.asked)
            patient.ask_at = now + pause_s if pause_s <= _ASK_MAX_S else float("inf")
            patient.asked += 1
            self._attend(dev_id, patient, self._meet(patient, record.info))
        elif idle is not None and record.ill is None:
            patient.calm = record, idle

    def _attend(self, dev_id: int, patient: _Patient, work: Coroutine[Any, Any, None]) -> None:
        async def attend() -> None:
            try:
                await work
            except Exception as error:  # noqa: BLE001 - to look is no reason not to recover
                _log.error("ublk %d: its server was not looked at: %r", dev_id, error)
            finally:
                patient.attended = False

        patient.attended = True
        self._spawn(dev_id, attend())

    async def _meet(self, patient: _Patient, info: DevInfo) -> None:
        """Learn which threads it has, and which of them it declares to serve queues."""
        process = patient.process
        if not process.names:
            threads = await process.threads.ask()
            process.names = {tid: thread.name for tid, thread in threads.items()}
        async with asyncio.timeout(_FILES_S):  # which are on a tmpfs, as a rule
            declared = await asyncio.to_thread(self._threads.declared, info)
        patient.declared = declared
        self._threads.watch(patient.server, declared)

    async def _find_lost(self, dev_id: int, patient: _Patient) -> None:
        """Tell which declared threads are gone, unless the whole process is about to be."""
        missing = symptoms.lost(patient.declared, await patient.process.threads.ask())
        await asyncio.sleep(_SURE_S)
        missing &= symptoms.lost(patient.declared, await patient.process.threads.ask())
        await self._monitor.read(dev_id)  # it may have let go of the device, in good order
        if missing:
            tids = ", ".join(map(str, sorted(missing)))
            what = f"of process {patient.server.pid}: thread {tids}"
            self._tell(dev_id, patient, Ailment.DEAD_QUEUE, what, self._edges.clock())

    async def _find_cause(self, record: Record, patient: _Patient, since: float) -> None:
        """Tell of a stall, and what its threads do meanwhile."""
        dev_id, info = record.dev_id, record.info
        before, first = patient.flow, await patient.process.threads.ask()
        await asyncio.sleep(_GAP_S)
        second, traffic = await patient.process.threads.ask(), self._edges.traffic(dev_id)
        if before is None or traffic is None or not traffic.inflight:
            return
        if second and traffic.completed == before.completed:
            cause = symptoms.cause(patient.process.names, first, second, _GAP_S)
            quiesces = info is not None and DevFlags.QUIESCE in DevFlags(info.flags)
            kept_back = symptoms.kept_back(traffic, quiesces=quiesces)
            what = f"process {patient.server.pid}: {kept_back}{cause}"
            self._tell(dev_id, patient, Ailment.STALL, what, since)

    def _tell(self, dev_id: int, patient: _Patient, kind: Ailment, what: str, since: float) -> None:
        patient.again_at = self._edges.clock() + _AGAIN_S
        self._monitor.post(dev_id, ServerAils(patient.server, kind, what, since))
