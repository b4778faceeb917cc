"""One attempt to bring a device back, from the new server's start to LIVE, or to its end.

Pure, the inner half of the machine: recovery.py decides when an attempt begins and what the facts
mean, this module takes it forward (DRAINING, STARTING, ATTACHING, PROBATION) and back (STOPPING);
verdict.py says what comes then. The numbered rules are at the head of recovery.py.
"""

from __future__ import annotations

import errno
from dataclasses import replace

from ublkwatch import pace
from ublkwatch.events import (
    Cancel,
    EndAttempt,
    FindServer,
    ReadInfo,
    SendEnd,
    SendStart,
    ServerExited,
    Spawn,
    Watch,
    WriteLine,
)
from ublkwatch.model import (
    Armed,
    Generation,
    Handoff,
    Phase,
    Policy,
    Reason,
    Record,
    ServerId,
    errno_name,
)
from ublkwatch.verdict import Step, arrive, beyond, enter, half_attached, settle, strays

# The phases in which an attempt may have a process or a command of its own under way.
ATTEMPTING = frozenset(
    {Phase.DRAINING, Phase.STARTING, Phase.ATTACHING, Phase.STOPPING, Phase.BACKOFF}
)
_FAILURES_MAX = 1000  # remembered
# What a command ends with that was cancelled, or whose worker died: EIO is the worker's own.
INTERRUPTED = (errno.EINTR, errno.EIO)
_ENDS_MAX = 8  # how often END is sent for one server, whatever the answers


# --- its way forward -----------------------------------------------------------------------------


def begin(record: Record, now: float, policy: Policy) -> Step:
    """Start the next attempt: a new number, a new server, which touches nothing yet.

    What is left of the last one has to end first; so has a server that lives, though the kernel
    has let go of it. Behind a server that is half attached nothing is started at all.
    """
    if not record.over or record.pending:
        return _stop(record, None, now)
    if half_attached(record, policy):
        return beyond(record, now, policy)
    seq, ended = record.seq + 1, strays(replace(record, seq=record.seq + 1))
    record = enter(
        record,
        Phase.DRAINING,
        now,
        wake=now + policy.drain_poll_s,
        seq=seq,
        attempts=record.attempts + 1,
        candidate=None,
        spawned_at=None,
        ready=False,
        standby=False,
        holders="",
        over=False,
        shared=False,
        agreed=0,
        quiet_since=None,
        free_since=None,
        ends=0,
        refused="",
        ill=None,
    )
    # A server that waits for its line comes up while the kernel tears down the old one's queues.
    spawn = (Spawn(seq),) if pace.starts_early(policy) else ()
    return record, (*ended, *spawn, ReadInfo())


def try_start(record: Record, now: float, policy: Policy) -> Step:
    """Send START once the server is ready, the old one gone and the state agreed on."""
    if not pace.prepared(record, policy) or not pace.let_go(record):
        return record, ()
    if pace.looks_first(policy):
        return pace.look(record, now, policy)
    if policy.generation is Generation.G2 and record.armed is Armed.YES:
        return attach(record, now, policy)  # G2 takes no second START, and needs none
    armed = Armed.SENT if record.armed is Armed.NO else record.armed
    wake = now + policy.holders_after_s
    record = enter(record, Phase.STARTING, now, wake=wake, armed=armed, pending=True)
    return record, (SendStart(record.seq),)


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
    elif error in (errno.ETIMEDOUT, *INTERRUPTED):
        record = replace(record, armed=Armed.UNSURE)
    elif record.armed is Armed.SENT:
        record = replace(record, armed=Armed.NO)
    record = _answered(record, error, "START_USER_RECOVERY")
    if record.phase is Phase.STOPPING:
        return settle(record, now, policy)
    if record.phase is not Phase.STARTING:
        return record, ()
    if error == errno.ENODEV:
        return leave(record, Phase.GONE, now)
    # Where it is not prepared any more, it died, and that came first.
    if error != errno.ETIMEDOUT and not pace.prepared(record, policy):
        if record.reason is Reason.STANDBY_LOST:
            return end(record, now)
        return fail(record, record.reason or Reason.DIED_BEFORE_READY, record.detail, now)
    if taken:
        return attach(record, now, policy)
    name = errno_name(error)
    detail = f"{name}; {record.holders}" if record.holders else name
    reasons = {
        errno.EBUSY: Reason.CHAR_DEVICE_BUSY,
        errno.EINTR: Reason.START_INTERRUPTED,
        errno.EIO: Reason.START_INTERRUPTED,
        errno.ETIMEDOUT: Reason.NO_ANSWER,
    }
    return fail(record, reasons.get(error, Reason.START_REFUSED), detail, now)


def _answered(record: Record, error: int, command: str) -> Record:
    """Take it that a command is no longer waited for; one that stays with the kernel is final."""
    if error == errno.ETIMEDOUT and record.phase is Phase.STOPPING:
        record = replace(record, reason=Reason.NO_ANSWER, detail=command)
    return replace(record, pending=False)


def attach(record: Record, now: float, policy: Policy) -> Step:
    """Let the server attach: by its line, or by starting it; or let its command do everything.

    END goes out right behind, and sleeps until every tag is fetched.
    """
    record = enter(record, Phase.ATTACHING, now, lined=True)
    if not pace.starts_early(policy):
        record = replace(record, spawned_at=None)
        return replace(record, wake=pace.attach_by(record, policy)), (Spawn(record.seq),)
    record, effects = send_end(replace(record, wake=pace.attach_by(record, policy)))
    return record, (WriteLine(record.seq), *effects)


def send_end(record: Record) -> Step:
    """Send END for the candidate, which lives: its end would have been told."""
    server = record.candidate
    assert server is not None
    record = replace(record, pending=True, ends=record.ends + 1)
    return record, (SendEnd(record.seq, server.pid),)


def end_replied(record: Record, error: int, now: float, policy: Policy) -> Step:
    """Take the answer to END: 0, an errno, or ETIMEDOUT for no answer."""
    record = _answered(record, error, "END_USER_RECOVERY")
    if error == 0:  # the round is complete in the kernel, whoever is left to serve
        record = replace(record, armed=Armed.NO, lined=False)
    if record.phase is Phase.STOPPING:
        return settle(record, now, policy)
    if record.phase is not Phase.ATTACHING:
        return record, ()
    name = errno_name(error)
    if error == 0 and record.candidate:
        return live(record, record.candidate, now, policy)
    if error == 0:  # LIVE, and the process that we started has left the serving to another
        return record, (FindServer(record.seq),)
    if error == errno.EBUSY:  # maybe LIVE already, by somebody else's END: the state will tell
        return replace(record, refused=name, agreed=0), (ReadInfo(),)
    if error in INTERRUPTED and record.candidate and record.ends < _ENDS_MAX:
        return send_end(record)  # interrupted, and the server is still at it
    if error == errno.EINVAL and policy.generation is Generation.G3 and record.ends < _ENDS_MAX:
        # Everything is fetched, but by another process than the one that we started.
        return record, (FindServer(record.seq),)
    if error == errno.ETIMEDOUT:
        return fail(record, Reason.NO_ANSWER, "END_USER_RECOVERY", now)
    return fail(record, Reason.END_REFUSED, name, now)


def server_found(record: Record, server: ServerId | None, now: float, policy: Policy) -> Step:
    """Take it that another process of the attempt serves, or none does."""
    if record.phase is Phase.PROBATION and record.server is None:
        if server is None:
            return fail(record, Reason.DIED_IN_PROBATION, record.detail, now)
        return replace(record, server=server), (Watch(server), ReadInfo())
    if record.phase is not Phase.ATTACHING:
        return record, ()
    if policy.handoff is Handoff.DELEGATED:
        return _whose(record, server, now, policy)
    if server is None and record.candidate is None and record.armed is Armed.YES:
        return record, ()  # it may open the device yet: looked for again until the deadline
    if server is None or server == record.ended:
        reason = Reason.END_REFUSED if record.candidate else Reason.DIED_ATTACHING
        detail = record.detail or "no process of the attempt has the character device open"
        return fail(record, reason, detail, now)
    if record.armed is Armed.NO:  # END was 0
        record, effects = live(record, server, now, policy)
        return record, (Watch(server), *effects)
    record = replace(record, candidate=server, wake=pace.attach_by(record, policy))
    if record.pending:  # END for the process that has left; its EINTR brings the next
        return record, (Watch(server), Cancel(record.seq))
    record, effects = send_end(record)
    return record, (Watch(server), *effects)


def _whose(record: Record, server: ServerId | None, now: float, policy: Policy) -> Step:
    """Take it whose LIVE it is that came before our delegate was seen to be started."""
    if server is not None:
        record, effects = live(record, server, now, policy)
        return record, (Watch(server), *effects)
    if record.spawned_at is None:  # somebody else's; a command that is run now could harm it
        return leave(record, Phase.OBSERVED, now)
    return record, ()


def live(record: Record, server: ServerId, now: float, policy: Policy) -> Step:
    """Believe LIVE for now: the second look decides."""
    record = enter(
        record,
        Phase.PROBATION,
        now,
        wake=now + policy.probation_s,
        server=server,
        candidate=None,
        armed=Armed.NO,
        lined=False,
        agreed=0,
    )
    return record, (ReadInfo(),)


# --- its processes' ends -------------------------------------------------------------------------


def exited(record: Record, event: ServerExited, now: float, policy: Policy) -> Step:
    """Take the end of the process that this attempt started."""
    return ended(replace(record, ended=event.server), event.how, event.code, now, policy)


def ended(record: Record, how: str, code: int | None, now: float, policy: Policy) -> Step:
    """Take the end of the attempt's process, whoever that was."""
    permanent = code in policy.permanent_exits
    match record.phase:
        case Phase.DRAINING if record.standby:  # it says nothing of one that is started now
            return end(replace(record, reason=Reason.STANDBY_LOST, detail=how), now)
        case Phase.STARTING if record.standby:
            return replace(record, candidate=None, reason=Reason.STANDBY_LOST, detail=how), ()
        case Phase.DRAINING:
            reason = Reason.PERMANENT_EXIT if permanent else Reason.DIED_BEFORE_READY
            return fail(record, reason, how, now)
        case Phase.STARTING:  # its START cannot be taken back: decided when that is answered
            reason = Reason.PERMANENT_EXIT if permanent else Reason.DIED_BEFORE_READY
            return replace(record, candidate=None, reason=reason, detail=how), ()
        case Phase.ATTACHING if permanent:
            return fail(record, Reason.PERMANENT_EXIT, how, now)
        case Phase.ATTACHING if policy.handoff is Handoff.DELEGATED:
            if _left_another(how, code):
                return replace(record, candidate=None, wake=now + policy.drain_poll_s), (
                    ReadInfo(),
                )
            record = replace(record, lined=record.lined and code not in policy.retry_exits)
            record, effects = fail(record, Reason.DELEGATE_FAILED, how, now)
            return record, (*effects, ReadInfo())  # some delete the device when they fail
        case Phase.ATTACHING if _left_another(how, code) and not pace.starts_early(policy):
            detail = "it left no process that has the character device open"
            record = replace(record, candidate=None, detail=detail, wake=now + pace.LOOK_AGAIN_S)
            return record, (FindServer(record.seq),)
        case Phase.ATTACHING:
            return fail(record, Reason.DIED_ATTACHING, how, now)
    return record, ()


def _left_another(how: str, code: int | None) -> bool:
    """Tell whether a process may have ended because another one serves in its place."""
    return code == 0 or how == "unknown"  # unknown: the child of our former life


def left_another(event: ServerExited, policy: Policy) -> bool:
    """Tell whether a server that served may have been the parent of the one that serves.

    It may linger: G2 takes END for a process that serves nothing.
    """
    managed = policy.handoff is Handoff.MANAGED
    return managed and not pace.starts_early(policy) and _left_another(event.how, event.code)


def died_in_probation(record: Record, event: ServerExited, now: float, policy: Policy) -> Step:
    """Take the end of the server under which the device had just become LIVE."""
    if left_another(event, policy):
        return replace(record, detail=event.how), (FindServer(record.seq),)
    reason = Reason.DIED_IN_PROBATION
    if event.code in policy.permanent_exits:
        reason = Reason.PERMANENT_EXIT
    ended = record.ill is not None and record.ill.condemned
    return fail(record, reason, record.ill.what if record.ill and ended else event.how, now)


# --- its end --------------------------------------------------------------------------------------


def fail(record: Record, reason: Reason, detail: str, now: float) -> Step:
    """End the attempt because it failed; what comes next is settled when it is over."""
    failures = (*record.failures[1 - _FAILURES_MAX :], now)
    return _stop(replace(record, failures=failures, reason=reason, detail=detail), None, now)


def break_off(record: Record, now: float) -> Step:
    """End the attempt without counting it; what comes next is settled when it is over."""
    return _stop(replace(record, reason=None), None, now)


def deleted_by_delegate(record: Record, policy: Policy) -> Reason | None:
    """Return what to say of a device that is gone while its own recover command was at work."""
    ran = policy.handoff is Handoff.DELEGATED and record.lined and record.spawned_at is not None
    at_work = record.phase in (Phase.ATTACHING, Phase.STOPPING, Phase.BACKOFF)
    return Reason.DELEGATE_DELETED if ran and at_work and record.then is None else None


def end(record: Record, now: float) -> Step:
    """End what is under way without counting it, for the reason that the record has."""
    return _stop(record, None, now)


def leave(record: Record, then: Phase, now: float, reason: Reason | None = None) -> Step:
    """End whatever is under way without counting it, and go to ``then``, for good.

    That we were told to forget it outlasts every other word.
    """
    if record.reason is not Reason.FORGOTTEN:
        record = replace(record, reason=reason)
    nothing_left = record.phase is Phase.BACKOFF and record.over and not record.pending
    if record.phase in ATTEMPTING and not nothing_left:
        return _stop(record, then, now)
    return arrive(record, then, now)


def _stop(record: Record, then: Phase | None, now: float) -> Step:
    if record.phase is Phase.STOPPING:
        return replace(record, then=then), ()
    cancel = (Cancel(record.seq),) if record.pending else ()
    record = enter(record, Phase.STOPPING, now, wake=now + 1, then=then)
    return record, (*cancel, EndAttempt(record.seq))
