"""What will become of a device, and when, in sentences: explain() looks ahead. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ublkwatch import ailing, orders, pace, verdict
from ublkwatch.model import Generation, Illness, Order, Phase, Policy, Reason, Record, Remedy


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


def span(seconds: float) -> str:
    """Write a duration as people say it."""
    seconds = max(0.0, seconds)
    for above, unit, word in ((172800, 86400, "days"), (7200, 3600, "h"), (120, 60, "min")):
        if seconds >= above:
            return f"{seconds / unit:.0f} {word}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def refusal(record: Record, order: Order, policy: Policy) -> str:
    """Ask the machine; where the kernel's kind is not known, as on the kernel that allows less."""
    if policy.generation is Generation.UNKNOWN:
        policy = replace(policy, generation=Generation.G2)
    return orders.objection(record, order, policy)


def following(record: Record, policy: Policy, times: Times) -> Iterator[str]:
    """Say what happens next, and when STOP_DEV ends the I/O that waits."""
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
    if not refusal(record, Order.RECOVER, policy):
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
    if refused := refusal(record, Order.RETRY, policy):
        return f"nothing by itself; {retry} would be refused: {refused}"
    if record.reason is Reason.NO_ANSWER:
        return (
            f"nothing by itself; end what the command waits for (docs/recovery.md), then {retry}; "
            "where that does not help, a reboot is needed"
        )
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
        case Phase.WATCHING | Phase.PROBATION if record.ill:
            return _ailing(record, record.ill, policy)
        case Phase.WATCHING:
            return _watching(record, policy)
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


def _watching(record: Record, policy: Policy) -> str:
    if record.held:
        return "should its server be lost, nothing is done while it is held"
    when = f"after {span(policy.grace_s)}" if policy.grace_s else "at once"
    return f"should its server be lost, it is recovered {when}"


def _ailing(record: Record, ill: Illness, policy: Policy) -> str:
    recover = f"`ublkwatch recover {record.dev_id}` ends its server, and the device is recovered"
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
