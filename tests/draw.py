"""Draw the machine from the machine: explore it, and write its diagram into docs/recovery.md.

``python -m tests.draw`` rewrites the diagram. The exploration is a breadth-first search over an
abstraction of records (ages, counts and names are folded together), told every kind of fact that
matters, under policies that between them have every choice. It is deterministic.
"""

from __future__ import annotations

import errno
import functools
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ublkwatch.events import (
    Asked,
    AttemptOver,
    AttemptShared,
    Decided,
    EndReplied,
    Event,
    HoldersFound,
    InfoMissing,
    InfoRead,
    Ready,
    Resumed,
    ServerAils,
    ServerExited,
    ServerFound,
    ServerWell,
    ShutdownBegun,
    Spawned,
    SpawnFailed,
    StartReplied,
    StopReplied,
    Woken,
)
from ublkwatch.model import (
    Ailment,
    Attach,
    DevInfo,
    Exhausted,
    Generation,
    Handoff,
    Order,
    Phase,
    Policy,
    Reason,
    Record,
    ServerId,
    SpawnVerdict,
)
from ublkwatch.recovery import answer
from ublkwatch.uapi import DevFlags, DevState
from ublkwatch.verdict import PERMANENT

DOCUMENT = Path(__file__).parent.parent / "docs/recovery.md"
BEGIN, END = "<!-- drawn by python -m tests.draw -->", "<!-- end of drawing -->"

SERVING, CANDIDATE, ENDED, FRESH = (ServerId(pid, pid, "boot") for pid in (1, 2, 3, 4))
NOBODY, STRANGER = -1, 9  # what ublksrv_pid may say where no process is seen
INSTANCE = "boot/1"
INFO = DevInfo(0, DevState.LIVE, DevFlags.USER_RECOVERY, 1, 1, 4096, NOBODY)
OF_A_KIND = 1
AGES = (0.0, 1.0, 1000.0)  # just now; a while; longer than any patience

_G2 = Policy(
    generation=Generation.G2, attempts_max=2, decisions_max=1, holders_after_s=0.5, drain_poll_s=0.5
)
_G3 = replace(_G2, generation=Generation.G3)
POLICIES = (
    replace(_G3, grace_s=1, hold_timeout_s=9),
    replace(_G2, grace_s=1),
    replace(_G3, attach=Attach.START),
    replace(_G2, attach=Attach.START, hold_timeout_s=9),
    replace(_G3, handoff=Handoff.DELEGATED),
    replace(_G2, handoff=Handoff.DELEGATED, grace_s=1),
    replace(_G3, seen_live=False),
    replace(_G3, has_spec=False),
    replace(_G3, generation=Generation.UNKNOWN),
)


# The reasons that make a difference to what comes next.
_TELLING = (
    *(None, Reason.FORGOTTEN, Reason.NOT_QUIESCED, Reason.NO_ANSWER, Reason.HALF_ATTACHED),
    *(Reason.HOOK_LATER, Reason.SHARED_SERVER, Reason.STANDBY_LOST),
)


@dataclass(frozen=True)
class Told:
    """What somebody may say, relative to a record."""

    event: Event
    after_s: float = 0.0


@dataclass
class Seen:
    """What the exploration found."""

    edges: dict[tuple[Phase, Phase], set[str]] = field(default_factory=lambda: defaultdict(set))
    changes: set[tuple[Phase, type[Event]]] = field(default_factory=set)
    records: int = 0


def _alphabet(seq: int) -> Iterator[Told]:
    for server in (None, SERVING, CANDIDATE, FRESH):
        yield Told(InfoRead(INFO, INSTANCE, server))
    yield Told(InfoRead(INFO, INSTANCE, SERVING), 1.0)
    yield Told(InfoRead(INFO, INSTANCE, None), 1.0)
    yield Told(InfoRead(replace(INFO, ublksrv_pid=STRANGER), INSTANCE, None))
    yield Told(InfoRead(replace(INFO, flags=DevFlags(0)), INSTANCE, SERVING))
    yield Told(InfoRead(INFO, "boot/2", FRESH))
    for state in (DevState.QUIESCED, DevState.DEAD, 7):
        yield Told(InfoRead(replace(INFO, state=state), INSTANCE, None))
    yield Told(InfoMissing())
    for server in (SERVING, CANDIDATE):
        for code in (None, 0, 1, 78):
            yield Told(ServerExited(server, "unknown" if code is None else "exit", code))
    for ailment in Ailment:
        yield Told(ServerAils(SERVING, ailment, "hangs", -1000.0))
    yield Told(ServerWell(SERVING))
    yield Told(Spawned(seq, FRESH))
    yield Told(Spawned(seq, FRESH, standby=True))
    yield Told(Spawned(seq - 1, FRESH))
    yield Told(Ready(seq))
    yield from (Told(SpawnFailed(seq, "", verdict)) for verdict in SpawnVerdict)
    yield from (Told(SpawnFailed(seq, "exit", ran=True, code=code)) for code in (0, 1))
    for error in (0, errno.EBUSY, errno.EINVAL, errno.EINTR, errno.ETIMEDOUT, errno.ENODEV):
        yield Told(StartReplied(seq, error))
        yield Told(EndReplied(seq, error))
    yield from (Told(AttemptOver(seq, unread)) for unread in (False, True))
    yield from (Told(AttemptShared(seq, server, "them")) for server in (SERVING, CANDIDATE, FRESH))
    yield from (Told(HoldersFound(seq, "who", free, 1000.0), 1.0) for free in (False, True))
    for server in (None, FRESH):
        yield Told(ServerFound(seq, server))
        yield Told(Resumed(server))
    yield from (Told(StopReplied(seq, error)) for error in (0, errno.EBUSY, errno.ENODEV))
    yield from (Told(Decided(seq, code)) for code in (10, 20, 0))
    yield from (Told(Woken(), after_s) for after_s in (1.0, 2.0, 1000.0))
    yield from (Told(Asked(order)) for order in Order)
    yield Told(Asked(Order.HOLD, until=1.0))
    yield Told(ShutdownBegun())


ALPHABET = tuple(_alphabet(1))


def ago(at: float | None, now: float) -> float | None:
    """Return a moment as of time 0, as one of AGES."""
    return None if at is None else -max(age for age in AGES if age <= max(0.0, now - at))


def fold(record: Record, now: float) -> Record:
    """Return the one record that stands for all that are alike, as of time 0."""
    names: dict[ServerId | None, ServerId | None] = {None: None}
    for server, name in (
        (record.server, SERVING),
        (record.candidate, CANDIDATE),
        (record.ended, ENDED),
    ):
        names.setdefault(server, name)
    info = record.info
    if info is not None:
        info = replace(
            INFO,
            state=info.state,
            flags=info.flags,
            ublksrv_pid=STRANGER if info.ublksrv_pid == STRANGER else NOBODY,
        )
    return Record(
        dev_id=0,
        instance=INSTANCE,
        phase=record.phase,
        reason=record.reason,
        since=-max(age for age in AGES if age <= now - record.since),
        wake=None if record.wake is None else 1.0,
        info=info,
        server=names[record.server],
        candidate=names[record.candidate],
        seq=1,
        spawned_at=ago(record.spawned_at, now),
        ready=record.ready,
        holders="who" if record.holders else "",
        agreed=min(record.agreed, 2),
        quiet_since=ago(record.quiet_since, now),
        free_since=ago(record.free_since, now),
        armed=record.armed,
        lined=record.lined,
        pending=record.pending,
        over=record.over,
        shared=record.shared,
        ends=record.ends if record.ends < 2 else 8,
        then=record.then,
        failures=(0.0,) * min(len(record.failures), 2),
        decisions=record.decisions,
        held=record.held,
        held_until=None if record.held_until is None else 1.0,
        give_up_at=None if record.give_up_at is None else 2.0,
        overdue=record.overdue,
        ended=names[record.ended],
        refused="x" if record.refused else "",
        stopped=record.stopped,
        ill=replace(record.ill, since=-1000.0) if record.ill else None,
        detected_by=record.detected_by,
        marks=(("lost", 0.0),) if record.marks else (),
    )


def kind(record: Record, *, ending: bool) -> tuple[object, ...]:
    """Return what makes records of one kind, of which a few stand for all."""
    state = record.info.state if record.info else None
    hold = (record.held or ending, record.held_until is None, record.overdue)
    common = (record.phase, hold, record.lined)
    nobody, untried = record.server is None, record.candidate is None
    queued = record.spawned_at is None
    match record.phase:
        case Phase.OBSERVED | Phase.WATCHING:
            left = (nobody, untried, record.pending, record.over)
            return (*common, left, record.reason, state, record.ill)
        case Phase.DRAINING:
            quiet = (record.quiet_since is None, record.free_since is None)
            coming = (untried, queued, record.ready)
            return (*common, nobody, coming, record.agreed, record.armed, quiet)
        case Phase.STARTING:
            return (*common, untried, record.armed)
        case Phase.ATTACHING:
            refused = bool(record.refused) and record.agreed
            return (*common, untried, queued, record.pending, record.armed, refused)
        case Phase.PROBATION:
            return (*common, nobody, record.agreed, record.ill)
        case Phase.STOPPING:
            left = (nobody, untried, record.pending, record.over)
            why = record.reason if record.reason in _TELLING else record.reason in PERMANENT
            return (*common, record.then, left, record.shared, record.armed, why)
        case Phase.FAILING:
            return (*common, nobody, record.pending, record.over, record.agreed)
    named = record.reason in (Reason.NOT_QUIESCED, Reason.NO_ANSWER)
    stuck = (record.pending, record.over, record.shared, untried)
    if record.phase is Phase.BACKOFF:
        return (*common, nobody, stuck, record.armed)
    return (*common, nobody, record.stopped, stuck, record.reason if named else None)


def named(event: Event) -> str:
    """Name an event as the diagram does."""
    return event.order.value if isinstance(event, Asked) else type(event).__name__


def explore(policy: Policy, seen: Seen) -> None:
    """Find a record of each kind that can be reached under one policy, and what leads where."""
    choices = {
        ends: [
            replace(policy, shutting_down=ends, on_exhausted=choice)
            for choice in (policy.on_exhausted, *Exhausted)
        ]
        for ends in (False, True)
    }
    start = (Record(dev_id=0, instance=INSTANCE), False)
    known, queue = {start}, deque([start])
    kinds: Counter[tuple[object, ...]] = Counter()
    while queue:
        record, ending = queue.popleft()
        seen.records += 1
        for told in ALPHABET:
            ends = ending or isinstance(told.event, ShutdownBegun)
            for after in answers(record, told, choices[ends], seen):
                node = (fold(after, told.after_s), ends)
                if node in known:
                    continue
                known.add(node)
                which = kind(node[0], ending=ends)
                kinds[which] += 1
                if kinds[which] <= OF_A_KIND:
                    queue.append(node)


def answers(record: Record, told: Told, choices: list[Policy], seen: Seen) -> Iterator[Record]:
    """Yield what a fact makes of a record; where that gives up, by every choice of the operator."""
    for policy in choices:
        after, effects = answer(record, told.event, told.after_s, policy)
        if after == record and not effects:
            return
        seen.changes.add((record.phase, type(told.event)))
        if after.phase is not record.phase:
            seen.edges[record.phase, after.phase].add(named(told.event))
        yield after
        if after.phase not in (Phase.DECIDING, Phase.FAILING, Phase.FAILED):
            return


@functools.cache
def everything() -> Seen:
    """Explore the machine under every policy."""
    seen = Seen()
    for policy in POLICIES:
        explore(policy, seen)
    return seen


def drawing() -> str:
    """Return the diagram in mermaid's words: every change of phase, and the facts behind it."""
    edges = everything().edges
    order = list(Phase)
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> observed"]
    for before, after in sorted(edges, key=lambda edge: (*map(order.index, edge),)):
        facts = ", ".join(sorted(edges[before, after]))
        lines.append(f"    {before.value} --> {after.value}: {facts}")
    return "\n".join([*lines, "    gone --> [*]", "```"])


def redrawn(text: str) -> str:
    """Return the document with the diagram as the machine is now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{drawing()}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(redrawn(DOCUMENT.read_text()))
