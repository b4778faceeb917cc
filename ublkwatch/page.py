"""The status document as a page for people: problems first, each with its remedy. Pure.

It reads the document alone, whichever version wrote it, and what counts down is counted from the
reader's own clock. No line is longer than the width, where one is given.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ublkwatch.spans import brief, milliseconds, span

Device = dict[str, Any]
Document = dict[str, Any]
Table = list[tuple[str, ...]]

# How a device fares, worst first, with the words of the summary and the colour that means it.
DOWN, BUSY, BARE, HELD, WELL = range(5)
FARES = {
    DOWN: ("in trouble", "31"),  # its I/O hangs, waits or failed, and nobody mends that
    BUSY: ("being recovered", "33"),
    BARE: ("not in care", "36"),  # LIVE, and nobody would recover it
    HELD: ("held", "36"),  # LIVE, and nobody would recover it until it is released
    WELL: ("well", "32"),
}
# What the device's flags mean for I/O when its server dies: what is in flight, what comes then.
_IN_FLIGHT = {"none": "gone", "recovery": "EIO", "reissue": "resent", "fail_io": "EIO"}
_MEANWHILE = {"none": "ENXIO", "recovery": "waits", "reissue": "waits", "fail_io": "EREMOTEIO"}
_COLUMNS = ("DEVICE", "STATE", "PHASE", "SERVER", "QxD", "IO", "RECOVERED", "LEFT", "NEXT")
_WIDE = (
    *("DEVICE", "STATE", "PHASE", "FOR", "SERVER", "PID", "UP", "QUEUES", "IN FLIGHT", "MEANWHILE"),
    *("RECOVERIES", "LAST HELD", "LEFT", "NEXT", "WHY", "DO"),
)
_SERVER = _COLUMNS.index("SERVER")
_SERVER_MIN = 12
_TIME = re.compile(r"\{@([0-9.]+)\}")
_WHOLE = re.compile(r"`[^`]*`|\b[\d.,]+ (?:ms|s|min|h|days)\b")
_LATE_S = 10.0  # a document that is older by so much than it should be has no writer any more


@dataclass(frozen=True, slots=True)
class Reader:
    """When and for whom a page is made."""

    wall: float  # seconds since the epoch
    running: bool  # somebody holds the supervisor's lock
    width: int | None = 80  # of the lines; None: as long as they are
    colour: bool = False
    clock: Callable[[float], str] = str  # writes a wall time

    def paint(self, text: str, code: str) -> str:
        """Colour a text; its meaning never lies in the colour alone."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text

    def wrapped(self, text: str, head: str = "") -> list[str]:
        """Return the lines of a text behind a head; durations and commands are not broken."""
        if self.width is None:
            return [head + text]
        whole = _WHOLE.sub(lambda it: it[0].replace(" ", "\xa0"), text)
        wrapper = textwrap.TextWrapper(
            self.width,
            initial_indent=head,
            subsequent_indent=" " * len(head),
            break_on_hyphens=False,
        )
        lines = wrapper.wrap(whole)
        return [line.replace("\xa0", " ") for line in lines]

    def ahead(self, at: float) -> str:
        """Return how long it is until then."""
        return f"in {span(at - self.wall)}" if at > self.wall else "now"

    def counted(self, sentence: str) -> str:
        """Put in how long it is until each time that a sentence names."""
        return _TIME.sub(lambda it: self.ahead(float(it[1])), sentence)

    def fresh(self, document: Document) -> bool:
        """Tell whether somebody keeps the document fresh."""
        age = self.wall - document["written_at"]
        return self.running and age <= _LATE_S + (document.get("written_every_s") or 60)


def fares(device: Device) -> int:
    """Tell how a device fares: DOWN is the worst."""
    phase, live = device["phase"], device["state"] == "LIVE"
    if device.get("ailment") or phase in ("failed", "held"):
        return DOWN
    if phase == "observed":
        return BARE if live else DOWN
    if phase != "watching" or device["state"] not in ("LIVE", None):
        return BUSY
    return HELD if device.get("held") else WELL


def is_healthy(device: Device) -> bool:
    """Tell whether I/O to the device goes on, as far as can be seen."""
    return fares(device) >= BARE


def faring(fare: int, *, fresh: bool) -> str:
    """Return the words for how a device fares; what nobody keeps fresh, nobody recovers."""
    return FARES[fare][0] if fresh or fare != BUSY else "not recovered"


def worst_first(devices: list[Device]) -> list[Device]:
    """Return the devices as a page shows them."""
    return sorted(devices, key=lambda device: (fares(device), device["dev_id"]))


# --- all devices ---------------------------------------------------------------------------------


def overview(document: Document, reader: Reader, *, unhealthy_only: bool = False) -> str:
    """Return one line for each device, what ails it and what to do below; a summary comes first."""
    devices, fresh = worst_first(document["devices"]), reader.fresh(document)
    text = summary(devices, reader, fresh=fresh)
    if unhealthy_only:
        devices = [device for device in devices if not is_healthy(device)]
        if fresh and not devices:
            text = f"all is well: {text}"
    lines = [text, *supervisor(document, reader)]
    if devices:
        lines += ["", *_rows(devices, reader, fresh=fresh)]
    return "\n".join(lines)


def summary(devices: list[Device], reader: Reader, *, fresh: bool = True) -> str:
    """Return how many devices fare how, in a line."""
    if not devices:
        return "no ublk devices"
    count = [fares(device) for device in devices]
    told = (
        reader.paint(f"{count.count(it)} {faring(it, fresh=fresh)}", code)
        for it, (_, code) in FARES.items()
        if it in count
    )
    return f"{len(devices)} device{'s' * (len(devices) != 1)}: {', '.join(told)}"


def supervisor(document: Document, reader: Reader) -> Iterator[str]:
    """Say that nobody keeps the document fresh, where that is so."""
    if reader.fresh(document):
        return
    written = document["written_at"]
    since = f"since {reader.clock(written)} ({span(reader.wall - written)} ago)"
    if not reader.running:
        text = (
            f"ublkwatch is NOT RUNNING {since}: this is how it was then, and nothing is recovered "
            "until it is started (`ublkwatch run`)"
        )
    else:
        text = (
            f"ublkwatch (pid {document['supervisor_pid']}) is SILENT {since}: it is stopped or "
            "stuck, or cannot write its runtime directory; this is how it was then"
        )
    for line in reader.wrapped(text):
        yield reader.paint(line, "1;31")


def _rows(devices: list[Device], reader: Reader, *, fresh: bool) -> Iterator[str]:
    wide = reader.width is None
    cells_of = _wide if wide else _narrow
    table: Table = [_WIDE if wide else _COLUMNS]
    table += [cells_of(device, reader, fresh=fresh) for device in devices]
    gap = "  "
    if reader.width is not None:
        gap = gap if _length(table, gap) <= reader.width else " "
        table = _shortened(table, _length(table, gap) - reader.width)
    widths = _widths(table)
    head = sum(widths[:3]) + 2 * len(gap)  # device, state and phase have the colour
    for number, cells in enumerate(table):
        line = gap.join(map(str.ljust, cells, widths)).rstrip()
        if reader.width is not None and len(line) > reader.width:
            line = f"{line[: reader.width - 1]}~"
        if not number:
            yield reader.paint(line, "1")
            continue
        device = devices[number - 1]
        yield reader.paint(line[:head], FARES[fares(device)][1]) + line[head:]
        if not wide:
            yield from _notes(device, reader, fresh=fresh)


def _notes(device: Device, reader: Reader, *, fresh: bool) -> Iterator[str]:
    """Say below a device's line why it is not simply well, what comes, and what to do."""
    if fares(device) == WELL:
        return
    if device["explanation"]:
        yield from reader.wrapped(clean(device["explanation"]), "    why:  ")
    if not fresh:
        return
    remedy = device.get("remedy")
    for sentence in device.get("outlook") or ():
        if not (remedy and remedy in sentence):
            yield from reader.wrapped(clean(reader.counted(sentence)), "    next: ")
    if remedy:
        for line in reader.wrapped(clean(remedy), "    do:   "):
            yield reader.paint(line, "1")


def _narrow(device: Device, reader: Reader, *, fresh: bool) -> tuple[str, ...]:
    held = device["last_held_s"]
    done = f"{device['recoveries']}x" if device["recoveries"] else "-"
    if held is not None and device["recoveries"]:
        done += f" {round(held * 1000)}ms" if held < 0.9995 else f" {brief(held)}"
    return (
        device["device"],
        device["state"] or "?",
        device["phase"],
        " ".join(server_of(device, reader)) or "-",
        _queues(device),
        _IN_FLIGHT.get(device["recovery_mode"], "?"),
        done,
        _left(device),
        _next(device, reader) if fresh else "-",
    )


def _wide(device: Device, reader: Reader, *, fresh: bool) -> tuple[str, ...]:
    name, pid, up = server_of(device, reader) or ("-", "-", "-")
    held = device["last_held_s"]
    return (
        device["device"],
        device["state"] or "?",
        device["phase"],
        brief(reader.wall - device["since"]),
        name,
        pid,
        up,
        _queues(device),
        _IN_FLIGHT.get(device["recovery_mode"], "?"),
        _MEANWHILE.get(device["recovery_mode"], "?"),
        str(device["recoveries"]),
        "-" if held is None else milliseconds(held),
        _left(device),
        _next(device, reader) if fresh else "-",
        clean(device["explanation"]) or "-",
        clean(device.get("remedy") or "-") if fresh else "-",
    )


def server_of(device: Device, reader: Reader) -> tuple[str, str, str] | tuple[()]:
    """Return name, pid and uptime of who serves, or of who is to."""
    if device["server_pid"] is None:
        pid = device.get("candidate_pid")
        return ("new", str(pid), "-") if pid else ()
    started = device.get("server_started_at")
    up = "-" if started is None else brief(reader.wall - started)
    return clean(device.get("server_name") or "?"), str(device["server_pid"]), up


def _queues(device: Device) -> str:
    return f"{device['queues']}x{device['depth']}" if device["queues"] else "?"


def _left(device: Device) -> str:
    return "-" if device["phase"] == "observed" else str(device["attempts_left"])


def _next(device: Device, reader: Reader) -> str:
    """Return the next action: when it comes, or (<) by when it must have."""
    action = device.get("next_action")
    if not action:
        return "you" if device.get("remedy") else "-"
    for key, sign in (("next_at", ""), ("next_by", "<")):
        if device.get(key) is not None:
            return f"{action} {sign}{brief(device[key] - reader.wall)}"
    return str(action)


def _widths(table: Table) -> list[int]:
    return [max(map(len, column)) for column in zip(*table, strict=True)]


def _length(table: Table, gap: str) -> int:
    return sum(_widths(table)) + len(gap) * (len(table[0]) - 1)


def _shortened(table: Table, excess: int) -> Table:
    """Cut the names of servers, so that the lines are shorter by ``excess``."""
    room = max(_SERVER_MIN, _widths(table)[_SERVER] - max(0, excess))

    def cut(cell: str) -> str:
        if len(cell) <= room:
            return cell
        name, pid, up = cell.rsplit(" ", 2)
        return f"{name[: max(0, room - len(pid) - len(up) - 3)]}~ {pid} {up}"

    return [(*row[:_SERVER], cut(row[_SERVER]), *row[_SERVER + 1 :]) for row in table]


# --- words ---------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Take out what a terminal might obey: a server's last words are anybody's."""
    return "".join(each if each.isprintable() else " " for each in text)
