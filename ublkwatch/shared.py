"""A process that serves other devices too is not ended for one device's sake. Pure.

A part of the machine: rule 13 at the head of recovery.py. Whether a process is shared only the
performer knows, who sees all devices: the machine asks for an end, and AttemptShared is the answer.
"""

from __future__ import annotations

from dataclasses import replace

from ublkwatch import attempt, orders, verdict
from ublkwatch.events import AttemptShared, Watch
from ublkwatch.model import Phase, Policy, Reason, Record, ServerId
from ublkwatch.verdict import Step


def spared(record: Record, event: AttemptShared, now: float, policy: Policy) -> Step:
    """Take it that a process was not ended: the device rests until that ends."""
    if record.pending or event.server == record.ended:
        return record, ()  # STOPPING asks again every second
    if record.phase is Phase.DRAINING and event.server == record.server:
        # It let go of this device alone. What was begun beside it is ended, and not counted.
        reason, detail = Reason.SHARED_SERVER, _serves(event)
        return attempt.end(replace(record, shared=True, reason=reason, detail=detail), now)
    if record.phase not in (Phase.STOPPING, Phase.FAILING):
        return record, ()
    if event.server != record.server:
        record = replace(record, candidate=event.server, over=False)
    watch = (Watch(event.server),)
    if record.then is not None:
        record, effects = verdict.arrive(record, record.then, now)
        return record, (*watch, *effects)
    if verdict.hands_bound(record, policy):
        return verdict.hold(record, now, policy), watch
    if verdict.half_attached(record, policy):
        record = verdict.named_half(record, policy)
        detail = record.detail
    else:
        detail = verdict.failure(record)
        if record.reason is Reason.SHARED_SERVER:
            detail = record.detail.partition("; ")[0]
        record = replace(record, reason=Reason.SHARED_SERVER)
    detail = "; ".join(part for part in (detail, _serves(event)) if part)
    return verdict.enter(record, Phase.FAILED, now, wake=None, detail=detail, shared=True), watch


def _serves(event: AttemptShared) -> str:
    return f"process {event.server.pid} serves {event.others}"


def ended(record: Record, server: ServerId, now: float, policy: Policy) -> Step:
    """Take the end of the process that was waited for: one more attempt, whatever had failed."""
    record = replace(
        record,
        shared=False,
        server=None if record.server == server else record.server,
        ended=server,
        failures=record.failures[max(0, len(record.failures) - policy.attempts_max + 1) :],
    )
    if verdict.hands_bound(record, policy):
        return verdict.hold(record, now, policy), ()
    if record.over and record.overdue:
        return verdict.failing(record, now, policy)
    if record.over:
        return orders.begin(record, now, policy)
    return attempt.end(record, now)
