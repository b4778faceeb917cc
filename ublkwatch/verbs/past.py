"""`ublkwatch history` and `ublkwatch events`: what happened, read from the files of the daemon."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from ublkwatch import config, page, past
from ublkwatch.trail import Trail
from ublkwatch.verbs import Exit, clock, dev_id_of, locked, pause, say, seconds

_LOOK_S = 0.2
_AGO_MAX_S = 3650 * 86400.0


def add(verbs: Any, shared: argparse.ArgumentParser) -> None:
    """Add these verbs to the command line."""
    past_of = argparse.ArgumentParser(add_help=False)
    past_of.add_argument(
        "dev_ids", type=dev_id_of, nargs="*", metavar="DEV", help="of these devices: N, ublkbN"
    )
    past_of.add_argument("--limit", type=_count, default=20, metavar="N", help="the last N; 0: all")
    history = verbs.add_parser(
        "history", parents=[shared, past_of], help="show recoveries and orders; for root"
    )
    history.add_argument("--json", action="store_true", help="for programs: docs/schema")
    history.add_argument(
        "--since", type=_since, default=0.0, metavar="TIME", help="30m, 2h, 7d or 2026-01-31 12:00"
    )
    history.set_defaults(verb=_history)
    events = verbs.add_parser("events", parents=[shared, past_of], help="show what happens")
    events.add_argument("--json", action="store_true", help="a line of JSON each: docs/schema")
    events.add_argument("--follow", "-f", action="store_true", help="go on, until Ctrl-C")
    events.set_defaults(verb=_events)


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return int(text)


def _since(text: str) -> float:
    """Understand a moment: so long ago, or a date."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        pass
    try:
        return time.time() - seconds(text, _AGO_MAX_S)
    except argparse.ArgumentTypeError:
        says = f"{text!r} is no time; write 30m, 2h, 7d, or a date: 2026-01-31, 2026-01-31T12:00"
        raise argparse.ArgumentTypeError(says) from None


def _history(arguments: argparse.Namespace) -> int:
    from ublkwatch.store import StoreError, read_history  # noqa: PLC0415 - as in verbs.run

    settings = config.load(arguments.config)
    try:
        rows = read_history(settings.state_dir)
    except PermissionError as error:
        return say(Exit.NO_PERMISSION, f"history: {error.filename}: only root may look; try sudo")
    except (OSError, StoreError) as error:
        return say(Exit.FAILED, f"history: {error}")
    wanted = set(arguments.dev_ids)
    found = [
        past.entry_of(row)
        for row in rows
        if row["at"] >= arguments.since and (not wanted or row["dev_id"] in wanted)
    ]
    shown = found[-arguments.limit :]
    left_out = len(found) - len(shown)
    if arguments.json:
        whole = {"schema_version": past.SCHEMA_VERSION, "left_out": left_out, "history": shown}
        print(json.dumps(whole, indent=2))
        return Exit.OK
    if left_out:
        print(f"... {left_out} before these; --limit 0 shows all")
    if not shown:
        print("nothing has happened, as far as is remembered")
    for entry in shown:
        head, lines = past.told(entry, clock)
        reader = page.Reader(0.0, running=True, width=max(80, len(head) + 40))
        for number, line in enumerate(lines):
            print("\n".join(reader.wrapped(line, head if not number else " " * len(head))))
    return Exit.OK


def _events(arguments: argparse.Namespace) -> int:
    settings = config.load(arguments.config)
    trail = Trail(settings.runtime_dir, arguments.dev_ids)
    try:
        _print(trail.last(arguments.limit or None), arguments)
        while arguments.follow and pause(_LOOK_S):
            _print(trail.more(), arguments)
    except KeyboardInterrupt:
        return Exit.OK
    except PermissionError as error:
        return say(Exit.NO_PERMISSION, f"events: {error.filename}: {error.strerror}; try sudo")
    except OSError as error:
        return say(Exit.FAILED, f"events: {error}")
    finally:
        trail.close()
    return Exit.OK if locked(settings.runtime_dir / "lock") else Exit.NOT_RUNNING


def _print(events: Iterable[dict[str, Any]], arguments: argparse.Namespace) -> None:
    for event in events:
        if arguments.json:
            print(json.dumps(past.event_of(event)))
        else:
            fraction = f".{int(event['at'] % 1 * 1000):03}"
            print(f"{clock(event['at'])}{fraction}  {page.clean(event['text'])}")
    sys.stdout.flush()
