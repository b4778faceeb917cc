"""What will become of a device, and when, and what a person can do about it. Pure.

In sentences for explain() and the status page, and in a word and a time for the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ublkwatch import ailing, orders, pace, verdict
from ublkwatch.model import Generation, Illness, Order, Phase, Policy, Reason, Record, Remedy
from ublkwatch.spans import span


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


def refusal(record: Record, order: Order, policy: Policy) -> str:
    """Ask the machine; where the kernel's kind is not known, as on the kernel that allows less."""
    if policy.generation is Generation.UNKNOWN:
        policy = replace(policy, generation=Generation.G2)
    return orders.objection(record, order, policy)


@dataclass(frozen=True, slots=True)
class Due:
    """What happens next, in a word: at a time, or by a time, at which it is given up."""

    what: str = ""
    at: float | None = None
    by: float | None = None


def due(record: Record, policy: Policy) -> Due:
    """Return what happens next by itself, and when; nothing where it waits for a person."""
    since, wake = record.since, record.wake
    match record.phase:
        case Phase.GRACE:
            return Due("recover", at=wake)
        case Phase.HELD if record.held and record.held_until is not None:
            return Due("recover", at=record.held_until)
        case Phase.DRAINING:
            what = "recover" if pace.looks_first(policy) else "START"
            return Due(what, by=_drained_by(record, policy))
        case Phase.STARTING:
            return Due("START", by=since + pace.start_patience_s(policy))
        case Phase.ATTACHING:
            return Due("LIVE", by=pace.attach_by(record, policy))
        case Phase.WATCHING | Phase.PROBATION if record.ill:
            return Due("kill" if _is_ended(record, record.ill, policy) else "")
        case Phase.PROBATION:
            return Due("believe", at=wake)
        case Phase.STOPPING:
            return Due("end")
        case Phase.BACKOFF:
            return Due("attempt", at=wake)
        case Phase.DECIDING:
            return Due("decide", by=wake)
        case Phase.FAILING:
            return Due("STOP_DEV", by=wake)
        case Phase.FAILED if record.give_up_at is not None and not _unending(record):
            return Due("STOP_DEV", at=record.give_up_at)
    return Due()


def remedy(record: Record, policy: Policy) -> str:
    """Return what a person can type or do, where the device waits for that; else ""."""
    match record.phase:
        case Phase.OBSERVED:
            return _observed_remedy(record, policy)
        case Phase.FAILED:
            return _failed_remedy(record, policy)
        case Phase.HELD if record.held:
            return f"`ublkwatch release {record.dev_id}`"
        case Phase.HELD:
            return f"`ublkwatch recover {record.dev_id}`"
        case Phase.WATCHING | Phase.PROBATION if record.ill:
            asked = not refusal(record, Order.RECOVER, policy)
            ended = _is_ended(record, record.ill, policy)
            return _end_it(record) if asked and not ended else ""
    return ""


def _observed_remedy(record: Record, policy: Policy) -> str:
    match record.reason:
        case Reason.NO_RECOVERY_FLAG:
            return "create it again, with UBLK_F_USER_RECOVERY"
        case Reason.NO_SPEC | Reason.FOREIGN:
            return f"`ublkwatch register {record.dev_id} -- COMMAND...`"
        case Reason.UNTRUSTED:
            return "make it root's own, as the reason says"
        case Reason.NO_FEATURES:
            return "a newer kernel is needed"
        case Reason.UNKNOWN_STATE:
            return "a newer ublkwatch is needed"
    can = not refusal(record, Order.RECOVER, policy)
    return f"`ublkwatch recover {record.dev_id}`" if can else ""


def _failed_remedy(record: Record, policy: Policy) -> str:
    if record.stopped:
        return "create the device again by its own program"
    if record.reason is Reason.INTERNAL_ERROR:
        return "restart ublkwatch, and please report what its log says"
    if record.held:
        return f"`ublkwatch release {record.dev_id}`"
    if refusal(record, Order.RETRY, policy):
        return "" if record.shared else f"`ublkwatch stop {record.dev_id}`"
    retry = f"`ublkwatch retry {record.dev_id}`"
    if record.reason is Reason.NO_ANSWER:
        return (
            f"end what the command waits for (docs/recovery.md), then {retry}; "
            "where that does not help, a reboot is needed"
        )
    return retry


def following(record: Record, policy: Policy, times: Times) -> Iterator[str]:
    """Say what happens next, and when STOP_DEV ends the I/O that waits."""
    if record.phase is Phase.GONE:
        yield "nothing: its record is forgotten"
    elif record.phase is Phase.OBSERVED:
        yield _observed(record, policy)
    elif record.phase is Phase.FAILED:
        yield _failed(record, policy)
    elif record.phase is Phase.HELD:
        yield _waiting(record, policy, times)
    else:
        yield _ahead(record, policy, times)
    yield _giving_up(record, times)


def _observed(record: Record, policy: Policy) -> str:
    do = remedy(record, policy)
    match record.reason:
        case Reason.NO_RECOVERY_FLAG:
            return f"nothing: nobody can recover it; {do}"
        case Reason.NO_SPEC:
            return (
                f"nothing, until somebody says how to start its server: {do} does, and so does the "
                "configuration"
            )
        case Reason.FOREIGN:
            return f"nothing: it is left to who restarts its server; where that is nobody: {do}"
        case Reason.UNTRUSTED:
            return f"nothing, until that can be trusted: {do}; it is looked at again and again"
        case Reason.NO_FEATURES:
            return f"nothing: {do}"
        case Reason.NO_VISIBLE_SERVER:
            return "it is watched as soon as a process that can be seen here serves it"
        case Reason.UNKNOWN_STATE:
            return f"nothing, in this state: {do}"
    return f"nothing by itself: it waits for {do}" if do else "it is judged at the next look"


def _failed(record: Record, policy: Policy) -> str:
    do = remedy(record, policy)
    if record.stopped or record.reason is Reason.INTERNAL_ERROR:
        return f"nothing: {do}"
    if record.reason is Reason.NOT_QUIESCED and not record.held:
        return (
            "nothing, unless the kernel lets go of the old server after all: then it is recovered"
        )
    if record.shared:
        pid = record.candidate or record.server or record.ended
        process = f"process {pid.pid}" if pid else "that process"
        return f"nothing until {process} ends; then this device is recovered with the others"
    if refused := refusal(record, Order.RETRY, policy):
        retry = f"`ublkwatch retry {record.dev_id}`"
        return f"nothing by itself; {retry} would be refused: {refused}"
    if record.reason is Reason.NO_ANSWER:
        return f"nothing by itself; {do}"
    return f"nothing by itself: it waits for {do}"


def _waiting(record: Record, policy: Policy, times: Times) -> str:
    if record.held and record.held_until is not None:
        return (
            f"nothing until the hold ends, {times.ahead(record.held_until)}; then it is recovered"
        )
    do = remedy(record, policy)
    if record.held:
        return f"nothing: it waits for {do}"
    if record.reason is Reason.SHUTDOWN:
        return f"nothing, for the host shuts down; if it does not after all: {do}"
    return f"nothing by itself: it waits for {do}"


def _ahead(record: Record, policy: Policy, times: Times) -> str:
    comes = due(record, policy)
    end = times.ahead(comes.by) if comes.by is not None else "soon"
    wake = times.ahead(record.wake) if record.wake is not None else "soon"
    held = ", and holds: it is held" if record.held else ""
    match record.phase:
        case Phase.WATCHING | Phase.PROBATION if record.ill:
            return _ailing(record, record.ill, policy)
        case Phase.WATCHING:
            return _watching(record, policy)
        case Phase.GRACE:
            return f"recovery begins {wake}, unless somebody else has brought it back"
        case Phase.DRAINING:
            return _draining(record, policy, end)
        case Phase.STARTING:
            busy = f"; EBUSY so far: {record.holders}" if record.holders else ""
            return f"the new server attaches once the kernel agrees; given up {end}{busy}"
        case Phase.ATTACHING:
            queued = record.spawned_at is None and not pace.starts_early(policy)
            once = "is started, and " if queued else ""
            return f"LIVE, once the new server {once}has fetched every request; it is ended {end}"
        case Phase.PROBATION:
            return f"if it is still LIVE {wake}, that is believed{held}"
        case Phase.STOPPING:
            return f"when all has ended, {_after(record, policy)}"
        case Phase.BACKOFF:
            failed = f"failed so far: {len(record.failures)} of {policy.attempts_max}"
            return f"the next attempt {wake}; {failed}"
        case Phase.DECIDING:
            says = f"{verdict.SAYS_RETRY}: try again, {verdict.SAYS_FAIL}: STOP_DEV, else: wait"
            return f"what its exit status says ({says}); without an answer it stays failed, {wake}"
    given_up = f"; if that cannot be done, it stays failed, {wake}"
    if record.pending:
        return f"the kernel answers STOP_DEV{given_up}"
    return f"STOP_DEV, once the server is known to be dead{given_up}"


def _watching(record: Record, policy: Policy) -> str:
    if record.held:
        return "should its server be lost, nothing is done while it is held"
    when = f"after {span(policy.grace_s)}" if policy.grace_s else "at once"
    return f"should its server be lost, it is recovered {when}"


def _is_ended(record: Record, ill: Illness, policy: Policy) -> bool:
    """Tell whether an ailing server is being ended, or is about to be."""
    left_alone = ailing.remedy(ill, policy) is Remedy.ALERT or ill.spared or record.held
    return ill.condemned or not (left_alone or ailing.spent(record, policy))


def _end_it(record: Record) -> str:
    return f"`ublkwatch recover {record.dev_id}` ends its server, and the device is recovered"


def _ailing(record: Record, ill: Illness, policy: Policy) -> str:
    recover = _end_it(record)
    if ill.condemned:
        return (
            "its server was sent SIGKILL, and when that has ended the device is recovered; a "
            "process in uninterruptible sleep ends when it wakes, else a reboot is needed"
        )
    if ailing.remedy(ill, policy) is Remedy.ALERT:
        return f"nothing by itself, as on_{ill.kind.value} says: {recover}"
    if ill.spared:
        return f"nothing while its server serves {ill.spared}; then that is ended"
    if ailing.spent(record, policy):
        times = len(record.failures)
        return f"nothing by itself: after {times} failures to end it did not help; {recover}"
    if record.held:
        return f"nothing while it is held; then its server is ended ({recover})"
    return "its server is ended, and the device is recovered"


def _draining(record: Record, policy: Policy, end: str) -> str:
    waits = []
    if not pace.prepared(record, policy):
        queued = record.spawned_at is None
        waits.append(f"the new server is {'started, and ' if queued else ''}ready")
    if not pace.let_go(record):
        waits.append("the kernel has let go of the old server")
    elif pace.looks_first(policy):
        waits.append("nobody has the character device open")
    blame = f" ({record.holders})" if record.holders else ""
    what = "START_USER_RECOVERY goes out"
    if pace.looks_first(policy):
        what = "its own recover command is run"
    return f"{what} once {' and '.join(waits) or 'all is read'}{blame}; given up {end}"


def _drained_by(record: Record, policy: Policy) -> float:
    """Return when the first of what a draining device waits for has taken too long."""
    ends = []
    if not pace.prepared(record, policy):
        ends.append(pace.ready_by(record, policy))
    if not pace.let_go(record):
        ends.append(record.since + policy.drain_timeout_s)
    elif pace.looks_first(policy):
        quiet_since = record.since if record.quiet_since is None else record.quiet_since
        ends.append(quiet_since + policy.start_timeout_s)
    return min(ends, default=record.since + policy.drain_timeout_s)


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
    if _unending(record):
        return f"{sentence}, but not while nothing may be ended: hold_timeout_s"
    unless = ", unless this brings it back" if trying else " if nothing changes"
    return f"{sentence}{unless}: hold_timeout_s"


def _unending(record: Record) -> bool:
    """Tell whether nothing may be ended now."""
    return record.held or record.reason is Reason.SHUTDOWN
