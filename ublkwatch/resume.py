"""How the machine goes on after our own death: from facts, with deadlines armed anew. Pure.

A part of the machine: rule 11 at the head of recovery.py. No command of our former life is with the
kernel any more: its worker ended with us. A candidate is found by its tag; it may have said READY=1
to nobody, and its line waits in the FIFO until it reads.
"""

from __future__ import annotations

from dataclasses import replace

from ublkwatch import ailing, attempt, orders, pace, verdict
from ublkwatch.events import EndAttempt, FindServer, ReadInfo, SendStart, Watch
from ublkwatch.model import (
    Ailment,
    Armed,
    Handoff,
    Illness,
    Phase,
    Policy,
    Reason,
    Record,
    ServerId,
)
from ublkwatch.verdict import Step

_DOWN = "while ublkwatch was down"
# Where an attempt has processes; what else is found by its tag is a leftover.
_TRYING = (Phase.DRAINING, Phase.STARTING, Phase.ATTACHING, Phase.STOPPING)


def resume(record: Record, candidate: ServerId | None, now: float, policy: Policy) -> Step:
    """Go on with what the record says, and with the candidate that was found."""
    armed = Armed.UNSURE if record.armed is Armed.SENT else record.armed
    well_s = (record.ill.since if record.ill else now) - record.since
    if record.phase is Phase.WATCHING and well_s >= policy.stable_s:
        record = replace(record, failures=())
    record = replace(record, since=now, agreed=0, pending=False, armed=armed)
    if record.phase in _TRYING:
        # Whether a server was started that was not found nobody knows: it may have been.
        begun = pace.starts_early(policy) or record.phase in (Phase.ATTACHING, Phase.STOPPING)
        record = replace(
            record,
            candidate=candidate,
            spawned_at=now if begun else None,
            ready=True,
            quiet_since=None,
            free_since=None,
        )
    watch = tuple(Watch(server) for server in (record.server, record.candidate) if server)
    if verdict.hands_off(record, policy) is not None:  # the configuration has changed
        record, effects = attempt.leave(record, Phase.OBSERVED, now)
    else:
        record, effects = _go_on(record, now, policy)
    return record, watch + effects


def _lasts(ill: Illness) -> bool:
    """Tell whether it is true still: a stall may have ended while nobody looked."""
    return ill.condemned or ill.kind is Ailment.DEAD_QUEUE


def _go_on(  # noqa: C901, PLR0912 - one arm for each phase
    record: Record, now: float, policy: Policy
) -> Step:
    early = pace.starts_early(policy)
    soon = now + policy.drain_poll_s
    match record.phase:
        case Phase.GRACE:
            return replace(record, wake=now + policy.grace_s), (ReadInfo(),)
        case Phase.HELD if not verdict.hands_bound(record, policy):
            return orders.begin(record, now, policy)
        case Phase.DRAINING if early and not record.candidate:
            return orders.begin(replace(record, over=True), now, policy)
        case Phase.DRAINING:
            return replace(record, wake=soon), (ReadInfo(),)
        case Phase.STARTING if early and not record.candidate:
            return attempt.fail(record, Reason.DIED_BEFORE_READY, _DOWN, now)
        case Phase.STARTING if pace.looks_first(policy):  # it was not a delegate's before
            return attempt.break_off(record, now)
        case Phase.STARTING:
            # The attempt's START again: G3 does not mind, G2's answer tells whether it was taken.
            wake = now + policy.holders_after_s
            return replace(record, wake=wake, pending=True), (SendStart(record.seq),)
        case Phase.ATTACHING if policy.handoff is Handoff.DELEGATED:
            return replace(record, wake=soon), (ReadInfo(),)
        case Phase.ATTACHING if not record.candidate:
            return attempt.fail(record, Reason.DIED_ATTACHING, _DOWN, now)
        case Phase.ATTACHING if early:
            # A server reads one line only: a second one does no harm, a missing one would.
            return attempt.attach(record, now, policy)
        case Phase.ATTACHING:
            return attempt.send_end(replace(record, wake=pace.attach_by(record, policy), ends=0))
        case Phase.WATCHING | Phase.PROBATION if record.ill and _lasts(record.ill):
            record, effects = ailing.treat(record, now, policy)
            return record, (*effects, ReadInfo())
        case Phase.WATCHING if not record.server:  # who serves was being looked for
            return record, (FindServer(record.seq), ReadInfo())
        case Phase.PROBATION if not record.server:  # who serves was being looked for
            wake = now + policy.probation_s
            return replace(record, wake=wake), (FindServer(record.seq), ReadInfo())
        case Phase.PROBATION:
            return replace(record, wake=now + policy.probation_s), (ReadInfo(),)
        case Phase.STOPPING:
            return replace(record, wake=now + 1, over=False), (EndAttempt(record.seq),)
        case Phase.BACKOFF:
            return replace(record, wake=now + policy.backoff_base_s), ()
        case Phase.DECIDING:
            return verdict.undecided(record, "not known: ublkwatch was restarted", now), ()
        case Phase.FAILING:
            return verdict.failing(record, now, policy)
    return record, (ReadInfo(),)
