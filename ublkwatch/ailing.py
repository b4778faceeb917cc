"""A server that lives while I/O hangs in it, which the kernel does not see: what is made of that.

Pure, a part of the machine: rule 14 at the head of recovery.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ublkwatch import verdict
from ublkwatch.events import ServerAils, ServerWell
from ublkwatch.model import Ailment, Generation, Illness, Phase, Policy, Record, Remedy
from ublkwatch.uapi import DevState
from ublkwatch.verdict import Step


def told(record: Record, event: ServerAils | ServerWell, now: float, policy: Policy) -> Step:
    """Take it that the server ails, or is well; a dead queue is the last word: it has no cure."""
    ill = record.ill
    serves = record.phase in (Phase.WATCHING, Phase.PROBATION) and event.server == record.server
    state = record.info.state if record.info else None  # in probation, it was not read yet
    let_go = record.phase is Phase.WATCHING and state is not DevState.LIVE
    if not serves or let_go or (ill and ill.condemned):
        return record, ()
    if isinstance(event, ServerWell):
        return replace(record, ill=ill if ill and ill.kind is Ailment.DEAD_QUEUE else None), ()
    if ill and ill.kind is Ailment.DEAD_QUEUE and event.kind is Ailment.STALL:
        return record, ()
    if ill is None or ill.kind is not event.kind:
        ill = Illness(event.kind, event.what, event.since)
    return treat(replace(record, ill=replace(ill, what=event.what)), now, policy)


def treat(record: Record, now: float, policy: Policy) -> Step:
    """Do about an ailing server what the operator chose, as far as the budget goes.

    To end a server costs as much of the budget as an attempt that failed: one that ails again and
    again is not ended for ever. In probation its end is such a failure.
    """
    ill = record.ill
    if ill is None or record.server is None or verdict.hands_bound(record, policy):
        return record, ()
    if ill.condemned:  # and we died before it was done, perhaps
        return record, verdict.strays(record)
    if ill.spared != policy.bystander:
        record = replace(record, ill=replace(ill, spared=policy.bystander))
    if policy.bystander or remedy(ill, policy) is Remedy.ALERT or spent(record, policy):
        return record, ()
    if record.phase is Phase.WATCHING:
        record = replace(record, failures=(*_failures(record, policy), now))
    return end(replace(record, asked_by=""))


def end(record: Record) -> Step:
    """End an ailing server, whomever else it serves: the ordinary recovery follows its end."""
    assert record.ill is not None
    record = replace(record, ill=replace(record.ill, condemned=True))
    return record, verdict.strays(record)


def bystander(record: Record, others: Iterable[Record], generation: Generation) -> str:
    """Return which other device of its server must not lose that now, and why; "" if none.

    One that is held, and on G2 one that attaches: it would be half attached.
    """
    for other in others:
        if record.server is None or record.server not in (other.server, other.candidate):
            continue
        if other.dev_id != record.dev_id and other.held:
            return f"ublkb{other.dev_id}, which is held"
        if generation is Generation.G2 and other.phase is Phase.ATTACHING:
            return f"ublkb{other.dev_id}, which attaches just now"
    return ""


def remedy(ill: Illness, policy: Policy) -> Remedy:
    """Return what the operator chose."""
    return policy.on_dead_queue if ill.kind is Ailment.DEAD_QUEUE else policy.on_stall


def spent(record: Record, policy: Policy) -> bool:
    """Tell whether its servers were ended so often that it would not help to go on."""
    return len(_failures(record, policy)) >= policy.attempts_max


def _failures(record: Record, policy: Policy) -> tuple[float, ...]:
    """Return what counts against an ailing server: nothing, if it had been well for long."""
    well_s = record.ill.since - record.since if record.ill else 0.0
    stable = record.phase is Phase.WATCHING and well_s >= policy.stable_s
    return () if stable else record.failures
