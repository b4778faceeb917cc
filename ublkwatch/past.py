"""The history and the events, for people and for programs. Pure.

What older versions wrote lacks keys: those are null here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from ublkwatch.model import Reason
from ublkwatch.page import clean
from ublkwatch.spans import milliseconds, span

SCHEMA_VERSION = 1

_RECOVERY = (
    *("result", "reason", "detail", "cause", "cause_detail", "lost_pid", "detected_by"),
    *("asked_by", "attempts", "start", "held_s"),
)
_ORDER = ("order", "name", "for_s", "reason", "result", "uid", "pid", "exe")
_CAUSES = {
    "oom_kill": "the OOM killer",
    "dead_queue": "a dead queue",
    "stall": "a stall",
    "unknown": "cause unknown",
}


def entry_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of the history as programs get it: docs/schema/history.json."""
    shared = {key: row.get(key) for key in ("id", "kind", "at", "dev_id")}
    shared["device"] = None if row.get("dev_id") is None else f"ublkb{row['dev_id']}"
    if row["kind"] == "order":
        return shared | {key: row.get(key) for key in _ORDER}
    marks = row.get("timeline") or []
    phases = list(_phases(marks))
    took_s = marks[-1][1] if marks else None
    return shared | {key: row.get(key) for key in _RECOVERY} | {"took_s": took_s, "phases": phases}


def _phases(marks: list[list[Any]]) -> Iterator[dict[str, Any]]:
    """Return each phase of an outage: "lost" is the moment, and the last mark is where it led."""
    for (phase, at), (_, end) in pairwise(marks):
        if phase != "lost":
            yield {"phase": phase, "at_s": at, "took_s": end - at}


def told(entry: dict[str, Any], clock: Callable[[float], str]) -> tuple[str, list[str]]:
    """Return an entry for people: the head of its lines, and what they say."""
    head = f"{clock(entry['at'])}  {entry['device'] or '-':<7}  "
    lines = list(_order(entry) if entry["kind"] == "order" else _recovery(entry))
    return head, [clean(line) for line in lines]


def _order(entry: dict[str, Any]) -> Iterator[str]:
    words = [entry["order"], entry["name"] or ""]
    if entry["for_s"] is not None:
        words.append(f"for {span(entry['for_s'])}")
    exe = f" ({entry['exe']})" if entry["exe"] else ""
    why = f": {entry['reason']}" if entry["reason"] else ""
    asked = " ".join(word for word in words if word)
    yield f"{asked}, asked for by uid {entry['uid']}, pid {entry['pid']}{exe}{why}"
    if entry["result"] != "taken":
        yield str(entry["result"])


def _recovery(entry: dict[str, Any]) -> Iterator[str]:
    count = entry["attempts"] or 0
    attempts = f"{count} attempt{'s' * (count != 1)}"
    if entry["result"] == "success":
        held = entry["held_s"]
        yield f"recovered: I/O was held for {milliseconds(held or 0)}; {attempts}"
    else:
        yield f"given up; {attempts}: {_why(entry)}"
    by = f"; asked for by {entry['asked_by']}" if entry["asked_by"] else ""
    yield f"{_cause(entry)}, noticed by {entry['detected_by'] or '?'}{by}"
    total: dict[str, float] = {}
    for each in entry["phases"]:
        total[each["phase"]] = total.get(each["phase"], 0.0) + each["took_s"]
    if total:
        yield ", ".join(f"{phase} {milliseconds(took)}" for phase, took in total.items())


def _why(entry: dict[str, Any]) -> str:
    reason = Reason.__members__.get(entry["reason"] or "")
    text = reason.value if reason else entry["reason"] or "no reason is known"
    return f"{text} ({entry['detail']})" if entry["detail"] else text


def _cause(entry: dict[str, Any]) -> str:
    words = _CAUSES.get(entry["cause"] or "unknown")
    pid = f"server {entry['lost_pid']}: " if entry["lost_pid"] else ""
    what = entry["cause_detail"]
    return pid + (f"{words} ({what})" if words and what else words or what or entry["cause"])


def event_of(line: dict[str, Any]) -> dict[str, Any]:
    """Return an event as programs get it: docs/schema/event.json."""
    dev_id = line.get("dev_id")
    return line | {"device": None if dev_id is None else f"ublkb{dev_id}"}
