"""A device's record in sentences, for a person at three in the morning. Pure.

What its phase means, why it is there, what was tried, who holds it, what happens next and when,
what that means for I/O, and what can be done. From the record alone, so also while ublkwatch is
down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ublkwatch import orders, pace, verdict
from ublkwatch.model import Generation, Order, Phase, Policy, Reason, Record, RecoveryMode
from ublkwatch.status import state_name
from ublkwatch.uapi import DevState

_MEANS = {
    Phase.OBSERVED: "ublkwatch looks on and does not act on it",
    Phase.WATCHING: "its server is watched",
    Phase.GRACE: "its server is lost, and others have the time to bring it back",
    Phase.HELD: "its server is lost, and nothing is done about it",
    Phase.DRAINING: "its server is lost; a new one is on its way while the kernel lets go of it",
    Phase.STARTING: "START_USER_RECOVERY is with the kernel",
    Phase.ATTACHING: "a new server attaches to it",
    Phase.PROBATION: "it is LIVE again, under a new server, and that is looked at once more",
    Phase.STOPPING: "what an attempt left is being ended: its processes, its command",
    Phase.BACKOFF: "an attempt failed, and another one follows after a pause",
    Phase.DECIDING: "ublkwatch gave up, and on_exhausted_command says what comes of it",
    Phase.FAILING: "ublkwatch gave up, and STOP_DEV ends the I/O that waits",
    Phase.FAILED: "ublkwatch gave up",
    Phase.GONE: "the device was stopped or deleted",
}
_NOTICED = {
    "pidfd": "its process ended",
    "poll": "the kernel said so",
    "startup": "it was so when ublkwatch started",
    "thread": "a thread that serves a queue was gone",
}
_DOES = {
    Order.HOLD: "nothing is begun or ended until it is released; --for 30m ends that by itself",
    Order.RELEASE: "end the hold: what waits is taken up",
    Order.RETRY: "begin now, with a new budget of attempts",
    Order.RECOVER: "begin now, whatever it waits for",
    Order.FORGET: "take the hands off this life of the device; it is not recovered",
}
_IO_DOWN = {
    RecoveryMode.NONE: "without UBLK_F_USER_RECOVERY the disk goes with its server",
    RecoveryMode.PLAIN: "what was in flight ended with EIO; what came since waits",
    RecoveryMode.REISSUE: "what was in flight is sent again to the new server; "
    "what came since waits",
    RecoveryMode.FAIL_IO: "what was in flight ended with EIO; "
    "what comes ends with EREMOTEIO at once",
}
_IO_UP = {
    RecoveryMode.NONE: "when its server dies the disk is removed: all I/O ends in errors",
    RecoveryMode.PLAIN: "when its server dies what is in flight ends with EIO; "
    "what comes then waits",
    RecoveryMode.REISSUE: "when its server dies what is in flight is sent again, and all I/O waits",
    RecoveryMode.FAIL_IO: "when its server dies what is in flight ends with EIO; "
    "what comes then with EREMOTEIO",
}
_DOWN = (DevState.QUIESCED, DevState.FAIL_IO)
_TOLD_MAX = 16  # lines of the timeline


@dataclass(frozen=True, slots=True)
class Times:
    """The two clocks at one moment, and how a person wants to read a wall time."""

    now: float
    wall: float
    write: Callable[[float], str]

    def ahead(self, at: float) -> str:
        """Return how long it is until then: "in 3.2 s"."""
        return f"in {span(at - self.now)}" if at > self.now else "now"

    def clock(self, at: float) -> str:
        """Return the wall time of a moment of the monotonic clock."""
        return self.write(self.wall + at - self.now)


def explain(
    record: Record,
    policy: Policy,
    times: Times,
    *,
    running: bool = True,
    written_at: float | None = None,
) -> str:
    """Return the sentences; ``written_at`` is the wall time when ublkwatch was last seen alive."""
    facts = [
        ("What", [_what(record)]),
        ("Why", [_why(record)]),
        ("Tried", list(_tried(record, times))),
        ("Held", list(_held(record, times))),
        ("Next", list(_next(record, policy, times))),
        ("I/O", [_io(record)]),
        ("You can", list(_possible(record, policy))),
    ]
    state = f", {state_name(record.info.state)}" if record.info else ""
    head = f"ublkb{record.dev_id}: {record.phase.value}{state}"
    lines = [
        f"{head}, for {span(times.now - record.since)}",
        _supervisor(running, written_at, times),
    ]
    for label, sentences in facts:
        for number, sentence in enumerate(each for each in sentences if each):
            lines.append(f"{'' if number else label + ':':<9}{sentence}")
    if record.reason:
        lines.append(f"{'More:':<9}docs/recovery.md, {record.reason.name}")
    return "\n".join(lines)


def span(seconds: float) -> str:
    """Write a duration as people say it."""
    seconds = max(0.0, seconds)
    for above, unit, word in ((172800, 86400, "days"), (7200, 3600, "h"), (120, 60, "min")):
        if seconds >= above:
            return f"{seconds / unit:.0f} {word}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def _supervisor(running: bool, written_at: float | None, times: Times) -> str:  # noqa: FBT001
    if running:
        return "ublkwatch is running"
    since = ""
    if written_at is not None:
        since = f" since {times.write(written_at)}, {span(times.wall - written_at)} ago"
    return f"ublkwatch is NOT RUNNING{since}: until it is started, nothing of what is below happens"


def _what(record: Record) -> str:
    means = _MEANS[record.phase]
    if record.phase is Phase.FAILED:
        if record.stopped:
            return f"{means}: it was stopped, and what waited ended in errors"
        return f"{means} after {_count(record.attempts, 'attempt')}" if record.attempts else means
    return means


def _why(record: Record) -> str:
    if record.reason is None or record.phase is Phase.WATCHING:
        return ""
    return record.reason.value + (f" ({record.detail})" if record.detail else "")


# --- what was -------------------------------------------------------------------------------------


def _tried(record: Record, times: Times) -> Iterator[str]:
    if record.phase is Phase.WATCHING and record.last_held_s is not None:
        yield (
            f"{_count(record.recoveries, 'recovery', 'recoveries')} so far; "
            f"at the last one I/O was held for {record.last_held_s:.3f} s"
        )
    if not record.marks:
        return
    lost = record.marks[0][1]
    noticed = _NOTICED.get(record.detected_by, record.detected_by)
    yield (
        f"{_count(record.attempts, 'attempt')}, since its server was lost {span(times.now - lost)} "
        f"ago ({times.clock(lost)}{f'; {noticed}' if noticed else ''})"
    )
    failed = [("an attempt failed", at) for at in record.failures if at >= lost]
    told = sorted([*record.marks, *failed], key=lambda mark: mark[1])
    shown = told if len(told) <= _TOLD_MAX else [told[0], *told[1 - _TOLD_MAX :]]
    for number, (what, at) in enumerate(shown):
        if number == 1 and len(shown) < len(told):
            yield f"    ... {len(told) - len(shown)} more"
        yield f"{f'+{at - lost:.3f}':>10} s  {what}"


def _held(record: Record, times: Times) -> Iterator[str]:
    if not record.held:
        return
    until = ", until it is released"
    if record.held_until is not None:
        until = f", until {times.clock(record.held_until)} ({times.ahead(record.held_until)})"
    yield f"by {record.held_by or 'an operator'}{until}"


# --- what will be ---------------------------------------------------------------------------------


def _next(record: Record, policy: Policy, times: Times) -> Iterator[str]:
    if record.phase is Phase.GONE:
        yield "nothing: its record is forgotten"
    elif record.phase is Phase.OBSERVED:
        yield _observed(record, policy)
    elif record.phase is Phase.FAILED:
        yield _failed(record, policy)
    elif record.phase is Phase.HELD:
        yield _waiting(record, times)
    else:
        yield _ahead(record, policy, times)
    yield _giving_up(record, times)


def _observed(record: Record, policy: Policy) -> str:
    recover = f"`ublkwatch recover {record.dev_id}`"
    match record.reason:
        case Reason.NO_RECOVERY_FLAG:
            return "nothing: nobody can recover it; create it again, with UBLK_F_USER_RECOVERY"
        case Reason.NO_SPEC:
            return (
                "nothing, until somebody says how to start its server: "
                f"`ublkwatch register {record.dev_id} -- COMMAND...` does, and so does the "
                "configuration"
            )
        case Reason.FOREIGN:
            return (
                "nothing: it is left to who restarts its server; where that is nobody: "
                f"`ublkwatch register {record.dev_id} -- COMMAND...`"
            )
        case Reason.UNTRUSTED:
            return (
                "nothing, until that can be trusted: it is looked at again when ublkwatch reloads"
            )
        case Reason.NO_FEATURES:
            return "nothing: a newer kernel is needed"
        case Reason.NO_VISIBLE_SERVER:
            return "it is watched as soon as a process that can be seen here serves it"
        case Reason.UNKNOWN_STATE:
            return "nothing, in this state: a newer ublkwatch is needed"
    if not _refusal(record, Order.RECOVER, policy):
        return f"nothing by itself: it waits for {recover}"
    return "it is judged at the next look"


def _failed(record: Record, policy: Policy) -> str:
    if record.stopped:
        return "nothing: create the device again by its own program"
    if record.reason is Reason.INTERNAL_ERROR:
        return "nothing: restart ublkwatch, and please report what its log says"
    if record.reason is Reason.NOT_QUIESCED and not record.held:
        return (
            "nothing, unless the kernel lets go of the old server after all: then it is recovered"
        )
    if record.shared:
        pid = record.candidate or record.server or record.ended
        process = f"process {pid.pid}" if pid else "that process"
        return f"nothing until {process} ends; then this device is recovered with the others"
    retry = f"`ublkwatch retry {record.dev_id}`"
    if refusal := _refusal(record, Order.RETRY, policy):
        return f"nothing by itself; {retry} would be refused: {refusal}"
    return f"nothing by itself: it waits for {retry}"


def _waiting(record: Record, times: Times) -> str:
    if record.held and record.held_until is not None:
        return (
            f"nothing until the hold ends, {times.ahead(record.held_until)}; then it is recovered"
        )
    if record.held:
        return f"nothing: it waits for `ublkwatch release {record.dev_id}`"
    recover = f"`ublkwatch recover {record.dev_id}`"
    if record.reason is Reason.SHUTDOWN:
        return f"nothing, for the host shuts down; if it does not after all: {recover}"
    return f"nothing by itself: it waits for {recover}"


def _ahead(record: Record, policy: Policy, times: Times) -> str:
    wake = times.ahead(record.wake) if record.wake is not None else "soon"
    since, held = record.since, ", and holds: it is held" if record.held else ""
    match record.phase:
        case Phase.WATCHING if record.held:
            return "should its server be lost, nothing is done while it is held"
        case Phase.WATCHING if policy.grace_s:
            return f"should its server be lost, it is recovered after {span(policy.grace_s)}"
        case Phase.WATCHING:
            return "should its server be lost, it is recovered at once"
        case Phase.GRACE:
            return f"recovery begins {wake}, unless somebody else has brought it back"
        case Phase.DRAINING:
            return _draining(record, policy, times)
        case Phase.STARTING:
            end = times.ahead(since + pace.start_patience_s(policy))
            busy = f"; EBUSY so far: {record.holders}" if record.holders else ""
            return f"the new server attaches once the kernel agrees; given up {end}{busy}"
        case Phase.ATTACHING:
            end = times.ahead(pace.attach_by(record, policy))
            queued = record.spawned_at is None and not pace.starts_early(policy)
            once = "is started, and " if queued else ""
            return f"LIVE, once the new server {once}has fetched every request; it is ended {end}"
        case Phase.PROBATION:
            return f"if it is still LIVE {wake}, that is believed{held}"
        case Phase.STOPPING:
            return f"when all has ended, {_after(record, policy)}"
        case Phase.BACKOFF:
            budget = f"{len(record.failures)} of {policy.attempts_max} failures are used up"
            return f"the next attempt {wake}; {budget}"
        case Phase.DECIDING:
            says = f"{verdict.SAYS_RETRY}: try again, {verdict.SAYS_FAIL}: STOP_DEV, else: wait"
            return f"what its exit status says ({says}); without an answer it stays failed, {wake}"
    given_up = f"; if that cannot be done, it stays failed, {wake}"
    if record.pending:
        return f"the kernel answers STOP_DEV{given_up}"
    return f"STOP_DEV, once the server is known to be dead{given_up}"


def _draining(record: Record, policy: Policy, times: Times) -> str:
    waits, ends = [], []
    if not pace.prepared(record, policy):
        queued = record.spawned_at is None
        waits.append(f"the new server is {'started, and ' if queued else ''}ready")
        ends.append(pace.ready_by(record, policy))
    if not pace.let_go(record):
        waits.append("the kernel has let go of the old server")
        ends.append(record.since + policy.drain_timeout_s)
    elif pace.looks_first(policy):
        waits.append("nobody has the character device open")
        quiet_since = record.since if record.quiet_since is None else record.quiet_since
        ends.append(quiet_since + policy.start_timeout_s)
    end = min(ends, default=record.since + policy.drain_timeout_s)
    blame = f" ({record.holders})" if record.holders else ""
    what = "START_USER_RECOVERY goes out"
    if pace.looks_first(policy):
        what = "its own recover command is run"
    return f"{what} once {' and '.join(waits) or 'all is read'}{blame}; given up {times.ahead(end)}"


def _another(record: Record, policy: Policy) -> bool:
    """Tell whether an attempt that failed may be followed by another one, as verdict.settle()."""
    if record.reason is Reason.HOOK_LATER:
        return not (record.held or record.overdue)
    final = record.reason in verdict.PERMANENT or len(record.failures) >= policy.attempts_max
    half = record.lined and policy.generation is Generation.G2
    return not (final or half or record.held or record.overdue)


def _after(record: Record, policy: Policy) -> str:
    if record.then is not None:
        return f"it is {record.then.value}"
    if record.held:
        return "it is held"
    return "another attempt follows after a pause" if _another(record, policy) else "it is given up"


def _giving_up(record: Record, times: Times) -> str:
    """Say when STOP_DEV ends the I/O that waits, where that is to come."""
    settled = record.phase in (Phase.OBSERVED, Phase.WATCHING, Phase.FAILING, Phase.GONE)
    if settled or record.stopped:
        return ""
    trying = record.phase in (Phase.STARTING, Phase.ATTACHING, Phase.PROBATION, Phase.STOPPING)
    if record.overdue:
        waited = "I/O has waited for hold_timeout_s: STOP_DEV ends it"
        if record.held:
            and_now = "when the hold ends"
            return (
                f"{waited} {and_now}{'' if record.phase is Phase.FAILED else ', unless recovered'}"
            )
        return f"{waited}, unless this brings it back" if trying else ""
    if record.give_up_at is None:
        return ""
    sentence = f"STOP_DEV {times.ahead(record.give_up_at)}"
    if record.held or record.reason is Reason.SHUTDOWN:
        return f"{sentence}, but not while nothing may be ended: hold_timeout_s"
    unless = ", unless this brings it back" if trying else " if nothing changes"
    return f"{sentence}{unless}: hold_timeout_s"


# --- what it means, and what can be done ----------------------------------------------------------


def _io(record: Record) -> str:
    if record.stopped:
        return "all of it has ended in errors; the disk is removed"
    if record.phase is Phase.GONE:
        return "the disk is gone"
    if record.info is None:
        return "not known here: the device's flags have not been read"
    mode = RecoveryMode.of(record.info.flags)
    up = record.phase in (Phase.OBSERVED, Phase.WATCHING, Phase.PROBATION) and not _is_down(record)
    return (_IO_UP if up else _IO_DOWN)[mode]


def _is_down(record: Record) -> bool:
    return record.info is not None and record.info.state in _DOWN


def _refusal(record: Record, order: Order, policy: Policy) -> str:
    """Ask the machine; where the kernel's kind is not known, as on the kernel that allows less."""
    if policy.generation is Generation.UNKNOWN:
        policy = replace(policy, generation=Generation.G2)
    return orders.objection(record, order, policy)


def _possible(record: Record, policy: Policy) -> Iterator[str]:
    for order in Order:
        if not _refusal(record, order, policy):
            yield f"{f'ublkwatch {order.value} {record.dev_id}':<22}  {_DOES[order]}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
