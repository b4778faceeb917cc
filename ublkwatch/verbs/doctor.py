"""`ublkwatch doctor`, `check-config`, `features` and `version`: what this machine has to say."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from ublkwatch import __version__, config
from ublkwatch.client import Client
from ublkwatch.settings import ConfigError
from ublkwatch.verbs import Exit, document_of, locked, may_administer, say
from ublkwatch.wire import Question

_FOLLOWS = {
    "UNKNOWN": ("no GET_FEATURES: ublkwatch only observes",),
    "G2": (
        "START_USER_RECOVERY is taken once for an outage, and changes the device",
        "a server that dies half attached wedges its device: only STOP_DEV frees it",
        "when a server had all requests, the kernel lets go of it after 30 s only",
    ),
    "G3": (
        "START_USER_RECOVERY may be sent any number of times, and changes nothing",
        "a server that dies half attached costs an attempt, and no more",
        "the kernel lets go when the last process has closed the character device",
    ),
}


def add(verbs: Any, shared: argparse.ArgumentParser) -> None:
    """Add these verbs to the command line."""
    for name, verb, text in (
        ("doctor", _doctor, "say what stands in the way on this machine, and the way out"),
        ("features", _features, "say what the driver can do, and what follows for recovery"),
        ("version", _version, "say which version this is, and which one runs"),
    ):
        parser = verbs.add_parser(name, parents=[shared], help=text)
        parser.add_argument("--json", action="store_true", help="for programs")
        parser.set_defaults(verb=verb)
    check = verbs.add_parser(
        "check-config", parents=[shared], help="say all that is wrong with a configuration"
    )
    check.add_argument(
        "file", type=Path, nargs="?", metavar="FILE", help="in the place of --config"
    )
    check.add_argument("--json", action="store_true", help="for programs")
    check.set_defaults(verb=_check_config)


def _doctor(arguments: argparse.Namespace) -> int:
    # Late, here and below: `ublkwatch status` must not pay for these.
    import asyncio  # noqa: PLC0415

    from ublkwatch import doctor, finding  # noqa: PLC0415
    from ublkwatch.examined import look  # noqa: PLC0415

    document: dict[str, Any] = {}
    running = False
    try:
        settings = config.load(arguments.config)
        running = locked(settings.runtime_dir / "lock")
        document = document_of(settings)
    except (ConfigError, OSError, ValueError):
        pass  # it is among the findings
    facts = asyncio.run(look(arguments.config, document, running=running))
    found = doctor.examine(facts)
    print(json.dumps(finding.document(found), indent=2) if arguments.json else finding.text(found))
    return Exit.OK if finding.healthy(found) else Exit.UNHEALTHY


def _check_config(arguments: argparse.Namespace) -> int:
    from ublkwatch import checking, finding  # noqa: PLC0415

    found = checking.check(arguments.file or arguments.config)
    print(json.dumps(finding.document(found), indent=2) if arguments.json else finding.text(found))
    return Exit.OK if finding.healthy(found) else Exit.CONFIG


def _features(arguments: argparse.Namespace) -> int:
    import asyncio  # noqa: PLC0415

    from ublkwatch.driver import UnavailableError  # noqa: PLC0415
    from ublkwatch.model import Generation  # noqa: PLC0415
    from ublkwatch.uapi import DevFlags  # noqa: PLC0415

    if not may_administer():
        return say(Exit.NO_PERMISSION, "features: /dev/ublk-control is for root; try sudo")
    try:
        features = asyncio.run(_ask())
    except UnavailableError as error:
        code = Exit.NO_PERMISSION if error.permission else Exit.UNAVAILABLE
        return say(code, f"features: {error}")
    generation = Generation.of(features).name
    value, known = int(features or 0), sum(DevFlags)
    names = [flag.name for flag in DevFlags if flag & value]
    new = [bit for bit in range(64) if (value & ~known) >> bit & 1]
    document = {
        "schema_version": 1,
        "features": value,
        "names": names,
        "unknown_bits": new,
        "generation": generation,
        "follows": _FOLLOWS[generation],
    }
    if arguments.json:
        print(json.dumps(document, indent=2))
        return Exit.OK
    print(f"features {value:#x}: {generation}'s rules")
    for line in (*names, *(f"bit {bit}, which this version does not know" for bit in new)):
        print(f"  {line}")
    print("for recovery:")
    for line in _FOLLOWS[generation]:
        print(f"  {line}")
    return Exit.OK


async def _ask() -> Any:
    from ublkwatch import driver  # noqa: PLC0415
    from ublkwatch.ctrl import UblkCtrl  # noqa: PLC0415

    ring = driver.open_ring()
    try:
        return await driver.ask_features(UblkCtrl(ring))
    finally:
        ring.close()


def _version(arguments: argparse.Namespace) -> int:
    running = None
    try:
        answer = Client(config.load(arguments.config).runtime_dir).ask(Question())
        running = answer.said[0].rpartition(" ")[2] if answer.said else None
    except (ConfigError, OSError):
        pass  # none runs, or it is not for us
    document = {
        "schema_version": 1,
        "ublkwatch": __version__,
        "running": running,
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
    if arguments.json:
        print(json.dumps(document, indent=2))
        return Exit.OK
    runs = f"; {running} runs" if running else ""
    here = f"Python {document['python']}, Linux {document['kernel']}"
    print(f"ublkwatch {__version__} ({here}){runs}")
    return Exit.OK
