"""`ublkwatch status`: the devices, read from the daemon's document; also while that is down.

Nothing heavy is imported here: this is asked for when a machine is in trouble.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from ublkwatch import config, page, sheet
from ublkwatch.config import Config
from ublkwatch.verbs import Exit, clock, dev_id_of, document_of, locked, pause, say

_WATCH_S = 2.0
_HIDE, _SHOW = "\x1b[?25l\x1b[?7l\x1b[2J", "\x1b[?25h\x1b[?7h"  # the cursor, and long lines' rest
_HOME, _LINE_END, _PAGE_END = "\x1b[H", "\x1b[K\n", "\x1b[J"


class _NothingToShowError(Exception):
    """Why there is no page: what ends us with which code."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


def add(verbs: Any, shared: argparse.ArgumentParser) -> None:
    """Add this verb to the command line."""
    show = verbs.add_parser(
        "status",
        parents=[shared],
        help="show the devices",
        description="Shows the devices, problems first, each with what to do about it. Below NEXT, "
        "<9s means: within 9 s, or it is given up; you: it waits for you.",
    )
    show.add_argument(
        "dev_ids",
        type=dev_id_of,
        nargs="*",
        metavar="DEV",
        help="all about these devices: N, ublkbN",
    )
    show.add_argument(
        *("-o", "--output"),
        choices=("wide", "json", "jsonl", "name"),
        help="wide: all columns; the others are for programs (docs/schema/status.json)",
    )
    show.add_argument(
        "--json", dest="output", action="store_const", const="json", help="the same as -o json"
    )
    show.add_argument(
        *("-x", "--unhealthy"), action="store_true", help="only devices that are not well"
    )
    show.add_argument(
        "--watch",
        type=_interval,
        nargs="?",
        const=_WATCH_S,
        metavar="SECONDS",
        help=f"show it again and again, until Ctrl-C; every {_WATCH_S:g} s",
    )
    show.set_defaults(verb=_status)


def _interval(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time from 0.1 to 3600 s; a device goes before --watch"
        )
    return value


def _status(arguments: argparse.Namespace) -> int:
    settings = config.load(arguments.config)
    if arguments.watch is not None:
        return _watch(lambda: _page(settings, arguments)[0], arguments.watch)
    try:
        text, code = _page(settings, arguments)
    except _NothingToShowError as error:
        return say(error.code, str(error))
    if text:
        print(text)
    return code


def _page(settings: Config, arguments: argparse.Namespace) -> tuple[str, Exit]:
    """Return the page of this moment, and how who asked for it once should end."""
    document = _document(settings)
    running = locked(settings.runtime_dir / "lock")
    devices = document["devices"]
    if arguments.dev_ids:
        devices = [_found(devices, dev_id, running=running) for dev_id in arguments.dev_ids]
    healthy = all(map(page.is_healthy, devices))
    code = Exit.NOT_RUNNING if not running else Exit.OK if healthy else Exit.UNHEALTHY
    text = _text(document | {"devices": devices, "running": running}, arguments)
    return text, code


def _text(document: dict[str, Any], arguments: argparse.Namespace) -> str:
    devices = document["devices"]
    if arguments.unhealthy and arguments.output in ("json", "jsonl", "name"):
        devices = [device for device in devices if not page.is_healthy(device)]
    match arguments.output:
        case "json":
            return json.dumps(document | {"devices": devices}, indent=2)
        case "jsonl":
            return "\n".join(map(json.dumps, devices))
        case "name":
            return "\n".join(device["device"] for device in devices)
    tty = sys.stdout.isatty()
    reader = page.Reader(
        time.time(),
        running=document["running"],
        width=None if arguments.output == "wide" else _size()[0],
        colour=tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb",
        clock=clock,
    )
    if arguments.dev_ids and not arguments.unhealthy and not arguments.output:
        return "\n\n".join(sheet.details(device, document, reader) for device in devices)
    return page.overview(document, reader, unhealthy_only=arguments.unhealthy)


def _document(settings: Config) -> dict[str, Any]:
    path = settings.runtime_dir / "status.json"
    try:
        return document_of(settings)
    except FileNotFoundError:
        message = f"{path}: ublkwatch is not running, and has not been; start `ublkwatch run`"
        raise _NothingToShowError(Exit.NOT_RUNNING, message) from None
    except PermissionError as error:
        message = f"{path}: {error.strerror}; try sudo"
        raise _NothingToShowError(Exit.NO_PERMISSION, message) from None
    except (OSError, ValueError) as error:
        raise _NothingToShowError(Exit.FAILED, f"{path}: {error}") from error


def _found(devices: list[dict[str, Any]], dev_id: int, *, running: bool) -> dict[str, Any]:
    for device in devices:
        if device["dev_id"] == dev_id:
            return device
    code = Exit.REFUSED if running else Exit.NOT_RUNNING
    hint = "`ublkwatch status` shows those that are" if running else "and ublkwatch is not running"
    raise _NothingToShowError(code, f"ublkb{dev_id}: no such device is known; {hint}")


def _size() -> tuple[int, int]:
    """Return how wide and high pages may be: a terminal's size, else 80 columns."""
    try:
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        columns, lines = 0, 0
    return columns or 80, lines or 24


# --- again and again -----------------------------------------------------------------------------


def _watch(page_now: Callable[[], str], every_s: float) -> Exit:
    """Show the page until Ctrl-C, SIGTERM, or until nobody reads: in place, on a terminal."""
    tty = sys.stdout.isatty()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if tty:
            sys.stdout.write(_HIDE)
        while True:
            try:
                text = page_now()
            except _NothingToShowError as error:
                text = str(error)
            sys.stdout.write(_in_place(text) if tty else f"{text}\n\n")
            sys.stdout.flush()
            if not pause(every_s):
                return Exit.OK
    except KeyboardInterrupt:
        return Exit.OK
    finally:
        if tty:
            with contextlib.suppress(OSError):  # it went away
                os.write(sys.stdout.fileno(), _SHOW.encode())


def _in_place(text: str) -> str:
    """Return what puts a page in the place of the last one, as far as it fits."""
    lines, room = text.split("\n"), _size()[1] - 1
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... {len(lines) - room + 1} more lines"]
    return _HOME + "".join(line + _LINE_END for line in lines) + _PAGE_END


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
