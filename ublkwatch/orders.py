"""What operators may ask for, when it is refused and why, and what follows. Pure.

A part of the machine: rule 12 at the head of recovery.py. Whoever takes an order from a person asks
``objection`` first, so that a refusal has words; the machine asks it again, since facts are faster
than people.
"""

from __future__ import annotations

from dataclasses import replace

from ublkwatch import ailing, attempt, verdict
from ublkwatch.events import Asked, ReadInfo
from ublkwatch.model import Armed, Generation, Handoff, Order, Phase, Policy, Reason, Record
from ublkwatch.uapi import DevState
from ublkwatch.verdict import Step

# Where an outage waits for time, for us, or for the operator.
WAITING = frozenset({Phase.GRACE, Phase.HELD, Phase.BACKOFF, Phase.FAILED})
# Only STOP_DEV frees a device of which this is true.
_LOST_FOR_GOOD = frozenset({Reason.HALF_ATTACHED, Reason.LIVE_WITHOUT_SERVER})
_DOWN = (DevState.QUIESCED, DevState.FAIL_IO)


def objection(record: Record, order: Order, policy: Policy) -> str:
    """Return why an order is refused, in words for the operator; "" when it is not."""
    phase = record.phase
    if phase is Phase.GONE:
        return "the device is gone"
    if record.reason is Reason.INTERNAL_ERROR:
        return "a bug in ublkwatch stopped it from acting on this device; restart ublkwatch"
    if order is Order.RELEASE:
        return "" if record.held else "it is not held"
    if phase is Phase.FAILING:
        return "it is being stopped by STOP_DEV, which cannot be taken back"
    if phase is Phase.OBSERVED and order is not Order.RECOVER:
        return f"ublkwatch does not act on it: {_why(record)}"
    match order:
        case Order.RETRY if phase not in (Phase.FAILED, Phase.BACKOFF):
            return f"it was not given up: it is {phase.value}"
        case Order.RETRY if record.held:
            return "it is held; release it first"
        case Order.RETRY | Order.RECOVER:
            return _cannot_begin(record, policy)
        case Order.FORGET if policy.generation is Generation.G2 and phase is Phase.ATTACHING:
            return "a server attaches just now, and to end it would wedge the device; ask again"
    return ""


def _cannot_begin(record: Record, policy: Policy) -> str:
    if record.stopped:
        return "it was stopped; create it again by its own program"
    if not policy.has_spec:
        return (policy.hands_off or Reason.NO_SPEC).value
    if record.shared:
        return (
            f"{_why(record)} ({record.detail}); once that process has ended it is recovered "
            "together with them"
        )
    if policy.generation is Generation.UNKNOWN:
        return Reason.NO_FEATURES.value
    state = record.info.state if record.info else None
    if record.phase is Phase.OBSERVED:
        back = record.reason is Reason.FORGOTTEN and state is DevState.LIVE
        known = record.reason in (Reason.NEVER_SEEN_LIVE, Reason.FORGOTTEN) and state in _DOWN
        if not (back or known):
            return f"there is nothing to recover: {_why(record)}"
    elif record.phase is Phase.WATCHING and record.ill:
        if policy.bystander:
            return f"its server serves {policy.bystander}, and would be ended for that one, too"
        return "its server was sent SIGKILL already" if record.ill.condemned else ""
    elif record.phase not in WAITING:
        return f"it is {record.phase.value} already"
    # How far a delegate came only its operator can tell, who may vouch for it.
    half = verdict.half_attached(record, policy) and policy.handoff is Handoff.MANAGED
    if policy.generation is Generation.G2 and (half or record.reason in _LOST_FOR_GOOD):
        return f"{_why(record)}; to recover it again could crash the kernel"
    return ""


def _why(record: Record) -> str:
    return record.reason.value if record.reason else record.phase.value


def obey(record: Record, asked: Asked, now: float, policy: Policy) -> Step:
    """Do what was asked for, unless it is refused."""
    if objection(record, asked.order, policy):
        return record, ()
    match asked.order:
        case Order.HOLD:
            return _hold(record, asked, now, policy)
        case Order.RELEASE:
            return release(replace(record, asked_by=asked.by), now, policy)
        case Order.FORGET:
            return _forget(record, asked, now)
        case Order.RETRY | Order.RECOVER:
            return _again(replace(record, asked_by=asked.by), now, policy)


def _hold(record: Record, asked: Asked, now: float, policy: Policy) -> Step:
    """Hold it. What has sent START goes on to its end: to break it off could wedge the device."""
    record = replace(record, held=True, held_until=asked.until, held_by=asked.by)
    match record.phase:
        case Phase.DRAINING:
            return attempt.break_off(record, now)
        case Phase.GRACE | Phase.BACKOFF | Phase.DECIDING | Phase.HELD:
            return verdict.hold(record, now, policy), ()
    return record, ()


def release(record: Record, now: float, policy: Policy) -> Step:
    """End the hold, and take up what waited for that."""
    record = replace(record, held=False, held_until=None, held_by="")
    match record.phase:
        case Phase.HELD:
            return begin(record, now, policy)
        case Phase.FAILED if record.shared:
            return record, ()
        case Phase.FAILED if record.overdue and not (record.stopped or policy.shutting_down):
            return verdict.failing(record, now, policy)
        case Phase.WATCHING | Phase.PROBATION:
            return ailing.treat(record, now, policy)
    return record, ()


def begin(record: Record, now: float, policy: Policy) -> Step:
    """Begin to bring the device back, or hold it where the hands are bound."""
    if verdict.hands_bound(record, policy):
        return verdict.hold(record, now, policy), ()
    return attempt.begin(replace(record, reason=None, detail=""), now, policy)


def _again(record: Record, now: float, policy: Policy) -> Step:
    """Begin now, with a new budget: the operator vouches for it."""
    if record.phase is Phase.OBSERVED and record.info and record.info.state is DevState.LIVE:
        return replace(record, reason=None, detail=""), (ReadInfo(),)
    if record.phase is Phase.WATCHING:  # and its server ails
        return ailing.end(replace(record, failures=(), held=False, held_until=None, held_by=""))
    started = record.marks or (("lost", now),)
    armed = record.armed
    if policy.generation is Generation.G2 and record.reason is Reason.START_REFUSED:
        armed = Armed.UNSURE  # somebody's START was taken; now EINVAL will mean that it was
    record = replace(
        record,
        held=False,
        held_until=None,
        held_by="",
        failures=(),
        decisions=0,
        lined=False,
        armed=armed,
        marks=started,
        give_up_at=verdict.patience_ends(record, now, policy),
        overdue=False,
        detected_by=record.detected_by or "startup",
    )
    return attempt.begin(replace(record, reason=None, detail=""), now, policy)


def _forget(record: Record, asked: Asked, now: float) -> Step:
    """Take the hands off it, whatever is under way."""
    record = replace(
        record,
        held=False,
        held_until=None,
        held_by="",
        give_up_at=None,
        overdue=False,
        failures=(),
        detail=asked.by,
    )
    record, effects = attempt.leave(record, Phase.OBSERVED, now, Reason.FORGOTTEN)
    return record, effects or (ReadInfo(),)
