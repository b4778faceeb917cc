"""What would come of an order, or of other rules, in words: the answer of a dry run. Pure.

The machine is asked by being stepped, and nothing is performed; so a dry run cannot err otherwise
than the deed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from enum import Enum
from typing import Any

from ublkwatch.care import Care
from ublkwatch.events import Cancel, Effect, EndAttempt, Kill, SendStop, Spawn
from ublkwatch.model import CHOICES, Policy, Record

# How the fields of a Care are called in the configuration, where that differs.
_KEYS = {"decider": "on_exhausted_command", "hook": "pre_recover"} | {
    "hook_timeout_s": "pre_recover_timeout_s"
}


def of_order(before: Record, after: Record, effects: tuple[Effect, ...]) -> Iterator[str]:
    """Say what an order would do to a device."""
    if after.phase is before.phase:
        yield f"it would stay {after.phase.value}"
    else:
        yield f"it would go from {before.phase.value} to {after.phase.value}"
    if after.held and not before.held:
        yield "a crash would not be recovered, and nothing begun, until it is released"
    if before.held and not after.held:
        yield "its hold would end"
    if before.failures and not after.failures:
        yield "its failed attempts would be forgotten"
    for effect in effects:
        if text := _words(effect):
            yield text


def harm(effects: tuple[Effect, ...]) -> str:
    """Return what of an order cannot be taken back."""
    return "; ".join(_words(effect) for effect in effects if isinstance(effect, Kill | SendStop))


def _words(effect: Effect) -> str:
    match effect:
        case Kill():
            return f"its server, process {effect.server.pid}, would be ended by SIGKILL"
        case Spawn():
            return "a new server would be started, and START_USER_RECOVERY sent"
        case EndAttempt():
            return "the attempt that is under way would be broken off, its processes killed"
        case Cancel():
            return "the command that is with the kernel would be cancelled"
        case SendStop():
            return "STOP_DEV would be sent: I/O that waits would end in errors"
    return ""  # it only looks


# --- rules ---------------------------------------------------------------------------------------


def of_care(old: Care, new: Care, shared: set[str]) -> Iterator[str]:
    """Say in which keys two cares of the same devices differ, beyond those in ``shared``."""
    before, after = _flat(old), _flat(new)
    for key, value in after.items():
        if before[key] != value and key not in shared:
            yield f"{key}: {_shown(before[key])} -> {_shown(value)}"


def of_policy(old: Policy, new: Policy) -> dict[str, str]:
    """Return by key how two policies differ."""
    before, after = _policy(old), _policy(new)
    return {
        key: f"{key}: {_shown(before[key])} -> {_shown(value)}"
        for key, value in after.items()
        if before[key] != value
    }


def _flat(care: Care) -> dict[str, Any]:
    found = {_KEYS.get(each.name, each.name): getattr(care, each.name) for each in fields(Care)}
    run = found.pop("run")
    policy = found.pop("policy")
    del found["source"]
    return found | {each.name: getattr(run, each.name) for each in fields(run)} | _policy(policy)


def _policy(policy: Policy) -> dict[str, Any]:
    return {name: getattr(policy, name) for name in CHOICES}


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, frozenset):
        return str(sorted(value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(dict(value) if value and isinstance(value[0], tuple) else list(value))
    return repr(value) if isinstance(value, str) else f"{value:g}"
