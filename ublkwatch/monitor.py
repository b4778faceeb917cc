"""The shell around the machine: one inbox, step, save, perform, publish.

Promises, each with a test: one task steps every event; the record is committed before its effects
run, and if that fails nothing is performed; an effect is answered with its attempt's number;
effects of one device never wait for another's. The edges come in as Protocols: nothing here knows
a syscall, a file or a library.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, fields, replace
from operator import attrgetter

from ublkwatch import ailing, chronicle, orders, recovery
from ublkwatch.care import Spec
from ublkwatch.events import (
    Asked,
    Event,
    Ready,
    ServerAils,
    ServerExited,
    ShutdownBegun,
    Transition,
    Woken,
)
from ublkwatch.lookout import Lookout
from ublkwatch.model import UNKNOWN, Phase, Policy, Reason, Record, ServerId
from ublkwatch.perform import Edges, Performer
from ublkwatch.pulse import Pulse
from ublkwatch.starts import tag_of
from ublkwatch.unsaved import Unsaved
from ublkwatch.who import Who

_log = logging.getLogger("ublkwatch")

_SAVE_RETRY_S = 1.0
_STALL_S = 2.0  # without a turn of the loop, beyond the poll's interval
_HOUSEKEEPING_S = 5.0
_UNKNOWN = "no such device is known"


@dataclass(frozen=True, slots=True)
class _DiskAgain:
    """It is time to see whether the disk takes records again; ``fact`` was just read."""

    fact: Event | None


class Monitor:
    """Keeps every device's record, and the order of things."""

    def __init__(
        self,
        edges: Edges,
        policy: Policy,
        records: dict[int, Record],
        specs: dict[int, Spec],
    ) -> None:
        """Begin with what a former life left; ``policy`` is for devices that have no care."""
        self._edges = edges
        self._former = records
        self._records: dict[int, Record] = {}
        self._inbox: asyncio.Queue[tuple[int, Event | _DiskAgain]] = asyncio.Queue()
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._unsaved = Unsaved()
        self._who = Who(edges, policy, specs, self._records.get)
        self.care, self.origin = self._who.care, self._who.origin
        self._performer = Performer(edges, specs, self)
        self.standbys = self._performer.standbys
        self._pulse = Pulse(edges, self, self._performer.spawn)
        self._lookout = Lookout(
            edges, self, self._performer, self._who, self._unsaved, self._records, records
        )
        self._waiting: dict[int, asyncio.Future[str]] = {}  # for an order to be taken, by its id()
        self._shutting_down = False
        self._look = asyncio.Event()
        self._interval_s = 0.0
        self._ran = edges.clock()
        self.polls = 0
        self._changes = 0

    # --- what others see -------------------------------------------------------------------------

    def records(self) -> list[Record]:
        """Return the devices as they are known now; those that are stopped are none."""
        return list(self._records.values())

    def all_records(self) -> list[Record]:
        """Return all devices of which there is a record, those of a former life, too."""
        return [*self._records.values(), *self._former.values()]

    @property
    def changes(self) -> int:
        """How often something has changed of what is known of the devices."""
        return self._changes + self._who.changes

    def policy(self, dev_id: int, event: Event | None = None) -> Policy:
        """Return the policy of one device, with what is true of it just now, as ``event`` comes."""
        record, beside = self._records.get(dev_id), ""
        policy = self._who.policy(dev_id, record)
        if record is not None and (record.ill is not None or isinstance(event, ServerAils)):
            beside = ailing.bystander(record, self.records(), policy.generation)
        if not self._shutting_down and not beside:
            return policy
        return replace(policy, shutting_down=self._shutting_down, bystander=beside)

    async def refresh(self, dev_id: int) -> None:
        """Ask anew in whose care a device is, and wait for it."""
        if (record := self._records.get(dev_id)) is not None:
            await self._who.refresh(record)

    def reconsider(self) -> None:
        """Ask anew in whose care each device is: rules have come or gone."""
        self._who.reconsider()
        self.look()

    def ask(self, dev_id: int, asked: Asked) -> str:
        """Take an operator's order; return why it is refused, or "" when it is taken up."""
        record = self._records.get(dev_id)
        if record is None:
            return _UNKNOWN
        if not (refusal := orders.objection(record, asked.order, self.policy(dev_id))):
            self.post(dev_id, asked)
        return refusal

    async def order(self, dev_id: int, asked: Asked) -> str:
        """Take an order as ask() does, and return once the machine has: facts are faster."""
        if refusal := self.ask(dev_id, asked):
            return refusal
        taken = asyncio.get_running_loop().create_future()
        self._waiting[id(asked)] = taken
        try:
            return str(await taken)
        finally:
            del self._waiting[id(asked)]

    def look(self) -> None:
        """Look at all devices now, and not only when the next poll is due."""
        self._look.set()

    def server_exited(self, server: ServerId, seen: str = UNKNOWN) -> None:
        """Take the news of a watched process's end; who waited for it knows best how it ended."""
        how, code = self._edges.launcher.how_ended(server.pid)
        how = seen if how == UNKNOWN else how
        self.standbys.exited(server, how)
        for record in self.records():
            if server == record.candidate and self._edges.launcher.must_ask(server.pid):
                self._performer.spawn(record.dev_id, self._performer.ends.tell_end(record, server))
            elif server in (record.server, record.candidate):
                words = self._edges.launcher.last_words(tag_of(record))
                said = f"{how}: {words}" if words and server == record.candidate else how
                self.post(record.dev_id, ServerExited(server, said, code))

    def ready(self, tag: str) -> None:
        """Take the news that an attempt's server waits for its line."""
        self._performer.ready(tag)
        for record in self.records():
            if tag_of(record) == tag:
                self.post(record.dev_id, Ready(record.seq))

    # --- the loop --------------------------------------------------------------------------------

    async def run(self, poll_interval_s: float) -> None:
        """Watch, for ever; cancel it to stop. The servers live on."""
        self._interval_s, self._ran = poll_interval_s, self._edges.clock()
        try:
            # Neither may end without the other: a supervisor that went blind must not look well.
            async with asyncio.TaskGroup() as group:
                group.create_task(self._poll_for_ever(poll_interval_s))
                group.create_task(self._step_for_ever())
        finally:
            for timer in self._timers.values():
                timer.cancel()
            self._performer.close()

    async def _step_for_ever(self) -> None:
        while True:
            dev_id, event = await self._inbox.get()
            if isinstance(event, _DiskAgain):
                self._catch_up(dev_id, event.fact)
            elif dev_id in self._unsaved:
                self._unsaved.keep(dev_id, event)
            else:
                self._take(dev_id, event)

    def post(self, dev_id: int, event: Event) -> None:
        self._inbox.put_nowait((dev_id, event))

    def _take(self, dev_id: int, event: Event) -> None:
        """Step one event: decide, commit, perform, publish."""
        before = self._records.get(dev_id)
        if before is None:
            self._taken(event, _UNKNOWN)
            return
        self.notice_stall()
        now = self._edges.clock()
        before, policy = self._records[dev_id], self.policy(dev_id, event)
        try:
            after, effects = recovery.step(before, event, now, policy)
            if not self._commit(before, after, dev_id):
                self._unsaved.keep(dev_id, event)  # and all that come behind it
                self._performer.spawn(dev_id, self._try_again(dev_id))
                return
            if after != before:
                self._put(after)
            self._edges.meter.stepped(after, now)
            if after.phase is Phase.GONE:
                self._forget(dev_id)
            else:
                self._arm(after)
                for effect in effects:
                    self._performer.perform(after, effect)
        except Exception as error:  # noqa: BLE001 - a bug harms this device only
            self.quarantine(dev_id, error)
            self._taken(event, "a bug in ublkwatch: its log has the details")
            return
        if isinstance(event, Asked):
            self._taken(event, orders.objection(before, event.order, policy))
        if chronicle.told(before) != chronicle.told(after):
            name = type(event).__name__
            self._edges.publish(Transition(self._edges.wall(), now, before, after, name, effects))
        if after.phase in (Phase.PROBATION, Phase.WATCHING) and before.phase is not after.phase:
            self._performer.up(tag_of(after))
        if after.phase is Phase.WATCHING and before.phase is not Phase.WATCHING:
            self._performer.spawn(dev_id, self._performer.learn_early(after))
        if before.phase is Phase.WATCHING and after.phase is not Phase.WATCHING:
            self._performer.spawn(dev_id, self._notice_shutdown())

    def _taken(self, event: Event, refusal: str) -> None:
        waiting = self._waiting.get(id(event))
        if waiting is not None and not waiting.done():
            waiting.set_result(refusal)

    async def _notice_shutdown(self) -> None:
        """Ask whether the host shuts down: only then a server's end is no crash.

        Beside the recovery, which goes no further than starting a server before this is answered.
        """
        if not self._shutting_down and await self._edges.launcher.shutting_down():
            self._shutting_down = True
            self._changes += 1
            _log.warning("the host shuts down: nothing is recovered any more")
            for record in self.records():
                self.post(record.dev_id, ShutdownBegun())

    def notice_stall(self) -> None:
        """Give every deadline back the time in which we did not run; the poll keeps the beat."""
        now = self._edges.clock()
        slept_s = now - self._ran - self._interval_s
        self._ran = now
        if slept_s > _STALL_S:
            _log.warning("did not run for %.1f s; all deadlines are put off", slept_s)
            for dev_id, record in self._records.items():
                self._put(recovery.delayed(record, slept_s))
                self._arm(self._records[dev_id])

    def _commit(self, before: Record, after: Record, dev_id: int) -> bool:
        if _lasting(before) == _lasting(after) or after.phase is Phase.GONE:
            return True
        try:
            self._edges.store.save_record(after)
        except OSError as error:
            _log.error("ublk %d: record not saved (%s); nothing was done, trying again in %g s",
                       dev_id, error, _SAVE_RETRY_S)  # fmt: skip
            self._edges.meter.dropped("record")
            return False
        return True

    async def _try_again(self, dev_id: int) -> None:
        await asyncio.sleep(_SAVE_RETRY_S)
        self._inbox.put_nowait((dev_id, _DiskAgain(await self._lookout.ask(dev_id))))

    def _catch_up(self, dev_id: int, now_true: Event | None) -> None:
        """Step what was put off, as far as the disk takes it."""
        waiting = self._unsaved.release(dev_id, [now_true] if now_true else [])
        while waiting and dev_id not in self._unsaved:
            self._take(dev_id, waiting.popleft())
        if dev_id in self._unsaved:
            self._unsaved.keep(dev_id, *waiting)
        elif (record := self._records.get(dev_id)) is not None:
            self._arm(record)

    def quarantine(self, dev_id: int, error: BaseException) -> None:
        """Keep the hands off a device over which our own code failed; the others live on."""
        _log.error("ublk %d: a bug in ublkwatch: %r", dev_id, error, exc_info=error)
        self._unsaved.drop(dev_id)  # else nobody would take what is told of it any more
        before, now = self._records.get(dev_id), self._edges.clock()
        if before is not None and before.reason is not Reason.INTERNAL_ERROR:
            after = recovery.quarantined(before, repr(error), now)
            self._put(after)
            self._edges.meter.stepped(after, now)
            self._arm(after)
            self._edges.publish(Transition(self._edges.wall(), now, before, after, "Bug"))

    def _forget(self, dev_id: int) -> None:
        del self._records[dev_id]
        self._changes += 1
        if timer := self._timers.pop(dev_id, None):
            timer.cancel()
        self._unsaved.drop(dev_id)
        self._who.forget(dev_id)
        self._edges.kept.drop(dev_id)
        self._edges.store.drop_record(dev_id)

    def _arm(self, record: Record) -> None:
        if timer := self._timers.pop(record.dev_id, None):
            timer.cancel()
        if (wake := record.next_wake()) is not None:
            delay = max(0.0, wake - self._edges.clock())
            self._timers[record.dev_id] = asyncio.get_running_loop().call_later(
                delay, self.post, record.dev_id, Woken()
            )

    # --- looking ---------------------------------------------------------------------------------

    async def _poll_for_ever(self, interval_s: float) -> None:
        housekeeping = late_s = 0.0
        while True:
            self._look.clear()
            began = self._edges.clock()
            self.notice_stall()
            failed = await self._lookout.all()
            self._edges.meter.polled(self._edges.clock() - began, failed=failed)
            self._pulse.look(self.records(), 2 * interval_s + _STALL_S)
            self.standbys.look()
            self.polls += 1
            self._edges.beat(late_s)
            if self._edges.clock() >= housekeeping:
                self._performer.tidy(self.all_records())
                housekeeping = self._edges.clock() + _HOUSEKEEPING_S
            late_s = await self._rest(interval_s)

    async def _rest(self, interval_s: float) -> float:
        """Wait for the next poll; return how late we were, where we were kept from running."""
        due = self._edges.clock() + interval_s
        try:
            async with asyncio.timeout(interval_s):
                await self._look.wait()
        except TimeoutError:
            return max(0.0, self._edges.clock() - due)
        return 0.0

    async def read(self, dev_id: int) -> None:
        """Look at one device."""
        await self._lookout.read(dev_id)

    def met(self, record: Record) -> None:
        """Take the record of a device that was seen for the first time."""
        self._put(record)

    def _put(self, record: Record) -> None:
        """Let this be what is known of a device now."""
        self._records[record.dev_id] = record
        self._changes += 1


# What of a record is worth a commit: not what the next read or timer tells anew.
_lasting = attrgetter(*({each.name for each in fields(Record)} - {"info", "agreed", "wake"}))
