"""The machine: (what we knew, a fact, the time, the policy) -> (what we now know, what to do).

Pure: no clock, no chance, no I/O, no exception. Total: every phase answers every event; what is not
named below changes nothing. The rules, each held by tests/test_recovery.py:

 1. The state that the kernel reports is the truth; a pid is a hint, and a process is a ServerId.
 2. An outage begins when the watched process has ended, or when two reads in a row say QUIESCED
    or FAIL_IO. START goes out when a read agrees with the ended process, or two reads agree.
 3. Never two servers: a line is written only after the old server was seen gone and START was
    accepted, and an attempt is over (no process of it left, no command of it with the kernel)
    before the next one begins.
 4. END goes out only behind this round's own accepted START, for a server that was alive just then,
    and never while an earlier END is with the kernel.
 5. On G2 a START is taken once (``armed``), and a server that ends after its line was written may
    have half attached: no START and no END after that, the device is reported as such.
 6. DEAD means stopped on purpose: the attempt is ended and nothing is resurrected.
 7. Somebody else's recovery that reached LIVE is adopted, and our attempt ended.
 8. An attempt that fails is counted once, whatever symptom came first; ``attempts_max`` of them
    within ``window_s`` are FAILED, and so is at once what another attempt cannot cure.
 9. Replies carry the attempt's number; one of another attempt changes nothing.
10. Every phase that waits for somebody has a deadline: only OBSERVED, WATCHING and FAILED last.
"""

from __future__ import annotations

from dataclasses import replace

from ublkwatch import attempt
from ublkwatch.attempt import ATTEMPTING, Step
from ublkwatch.events import (
    AttemptOver,
    EndAttempt,
    EndReplied,
    Event,
    FindHolders,
    HoldersFound,
    InfoMissing,
    InfoRead,
    Kill,
    ReadInfo,
    Ready,
    Resumed,
    SendStart,
    ServerExited,
    Spawned,
    SpawnFailed,
    StartReplied,
    Watch,
    Woken,
)
from ublkwatch.model import (
    Armed,
    Generation,
    Phase,
    Policy,
    Reason,
    Record,
    RecoveryMode,
    ServerId,
)
from ublkwatch.uapi import DevState


def step(record: Record, event: Event, now: float, policy: Policy) -> Step:
    """Take one fact."""
    if record.phase is Phase.GONE:
        return record, ()
    match event:
        case InfoMissing():
            return attempt.leave(record, Phase.GONE, now)
        case InfoRead():
            return _on_info(record, event, now, policy)
        case ServerExited():
            return _on_exit(record, event, now, policy)
        case Woken():
            return _on_woken(record, now, policy)
        case Resumed():
            return _on_resumed(record, event.candidate, now, policy)
        case (
            Spawned()
            | Ready()
            | SpawnFailed()
            | StartReplied()
            | EndReplied()
            | AttemptOver()
            | HoldersFound()
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
    return replace(record, since=record.since + by_s, wake=wake)


# --- what the kernel reports ---------------------------------------------------------------------


def _on_info(record: Record, event: InfoRead, now: float, policy: Policy) -> Step:
    record = replace(record, info=event.info)
    if record.phase is Phase.OBSERVED:
        record = replace(record, server=event.server)
    if event.instance != record.instance:
        return attempt.leave(record, Phase.GONE, now)
    match event.info.state:
        case DevState.DEAD:
            return attempt.leave(record, Phase.GONE, now)
        case DevState.LIVE:
            return _on_live(replace(record, agreed=0), event.server, now, policy)
        case DevState.QUIESCED | DevState.FAIL_IO:
            return _on_down(record, now, policy)
        case unknown if record.phase in ATTEMPTING:
            return attempt.leave(replace(record, detail=f"state {unknown}"), Phase.OBSERVED, now)
        case unknown:
            return _observe(record, Reason.UNKNOWN_STATE, now, f"state {unknown}"), ()


def _on_live(record: Record, server: ServerId | None, now: float, policy: Policy) -> Step:
    match record.phase:
        case Phase.OBSERVED | Phase.FAILED:
            if (hands_off := _hands_off(record, policy)) is not None:
                return _observe(record, hands_off, now), ()
            if server:
                return _adopt(record, server, now)
            return (
                (record, ())
                if record.phase is Phase.FAILED
                else (_observe(record, Reason.NO_VISIBLE_SERVER, now), ())
            )
        case Phase.WATCHING if server and server != record.server:
            return _adopt(record, server, now)  # recovered by somebody else between two polls
        case Phase.PROBATION if server and server != record.server:
            return _adopt(record, server, now)
        case Phase.PROBATION if server and now - record.since >= policy.probation_s:
            return _recovered(record, now), ()
        case Phase.ATTACHING if server and server == record.candidate and not record.pending:
            return attempt.live(record, now, policy)  # END: EBUSY, since it had been done before
    if record.phase in ATTEMPTING and server and server not in (record.candidate, record.server):
        return attempt.leave(record, Phase.OBSERVED, now)  # the next read adopts it
    return record, ()


def _on_down(record: Record, now: float, policy: Policy) -> Step:
    record = replace(record, agreed=record.agreed + 1)
    match record.phase:
        case Phase.OBSERVED:
            if (hands_off := _hands_off(record, policy)) is not None:
                return _observe(record, hands_off, now), ()
            if not policy.seen_live:
                return _observe(record, Reason.NEVER_SEEN_LIVE, now), ()
            return _lost(record, now, policy, "startup")
        case Phase.WATCHING | Phase.PROBATION:
            if record.agreed < 2:
                return record, (ReadInfo(),)
            return _lost(record, now, policy, "poll")
        case Phase.DRAINING:
            return attempt.try_start(record, now, policy)
        case Phase.ATTACHING if not record.pending:
            return attempt.fail(record, Reason.END_REFUSED, record.detail, now)
        case Phase.FAILED if record.reason is Reason.NOT_QUIESCED:
            return _lost(record, now, policy, "poll")  # the kernel has let go after all
    return record, ()


def _hands_off(record: Record, policy: Policy) -> Reason | None:
    if policy.generation is Generation.UNKNOWN:
        return Reason.NO_FEATURES
    if record.info and RecoveryMode.of(record.info.flags) is RecoveryMode.NONE:
        return Reason.NO_RECOVERY_FLAG
    return None if policy.has_spec else Reason.NO_SPEC


def _observe(record: Record, reason: Reason, now: float, detail: str = "") -> Record:
    if (record.phase, record.reason, record.detail) == (Phase.OBSERVED, reason, detail):
        return record
    return replace(
        record,
        phase=Phase.OBSERVED,
        reason=reason,
        detail=detail,
        since=now,
        wake=None,
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
        recoveries=record.recoveries,
        last_held_s=record.last_held_s,
    )
    return watching, (Watch(server),)


# --- the beginning and the end of an outage ------------------------------------------------------


def _lost(record: Record, now: float, policy: Policy, by: str) -> Step:
    """Begin an outage. A server that still lives, though the kernel let go of it, has to end."""
    stray = (Kill(record.server),) if record.server else ()
    lost = replace(record, detected_by=by, attempts=0, marks=(("lost", now),))
    record, effects = attempt.begin(lost, now, policy)
    return record, stray + effects


def _recovered(record: Record, now: float) -> Record:
    marks = dict(record.marks)
    return replace(
        record,
        phase=Phase.WATCHING,
        reason=None,
        detail="",
        since=now,
        wake=None,
        failures=(),
        recoveries=record.recoveries + 1,
        last_held_s=marks.get("probation", now) - marks.get("lost", now),
    )


# --- replies, ends and timers --------------------------------------------------------------------


def _on_reply(
    record: Record,
    event: Spawned | Ready | SpawnFailed | StartReplied | EndReplied | AttemptOver | HoldersFound,
    now: float,
    policy: Policy,
) -> Step:
    draining = record.phase is Phase.DRAINING
    match event:
        case StartReplied():
            return attempt.start_replied(record, event.error, now, policy)
        case EndReplied():
            return attempt.end_replied(record, event.error, now, policy)
        case Spawned() if draining:
            return replace(record, candidate=event.server), (Watch(event.server),)
        case Ready() if draining:
            return attempt.try_start(replace(record, ready=True), now, policy)
        case SpawnFailed() if draining:
            return attempt.fail(record, Reason.SPAWN_FAILED, event.why, now)
        case HoldersFound() if record.phase in (Phase.DRAINING, Phase.STARTING):
            return replace(record, holders=event.who), ()
        case AttemptOver() if record.phase is Phase.STOPPING:
            return attempt.settle(replace(record, over=True), now, policy)
    return record, ()


def _on_exit(record: Record, event: ServerExited, now: float, policy: Policy) -> Step:
    if event.server == record.server:
        record = replace(record, server=None)
        match record.phase:
            case Phase.WATCHING:
                return _lost(record, now, policy, "pidfd")
            case Phase.PROBATION:
                return attempt.fail(record, Reason.DIED_IN_PROBATION, event.how, now)
            case Phase.DRAINING:
                return attempt.try_start(record, now, policy)
        return record, ()
    if event.server != record.candidate:
        return record, ()
    match record.phase:
        case Phase.DRAINING:
            return attempt.fail(record, Reason.DIED_BEFORE_READY, event.how, now)
        case Phase.STARTING:  # its START cannot be taken back: decided when that is answered
            return replace(record, candidate=None, detail=event.how), ()
        case Phase.ATTACHING:
            return attempt.fail(record, Reason.DIED_ATTACHING, event.how, now)
    return record, ()


def _on_woken(record: Record, now: float, policy: Policy) -> Step:
    if record.wake is None or now < record.wake:
        return record, ()
    waited = now - record.since
    match record.phase:
        case Phase.DRAINING if not record.ready and waited >= policy.ready_timeout_s:
            return attempt.fail(record, Reason.NOT_READY, f"after {waited:.0f} s", now)
        case Phase.DRAINING if waited >= policy.drain_timeout_s and not attempt.let_go(record):
            return _undrained(record, now, policy)
        case Phase.DRAINING:
            return _ask_again(record, now, policy)
        case Phase.STARTING if waited < attempt.start_patience_s(policy):
            wake = record.since + attempt.start_patience_s(policy)
            return replace(record, wake=wake), (FindHolders(record.seq),)
        case Phase.STARTING:
            unsure = replace(record, armed=Armed.UNSURE)
            return attempt.fail(unsure, Reason.NO_ANSWER, "START_USER_RECOVERY", now)
        case Phase.ATTACHING:
            return attempt.fail(record, Reason.ATTACH_TIMEOUT, f"after {waited:.0f} s", now)
        case Phase.PROBATION:
            return replace(record, wake=now + policy.probation_s), (ReadInfo(),)
        case Phase.BACKOFF:
            return attempt.begin(record, now, policy)
        case Phase.STOPPING if waited >= policy.stop_timeout_s:
            stuck = replace(record, reason=Reason.NO_ANSWER, detail=_what_hangs(record))
            return attempt.arrive(stuck, record.then or Phase.FAILED, now)
        case Phase.STOPPING:  # a process in uninterruptible sleep takes its signal later
            return replace(record, wake=now + 1), (EndAttempt(record.seq),)
    return replace(record, wake=None), ()


def _ask_again(record: Record, now: float, policy: Policy) -> Step:
    """Poll while the kernel drains; once it takes long, find out who is in the way."""
    waited = now - record.since
    if attempt.let_go(record) and not record.ready:
        # It has let go. What is missing is the new server, which needs the CPU more than we do.
        return replace(record, wake=record.since + policy.ready_timeout_s), ()
    pause = min(policy.drain_poll_max_s, max(policy.drain_poll_s, waited / 16))
    record = replace(record, wake=now + pause)
    if waited < policy.holders_after_s or record.holders:
        return record, (ReadInfo(),)
    record = replace(record, holders="looking who holds the character device")
    return record, (ReadInfo(), FindHolders(record.seq))


def _undrained(record: Record, now: float, policy: Policy) -> Step:
    """Name what the kernel's not letting go means."""
    live = record.info is not None and record.info.state is DevState.LIVE
    if live and not record.server and policy.generation is Generation.G2:
        # What a G2 driver makes of END for a server that had fetched everything and then died.
        return attempt.fail(record, Reason.LIVE_WITHOUT_SERVER, "", now)
    pid = record.info.ublksrv_pid if record.info else None
    detail = f"LIVE with ublksrv_pid {pid}" if live else ""
    detail = "; ".join(part for part in (detail, record.holders) if part)
    return attempt.fail(record, Reason.NOT_QUIESCED, detail, now)


def _what_hangs(record: Record) -> str:
    return "a control command" if record.pending else "its processes were not seen to end"


def _on_resumed(record: Record, candidate: ServerId | None, now: float, policy: Policy) -> Step:
    """Go on after our own death: from facts, with deadlines armed anew.

    No command of our former life is with the kernel: its worker ended with us. A candidate that was
    found may have said READY=1 to nobody; its line waits in the FIFO until it reads.
    """
    armed = Armed.UNSURE if record.armed is Armed.SENT else record.armed
    record = replace(
        record, since=now, agreed=0, pending=False, armed=armed, candidate=candidate, ready=True
    )
    old = (Watch(record.server),) if record.server else ()
    watch = (*old, Watch(candidate)) if candidate else old
    match record.phase:
        case Phase.WATCHING:
            return record, (*watch, ReadInfo())
        case Phase.PROBATION:
            return replace(record, wake=now + policy.probation_s), (*watch, ReadInfo())
        case Phase.DRAINING if candidate:
            return replace(record, wake=now + policy.drain_poll_s), (*watch, ReadInfo())
        case Phase.DRAINING:
            record, effects = attempt.begin(record, now, policy)
            return record, watch + effects
        case Phase.STARTING if candidate:
            # The attempt's START again: G3 does not mind, G2's answer tells whether it was taken.
            wake = now + policy.holders_after_s
            return replace(record, wake=wake, pending=True), (*watch, SendStart(record.seq))
        case Phase.ATTACHING if candidate:
            # A server reads one line only: a second one does no harm, a missing one would.
            record, effects = attempt.attach(record, now, policy)
            return record, watch + effects
        case Phase.STARTING:
            return attempt.fail(record, Reason.DIED_BEFORE_READY, "while ublkwatch was down", now)
        case Phase.ATTACHING:
            return attempt.fail(record, Reason.DIED_ATTACHING, "while ublkwatch was down", now)
        case Phase.STOPPING:
            return replace(record, wake=now + 1), (*watch, EndAttempt(record.seq))
        case Phase.BACKOFF:
            return replace(record, wake=now + policy.backoff_base_s), ()
    return record, (ReadInfo(),)
