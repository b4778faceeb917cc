"""Laws of the machine over whatever can be told to it, in any order that the world allows.

A small world keeps the books: what is with the kernel, which processes live, which START was
accepted. Bytes choose among the facts that it allows next, so that stories get far.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from draw import ALPHABET, FRESH, INFO, INSTANCE, POLICIES, everything
from hypothesis import Phase as HypothesisPhase
from hypothesis import given, settings
from hypothesis import strategies as st

from ublkwatch.deaf import DEAF
from ublkwatch.events import (
    Asked,
    AttemptOver,
    AttemptShared,
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
    InfoMissing,
    InfoRead,
    Kill,
    ReadInfo,
    Ready,
    Resumed,
    SendEnd,
    SendStart,
    SendStop,
    ServerAils,
    ServerExited,
    ServerFound,
    ServerWell,
    ShutdownBegun,
    Spawn,
    Spawned,
    SpawnFailed,
    StartReplied,
    StopReplied,
    Watch,
    Woken,
    WriteLine,
)
from ublkwatch.model import (
    Ailment,
    Armed,
    Attach,
    Exhausted,
    Generation,
    Handoff,
    Order,
    Phase,
    Policy,
    Record,
    Remedy,
    ServerId,
    SpawnVerdict,
)
from ublkwatch.orders import objection
from ublkwatch.recovery import answer, step
from ublkwatch.uapi import DevState

# Fewer where a mutant of the machine has to be caught quickly, and always the same ones there.
EXAMPLES = int(os.environ.get("UBLKWATCH_LAW_EXAMPLES", "20000"))
ALL = EXAMPLES >= 20000
settings.register_profile(
    "laws",
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES <= 20000,  # who asks for more gets others
    phases=tuple(HypothesisPhase) if ALL else (HypothesisPhase.generate,),
)
LAWS = settings.get_profile("laws")

LAST = {Phase.OBSERVED, Phase.WATCHING, Phase.HELD, Phase.FAILED, Phase.GONE}
ACTS = (Spawn, SendStart, SendEnd, SendStop, WriteLine, Decide)
CHOICES = tuple(
    replace(policy, attempts_max=attempts, on_exhausted=exhausted, chance=chance, on_stall=remedy)
    for policy in POLICIES
    for attempts, chance, remedy in ((1, 0.0, Remedy.ALERT), (3, 1.0, Remedy.KILL))
    for exhausted in Exhausted
)
REPLIES: dict[type[Effect], Callable[[int, int], Event]] = {
    SendStart: StartReplied,
    SendEnd: EndReplied,
    SendStop: StopReplied,
}
reached: set[Phase] = set()


def read(state: DevState | int, server: ServerId | None = None, pid: int = -1) -> InfoRead:
    return InfoRead(replace(INFO, state=state, ublksrv_pid=pid), INSTANCE, server)


@dataclass
class World:
    """What is true, whatever the machine makes of it."""

    policy: Policy
    record: Record = field(default_factory=lambda: Record(dev_id=0, instance=INSTANCE))
    now: float = 0.0
    pid: int = 10
    command: type[Effect] | None = None  # with the kernel
    processes: set[ServerId] = field(default_factory=set)  # of the attempt, alive
    spawning: bool = False
    started: bool = False  # a process of this attempt was
    finding: bool = False
    looking: float | None = None  # when the last look for holders began
    free: bool = False  # what the last look said that began behind the kernel's word
    accepted: bool = False  # START was, in this round
    touched: bool = False  # a server may have begun to attach
    half: bool = False  # and was ended before END was done
    begun: int = 0  # attempts, since somebody had a say
    said_fail: bool = False

    def facts(self) -> list[Event]:
        """Return what may happen next; the likely ones more than once."""
        record, seq = self.record, self.record.seq
        serving = record.server or record.candidate
        facts: list[Event] = [
            *[Woken()] * 3,
            *[read(DevState.QUIESCED)] * 3,
            read(DevState.LIVE),
            read(DevState.LIVE, serving),
            read(DevState.LIVE, serving),
            read(DevState.LIVE, record.ended, 9),
        ]
        for server in (record.server, record.candidate):
            if server:
                facts += [ServerExited(server, "exit", code) for code in (0, 1)]
        if self.spawning:
            self.pid += 1
            facts += [Spawned(seq, ServerId(self.pid, 1, "boot"))] * 6
            facts += [SpawnFailed(seq, "", verdict) for verdict in SpawnVerdict]
            facts += [SpawnFailed(seq, "exit", ran=True, code=code) for code in (0, 1)]
        elif record.phase is Phase.DRAINING:
            facts += [Ready(seq)] * 4
        if self.command:
            reply = REPLIES[self.command]
            facts += [reply(seq, 0)] * 5
            errors = (errno.EBUSY, errno.EINVAL, errno.EINTR, errno.ETIMEDOUT, errno.ENODEV)
            facts += [reply(seq, error) for error in errors]
        if record.phase is Phase.STOPPING or not record.over:
            facts += [AttemptOver(seq)] * 3 if record.phase is Phase.STOPPING else []
        if record.phase in (Phase.STOPPING, Phase.FAILING, Phase.DRAINING):
            living = [server for server in (record.server, record.candidate) if server]
            facts += [AttemptShared(seq, server, "others") for server in living]
        if self.looking is not None:
            facts += [HoldersFound(seq, "", free, self.looking) for free in (True, True, False)]
        if self.finding:
            facts += [ServerFound(seq, None), ServerFound(seq, ServerId(seq + 500, 1, "boot"))]
        if record.phase is Phase.DECIDING:
            facts += [Decided(seq, 10), Decided(seq, 20), Decided(seq, 0)]
        return facts

    def rare(self) -> list[Event]:
        """Return what may happen at any time, and seldom does."""
        old = self.record.seq - 1
        return [
            *(Asked(order) for order in Order),
            *(Asked(order) for order in Order),
            Asked(Order.HOLD, until=self.now + 5),
            ShutdownBegun(),
            *[Resumed(self.record.candidate)] * 2,
            Resumed(None),
            read(DevState.LIVE, FRESH),
            read(DevState.DEAD),
            read(7),
            InfoMissing(),
            InfoRead(INFO, "boot/2", FRESH),
            *(StartReplied(old, 0), EndReplied(old, 0), AttemptOver(old), Ready(old)),
            Spawned(old, FRESH),
            *(ServerAils(self.record.server or FRESH, kind, "", self.now) for kind in Ailment),
            ServerWell(self.record.server or FRESH),
        ]

    def choose(self, which: int, how: int) -> Event:
        facts = self.rare() if how % 16 == 0 else self.facts()
        event = facts[which % len(facts)]
        if isinstance(event, Woken):
            due = self.record.next_wake()
            self.now = max(self.now, due) if due is not None and how % 5 else self.now + 100
        elif how % 3 == 0:
            self.now += (0.001, 1.0, 40.0)[how % 9 // 3]
        return event

    def take(self, event: Event) -> None:
        """Tell the machine, and hold what it says against the laws."""
        if isinstance(event, ShutdownBegun):
            self.policy = replace(self.policy, shutting_down=True)
        self.note_fact(event)
        before = self.record
        self.record, effects = step(before, event, self.now, self.policy)
        assert (self.record, effects) == step(before, event, self.now, self.policy), "deterministic"
        reached.add(self.record.phase)
        self.check_bounds(before, event, effects)
        self.check_hands(before, event, effects)
        if self.record.phase in (Phase.WATCHING, Phase.PROBATION):
            self.half = self.touched = self.accepted = False  # LIVE: the round is complete
        for effect in effects:
            self.check_effect(before, event, effect)
            self.note_effect(effect)
        if ALL and before.phase is not self.record.phase:
            edge = (before.phase, self.record.phase)
            assert edge in everything().edges, f"drawn: {edge} by {event}"
        if isinstance(event, Woken):
            self.check_progress()

    def note_fact(self, event: Event) -> None:  # noqa: C901, PLR0912 - an arm for each
        seq = self.record.seq
        match event:
            case Resumed():
                self.command, self.spawning, self.finding = None, False, False
                self.started, self.looking = True, None  # for all that is known
                self.begun = 0
            case Asked(order=order):
                self.begun = 0
                taken_up = not objection(self.record, order, self.policy)
                delegated = self.policy.handoff is Handoff.DELEGATED
                if delegated and taken_up and order in (Order.RETRY, Order.RECOVER):
                    self.half = self.touched = False  # the operator vouches for the delegate
            case Decided(code=10):
                self.begun = 0
            case Decided(code=20):
                self.said_fail = True
            case StartReplied(error=error) if event.seq == seq:
                self.command = None
                taken = self.policy.generation is Generation.G2 and error == errno.EINVAL
                if error == 0 or (taken and self.record.armed is Armed.UNSURE):
                    self.accepted, self.touched = True, False
            case EndReplied(error=error) if event.seq == seq:
                self.command = None
                if error == 0:
                    self.accepted = self.touched = self.half = False
            case StopReplied():
                self.command = None
            case Spawned(server=server) if event.seq == seq:
                self.spawning, self.started = False, True
                self.processes.add(server)
                self.half |= self.touched and self.record.phase is Phase.STOPPING
            case SpawnFailed(ran=True) if event.seq == seq:
                self.spawning, self.started = False, True
                self.half |= self.touched and self.record.phase is Phase.STOPPING
            case SpawnFailed(verdict=verdict) if event.seq == seq:
                self.spawning = self.touched = False
                self.begun -= verdict is SpawnVerdict.LATER
            case ServerExited(server=server):
                self.processes.discard(server)
            case AttemptOver() if event.seq == seq:
                self.processes.clear()
                self.spawning = False
                self.touched &= self.started
            case HoldersFound(free=free, began=began):
                self.looking = None
                quiet = self.record.quiet_since
                self.free = free and quiet is not None and began >= quiet
            case ServerFound():
                self.finding = False

    def note_effect(self, effect: Effect) -> None:
        match effect:
            case SendStart() | SendEnd() | SendStop():
                self.command = type(effect)
            case Spawn():
                self.spawning = True
                self.touched |= self.policy.attach is Attach.START
                self.touched |= self.policy.handoff is Handoff.DELEGATED
            case WriteLine():
                self.touched = True
            case FindServer():
                self.finding = True
            case FindHolders():
                self.looking = self.now
            case EndAttempt():
                self.half |= self.touched and self.started

    def check_bounds(self, before: Record, event: Event, effects: tuple[Effect, ...]) -> None:
        record, policy = self.record, self.policy
        assert len(effects) <= 5, "bounded: effects"
        assert len(record.marks) <= 64, "bounded: marks"
        assert len(record.failures) <= 1000, "bounded: failures"
        if record.phase not in LAST:
            assert record.wake is not None, "who waits has a deadline"
        if before.phase is Phase.GONE:
            assert (record, effects) == (before, ()), "gone: stays gone"
        assert record.seq in (before.seq, before.seq + 1), "numbers: one after the other"
        if record.seq > before.seq:
            self.begun += 1
            assert before.over or isinstance(event, Resumed), "one attempt: the last one is over"
            assert not before.pending or isinstance(event, Resumed), "one attempt: no command left"
            assert self.command is None, "one attempt: nothing is with the kernel"
            self.started = self.free = False
        if isinstance(event, AttemptShared) and before.phase is Phase.DRAINING:
            self.begun -= record.phase is not before.phase  # not the attempt's fault
        if before.shared and before.phase is Phase.FAILED:
            ended = isinstance(event, ServerExited)
            self.begun -= ended and record.phase is not before.phase  # one more is allowed
            acts = (*ACTS, EndAttempt, Kill)
            late = isinstance(event, Spawned)  # of another attempt: it is ended, whoever waits
            assert ended or late or not any(isinstance(effect, acts) for effect in effects), (
                "shared: a server of other devices is left alone"
            )
        if record.phase in (Phase.WATCHING, Phase.OBSERVED):
            self.begun, self.said_fail = 0, False
        assert self.begun <= policy.attempts_max + 1, "budget: attempts are limited"
        assert len(record.failures) <= len(before.failures) + 1, "budget: counted once"
        passive = policy.generation is Generation.UNKNOWN or not policy.has_spec
        if passive:
            assert record.phase in (Phase.OBSERVED, Phase.GONE), "hands off: not ours"
            assert all(isinstance(effect, ReadInfo | Watch) for effect in effects) or isinstance(
                event, Spawned
            ), "hands off: only looked at"
        if isinstance(event, InfoRead) and event.info.state is DevState.DEAD:
            stopped = record.stopped or before.phase is Phase.FAILING
            assert stopped or record.phase in (Phase.GONE, Phase.STOPPING), "DEAD: not resurrected"
        if isinstance(event, InfoRead) and event.instance != INSTANCE:
            assert record.phase in (Phase.GONE, Phase.STOPPING), "instance: another device"
            assert not any(isinstance(effect, ACTS) for effect in effects), "instance: no act"

    def check_hands(self, before: Record, event: Event, effects: tuple[Effect, ...]) -> None:
        bound = self.record.held or self.policy.shutting_down
        ordered = isinstance(event, Asked)
        if bound and before.phase in LAST | {Phase.GRACE, Phase.BACKOFF} and not ordered:
            assert not any(isinstance(effect, ACTS) for effect in effects), "bound: nothing begins"
        if bound and self.record.phase is Phase.HELD:
            assert not any(isinstance(effect, ACTS) for effect in effects), "bound: held"
        if self.record.phase is Phase.HELD:
            assert bound, "bound: held by somebody"
        if isinstance(event, Asked) and event.order is Order.FORGET and effects:
            done = self.record.phase in (Phase.OBSERVED, Phase.STOPPING, Phase.GONE)
            assert done, "orders: forget takes the hands off"

    def check_effect(self, before: Record, event: Event, effect: Effect) -> None:
        record, policy = self.record, self.policy
        g2 = policy.generation is Generation.G2
        if isinstance(effect, SendStart | SendEnd | SendStop):
            assert self.command is None, "commands: one at a time"
            assert record.pending, "commands: written down"
        if isinstance(effect, SendStart | SendEnd | WriteLine):
            delegated = policy.handoff is Handoff.DELEGATED
            free = isinstance(effect, SendStart) and not g2
            assert free or not delegated, "delegated: no command of ours, but for START on G3"
            assert not (g2 and self.half), "half attached: neither START nor END on G2"
            assert record.server is None, "two servers: the old one is gone"
        match effect:
            case SendStart():
                assert record.armed in (Armed.SENT, Armed.UNSURE, Armed.YES), "START: marked"
                assert not (g2 and record.armed is Armed.YES), "START: once on G2"
            case SendEnd(pid=pid):
                assert self.accepted, "END: behind an accepted START"
                assert record.candidate, "END: for a candidate"
                assert record.candidate.pid == pid, "END: for the candidate"
                assert record.candidate != record.ended, "END: for one that lives"
            case Spawn() if g2 and policy.handoff is Handoff.DELEGATED:
                assert not self.half, "half attached: no delegate on G2"
                assert self.free, "delegated: nobody holds the device on G2"
            case SendStop():
                assert record.phase is Phase.FAILING, "STOP: only when failing"
                bound = record.held or policy.shutting_down
                assert not bound, "STOP: hands bound"
                assert record.server is None, "STOP: the server is dead"
                assert not self.processes, "STOP: the attempt's servers are dead"
                chosen = policy.on_exhausted is Exhausted.FAIL or policy.hold_timeout_s > 0
                assert chosen or self.said_fail, "STOP: the operator's choice"
                assert isinstance(event, InfoRead), "STOP: the state was read"
            case Kill() if isinstance(event, ServerAils):
                stall = event.kind is Ailment.STALL
                remedy = policy.on_stall if stall else policy.on_dead_queue
                assert remedy is Remedy.KILL, "ailing: ended by the operator's choice"
                bound = record.held or policy.shutting_down
                assert not bound, "ailing: hands bound"
                assert event.server == record.server, "ailing: the one that serves"
            case Cancel():
                assert before.pending or record.pending, "Cancel: something is with the kernel"

    def check_progress(self) -> None:
        """Wake it again and again at this very moment: it must come to rest."""
        record = self.record
        for _ in range(8):
            due = record.next_wake()
            if due is None or due > self.now or record.phase is Phase.GONE:
                return
            record, _effects = step(record, Woken(), self.now, self.policy)
        pytest.fail(f"busy loop: {record}")


@pytest.mark.timeout(900)  # to find a shorter story of a failure takes its time
@settings(LAWS)
@given(st.binary(min_size=16, max_size=90), st.sampled_from(CHOICES))
def test_the_machine_keeps_its_laws(choices: bytes, policy: Policy) -> None:
    world = World(policy)
    for which, how in zip(choices[::2], choices[1::2], strict=False):
        world.take(world.choose(which, how))


def test_the_laws_were_tried_in_every_phase() -> None:
    assert reached == set(Phase)


# --- what changes nothing ------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_every_phase_answers_every_fact_and_what_changes_nothing_is_written_down() -> None:
    every = {(phase, type(told.event)) for phase in Phase for told in ALPHABET}
    written = {(phase, event) for phase, events in DEAF.items() for event in events}
    seen = everything().changes
    assert set(DEAF) == set(Phase)
    assert not written & seen, "a fact that matters is not listened to"
    assert every - written == seen, "a fact that changes nothing is not written down"


@pytest.mark.timeout(600)
@settings(LAWS, max_examples=min(EXAMPLES, 1500))
@given(st.binary(min_size=16, max_size=60), st.sampled_from(CHOICES))
def test_what_is_not_listened_to_would_change_nothing(choices: bytes, policy: Policy) -> None:
    world = World(policy)
    for which, how in zip(choices[::2], choices[1::2], strict=False):
        world.record, _ = step(world.record, world.choose(which, how), world.now, world.policy)
        record = world.record
        for told in ALPHABET:
            if type(told.event) in DEAF[record.phase]:
                event: Event = told.event
                if hasattr(event, "seq"):
                    event = replace(event, seq=record.seq)  # type: ignore[arg-type]
                assert answer(record, event, world.now, world.policy) == (record, ())
