"""One attempt to bring a device back, from the new server's start to LIVE, or to its end.

Pure, the inner half of the machine: recovery.py decides when an attempt begins and what the facts
mean, this module takes it forward (DRAINING, STARTING, ATTACHING, PROBATION) and back (STOPPING,
then BACKOFF or FAILED). The numbered rules are at the head of recovery.py.
"""

from __future__ import annotations

import errno
from dataclasses import replace

from ublkwatch.events import (
    Cancel,
    Effect,
    EndAttempt,
    ReadInfo,
    SendEnd,
    SendStart,
    Spawn,
    WriteLine,
)
from ublkwatch.model import Armed, Generation, Phase, Policy, Reason, Record, errno_name

Step = tuple[Record, tuple[Effect, ...]]

# Another attempt cannot cure these.
PERMANENT = frozenset(
    {
        Reason.NOT_QUIESCED,
        Reason.START_REFUSED,
        Reason.NO_ANSWER,
        Reason.HALF_ATTACHED,
        Reason.LIVE_WITHOUT_SERVER,
    }
)
# The phases in which an attempt may have a process or a command of its own under way.
ATTEMPTING = frozenset(
    {Phase.DRAINING, Phase.STARTING, Phase.ATTACHING, Phase.STOPPING, Phase.BACKOFF}
)
_MARKS_MAX = 64


# --- its way forward -----------------------------------------------------------------------------


def begin(record: Record, now: float, policy: Policy) -> Step:
    """Start the next attempt: a new number, a new server, which touches nothing yet."""
    seq = record.seq + 1
    record = enter(
        record,
        Phase.DRAINING,
        now,
        wake=now + policy.drain_poll_s,
        seq=seq,
        attempts=record.attempts + 1,
        candidate=None,
        ready=False,
        holders="",
        over=False,
        agreed=0,
    )
    # The new server comes up while the kernel tears down the old one's queues.
    return record, (Spawn(seq), ReadInfo())


def let_go(record: Record) -> bool:
    """Tell whether the old server is gone and the kernel has let go of it.

    One read that agrees with the ended process is enough, else two in a row.
    """
    return not record.server and record.agreed >= (1 if record.detected_by == "pidfd" else 2)


def try_start(record: Record, now: float, policy: Policy) -> Step:
    """Send START once the server is ready, the old one gone and the state agreed on."""
    if not record.ready or not record.candidate or not let_go(record):
        return record, ()
    if policy.generation is Generation.G2 and record.armed is Armed.YES:
        return attach(record, now, policy)  # G2 takes no second START, and needs none
    armed = Armed.SENT if record.armed is Armed.NO else record.armed
    return (
        enter(
            record,
            Phase.STARTING,
            now,
            wake=now + policy.holders_after_s,
            armed=armed,
            pending=True,
        ),
        (SendStart(record.seq),),
    )


def start_patience_s(policy: Policy) -> float:
    """Return how long START may take: its retries while EBUSY, and some time to be answered."""
    return policy.start_timeout_s + policy.stop_timeout_s


def start_replied(record: Record, error: int, now: float, policy: Policy) -> Step:
    """Take the answer to START: 0, an errno, or ETIMEDOUT for no answer."""
    taken = error == 0 or (
        # G2 says EINVAL to a second START: ours from before our restart had been taken.
        error == errno.EINVAL
        and policy.generation is Generation.G2
        and record.armed is Armed.UNSURE
    )
    if taken:
        record = replace(record, armed=Armed.YES, lined=False)
    elif error == errno.ETIMEDOUT:
        record = replace(record, armed=Armed.UNSURE)
    elif record.armed is Armed.SENT:
        record = replace(record, armed=Armed.NO)
    record = replace(record, pending=False)
    if record.phase is Phase.STOPPING:
        return settle(record, now, policy)
    if record.phase is not Phase.STARTING:
        return record, ()
    if taken and record.candidate:
        return attach(record, now, policy)
    if taken:
        return fail(record, Reason.DIED_BEFORE_READY, record.detail, now)
    if error == errno.ENODEV:
        return leave(record, Phase.GONE, now)
    name = errno_name(error)
    detail = f"{name}; {record.holders}" if record.holders else name
    reasons = {errno.EBUSY: Reason.CHAR_DEVICE_BUSY, errno.ETIMEDOUT: Reason.NO_ANSWER}
    return fail(record, reasons.get(error, Reason.START_REFUSED), detail, now)


def attach(record: Record, now: float, policy: Policy) -> Step:
    """Give the server its go; END goes out right behind it and sleeps until it attached."""
    record = enter(
        record,
        Phase.ATTACHING,
        now,
        wake=now + policy.attach_timeout_s,
        lined=True,
        pending=True,
    )
    assert record.candidate is not None
    return record, (WriteLine(record.seq), SendEnd(record.seq, record.candidate.pid))


def end_replied(record: Record, error: int, now: float, policy: Policy) -> Step:
    """Take the answer to END: 0, an errno, or ETIMEDOUT for no answer."""
    record = replace(record, pending=False)
    if error == 0:  # the round is complete in the kernel, whoever is left to serve
        record = replace(record, armed=Armed.NO, lined=False)
    if record.phase is Phase.STOPPING:
        return settle(record, now, policy)
    if record.phase is not Phase.ATTACHING:
        return record, ()
    if error == 0:
        return live(record, now, policy)
    name = errno_name(error)
    if error == errno.EBUSY:  # maybe LIVE already, by somebody else's END: the state will tell
        return replace(record, detail=name), (ReadInfo(),)
    return fail(record, Reason.END_REFUSED, name, now)


def live(record: Record, now: float, policy: Policy) -> Step:
    """Believe LIVE for now: the second look decides."""
    record = enter(
        record,
        Phase.PROBATION,
        now,
        wake=now + policy.probation_s,
        server=record.candidate,
        candidate=None,
        armed=Armed.NO,
        lined=False,
        agreed=0,
    )
    return record, (ReadInfo(),)


# --- its end --------------------------------------------------------------------------------------


def fail(record: Record, reason: Reason, detail: str, now: float) -> Step:
    """End the attempt because it failed; what comes next is settled when it is over."""
    if record.phase is Phase.STOPPING:  # the first symptom has been counted
        return record, ()
    failures = (*record.failures, now)
    return _stop(replace(record, failures=failures, reason=reason, detail=detail), None, now)


def leave(record: Record, then: Phase, now: float, reason: Reason | None = None) -> Step:
    """End whatever is under way without counting it, and go to ``then``."""
    if record.phase in ATTEMPTING:
        return _stop(replace(record, reason=reason), then, now)
    return arrive(replace(record, reason=reason), then, now)


def _stop(record: Record, then: Phase | None, now: float) -> Step:
    if record.phase is Phase.STOPPING:
        return replace(record, then=then), ()
    cancel = (Cancel(record.seq),) if record.pending else ()
    record = enter(record, Phase.STOPPING, now, wake=now + 1, then=then)
    return record, (*cancel, EndAttempt(record.seq))


def settle(record: Record, now: float, policy: Policy) -> Step:
    """Decide what comes after an attempt, once no process or command of it is left."""
    if not record.over or record.pending:
        return record, ()
    record = replace(record, candidate=None, ready=False)
    if record.then is not None:
        return arrive(record, record.then, now)
    if policy.generation is Generation.G2 and record.lined:
        detail = f"{record.reason.value if record.reason else ''} {record.detail}".strip()
        record = replace(record, reason=Reason.HALF_ATTACHED, detail=detail)
    recent = tuple(at for at in record.failures if now - at <= policy.window_s)
    record = replace(record, failures=recent)
    if record.reason in PERMANENT or len(recent) >= policy.attempts_max:
        return arrive(record, Phase.FAILED, now)
    backoff_s = min(policy.backoff_max_s, policy.backoff_base_s * 2 ** max(0, len(recent) - 1))
    return enter(record, Phase.BACKOFF, now, wake=now + backoff_s), ()


def arrive(record: Record, phase: Phase, now: float) -> Step:
    """Rest in a phase that waits for nobody."""
    record = enter(record, phase, now, wake=None, then=None)
    return record, (ReadInfo(),) if phase is Phase.OBSERVED else ()


def enter(record: Record, phase: Phase, now: float, **changes: object) -> Record:
    """Change the phase, and remember when."""
    marks = (*record.marks[: _MARKS_MAX - 1], (phase.value, now))
    return replace(record, phase=phase, since=now, marks=marks, **changes)  # type: ignore[arg-type]
