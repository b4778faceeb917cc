"""The command line: from words to a verb, and from its end to an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ublkwatch import __version__, config
from ublkwatch.settings import ConfigError
from ublkwatch.verbs import Exit, dev_id_of, say, show


def main(argv: list[str] | None = None) -> int:
    """Run a verb and return its exit code."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        code = int(arguments.verb(arguments))
        sys.stdout.flush()
    except ConfigError as error:
        return say(Exit.CONFIG, str(error))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    return code


def parse(argv: list[str]) -> argparse.Namespace:
    """Understand a command line; what follows `--` in `register` is the server's own."""
    cut = argv.index("--") if argv[:1] == ["register"] and "--" in argv else len(argv)
    arguments = _parser(argv[:1]).parse_args(argv[:cut])
    arguments.command = argv[cut + 1 :]
    return arguments


def _parser(word: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ublkwatch", description="Keeps userspace block devices (ublk) alive."
    )
    parser.add_argument("--version", action="version", version=f"ublkwatch {__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--config", type=Path, metavar="FILE", help=f"default: {config.DEFAULT_PATH}"
    )
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("dev_id", type=dev_id_of, metavar="DEV", help="N, ublkbN or /dev/ublkbN")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    show.add(verbs, shared)
    if word == ["status"]:
        return parser  # it must not pay for the others
    from ublkwatch.verbs import ask, past, run, tell  # noqa: PLC0415

    tell.add(verbs, shared, device)
    past.add(verbs, shared)
    ask.add(verbs, shared, device)
    run.add(verbs, shared)
    return parser
