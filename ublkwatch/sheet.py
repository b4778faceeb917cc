"""One device of the status document, in full, with its last outage as a timeline. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ublkwatch.page import (
    FARES,
    Device,
    Document,
    Reader,
    clean,
    fares,
    faring,
    server_of,
    supervisor,
)
from ublkwatch.spans import milliseconds, span

_UP = ("watching", "observed")


def details(device: Device, document: Document, reader: Reader) -> str:
    """Return everything that the document says of a device."""
    fresh, fare = reader.fresh(document), fares(device)
    words = reader.paint(faring(fare, fresh=fresh), FARES[fare][1])
    state = device["state"] or "state unknown"
    spent = span(reader.wall - device["since"])
    head = f"{device['device']}: {words}; {device['phase']}, {state}, for {spent}"
    lines = [head, *supervisor(document, reader)]
    for label, text in _facts(device, reader, fresh=fresh):
        lines += reader.wrapped(clean(text), f"  {label:<8}")
    return "\n".join([*lines, *_timeline(device, reader)])


def _facts(device: Device, reader: Reader, *, fresh: bool) -> Iterator[tuple[str, str]]:
    if device["explanation"]:
        yield "Why", device["explanation"]
    if since := device.get("ailing_since"):
        yield "Hangs", f"for {span(reader.wall - since)}, since {reader.clock(since)}"
    if fresh:
        outlook, remedy = device.get("outlook") or (), device.get("remedy")
        yield from (("Next", reader.counted(sentence)) for sentence in outlook)
        if remedy and not any(remedy in sentence for sentence in outlook):
            yield "Do", remedy
    if device["io_while_down"]:
        yield "Crash", device["io_while_down"]
    yield "Server", _server_in_full(device, reader)
    if device.get("standby"):
        pid, note = device.get("standby_pid"), device.get("standby_note")
        yield (
            "Standby",
            device["standby"]
            + (f", pid {pid}" if pid else "")
            + (f"; the last one: {note}" if note else ""),
        )
    if device["queues"]:
        yield "Queues", f"{device['queues']} of depth {device['depth']}; flags {device['flags']:#x}"
    yield "So far", _so_far(device)
    if device["held"]:
        until = device.get("held_until")
        ends = f"{reader.clock(until)} ({reader.ahead(until)})" if until else "it is released"
        yield "Held", f"by {device.get('held_by') or 'an operator'}, until {ends}"
    if device.get("care"):
        yield "Policy", ", ".join(f"{key} = {value}" for key, value in device["care"].items())


def _server_in_full(device: Device, reader: Reader) -> str:
    server = server_of(device, reader)
    if not server:
        return "none"
    if device["server_pid"] is None:
        return f"none yet; pid {server[1]} is to serve"
    since = device.get("server_started_at")
    up = f", up {span(reader.wall - since)}, since {reader.clock(since)}" if since else ""
    return f"{server[0]}, pid {server[1]}{up}"


def _so_far(device: Device) -> str:
    times, held = device["recoveries"], device["last_held_s"]
    text = f"{times} {'recovery' if times == 1 else 'recoveries'}"
    if times and held is not None:
        text += f", at the last one I/O was held for {milliseconds(held)}"
    if device["phase"] == "failed":
        tried = device["attempts"]
        return f"{text}; given up after {tried} attempt{'s' * (tried != 1)}"
    left = device["attempts_left"]
    return f"{text}; {left} failed attempt{'s' * (left != 1)} left until it is given up"


def _timeline(device: Device, reader: Reader) -> Iterator[str]:
    """Tell the outage that is, or the last one: each phase, when it began, how long it took."""
    marks = device["timeline"]
    if not marks:
        return
    cause = device.get("cause_detail") or device.get("cause") or "unknown"
    by = device.get("asked_by")
    told = [
        f"{reader.clock(device['detected_at'])}, noticed by {device['detected_by']}",
        f"cause: {cause}",
        f"{device['attempts']} attempt{'s' * (device['attempts'] != 1)}",
        *([f"asked for by {by}"] if by else []),
    ]
    which = "Last outage" if device["phase"] in _UP else "This outage"
    yield from reader.wrapped(clean("; ".join(told)), f"  {which}: ")
    yield from (f"    {line}" for line in phases(marks))


def phases(marks: list[list[Any]]) -> Iterator[str]:
    """Return a line for each phase of an outage, from its marks."""
    ends = [*(at for _, at in marks[1:]), None]
    for (phase, at), end in zip(marks, ends, strict=True):
        took = "" if end is None or phase == "lost" else f"took {milliseconds(end - at)}"
        yield f"+{milliseconds(at):>10}  {phase:<9}  {took}".rstrip()
