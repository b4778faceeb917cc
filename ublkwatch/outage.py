"""What the kernel's states mean: how an outage begins, and how it ends. Pure.

A part of the machine: rules 1, 2, 6 and 7 at the head of recovery.py.
"""

from __future__ import annotations

from dataclasses import replace

from ublkwatch import attempt, orders, pace, verdict
from ublkwatch.attempt import ATTEMPTING
from ublkwatch.events import FindServer, InfoRead, ReadInfo, Watch
from ublkwatch.model import (
    UNKNOWN,
    Armed,
    Generation,
    Handoff,
    Loss,
    Phase,
    Policy,
    Reason,
    Record,
    ServerId,
)
from ublkwatch.uapi import DevState
from ublkwatch.verdict import Step

# Where we do nothing, so that a server that serves again, even the old one, is somebody's doing.
_IDLE = frozenset({Phase.GRACE, Phase.HELD, Phase.DECIDING, Phase.FAILED})


def on_info(record: Record, event: InfoRead, now: float, policy: Policy) -> Step:
    """Take an answer of GET_DEV_INFO."""
    record = replace(record, info=event.info)
    server = None if event.server == record.ended else event.server  # read before it ended
    if record.phase is Phase.OBSERVED:
        record = replace(record, server=server)
    if event.instance != record.instance:
        return attempt.leave(record, Phase.GONE, now)
    match event.info.state:
        case DevState.DEAD:
            return _on_dead(record, now, policy)
        case DevState.LIVE:
            record = replace(record, agreed=0, quiet_since=None, free_since=None)
            return _on_live(_round_over(record), server, now, policy)
        case DevState.QUIESCED | DevState.FAIL_IO:
            return _on_down(replace(record, agreed=record.agreed + 1), now, policy)
        case unknown if record.phase in ATTEMPTING:
            record = replace(record, detail=f"state {unknown}")
            return attempt.leave(record, Phase.OBSERVED, now)
        case unknown:
            return _observe(record, Reason.UNKNOWN_STATE, now, f"state {unknown}"), ()


def _on_dead(record: Record, now: float, policy: Policy) -> Step:
    stopping = record.phase is Phase.FAILING and record.pending
    ours = stopping or (record.phase is Phase.FAILED and record.stopped)
    if ours:
        return record, ()
    reason = attempt.deleted_by_delegate(record, policy)
    return attempt.leave(record, Phase.GONE, now, reason)


def _round_over(record: Record) -> Record:
    """Doubt an accepted START of which LIVE, outside of an attempt, may be the end."""
    trying = record.phase in (Phase.STARTING, Phase.ATTACHING)
    return (
        replace(record, armed=Armed.UNSURE) if record.armed is Armed.YES and not trying else record
    )


def _on_live(record: Record, server: ServerId | None, now: float, policy: Policy) -> Step:
    match record.phase:
        case Phase.OBSERVED | Phase.WATCHING if why := verdict.hands_off(record, policy):
            return _hands_off(record, why, now, policy), ()
        case Phase.OBSERVED if server:
            return adopt(record, server, now)
        case Phase.OBSERVED:
            return _observe(record, Reason.NO_VISIBLE_SERVER, now), ()
        case Phase.FAILING if record.pending:
            return record, ()
        case Phase.FAILING if not server and _is_dead(record):
            return verdict.send_stop(record, now, policy)
        case Phase.ATTACHING if server and not record.pending:
            if (done := _on_attached(record, server, now, policy)) is not None:
                return done
        case Phase.PROBATION if now - record.since >= policy.probation_s and record.server:
            # G2 says the pid that END gave it, which may be nobody's: then our own watch counts.
            if server == record.server or (not server and policy.generation is Generation.G2):
                return _recovered(record, now), ()
    if not server or (server == record.server and record.phase not in _IDLE):
        return record, ()
    if record.phase in ATTEMPTING:
        ours = server == record.candidate
        return (record, ()) if ours else attempt.leave(record, Phase.OBSERVED, now)
    return adopt(record, server, now)  # recovered by somebody else


def _on_attached(record: Record, server: ServerId, now: float, policy: Policy) -> Step | None:
    """Take it that the device is LIVE; None where that is somebody else's doing."""
    if server == record.candidate:  # END: EBUSY, it had been done before
        return attempt.live(record, server, now, policy)
    delegated = policy.handoff is Handoff.DELEGATED
    if delegated and record.spawned_at is None:  # ours is up already, or it is somebody else's
        return record, (FindServer(record.seq),)
    if delegated or record.armed is Armed.NO:  # END was 0
        record, effects = attempt.live(record, server, now, policy)
        return record, (Watch(server), *effects)
    return None


def _on_down(record: Record, now: float, policy: Policy) -> Step:
    refused = record.refused and not record.pending
    match record.phase:
        case Phase.OBSERVED:
            if (hands_off := verdict.hands_off(record, policy)) is not None:
                return _hands_off(record, hands_off, now, policy), ()
            if not policy.seen_live:
                return _observe(record, Reason.NEVER_SEEN_LIVE, now), ()
            return lost(record, now, policy, "startup")
        case Phase.WATCHING | Phase.PROBATION | Phase.FAILING if record.agreed < 2:
            return record, (ReadInfo(),)
        case Phase.ATTACHING if refused and record.agreed < 2:
            return record, (ReadInfo(),)
        case Phase.WATCHING:
            return lost(record, now, policy, "poll")
        case Phase.PROBATION:
            return attempt.fail(record, Reason.DIED_IN_PROBATION, "it let go of the device", now)
        case Phase.DRAINING:
            return attempt.try_start(record, now, policy)
        case Phase.ATTACHING if refused:
            return attempt.fail(record, Reason.END_REFUSED, record.refused, now)
        case Phase.FAILING:
            return verdict.send_stop(record, now, policy)
        case Phase.FAILED if _let_go_after_all(record, policy):
            return orders.begin(record, now, policy)
    return record, ()


def _let_go_after_all(record: Record, policy: Policy) -> bool:
    if record.reason is not Reason.NOT_QUIESCED or record.stopped:
        return False
    left = len(record.failures) < policy.attempts_max
    return left and pace.let_go(record) and not verdict.hands_bound(record, policy)


def _is_dead(record: Record) -> bool:
    """Tell whether LIVE names a server that has ended: we saw that, or the kernel did."""
    pid = record.info.ublksrv_pid if record.info else None
    return pid == -1 or (record.ended is not None and pid == record.ended.pid)


def _hands_off(record: Record, reason: Reason, now: float, policy: Policy) -> Record:
    why = policy.hands_off_why if reason is policy.hands_off else None
    return _observe(record, reason, now, why)


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


def adopt(record: Record, server: ServerId, now: float) -> Step:
    """Watch a server that we did not start, with a clean slate."""
    watching = Record(
        dev_id=record.dev_id,
        instance=record.instance,
        phase=Phase.WATCHING,
        since=now,
        info=record.info,
        server=server,
        seq=record.seq,
        pending=record.pending,  # what could not be ended is still to be waited for
        over=record.over or server == record.candidate,
        held=record.held,
        held_until=record.held_until,
        held_by=record.held_by,
        recoveries=record.recoveries,
        last_held_s=record.last_held_s,
    )
    return watching, (Watch(server),)


# --- the beginning and the end of an outage ------------------------------------------------------


def lost(record: Record, now: float, policy: Policy, by: str, how: str = UNKNOWN) -> Step:
    """Begin an outage: at once, or after grace, or not while the hands are bound."""
    if why := verdict.hands_off(record, policy):  # the rules have changed
        return _hands_off(record, why, now, policy), ()
    stable = record.phase is Phase.WATCHING and now - record.since >= policy.stable_s
    recent = tuple(at for at in record.failures if now - at <= policy.window_s)
    ill = record.ill if record.ill and record.ill.condemned else None
    record = replace(
        record,
        reason=Reason.GRACE,
        detail=ill.what if ill else "",
        detected_by=ill.kind.value if ill else by,
        loss=Loss(record.ended if by == "pidfd" else record.server, ill.what if ill else how),
        asked_by=record.asked_by if ill else "",
        attempts=0,
        decisions=0,
        failures=record.failures if ill else () if stable else recent,
        marks=(("lost", now),),
        give_up_at=verdict.patience_ends(record, now, policy),
        overdue=False,
        agreed=0,
    )
    if policy.grace_s and not verdict.hands_bound(record, policy):
        return verdict.enter(record, Phase.GRACE, now, wake=now + policy.grace_s), ()
    return orders.begin(record, now, policy)


def server_found(record: Record, server: ServerId | None, now: float, policy: Policy) -> Step:
    """Take it who serves: an attempt's device, or one whose server has ended well."""
    if record.phase is not Phase.WATCHING:
        return attempt.server_found(record, server, now, policy)
    if record.server is not None:
        return record, ()
    if server is None:
        return lost(record, now, policy, "pidfd", record.detail)
    return replace(record, server=server, detail=""), (Watch(server), ReadInfo())


def _recovered(record: Record, now: float) -> Record:
    marks = dict(record.marks)
    return verdict.enter(
        record,
        Phase.WATCHING,
        now,
        reason=None,
        detail="",
        wake=None,
        give_up_at=None,
        overdue=False,
        over=True,
        recoveries=record.recoveries + 1,
        last_held_s=marks.get("probation", now) - marks.get("lost", now),
    )
