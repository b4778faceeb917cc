"""How a wish is brought to the daemon that runs, for all verbs that act."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

from ublkwatch import config, wire
from ublkwatch.client import PATIENCE_S, Client
from ublkwatch.config import Config
from ublkwatch.verbs import Exit, operators, say
from ublkwatch.wire import Answer, Change, Deed, Request

Wish = Request | Deed | Change


def add_options(verb: argparse.ArgumentParser, *, asks: bool = False) -> None:
    """Add what every verb that acts can be told; ``asks``: it may do what nobody can undo."""
    verb.add_argument("--reason", default="", metavar="TEXT", help="for the log and for others")
    verb.add_argument("--dry-run", action="store_true", help="say what would be done, and do not")
    if asks:
        verb.add_argument("--yes", action="store_true", help="do not ask whether it is meant")
    verb.set_defaults(asks=asks)


def hand_over(  # noqa: PLR0913 - each by its name
    arguments: argparse.Namespace,
    wish: Wish,
    what: str,
    *,
    hint: str = "",
    more: str = "",
    offline: Callable[[Config], int] | None = None,
    then: Callable[[Config, Answer], int] | None = None,
    patience_s: float = PATIENCE_S,
) -> int:
    """Ask the daemon, and a person beforehand where it cannot be undone; return the exit code.

    ``more`` is what the daemon does not know of the harm. ``offline`` is done where no daemon runs,
    ``then`` when it was taken.
    """
    settings = config.load(arguments.config)
    if len(wish.reason) > wire.REASON_MAX:
        return say(Exit.USAGE, f"--reason: at most {wire.REASON_MAX} characters")
    client = Client(settings.runtime_dir)
    try:
        if arguments.asks and not (arguments.yes or wish.dry_run):
            foreseen = client.ask(replace(wish, dry_run=True), patience_s)
            if foreseen.why:
                return refuse(what, foreseen.why, hint)
            if foreseen.harm and not confirmed(what, foreseen.harm + more):
                return Exit.REFUSED
        answer = client.ask(wish, patience_s)
    except (FileNotFoundError, ConnectionRefusedError):
        if offline is not None:
            return offline(settings)
        return say(Exit.NOT_RUNNING, f"{what}: ublkwatch is not running; start it, then ask again")
    except PermissionError:
        only = f"only {operators(settings)} may give orders"
        return say(Exit.NO_PERMISSION, f"{what}: {only}; try sudo")
    except TimeoutError:
        return say(Exit.FAILED, f"{what}: no answer from ublkwatch; its log may say why")
    except OSError as error:
        return say(Exit.FAILED, f"{what}: {settings.runtime_dir / wire.NAME}: {error}")
    if answer.why:
        return refuse(what, answer.why, hint)
    if then is not None and not wish.dry_run:
        return then(settings, answer)
    return done(what, answer, dry_run=wish.dry_run, more=more)


def refuse(what: str, why: str, hint: str) -> Exit:
    """Say why it was refused, and what to do about it."""
    return say(Exit.REFUSED, f"{what}: refused: {why}{'; ' if hint else ''}{hint}")


def done(what: str, answer: Answer, *, dry_run: bool, later: str = "", more: str = "") -> Exit:
    """Say what was done, or what would be."""
    print(f"{what}: {'dry run, nothing is done' if dry_run else 'done'}{later}")
    for line in answer.said:
        print(f"  {line}{more}")
    return Exit.OK


def confirmed(what: str, harm: str) -> bool:
    """Ask the person at the terminal; where there is none, say how to do without."""
    if not sys.stdin.isatty():
        say(Exit.REFUSED, f"{what}: refused: {harm}; --yes has it done, --dry-run says more")
        return False
    print(f"{what}: {harm}. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    say(Exit.REFUSED, f"{what}: nothing was done")
    return False
