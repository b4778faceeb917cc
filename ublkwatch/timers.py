"""What the machine does when a time has come that it had asked for. Pure.

A part of the machine: rule 10 at the head of recovery.py.
"""

from __future__ import annotations

from dataclasses import replace

from ublkwatch import attempt, orders, pace, verdict
from ublkwatch.events import EndAttempt, FindHolders, FindServer, ReadInfo
from ublkwatch.model import Armed, Generation, Handoff, Phase, Policy, Reason, Record
from ublkwatch.uapi import DevState
from ublkwatch.verdict import Step

_QUEUED = "it was not started in time: too many others were"


def woken(record: Record, now: float, policy: Policy) -> Step:
    """Take it that it is ``now``: the end of a hold, of I/O's patience, of a phase's own wait."""
    if record.held and record.held_until is not None and now >= record.held_until:
        return orders.release(record, now, policy)
    if record.give_up_at is not None and now >= record.give_up_at:
        if record.phase is Phase.DRAINING and not verdict.hands_bound(record, policy):
            return attempt.break_off(replace(record, give_up_at=None, overdue=True), now)
        return verdict.overdue(record, now, policy)
    if record.wake is None or now < record.wake:
        return record, ()
    return _on_wake(record, now, policy)


def _on_wake(  # noqa: C901, PLR0912 - one arm for each phase
    record: Record, now: float, policy: Policy
) -> Step:
    waited = now - record.since
    match record.phase:
        case Phase.GRACE:
            return orders.begin(record, now, policy)
        case Phase.DRAINING:
            return _on_draining(record, now, policy)
        case Phase.STARTING if now < record.since + pace.start_patience_s(policy):
            wake = record.since + pace.start_patience_s(policy)
            return replace(record, wake=wake), (FindHolders(record.seq),)
        case Phase.STARTING:
            unsure = replace(record, armed=Armed.UNSURE)
            return attempt.fail(unsure, Reason.NO_ANSWER, "START_USER_RECOVERY", now)
        case Phase.ATTACHING if now < pace.attach_by(record, policy):
            if policy.handoff is Handoff.MANAGED and record.candidate is None:
                return replace(record, wake=now + pace.LOOK_AGAIN_S), (FindServer(record.seq),)
            return replace(record, wake=now + _pause(waited, policy, urgent=False)), (ReadInfo(),)
        case Phase.ATTACHING if record.spawned_at is None:
            return attempt.fail(record, Reason.SPAWN_FAILED, _QUEUED, now)
        case Phase.ATTACHING:
            return attempt.fail(record, Reason.ATTACH_TIMEOUT, f"after {waited:.0f} s", now)
        case Phase.PROBATION if now >= record.since + policy.attach_timeout_s + policy.probation_s:
            return attempt.leave(record, Phase.OBSERVED, now)  # it is not to be believed
        case Phase.PROBATION:
            return replace(record, wake=now + policy.probation_s), (ReadInfo(),)
        case Phase.BACKOFF if verdict.hands_bound(record, policy):
            return verdict.hold(record, now, policy), ()
        case Phase.BACKOFF:
            return attempt.begin(record, now, policy)
        case Phase.STOPPING if now >= record.since + policy.stop_timeout_s:
            if record.then is not None:
                return verdict.arrive(record, record.then, now)
            # Nothing may be stopped or begun behind it.
            stuck = replace(record, reason=Reason.NO_ANSWER, detail=_what_hangs(record))
            return verdict.enter(stuck, Phase.FAILED, now, wake=None), ()
        case Phase.STOPPING:  # a process in uninterruptible sleep takes its signal later
            return replace(record, wake=now + 1), (EndAttempt(record.seq),)
        case Phase.DECIDING:
            return verdict.undecided(record, "no answer in time", now), ()
        case Phase.FAILING:
            trouble = "STOP_DEV was not answered" if record.pending else "STOP_DEV was not sent"
            return verdict.stop_over(record, trouble, now)
    return replace(record, wake=None), ()


def _on_draining(record: Record, now: float, policy: Policy) -> Step:
    """Poll while the kernel drains; once it takes long, find out who is in the way."""
    waited = now - record.since
    unready = not pace.prepared(record, policy)
    if unready and now >= pace.ready_by(record, policy):
        if record.spawned_at is None:
            return attempt.fail(record, Reason.SPAWN_FAILED, _QUEUED, now)
        ran_s = now - record.spawned_at
        return attempt.fail(record, Reason.NOT_READY, f"after {ran_s:.0f} s", now)
    if now >= record.since + policy.drain_timeout_s and not pace.let_go(record):
        return _undrained(record, now, policy)
    if unready and pace.let_go(record):
        # It has let go. What is missing is the new server, which needs the CPU more than we do.
        return replace(record, wake=pace.ready_by(record, policy)), ()
    if record.quiet_since is not None and pace.let_go(record):
        return _on_quiet(record, record.quiet_since, now, policy)
    record = replace(record, wake=now + _pause(waited, policy, urgent=not unready))
    if waited < policy.holders_after_s or record.holders:
        return record, (ReadInfo(),)
    record = replace(record, holders="looking who holds the character device")
    return record, (ReadInfo(), FindHolders(record.seq))


def _on_quiet(record: Record, quiet_since: float, now: float, policy: Policy) -> Step:
    """Wait for nobody to hold the character device, and a little longer; then start."""
    if record.free_since is not None:
        settled_at = record.free_since + policy.settle_s
        if now >= settled_at:
            return attempt.attach(record, now, policy)
        return replace(record, wake=settled_at), ()
    give_up_at = quiet_since + policy.start_timeout_s
    if now >= give_up_at:
        who = record.holders or "nobody could tell who has it open"
        return attempt.fail(record, Reason.CHAR_DEVICE_BUSY, who, now)
    wake = min(give_up_at, now + pace.look_pause_s(record, now, policy))
    return replace(record, wake=wake), (FindHolders(record.seq), ReadInfo())


def _pause(waited: float, policy: Policy, *, urgent: bool) -> float:
    """Return the time until the next look: the shorter, if it is all that the device waits for."""
    first_s, share = (policy.drain_poll_s, 16) if urgent else (10 * policy.drain_poll_s, 8)
    return min(policy.drain_poll_max_s, max(first_s, waited / share))


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
