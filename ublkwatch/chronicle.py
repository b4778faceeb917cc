"""What is remembered of a transition: an event for the trail, an outage for the history. Pure.

Each is an object of JSON with a "kind", an "at" (seconds since the epoch) and a "dev_id".
"""

from __future__ import annotations

from typing import Any

from ublkwatch.events import Transition
from ublkwatch.model import UNKNOWN, Ailment, Phase, Reason, Record

OOM_KILL = "oom_kill"
MAY_BE_OOM = ("signal", UNKNOWN)  # causes of which the kernel's log may know more
_AILMENTS = {ailment.value for ailment in Ailment}


def told(record: Record) -> object:
    """Return what subscribers are told of when it changes."""
    ill = record.ill and (record.ill.kind, record.ill.condemned)
    return record.phase, record.reason, record.seq, ill


def cause(record: Record) -> tuple[str, str | None]:
    """Return why the device lost its last server, as far as that is known: a word, and what for.

    The word is "signal", "exit", an ailment or "unknown"; the history knows "oom_kill" as well.
    """
    how = record.loss.how if record.loss else UNKNOWN
    if record.detected_by in _AILMENTS:
        return record.detected_by, how
    if how == UNKNOWN:
        return UNKNOWN, None
    return "exit" if how.startswith("exit ") else "signal", how


def outage_over(transition: Transition) -> dict[str, Any] | None:
    """Return what the history keeps where this transition ends an outage, by us or as given up."""
    before, record = transition.before.phase, transition.after
    gave_up = record.phase is Phase.FAILED and before is not Phase.FAILED
    gave_up |= record.reason is Reason.DELEGATE_DELETED and record.phase is Phase.GONE
    recovered = (before, record.phase) == (Phase.PROBATION, Phase.WATCHING)
    if not (gave_up or recovered):
        return None
    lost = record.marks[0][1] if record.marks else transition.now
    why, what = cause(record)
    return {
        "kind": "recovery",
        "dev_id": record.dev_id,
        "instance": record.instance,
        "at": transition.wall,
        "result": "success" if recovered else "gave_up",
        "reason": record.reason.name if record.reason else None,
        "detail": record.detail or None,
        "cause": why,
        "cause_detail": what,
        "lost_pid": record.loss.server.pid if record.loss and record.loss.server else None,
        "detected_by": record.detected_by,
        "asked_by": record.asked_by or None,
        "attempts": record.attempts,
        "start": ("standby" if record.standby else "cold") if recovered else None,
        "held_s": record.last_held_s if recovered else None,
        "timeline": [[name, at - lost] for name, at in record.marks],
    }


def event(transition: Transition, level: str, text: str) -> dict[str, Any]:
    """Return a transition for who follows the events; ``text`` is what the log says of it."""
    before, after = transition.before, transition.after
    return {
        "kind": "transition",
        "at": transition.wall,
        "dev_id": after.dev_id,
        "level": level,
        "text": text,
        "from": before.phase.value,
        "to": after.phase.value,
        "fact": transition.event,
        "reason": after.reason.name if after.reason else None,
        "detail": after.detail or None,
    }
