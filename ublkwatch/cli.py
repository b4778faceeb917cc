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
    arguments = parser(argv[:1]).parse_args(argv[:cut])
    arguments.command = argv[cut + 1 :]
    return arguments


def parser(word: list[str] | None = None) -> argparse.ArgumentParser:
    """Return the whole command line, or as much of it as it takes for ``word``.

    The manual and the completions are made from it, too.
    """
    whole = argparse.ArgumentParser(
        prog="ublkwatch", description="Keeps userspace block devices (ublk) alive."
    )
    whole.add_argument("--version", action="version", version=f"ublkwatch {__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--config", type=Path, metavar="FILE", help=f"default: {config.DEFAULT_PATH}"
    )
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("dev_id", type=dev_id_of, metavar="DEV", help="N, ublkbN or /dev/ublkbN")
    verbs = whole.add_subparsers(required=True, metavar="VERB")
    show.add(verbs, shared)
    if word == ["status"]:
        return whole  # it must not pay for the others
    from ublkwatch.verbs import (  # noqa: PLC0415
        doctor,
        drill,
        order,
        past,
        rules,
        run,
        service,
        stop,
        tell,
    )

    tell.add(verbs, shared, device)
    past.add(verbs, shared)
    for each in (order, stop, drill):
        each.add(verbs, shared, device)
    rules.add(verbs, shared)
    doctor.add(verbs, shared)
    run.add(verbs, shared)
    service.add(verbs, shared)
    return whole
