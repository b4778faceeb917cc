"""The status document, and its table. Pure.

The document is what other programs read (``schema_version`` says how it is to be understood:
within one number, keys are only added); the table is for people. Times are numbers in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from enum import Enum
from typing import Any

from ublkwatch.model import (
    Ailment,
    DevInfo,
    Generation,
    Phase,
    Policy,
    Reason,
    Record,
    RecoveryMode,
)
from ublkwatch.uapi import DevFlags, DevState

SCHEMA_VERSION = 1

# What a policy says that no operator chose.
_TRUTHS = {"generation", "has_spec", "seen_live", "shutting_down", "chance", "bystander"} | {
    "hands_off",
    "hands_off_why",
}

# What the device's flags mean for a program that does I/O while the server is away.
PROMISE = {
    RecoveryMode.NONE: "the disk is removed when the server dies",
    RecoveryMode.PLAIN: "in flight: EIO; meanwhile: waits",
    RecoveryMode.REISSUE: "in flight: sent again; meanwhile: waits",
    RecoveryMode.FAIL_IO: "in flight: EIO; meanwhile: EREMOTEIO",
}

# The same for the table: what was in flight, what comes meanwhile.
_SHORT = {
    "none": "disk removed",
    "recovery": "EIO, waits",
    "reissue": "resent, waits",
    "fail_io": "EIO, EREMOTEIO",
}


def state_name(state: DevState | int) -> str:
    """Return the kernel's name of a state, or its number if it is a new one."""
    return state.name if isinstance(state, DevState) else f"state {state}"


def document(  # noqa: PLR0913 - each by its name
    records: Iterable[Record],
    policy: Callable[[int], Policy],
    *,
    wall: float,
    now: float,
    pid: int,
    generation: Generation = Generation.UNKNOWN,
) -> dict[str, Any]:
    """Return the status document of this moment; ``generation`` is the driver's."""
    devices = [
        _device(record, policy(record.dev_id), now, wall - now)
        for record in sorted(records, key=lambda record: record.dev_id)
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "written_at": wall,
        "supervisor_pid": pid,
        "generation": generation.name,
        "devices": devices,
    }


def _device(record: Record, policy: Policy, now: float, offset: float) -> dict[str, Any]:
    info = record.info
    mode = RecoveryMode.of(info.flags) if info else None
    stable = record.phase is Phase.WATCHING and now - record.since >= policy.stable_s
    recent = [at for at in record.failures if now - at <= policy.window_s and not stable]
    return {
        "dev_id": record.dev_id,
        "device": f"ublkb{record.dev_id}",
        "state": state_name(info.state) if info else None,
        "phase": record.phase.value,
        "reason": record.reason.name if record.reason else None,
        "detail": record.detail or None,
        "explanation": explanation(record),
        "since": record.since + offset,
        "next_at": record.wake + offset if record.phase is Phase.BACKOFF and record.wake else None,
        "server_pid": record.server.pid if record.server else None,
        "queues": info.nr_hw_queues if info else None,
        "depth": info.queue_depth if info else None,
        "flags": int(info.flags) if info else None,
        "recovery_mode": mode.value if mode else None,
        "io_while_down": PROMISE[mode] if mode else None,
        "recoveries": record.recoveries,
        "last_held_s": record.last_held_s,
        "detected_by": record.detected_by or None,
        "detected_at": record.marks[0][1] + offset if record.marks else None,
        "timeline": [[name, at - record.marks[0][1]] for name, at in record.marks],
        "attempts": record.attempts,
        "attempts_left": max(0, policy.attempts_max - len(recent)),
        "held": record.held,
        "held_until": None if record.held_until is None else record.held_until + offset,
        "held_by": record.held_by or None,
        "give_up_at": None if record.give_up_at is None else record.give_up_at + offset,
        "stopped": record.stopped,
        "ailment": record.ill.kind.value if record.ill and complaint(record) else None,
        "ailing_since": record.ill.since + offset if record.ill and complaint(record) else None,
        "care": policy_document(policy) if policy.has_spec else None,
    }


_PLAIN = Policy()


def policy_document(policy: Policy) -> dict[str, Any]:
    """Return what an operator chose for a device, as far as it differs from the defaults."""
    return {
        field.name: _plain(getattr(policy, field.name))
        for field in fields(Policy)
        if field.name not in _TRUTHS and getattr(policy, field.name) != getattr(_PLAIN, field.name)
    }


def policy_from(care: dict[str, Any] | None) -> Policy:
    """Return the policy that policy_document() has written; None: nobody's care."""
    kinds = {field.name: type(getattr(_PLAIN, field.name)) for field in fields(Policy)}
    known = {key: kinds[key](value) for key, value in (care or {}).items() if key in kinds}
    return replace(_PLAIN, has_spec=care is not None, **known)


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value


def info_from(device: dict[str, Any]) -> DevInfo | None:
    """Return what a device of the document says of GET_DEV_INFO's answer, as far as it does."""
    if device["state"] is None or device["flags"] is None:
        return None
    states: dict[str, DevState] = {state.name: state for state in DevState}
    number = device["state"].removeprefix("state ")
    return DevInfo(
        dev_id=device["dev_id"],
        state=states[number] if number in states else int(number),
        flags=DevFlags(device["flags"]),
        nr_hw_queues=device["queues"],
        queue_depth=device["depth"],
        max_io_buf_bytes=0,
        ublksrv_pid=device["server_pid"] or -1,
    )


_AILS = {
    Ailment.STALL: "stalled: its server has requests and completes none",
    Ailment.DEAD_QUEUE: "a queue is dead: the thread that served it is gone, and its I/O hangs",
}


def complaint(record: Record) -> str:
    """Return what ails the server of a device that is LIVE; empty when nothing does."""
    if record.ill is None or record.phase not in (Phase.WATCHING, Phase.PROBATION):
        return ""
    return f"{_AILS[record.ill.kind]} ({record.ill.what})"


def explanation(record: Record) -> str:
    """Say in one line why the device is not simply watched; empty when it is."""
    why = record.reason.value if record.reason else ""
    why += f" ({record.detail})" if record.detail else ""
    match record.phase:
        case Phase.DRAINING if record.ready:
            waits = "the new server is ready; waiting for the kernel to let go of the old one"
            why = f"{waits}: {record.holders}" if record.holders else waits
        case Phase.STARTING if record.holders:
            why = f"START_USER_RECOVERY is sent again while EBUSY: {record.holders}"
        case Phase.WATCHING | Phase.PROBATION if complaint(record):
            why = complaint(record)
        case Phase.WATCHING:
            why = ""
        case Phase.DECIDING:
            why = f"given up, on_exhausted_command decides: {why}"
        case Phase.FAILING:
            why = f"given up, STOP_DEV ends the I/O that waits: {why}"
        case Phase.FAILED if record.stopped:
            why = f"given up and stopped, what waited ended in errors: {why}"
    if record.held and record.reason is not Reason.HELD:
        held = f"held by {record.held_by or 'an operator'}"
        why = f"{why}; {held}" if why else f"{held}: a crash is not recovered"
    return why


_COLUMNS = ("DEVICE", "STATE", "PHASE", "SERVER", "QUEUES", "I/O ON A CRASH", "RECOVERIES", "HELD")


def table(status: dict[str, Any], *, running: bool, wall: float | None = None) -> str:
    """Return the table for people, problems first; a summary line heads it."""
    wall = time.time() if wall is None else wall
    devices = sorted(status["devices"], key=lambda device: (is_well(device), device["dev_id"]))
    watched = sum(map(is_well, devices))
    head = f"{len(devices)} device{'s' * (len(devices) != 1)}, {watched} watched and LIVE"
    if not running:
        head += f"; ublkwatch is not running, this is {wall - status['written_at']:.0f} s old"
    if not devices:
        return head
    rows = [_COLUMNS, *(_row(device) for device in devices)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [head, ""]
    for device, row in zip([None, *devices], rows, strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
        if device and device["explanation"]:
            lines.append(f"    {device['explanation']}")
    return "\n".join(lines)


def is_well(device: dict[str, Any]) -> bool:
    """Tell whether a device of the document is watched, and nothing ails its server."""
    return device["phase"] == "watching" and not device.get("ailment")


def _row(device: dict[str, Any]) -> tuple[str, ...]:
    held = device["last_held_s"]
    return (
        device["device"],
        device["state"] or "?",
        device["phase"],
        str(device["server_pid"] or "-"),
        f"{device['queues']}x{device['depth']}" if device["queues"] else "?",
        _SHORT.get(device["recovery_mode"], "?"),
        str(device["recoveries"]),
        "-" if held is None else f"{held * 1000:.0f} ms",
    )
