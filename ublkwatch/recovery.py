"""The machine: (what we knew, a fact, the time, the policy) -> (what we now know, what to do).

Pure: no clock, no chance, no I/O, no exception. Total: every phase answers every event, and what
changes nothing is written down (``DEAF``). The rules, each held by a test:

 1. The state that the kernel reports is the truth; a pid is a hint, and a process is a ServerId.
 2. An outage begins when the watched process has ended, or when two reads in a row say QUIESCED
    or FAIL_IO. START goes out when a read agrees with the ended process, or two reads agree.
 3. Never two servers: one may touch the device only after the old one was seen gone and START was
    accepted, and an attempt is over (no process of it left, no command of it with the kernel)
    before the next one begins.
 4. END goes out only behind this round's own accepted START, for a server that was alive just then,
    and never while an earlier END is with the kernel.
 5. On G2 a START is taken once (``armed``), and a server that ends when it may have begun to attach
    may have half attached: no START and no END after that, the device is reported as such.
 6. DEAD means stopped on purpose: the attempt is ended and nothing is resurrected. What we stopped
    ourselves stays known, with the reason, until the device is deleted.
 7. Somebody else's recovery that reached LIVE is adopted, and our attempt ended.
 8. An attempt that fails is counted once, whatever symptom came first. ``attempts_max`` of them in
    one recovery, or within ``window_s``, exhaust the budget, and so does at once what another
    attempt cannot cure; ``stable_s`` of LIVE give it back. The pauses between attempts grow, are
    capped, and are drawn by chance.
 9. Replies carry the attempt's number; one of another attempt changes nothing.
10. Every phase that waits for somebody has a deadline: only OBSERVED, WATCHING, HELD and FAILED
    last. Where ``hold_timeout_s`` is set, I/O waits no longer, unless an operator holds the device.
11. After our own death we go on from the saved record and from facts, with deadlines armed anew.
12. Held by an operator, or while the host shuts down, nothing is begun and nothing is ended; what
    has sent its START goes on to its end. STOP_DEV is sent by the operator's choice alone, when the
    server is known to be dead.
"""

from __future__ import annotations

from dataclasses import replace

from ublkwatch import attempt, orders, timers, verdict
from ublkwatch.attempt import ATTEMPTING
from ublkwatch.events import (
    Asked,
    AttemptOver,
    Decided,
    EndReplied,
    Event,
    HoldersFound,
    InfoMissing,
    InfoRead,
    Kill,
    QueueThreadLost,
    ReadInfo,
    Ready,
    Resumed,
    ServerExited,
    ServerFound,
    ShutdownBegun,
    Spawned,
    SpawnFailed,
    StartReplied,
    StopReplied,
    Watch,
    Woken,
)
from ublkwatch.model import (
    Generation,
    Handoff,
    Phase,
    Policy,
    Reason,
    Record,
    RecoveryMode,
    ServerId,
)
from ublkwatch.resume import resume
from ublkwatch.uapi import DevState
from ublkwatch.verdict import Step


def step(record: Record, event: Event, now: float, policy: Policy) -> Step:
    """Take one fact."""
    if record.phase is Phase.GONE:
        return record, ()
    match event:
        case InfoMissing():
            return attempt.leave(record, Phase.GONE, now, policy)
        case InfoRead():
            return _on_info(record, event, now, policy)
        case ServerExited():
            return _on_exit(record, event, now, policy)
        case QueueThreadLost():
            return _on_thread_lost(record, event, policy)
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
            | HoldersFound()
            | ServerFound()
            | StopReplied()
            | Decided()
        ):
            if event.seq != record.seq:
                return record, ()
            return _on_reply(record, event, now, policy)


def delayed(record: Record, by_s: float) -> Record:
    """Return the record as if its phase had begun later: time in which we slept counts for nobody.

    After a SIGSTOP, a suspend or a long stall every deadline has passed, and none of them says
    anything about a server. What was held is still held: the marks stay.
    """
    wake = None if record.wake is None else record.wake + by_s
    give_up_at = None if record.give_up_at is None else record.give_up_at + by_s
    return replace(record, since=record.since + by_s, wake=wake, give_up_at=give_up_at)


# --- what the kernel reports ---------------------------------------------------------------------


def _on_info(record: Record, event: InfoRead, now: float, policy: Policy) -> Step:
    record = replace(record, info=event.info)
    server = None if event.server == record.ended else event.server  # read before it ended
    if record.phase is Phase.OBSERVED:
        record = replace(record, server=server)
    if event.instance != record.instance:
        return attempt.leave(record, Phase.GONE, now, policy)
    match event.info.state:
        case DevState.DEAD:
            return _on_dead(record, now, policy)
        case DevState.LIVE:
            return _on_live(replace(record, agreed=0), server, now, policy)
        case DevState.QUIESCED | DevState.FAIL_IO:
            return _on_down(replace(record, agreed=record.agreed + 1), now, policy)
        case unknown if record.phase in ATTEMPTING:
            record = replace(record, detail=f"state {unknown}")
            return attempt.leave(record, Phase.OBSERVED, now, policy)
        case unknown:
            return _observe(record, Reason.UNKNOWN_STATE, now, f"state {unknown}"), ()


def _on_dead(record: Record, now: float, policy: Policy) -> Step:
    ours = record.stopped or (record.phase is Phase.FAILING and record.pending)
    return (record, ()) if ours else attempt.leave(record, Phase.GONE, now, policy)


def _on_live(record: Record, server: ServerId | None, now: float, policy: Policy) -> Step:
    match record.phase:
        case Phase.OBSERVED if (hands_off := _hands_off(record, policy)) is not None:
            return _observe(record, hands_off, now), ()
        case Phase.OBSERVED if server:
            return _adopt(record, server, now)
        case Phase.OBSERVED:
            return _observe(record, Reason.NO_VISIBLE_SERVER, now), ()
        case Phase.FAILING if not server:
            return verdict.send_stop(record, now, policy)
        case Phase.ATTACHING if policy.handoff is Handoff.DELEGATED:
            if server and server != record.server:
                record, effects = attempt.live(record, server, now, policy)
                return record, (Watch(server), *effects)
            return record, ()
        case Phase.ATTACHING if server and server == record.candidate and not record.pending:
            return attempt.live(record, server, now, policy)  # END: EBUSY, it had been done before
        case Phase.PROBATION if now - record.since >= policy.probation_s and record.server:
            # G2 says the pid that END gave it, which may be nobody's: then our own watch counts.
            if server == record.server or (not server and policy.generation is Generation.G2):
                return _recovered(record, now), ()
    if not server or (server == record.server and record.phase is not Phase.FAILED):
        return record, ()
    if record.phase in ATTEMPTING:
        ours = server == record.candidate
        return (record, ()) if ours else attempt.leave(record, Phase.OBSERVED, now, policy)
    return _adopt(record, server, now)  # recovered by somebody else


def _on_down(record: Record, now: float, policy: Policy) -> Step:
    match record.phase:
        case Phase.OBSERVED:
            if (hands_off := _hands_off(record, policy)) is not None:
                return _observe(record, hands_off, now), ()
            if not policy.seen_live:
                return _observe(record, Reason.NEVER_SEEN_LIVE, now), ()
            return _lost(record, now, policy, "startup")
        case Phase.WATCHING | Phase.PROBATION | Phase.FAILING if record.agreed < 2:
            return record, (ReadInfo(),)
        case Phase.WATCHING | Phase.PROBATION:
            return _lost(record, now, policy, "poll")
        case Phase.DRAINING:
            return attempt.try_start(record, now, policy)
        case Phase.ATTACHING if record.refused and not record.pending:
            return attempt.fail(record, Reason.END_REFUSED, record.refused, now)
        case Phase.FAILING:
            return verdict.send_stop(record, now, policy)
        case Phase.FAILED if record.reason is Reason.NOT_QUIESCED and not record.held:
            return _lost(record, now, policy, "poll")  # the kernel has let go after all
    return record, ()


def _hands_off(record: Record, policy: Policy) -> Reason | None:
    if policy.generation is Generation.UNKNOWN:
        return Reason.NO_FEATURES
    if record.info and RecoveryMode.of(record.info.flags) is RecoveryMode.NONE:
        return Reason.NO_RECOVERY_FLAG
    if record.reason is Reason.FORGOTTEN:
        return Reason.FORGOTTEN
    return None if policy.has_spec else Reason.NO_SPEC


def _observe(record: Record, reason: Reason, now: float, detail: str | None = None) -> Record:
    """Keep the hands off; that we were told to, and by whom, is not forgotten."""
    if detail is None:
        detail = record.detail if reason is Reason.FORGOTTEN else ""
    if (record.phase, record.reason, record.detail) == (Phase.OBSERVED, reason, detail):
        return record
    return replace(
        record,
        phase=Phase.OBSERVED,
        reason=reason,
        detail=detail,
        since=now,
        wake=None,
        give_up_at=None,
    )


def _adopt(record: Record, server: ServerId, now: float) -> Step:
    watching = Record(
        dev_id=record.dev_id,
        instance=record.instance,
        phase=Phase.WATCHING,
        since=now,
        info=record.info,
        server=server,
        seq=record.seq,
        held=record.held,
        held_until=record.held_until,
        held_by=record.held_by,
        recoveries=record.recoveries,
        last_held_s=record.last_held_s,
    )
    return watching, (Watch(server),)


# --- the beginning and the end of an outage ------------------------------------------------------


def _lost(record: Record, now: float, policy: Policy, by: str) -> Step:
    """Begin an outage: at once, or after grace, or not while the hands are bound."""
    stable = record.phase is Phase.WATCHING and now - record.since >= policy.stable_s
    recent = tuple(at for at in record.failures if now - at <= policy.window_s)
    record = replace(
        record,
        reason=Reason.GRACE,
        detail=record.crippled,
        detected_by="thread" if record.crippled else by,
        crippled="",
        attempts=0,
        decisions=0,
        failures=() if stable else recent,
        marks=(("lost", now),),
        give_up_at=now + policy.hold_timeout_s if policy.hold_timeout_s else None,
        overdue=False,
        agreed=0,
    )
    if policy.grace_s and not verdict.hands_bound(record, policy):
        return verdict.enter(record, Phase.GRACE, now, wake=now + policy.grace_s), ()
    return orders.begin(record, now, policy)


def _recovered(record: Record, now: float) -> Record:
    marks = dict(record.marks)
    return replace(
        record,
        phase=Phase.WATCHING,
        reason=None,
        detail="",
        since=now,
        wake=None,
        give_up_at=None,
        overdue=False,
        recoveries=record.recoveries + 1,
        last_held_s=marks.get("probation", now) - marks.get("lost", now),
    )


# --- replies, ends and timers --------------------------------------------------------------------


def _on_reply(record: Record, event: Event, now: float, policy: Policy) -> Step:
    draining = record.phase is Phase.DRAINING
    spawning = draining or record.phase is Phase.ATTACHING
    match event:
        case StartReplied():
            return attempt.start_replied(record, event.error, now, policy)
        case EndReplied():
            return attempt.end_replied(record, event.error, now, policy)
        case StopReplied():
            return verdict.stop_replied(record, event.error, now, policy)
        case Spawned() if spawning and record.candidate is None:
            record = replace(record, candidate=event.server)
            effects: Step = (record, ())
            if not draining and policy.handoff is Handoff.MANAGED:
                effects = attempt.send_end(record)
            return effects[0], (Watch(event.server), *effects[1])
        case SpawnFailed() if spawning and record.candidate is None:
            record = replace(record, lined=False)  # there was nobody who could attach
            return attempt.fail(record, Reason.SPAWN_FAILED, event.why, now)
        case Ready() if draining:
            return attempt.try_start(replace(record, ready=True), now, policy)
        case ServerFound():
            return attempt.server_found(record, event.server, now, policy)
        case HoldersFound() if record.phase in (Phase.DRAINING, Phase.STARTING):
            return replace(record, holders=event.who), ()
        case AttemptOver() if record.phase is Phase.STOPPING:
            # A server that never read its line has not touched the device.
            lined = record.lined and not event.unread
            return verdict.settle(replace(record, over=True, lined=lined), now, policy)
        case Decided() if record.phase is Phase.DECIDING:
            return _on_decided(record, event, now, policy)
    return record, ()


def _on_decided(record: Record, event: Decided, now: float, policy: Policy) -> Step:
    match event.code:
        case verdict.SAYS_RETRY:
            return orders.begin(replace(record, failures=()), now, policy)
        case verdict.SAYS_FAIL if not verdict.hands_bound(record, policy):
            return verdict.failing(record, now, policy)
    how = event.how if event.code is None else f"exit status {event.code}"
    return verdict.undecided(record, how, now), ()


def _on_exit(record: Record, event: ServerExited, now: float, policy: Policy) -> Step:
    if event.server == record.candidate:
        return attempt.exited(record, event, now, policy)
    if event.server != record.server:
        return record, ()
    record = replace(record, server=None, ended=event.server)
    match record.phase:
        case Phase.WATCHING:
            return _lost(record, now, policy, "pidfd")
        case Phase.PROBATION:
            return attempt.died_in_probation(record, event, now, policy)
        case Phase.DRAINING:
            return attempt.try_start(record, now, policy)
        case Phase.FAILING:
            return record, (ReadInfo(),)
    return record, ()


def _on_thread_lost(record: Record, event: QueueThreadLost, policy: Policy) -> Step:
    """End a server that lost a queue: that hangs for ever, and only another server cures it."""
    watched = record.phase in (Phase.WATCHING, Phase.PROBATION) and event.server == record.server
    if not watched or record.crippled or verdict.hands_bound(record, policy):
        return record, ()
    return replace(record, crippled=event.what), (Kill(event.server),)


def _on_shutdown(record: Record, now: float, policy: Policy) -> Step:
    match record.phase:
        case Phase.DRAINING:
            return attempt.leave(record, Phase.HELD, now, policy)
        case Phase.GRACE | Phase.BACKOFF | Phase.DECIDING:
            return verdict.hold(record, now, policy), ()
    return record, ()
