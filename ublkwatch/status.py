"""The status document, which page.py shows to people and other programs read. Pure.

``schema_version`` says how it is to be understood: within one number, keys are only added;
docs/schema/status.json has them all. Times are seconds since the epoch. What speaks of a time to
come names it as {@SECONDS}, for the reader to count down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from enum import Enum
from typing import Any

from ublkwatch import chronicle
from ublkwatch.care import StandbyShown
from ublkwatch.foretell import Times, due, following, remedy
from ublkwatch.model import (
    CHOICES,
    Ailment,
    DevInfo,
    Generation,
    Phase,
    Policy,
    Reason,
    Record,
    RecoveryMode,
    ServerId,
)
from ublkwatch.uapi import DevFlags, DevState

SCHEMA_VERSION = 1

# What the device's flags mean for a program that does I/O while the server is away.
PROMISE = {
    RecoveryMode.NONE: "the disk is removed when the server dies",
    RecoveryMode.PLAIN: "in flight: EIO; meanwhile: waits",
    RecoveryMode.REISSUE: "in flight: sent again; meanwhile: waits",
    RecoveryMode.FAIL_IO: "in flight: EIO; meanwhile: EREMOTEIO",
}


class _Later(Times):
    """Times that the reader of the document counts down."""

    def ahead(self, at: float) -> str:
        return f"{{@{self.wall + at - self.now:.3f}}}"


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
    interval_s: float | None = None,
    name: Callable[[Record], str] = lambda _: "",
    started_at: Callable[[ServerId], float | None] = lambda _: None,
    standby: Callable[[Record], StandbyShown | None] = lambda _: None,
) -> dict[str, Any]:
    """Return the status document of this moment; ``generation`` is the driver's.

    It is written anew, or confirmed, every ``interval_s`` at least. ``name`` is the server's, for
    people, and ``started_at`` the wall time at which a process was started. ``standby`` is what
    there is to be said of a device's standby; None: it shall have none.
    """
    devices = [
        _device(record, policy(record.dev_id), Times(now, wall, str))
        | _server(record, name, started_at)
        | _standby(standby(record))
        for record in sorted(records, key=lambda record: record.dev_id)
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "written_at": wall,
        "written_every_s": interval_s,
        "supervisor_pid": pid,
        "generation": generation.name,
        "devices": devices,
    }


def attempts_left(record: Record, policy: Policy, now: float) -> int:
    """Return how many more attempts may fail until the device is given up."""
    return max(0, policy.attempts_max - len(_counted(record, policy, now)))


def ages(record: Record, policy: Policy, now: float) -> bool:
    """Tell whether the passing of time alone changes what the document says of a device."""
    recent = record.phase is Phase.WATCHING and now - record.since < policy.stable_s
    return recent and bool(record.failures)


def _counted(record: Record, policy: Policy, now: float) -> tuple[float, ...]:
    """Return the failures that count: all in an outage, else what the next one would begin with."""
    if record.phase is not Phase.WATCHING:
        return record.failures
    if now - record.since >= policy.stable_s:
        return ()
    return tuple(at for at in record.failures if now - at <= policy.window_s)


def _device(record: Record, policy: Policy, times: Times) -> dict[str, Any]:
    info, now, offset = record.info, times.now, times.wall - times.now
    mode = RecoveryMode.of(info.flags) if info else None
    cause, cause_detail = chronicle.cause(record) if record.marks else (None, None)
    comes = due(record, policy)
    return {
        "dev_id": record.dev_id,
        "device": f"ublkb{record.dev_id}",
        "state": state_name(info.state) if info else None,
        "phase": record.phase.value,
        "reason": record.reason.name if record.reason else None,
        "detail": record.detail or None,
        "explanation": explanation(record),
        "since": record.since + offset,
        "next_action": comes.what or None,
        "next_at": None if comes.at is None else comes.at + offset,
        "next_by": None if comes.by is None else comes.by + offset,
        "outlook": [
            each for each in following(record, policy, _Later(now, times.wall, str)) if each
        ],
        "remedy": remedy(record, policy) or None,
        "queues": info.nr_hw_queues if info else None,
        "depth": info.queue_depth if info else None,
        "flags": int(info.flags) if info else None,
        "recovery_mode": mode.value if mode else None,
        "io_while_down": PROMISE[mode] if mode else None,
        "recoveries": record.recoveries,
        "last_held_s": record.last_held_s,
        "cause": cause,
        "cause_detail": cause_detail,
        "asked_by": record.asked_by or None,
        "detected_by": record.detected_by or None,
        "detected_at": record.marks[0][1] + offset if record.marks else None,
        "timeline": [[name, at - record.marks[0][1]] for name, at in record.marks],
        "attempts": record.attempts,
        "attempts_left": attempts_left(record, policy, now),
        "held": record.held,
        "held_until": None if record.held_until is None else record.held_until + offset,
        "held_by": record.held_by or None,
        "give_up_at": None if record.give_up_at is None else record.give_up_at + offset,
        "stopped": record.stopped,
        "ailment": record.ill.kind.value if record.ill and complaint(record) else None,
        "ailing_since": record.ill.since + offset if record.ill and complaint(record) else None,
        "care": policy_document(policy) if policy.has_spec else None,
    }


def _server(
    record: Record,
    name: Callable[[Record], str],
    started_at: Callable[[ServerId], float | None],
) -> dict[str, Any]:
    server, candidate = record.server, record.candidate
    return {
        "server_pid": server.pid if server else None,
        "server_name": name(record) or None,
        "server_started_at": started_at(server) if server else None,
        "candidate_pid": candidate.pid if candidate and candidate != server else None,
    }


def _standby(shown: StandbyShown | None) -> dict[str, Any]:
    return {
        "standby": shown.state if shown else None,
        "standby_pid": shown.pid if shown else None,
        "standby_note": shown.note or None if shown else None,
    }


_PLAIN = Policy()


def policy_document(policy: Policy) -> dict[str, Any]:
    """Return what an operator chose for a device, as far as it differs from the defaults."""
    return {
        name: _plain(getattr(policy, name))
        for name in CHOICES
        if getattr(policy, name) != getattr(_PLAIN, name)
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
