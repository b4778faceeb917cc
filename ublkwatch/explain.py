"""A device's record in sentences, for a person at three in the morning. Pure.

What its phase means, why it is there, what was tried, who holds it, what happens next and when,
what that means for I/O, and what can be done. From the record alone, so also while ublkwatch is
down.
"""

from __future__ import annotations

from collections.abc import Iterator

from ublkwatch.foretell import Times, following, refusal
from ublkwatch.model import UNKNOWN, Generation, Order, Phase, Policy, Record, RecoveryMode
from ublkwatch.spans import span
from ublkwatch.status import complaint, state_name
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
    "dead_queue": "a thread that serves a queue was gone, and it was ended for that",
    "stall": "it completed no request any more, and was ended for that",
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
        ("Why", [_why(record, times)]),
        ("Tried", list(_tried(record, times))),
        ("Held", list(_held(record, times))),
        ("Next", list(following(record, policy, times))),
        ("I/O", [_io(record, policy)]),
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
    more = record.ill.kind if record.ill and complaint(record) else record.reason
    if more:
        lines.append(f"{'More:':<9}docs/recovery.md, {more.name}")
    return "\n".join(lines)


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


def _why(record: Record, times: Times) -> str:
    if record.ill and (complains := complaint(record)):
        return f"{complains}; since {times.clock(record.ill.since)}"
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
    if record.detected_by == "pidfd" and record.loss and record.loss.how != UNKNOWN:
        noticed += f": {record.loss.how}"
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


# --- what it means, and what can be done ----------------------------------------------------------


def _io(record: Record, policy: Policy) -> str:
    if record.stopped:
        return "all of it has ended in errors; the disk is removed"
    if record.phase is Phase.GONE:
        return "the disk is gone"
    if record.info is None:
        return "not known here: the device's flags have not been read"
    mode = RecoveryMode.of(record.info.flags)
    up = record.phase in (Phase.OBSERVED, Phase.WATCHING, Phase.PROBATION) and not _is_down(record)
    if complaint(record):
        late = "; on this kernel up to 30 s later" if policy.generation is Generation.G2 else ""
        return f"what its server has hangs; {_IO_UP[mode]}{late}"
    return (_IO_UP if up else _IO_DOWN)[mode]


def _is_down(record: Record) -> bool:
    return record.info is not None and record.info.state in _DOWN


def _possible(record: Record, policy: Policy) -> Iterator[str]:
    for order in Order:
        if not refusal(record, order, policy):
            yield f"{f'ublkwatch {order.value} {record.dev_id}':<22}  {_DOES[order]}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
