"""The machine: (what we knew, a fact, the time, the policy) -> (what we now know, what to do).

Pure: no clock, no chance, no I/O, no exception. Total: every phase answers every event, and what
changes nothing is written down (``DEAF``). The rules, each held by a test:

 1. The state that the kernel reports is the truth; a pid is a hint, and a process is a ServerId.
 2. An outage begins when the watched process has ended, or when two reads in a row say QUIESCED
    or FAIL_IO. START goes out when a read agrees with the ended process, or two reads agree.
 3. Never two servers: one may touch the device only after the old one was seen gone and START was
    accepted, and an attempt is over (no process of it left, no command of it with the kernel)
    before the next one begins. A delegate sends START itself: on G3 it is started behind ours,
    which costs nothing there; on G2 when a look behind the kernel's word has found nobody who has
    the character device open, and ``settle_s`` later.
 4. END goes out only behind this round's own accepted START, for a server that was alive just then,
    and never while an earlier END is with the kernel.
 5. On G2 a START is taken once (``armed``), and a server that ends when it may have begun to attach
    may have half attached: no START and no END after that, the device is reported as such. So
    may a delegate, unless its exit code says that it sent nothing (``retry_exits``).
 6. DEAD means stopped on purpose: the attempt is ended and nothing is resurrected. What we stopped
    ourselves stays known, with the reason, until the device is deleted.
 7. Somebody else's recovery that reached LIVE is adopted, and our attempt ended.
 8. An attempt that fails is counted once, whatever symptom came first. ``attempts_max`` of them in
    one recovery, or within ``window_s``, exhaust the budget, and so does at once what another
    attempt cannot cure; ``stable_s`` of LIVE give it back. The pauses between attempts grow, are
    capped, and are drawn by chance. What pre_recover puts off is not counted.
 9. Replies carry the attempt's number; one of another attempt changes nothing.
10. Every phase that waits for somebody has a deadline, a server's from its start on, before that
    the queue's: only OBSERVED, WATCHING, HELD and FAILED last. Where ``hold_timeout_s`` is
    set, I/O waits no longer, unless an operator holds the device.
11. After our own death we go on from the saved record and from facts, with deadlines armed anew.
12. Held by an operator, or while the host shuts down, nothing is begun and nothing is ended; what
    has sent its START goes on to its end. STOP_DEV is sent by the operator's choice alone, when the
    server is known to be dead.
13. A process that serves other devices too is not ended for one device's sake: that one is given
    up, and has one more attempt when the process ends. Half attached on G2, it has none.
14. A server that lives while I/O hangs in it is ended only where the operator chose that (for a
    dead queue it is the default), or asks for it; then whomever else it serves, but for a device
    that is held, or on G2 attaches. It costs as much of the budget as an attempt that failed, and
    where that is spent the device is left as it is.
"""

from __future__ import annotations

from dataclasses import replace

from ublkwatch import ailing, attempt, orders, outage, pace, shared, timers, verdict
from ublkwatch.deaf import DEAF
from ublkwatch.events import (
    Asked,
    AttemptOver,
    AttemptShared,
    Decided,
    Effect,
    EndReplied,
    Event,
    FindServer,
    HoldersFound,
    InfoMissing,
    InfoRead,
    Kill,
    ReadInfo,
    Ready,
    Resumed,
    ServerAils,
    ServerExited,
    ServerFound,
    ServerWell,
    ShutdownBegun,
    Spawned,
    SpawnFailed,
    StartReplied,
    StopReplied,
    Watch,
    Woken,
)
from ublkwatch.model import (
    Handoff,
    Loss,
    Phase,
    Policy,
    Reason,
    Record,
    SpawnVerdict,
)
from ublkwatch.resume import resume
from ublkwatch.uapi import DevState
from ublkwatch.verdict import Step

_NOT_STARTED = {
    SpawnVerdict.FAILED: Reason.SPAWN_FAILED,
    SpawnVerdict.HOOK_FAILED: Reason.HOOK_FAILED,
    SpawnVerdict.PARK: Reason.HOOK_PARKED,
}


def step(record: Record, event: Event, now: float, policy: Policy) -> Step:
    """Take one fact."""
    if type(event) in DEAF[record.phase]:
        return record, ()
    return answer(record, event, now, policy)


def answer(record: Record, event: Event, now: float, policy: Policy) -> Step:
    """Take a fact that matters."""
    if record.phase is Phase.GONE:
        return record, ()
    if record.reason is Reason.INTERNAL_ERROR:
        return _quarantined(record, event, now, policy)
    match event:
        case InfoMissing():
            reason = attempt.deleted_by_delegate(record, policy)
            return attempt.leave(record, Phase.GONE, now, reason)
        case InfoRead():
            return outage.on_info(record, event, now, policy)
        case ServerExited():
            return _on_exit(record, event, now, policy)
        case ServerAils() | ServerWell():
            return ailing.told(record, event, now, policy)
        case Woken():
            return timers.woken(record, now, policy)
        case Resumed():
            return resume(record, event.candidate, now, policy)
        case Asked():
            return orders.obey(record, event, now, policy)
        case ShutdownBegun():
            return _on_shutdown(record, now, policy)
        case (
            Spawned()
            | Ready()
            | SpawnFailed()
            | StartReplied()
            | EndReplied()
            | AttemptOver()
            | AttemptShared()
            | HoldersFound()
            | ServerFound()
            | StopReplied()
            | Decided()
        ):
            if event.seq != record.seq:
                return record, _unwanted(event)
            return _on_reply(record, event, now, policy)


def delayed(record: Record, by_s: float) -> Record:
    """Return the record as if its phase had begun later: time in which we slept counts for nobody.

    After a SIGSTOP, a suspend or a long stall every deadline has passed, and none of them says
    anything about a server. What was held is still held: the marks stay.
    """

    def later(at: float | None) -> float | None:
        return None if at is None else at + by_s

    return replace(
        record,
        since=record.since + by_s,
        wake=later(record.wake),
        spawned_at=later(record.spawned_at),
        quiet_since=later(record.quiet_since),
        free_since=later(record.free_since),
        give_up_at=later(record.give_up_at),
        ill=record.ill and replace(record.ill, since=record.ill.since + by_s),
    )


def quarantined(record: Record, error: str, now: float) -> Record:
    """Return the record of a device over which our own code failed: hands off."""
    reason = Reason.INTERNAL_ERROR
    return replace(record, phase=Phase.FAILED, reason=reason, detail=error, since=now, wake=None)


# --- replies, ends and timers --------------------------------------------------------------------


def _on_reply(record: Record, event: Event, now: float, policy: Policy) -> Step:
    draining = record.phase is Phase.DRAINING
    spawning = draining or record.phase is Phase.ATTACHING
    match event:
        case StartReplied() if record.pending:
            return attempt.start_replied(record, event.error, now, policy)
        case EndReplied() if record.pending:
            return attempt.end_replied(record, event.error, now, policy)
        case StopReplied() if record.pending:
            return verdict.stop_replied(record, event.error, now, policy)
        case Spawned() if spawning and record.candidate is None:
            record, effects = _on_spawned(record, event, now, policy)
            return record, (Watch(event.server), *effects)
        case SpawnFailed() if spawning and record.candidate is None:
            return _on_spawn_failed(record, event, now, policy)
        case Spawned() | SpawnFailed():
            return _began_late(record, event, now)
        case Ready() if draining:  # and the kernel's word is all that is missing, if it is
            return attempt.try_start(replace(record, ready=True, wake=now), now, policy)
        case ServerFound():
            return outage.server_found(record, event.server, now, policy)
        case HoldersFound() if record.phase in (Phase.DRAINING, Phase.STARTING):
            return pace.holders_found(record, event, now, policy), ()
        case AttemptShared():
            return shared.spared(record, event, now, policy)
        case AttemptOver() if not record.over:
            return _on_over(record, event, now, policy)
        case Decided() if record.phase is Phase.DECIDING:
            return _on_decided(record, event, now, policy)
    return record, ()


def _on_over(record: Record, event: AttemptOver, now: float, policy: Policy) -> Step:
    # A server that was never started, or never read its line, has not touched the device.
    touched = record.spawned_at is not None and not event.unread
    record = replace(record, over=True, lined=record.lined and touched)
    if record.phase is Phase.STOPPING:
        return verdict.settle(record, now, policy)
    look = (ReadInfo(),) if record.phase is Phase.FAILING else ()
    return replace(record, candidate=None), look  # later than we would wait


def _on_spawned(record: Record, event: Spawned, now: float, policy: Policy) -> Step:
    """Take it that the server's process exists: its time begins."""
    standby = event.standby
    record = replace(record, candidate=event.server, spawned_at=now, standby=standby)
    if record.phase is Phase.DRAINING:
        wake = pace.ready_by(record, policy)
        wake = now if record.ready else min(record.wake or wake, wake)
        return attempt.try_start(replace(record, wake=wake), now, policy)
    if policy.handoff is Handoff.DELEGATED:
        return replace(record, wake=now + policy.drain_poll_s), ()
    return attempt.send_end(replace(record, wake=pace.attach_by(record, policy)))


def _on_spawn_failed(record: Record, event: SpawnFailed, now: float, policy: Policy) -> Step:
    """Take it that no server was started, or that one has ended before it could be watched."""
    if event.ran:
        record = replace(record, spawned_at=now)
        return attempt.ended(record, event.why, event.code, now, policy)
    record = replace(record, lined=False)  # there was nobody who could attach
    if event.verdict is SpawnVerdict.LATER:
        record = replace(record, reason=Reason.HOOK_LATER, detail=event.why)
        return attempt.end(record, now)
    return attempt.fail(record, _NOT_STARTED[event.verdict], event.why, now)


def _began_late(record: Record, event: Spawned | SpawnFailed, now: float) -> Step:
    """Take it that a server was started whose attempt is being ended: it may have done harm."""
    if record.phase in (Phase.WATCHING, Phase.PROBATION):
        return record, ()
    began = isinstance(event, Spawned) or event.ran
    if began and record.phase is Phase.STOPPING and record.spawned_at is None:
        record = replace(record, spawned_at=now)
    return record, _unwanted(event)


def _unwanted(event: Event) -> tuple[Effect, ...]:
    """End a process that came up too late for its attempt."""
    return (Kill(event.server, event.seq),) if isinstance(event, Spawned) else ()


def _quarantined(record: Record, event: Event, now: float, policy: Policy) -> Step:
    """Keep the hands off a device over which our own code failed, until a server serves it."""
    match event:
        case InfoMissing():
            return verdict.arrive(record, Phase.GONE, now)
        case InfoRead() if event.instance != record.instance or event.info.state is DevState.DEAD:
            return verdict.arrive(record, Phase.GONE, now)
        case InfoRead() if event.server and event.info.state is DevState.LIVE:
            return outage.on_info(record, event, now, policy)
        case InfoRead():
            record = replace(record, info=event.info)
    return replace(record, wake=None, give_up_at=None, held_until=None), ()


def _on_decided(record: Record, event: Decided, now: float, policy: Policy) -> Step:
    match event.code:
        case verdict.SAYS_RETRY if not verdict.half_attached(record, policy):
            return orders.begin(replace(record, failures=()), now, policy)
        case verdict.SAYS_FAIL if not verdict.hands_bound(record, policy):
            return verdict.failing(record, now, policy)
    how = event.how if event.code is None else f"exit status {event.code}"
    return verdict.undecided(record, how, now), ()


def _on_exit(record: Record, event: ServerExited, now: float, policy: Policy) -> Step:
    waited_for = event.server in (record.server, record.candidate)
    if record.phase is Phase.FAILED and record.shared and waited_for:
        return shared.ended(record, event.server, now, policy)
    if event.server == record.candidate:
        return attempt.exited(record, event, now, policy)
    if event.server != record.server:
        return record, ()
    record = replace(record, server=None, ended=event.server)
    if record.loss == Loss(event.server):  # it had let go of the device before it ended
        record = replace(record, loss=Loss(event.server, event.how))
    match record.phase:
        case Phase.WATCHING if record.seq and attempt.left_another(event, policy):
            return replace(record, detail=event.how), (FindServer(record.seq),)
        case Phase.WATCHING:
            return outage.lost(record, now, policy, "pidfd", event.how)
        case Phase.PROBATION:
            return attempt.died_in_probation(record, event, now, policy)
        case Phase.DRAINING:
            return attempt.try_start(record, now, policy)
        case Phase.FAILING:
            return record, (ReadInfo(),)
    return record, ()


def _on_shutdown(record: Record, now: float, policy: Policy) -> Step:
    match record.phase:
        case Phase.DRAINING:
            return attempt.break_off(record, now)
        case Phase.GRACE | Phase.BACKOFF | Phase.DECIDING:
            return verdict.hold(record, now, policy), ()
        case Phase.FAILING if not record.pending:
            return verdict.hold(record, now, policy), ()
    return record, ()
