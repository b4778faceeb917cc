"""What comes after an attempt: another one, or giving up, and what giving up means.

Pure, a part of the machine; the numbered rules are at the head of recovery.py. An attempt that
failed leads to BACKOFF and another one, while the budget lasts and another one can help. After that
the operator's choice holds: FAILED (I/O goes on waiting), FAILING (STOP_DEV ends it), or DECIDING
(a command of the operator's says which).
"""

from __future__ import annotations

import errno
from dataclasses import replace

from ublkwatch.events import Decide, Effect, EndAttempt, Kill, ReadInfo, SendStop
from ublkwatch.model import (
    Exhausted,
    Generation,
    Handoff,
    Phase,
    Policy,
    Reason,
    Record,
    RecoveryMode,
    errno_name,
)

Step = tuple[Record, tuple[Effect, ...]]

# Another attempt cannot cure these.
PERMANENT = frozenset(
    {
        Reason.PERMANENT_EXIT,
        Reason.HOOK_PARKED,
        Reason.NOT_QUIESCED,
        Reason.START_REFUSED,
        Reason.NO_ANSWER,
        Reason.HALF_ATTACHED,
        Reason.LIVE_WITHOUT_SERVER,
    }
)
# What the operator's command says by its exit code; anything else means HOLD.
SAYS_RETRY, SAYS_FAIL = 10, 20
_MARKS_MAX = 64
_ANSWER_S = 15.0  # for a reply to reach us after its command's own deadline


def enter(record: Record, phase: Phase, now: float, **changes: object) -> Record:
    """Change the phase, and remember when."""
    marks = (*record.marks[: _MARKS_MAX - 1], (phase.value, now))
    return replace(record, phase=phase, since=now, marks=marks, **changes)  # type: ignore[arg-type]


def arrive(record: Record, phase: Phase, now: float) -> Step:
    """Go to a phase in which no attempt is under way."""
    record = enter(record, phase, now, wake=None, then=None, give_up_at=None, shared=False)
    return record, (ReadInfo(),) if phase is Phase.OBSERVED else ()


def hold(record: Record, now: float, policy: Policy) -> Record:
    """Wait for the operator, or for the host's end."""
    reason = Reason.SHUTDOWN if policy.shutting_down and not record.held else Reason.HELD
    detail = record.held_by if reason is Reason.HELD else ""
    return enter(record, Phase.HELD, now, wake=None, reason=reason, detail=detail)


def hands_bound(record: Record, policy: Policy) -> bool:
    """Tell whether nothing may be begun or ended now."""
    return record.held or policy.shutting_down


def hands_off(record: Record, policy: Policy) -> Reason | None:
    """Return why a device is not ours to act on, whatever its state."""
    if policy.generation is Generation.UNKNOWN:
        return Reason.NO_FEATURES
    if record.info and RecoveryMode.of(record.info.flags) is RecoveryMode.NONE:
        return Reason.NO_RECOVERY_FLAG
    if record.reason is Reason.FORGOTTEN:
        return Reason.FORGOTTEN
    return None if policy.has_spec else policy.hands_off or Reason.NO_SPEC


def half_attached(record: Record, policy: Policy) -> bool:
    """Tell whether a server may have attached in part, which G2 never recovers from."""
    return policy.generation is Generation.G2 and record.lined


def beyond(record: Record, now: float, policy: Policy) -> Step:
    """Give up a device that is half attached."""
    return exhausted(named_half(record, policy), now, policy)


def named_half(record: Record, policy: Policy) -> Record:
    """Say that it is half attached, and what led there; a delegate's own failure says more."""
    if policy.handoff is Handoff.MANAGED and record.reason is not Reason.HALF_ATTACHED:
        return replace(record, reason=Reason.HALF_ATTACHED, detail=failure(record))
    return record if record.reason else replace(record, reason=Reason.DELEGATE_FAILED)


def failure(record: Record) -> str:
    """Return what went wrong so far, in words."""
    return f"{record.reason.value if record.reason else ''} {record.detail}".strip()


# --- after an attempt ----------------------------------------------------------------------------


def settle(record: Record, now: float, policy: Policy) -> Step:
    """Decide what comes after an attempt, once no process or command of it is left."""
    if not record.over or record.pending:
        return record, ()
    ended = record.candidate or record.ended
    record = replace(record, candidate=None, ready=False, ended=ended)
    if record.then is not None:
        return arrive(record, record.then, now)
    if hands_bound(record, policy):
        return hold(record, now, policy), ()
    if record.shared and record.server is not None:
        return enter(record, Phase.FAILED, now, wake=None), ()  # until that server ends
    record = replace(record, shared=False)
    if record.overdue:
        return failing(record, now, policy)
    if half_attached(record, policy):
        return beyond(record, now, policy)
    if record.reason is Reason.HOOK_LATER:
        return enter(record, Phase.BACKOFF, now, wake=now + policy.hook_pause_s), ()
    if record.reason in PERMANENT or len(record.failures) >= policy.attempts_max:
        return exhausted(record, now, policy)
    # That has ended: now, with the other devices; or nothing was wrong but with a standby.
    if record.reason in (Reason.SHARED_SERVER, Reason.STANDBY_LOST):
        return enter(record, Phase.BACKOFF, now, wake=now), ()
    longest_s = policy.backoff_base_s * 2 ** min(len(record.failures) - 1, 32)
    backoff_s = min(policy.backoff_max_s, longest_s) * policy.chance
    return enter(record, Phase.BACKOFF, now, wake=now + backoff_s), ()


def exhausted(record: Record, now: float, policy: Policy) -> Step:
    """Give up, as the operator chose."""
    match policy.on_exhausted:
        case Exhausted.FAIL:
            return failing(record, now, policy)
        case Exhausted.EXEC if record.decisions < policy.decisions_max:
            wake = now + policy.exec_timeout_s + _ANSWER_S
            decisions = record.decisions + 1
            record = enter(record, Phase.DECIDING, now, wake=wake, decisions=decisions)
            return record, (Decide(record.seq),)
    return enter(record, Phase.FAILED, now, wake=None), ()


def patience_ends(record: Record, now: float, policy: Policy) -> float | None:
    """Return when I/O that begins to wait now will have waited as long as it may."""
    fails = record.info is not None and RecoveryMode.of(record.info.flags) is RecoveryMode.FAIL_IO
    return now + policy.hold_timeout_s if policy.hold_timeout_s and not fails else None


def overdue(record: Record, now: float, policy: Policy) -> Step:
    """Take it that I/O has waited as long as it may; an attempt past its START may still end it."""
    record = replace(record, give_up_at=None, overdue=True)
    waits = record.phase in (Phase.GRACE, Phase.BACKOFF, Phase.DECIDING, Phase.FAILED)
    if waits and not record.shared and not hands_bound(record, policy):
        return failing(record, now, policy)
    return record, ()


def undecided(record: Record, how: str, now: float) -> Record:
    """Hold, because the operator's command did not say anything else."""
    detail = "; ".join(part for part in (record.detail, f"on_exhausted command: {how}") if part)
    return enter(record, Phase.FAILED, now, wake=None, detail=detail)


# --- STOP_DEV ------------------------------------------------------------------------------------


def failing(record: Record, now: float, policy: Policy) -> Step:
    """Begin to end the I/O that waits: every server has to be dead, and the state read anew."""
    if hands_bound(record, policy):
        return hold(record, now, policy), ()
    reason = record.reason
    if record.overdue and reason in (None, Reason.GRACE, Reason.HELD, Reason.SHUTDOWN):
        reason = Reason.HOLD_TIMEOUT
    rest = () if record.over else (EndAttempt(record.seq),)
    record = enter(
        record,
        Phase.FAILING,
        now,
        wake=now + policy.stop_timeout_s,
        reason=reason,
        agreed=0,
        give_up_at=None,
        overdue=False,
    )
    return record, (*strays(record), *rest, ReadInfo())


def strays(record: Record) -> tuple[Effect, ...]:
    """Wish for the end of a server that lives, though it does not serve, or not any more."""
    if not record.server:
        return ()
    # One that ails is ended whomever else it serves: their I/O may hang as well.
    ails = record.ill is not None and record.ill.condemned
    return (Kill(record.server, None if ails else record.seq),)


def send_stop(record: Record, now: float, policy: Policy) -> Step:
    """Send STOP_DEV, if every server is known to be dead."""
    if record.pending or record.server or not record.over:
        return record, ()
    if hands_bound(record, policy):
        return hold(record, now, policy), ()
    wake = now + policy.stop_timeout_s + _ANSWER_S
    return replace(record, pending=True, wake=wake), (SendStop(record.seq),)


def stop_replied(record: Record, error: int, now: float, policy: Policy) -> Step:
    """Take the answer to STOP_DEV: 0, an errno, or ETIMEDOUT for no answer."""
    record = replace(record, pending=False)
    if record.phase is Phase.STOPPING:
        return settle(record, now, policy)
    if record.phase is not Phase.FAILING:
        return replace(record, stopped=record.phase is Phase.FAILED and not error), ()
    if error == errno.ENODEV:
        return arrive(record, Phase.GONE, now)
    return stop_over(record, f"STOP_DEV: {errno_name(error)}" if error else "", now)


def stop_over(record: Record, trouble: str, now: float) -> Step:
    """Rest: the device was stopped, or could not be."""
    detail = "; ".join(part for part in (record.detail, trouble) if part)
    record = replace(record, stopped=not trouble, detail=detail)
    return enter(record, Phase.FAILED, now, wake=None), ()
