"""What an attempt waits for before its server may touch the device, and until when. Pure.

A part of the machine, below attempt.py: rules 3 and 10 at the head of recovery.py.
"""

from __future__ import annotations

from dataclasses import replace

from ublkwatch.events import FindHolders, HoldersFound
from ublkwatch.model import Attach, Generation, Handoff, Policy, Record
from ublkwatch.verdict import Step

LOOK_AGAIN_S = 1.0  # for the process that a server left behind


def starts_early(policy: Policy) -> bool:
    """Tell whether the new server may start while the kernel still drains: it waits for a line."""
    return policy.handoff is Handoff.MANAGED and policy.attach is Attach.LINE


def let_go(record: Record) -> bool:
    """Tell whether the old server is gone and the kernel has let go of it.

    One read that agrees with the ended process is enough, else two in a row.
    """
    seen_ended = record.detected_by not in ("", "poll", "startup")
    return not record.server and record.agreed >= (1 if seen_ended else 2)


def prepared(record: Record, policy: Policy) -> bool:
    """Tell whether the new server is where it has to be before START."""
    return not starts_early(policy) or (record.ready and record.candidate is not None)


def looks_first(policy: Policy) -> bool:
    """Tell whether nobody may be seen to hold the character device before the server starts.

    A delegate sends START itself. On G3 ours before that costs nothing, and tells exactly whether
    the device is free; on G2, which takes one, ours would be the end of the delegate's.
    """
    return policy.handoff is Handoff.DELEGATED and policy.generation is Generation.G2


def look(record: Record, now: float, policy: Policy) -> Step:
    """Begin to look for holders, now that the kernel has let go; timers.py does so again."""
    if record.quiet_since is not None:
        return record, ()
    record = replace(record, quiet_since=now, wake=now + look_pause_s(record, now, policy))
    return record, (FindHolders(record.seq),)


def look_pause_s(record: Record, now: float, policy: Policy) -> float:
    """Return the time between two looks for holders, which grows."""
    waited = now - (record.quiet_since if record.quiet_since is not None else now)
    return max(policy.settle_s, policy.drain_poll_s, min(policy.holders_after_s, waited / 2))


def holders_found(record: Record, event: HoldersFound, now: float, policy: Policy) -> Record:
    """Take it who has the character device open; only a look behind the kernel's word counts."""
    record = replace(record, holders=event.who)
    if record.quiet_since is None or event.began < record.quiet_since:
        return record
    if not event.free:
        return replace(record, free_since=None)
    if record.free_since is not None:
        return record
    return replace(record, free_since=now, holders="", wake=now + policy.settle_s)


def start_patience_s(policy: Policy) -> float:
    """Return how long START may take: its retries while EBUSY, and some time to be answered."""
    return policy.start_timeout_s + policy.stop_timeout_s


def attach_by(record: Record, policy: Policy) -> float:
    """Return when ATTACHING has to be done; who starts only then has its start-up in it."""
    if starts_early(policy):
        return record.since + policy.attach_timeout_s
    if record.spawned_at is None:
        return record.since + policy.queue_timeout_s
    return record.spawned_at + policy.ready_timeout_s + policy.attach_timeout_s


def ready_by(record: Record, policy: Policy) -> float:
    """Return when a server that waits for its line has to be ready; to be started takes longer."""
    if record.spawned_at is None:
        return record.since + policy.queue_timeout_s
    return record.spawned_at + policy.ready_timeout_s
