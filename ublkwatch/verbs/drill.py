"""`ublkwatch drill`: kills a device's server, again and again, and measures what comes of it."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from ublkwatch import client
from ublkwatch.config import Config
from ublkwatch.model import RecoveryMode
from ublkwatch.verbs import Exit, asking, document_of, say, seconds
from ublkwatch.wire import Answer, Deed


def add(verbs: Any, shared: argparse.ArgumentParser, device: argparse.ArgumentParser) -> None:
    """Add this verb to the command line."""
    drill = verbs.add_parser(
        "drill", parents=[shared, device], help="kill a device's server, and time its recovery"
    )
    drill.add_argument("--rounds", type=_rounds, default=3, metavar="N", help="kills; default: 3")
    drill.add_argument(
        "--scratch",
        action="store_true",
        help="write and verify through the kills: what is on the disk is destroyed",
    )
    drill.add_argument(
        "--although-in-use", action="store_true", help="whoever uses the disk meets its pauses"
    )
    drill.add_argument("--report", type=Path, metavar="FILE", help="write a report as JSON")
    drill.add_argument(
        "--timeout",
        dest="timeout_s",
        type=seconds,
        default=60.0,
        metavar="TIME",
        help="for each recovery; default: 60s",
    )
    asking.add_options(drill, asks=True)
    drill.set_defaults(verb=_drill)


def _rounds(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 10000")
    return int(text)


def _drill(arguments: argparse.Namespace) -> int:
    dev_id, what = arguments.dev_id, f"drill ublkb{arguments.dev_id}"
    if arguments.scratch and arguments.although_in_use:
        return say(Exit.USAGE, "--scratch destroys what is on the disk: not --although-in-use")
    if os.geteuid() != 0:
        return say(Exit.NO_PERMISSION, f"{what}: only root may end servers; try sudo")
    reason = arguments.reason or f"{arguments.rounds} rounds"
    deed = Deed("drill", dev_id, arguments.although_in_use, reason, arguments.dry_run)
    harm = f", {arguments.rounds} times" + (
        f"; all data on /dev/ublkb{dev_id} would be destroyed" if arguments.scratch else ""
    )
    return asking.hand_over(
        arguments,
        deed,
        what,
        hint=f"`ublkwatch explain {dev_id}` says more",
        more=harm,
        then=partial(_run, arguments),
        patience_s=client.DEED_S,
    )


def _run(arguments: argparse.Namespace, settings: Config, _answer: Answer) -> int:
    # Late: `ublkwatch status` must not pay for these.
    import asyncio  # noqa: PLC0415
    import json  # noqa: PLC0415

    from ublkwatch.rounds import drill  # noqa: PLC0415

    report = asyncio.run(
        drill(
            settings.runtime_dir,
            arguments.dev_id,
            arguments.rounds,
            timeout_s=arguments.timeout_s,
            scratch=arguments.scratch,
            may_fail=_may_fail(settings, arguments.dev_id),
            tell=lambda line: print(line, flush=True),
        )
    )
    print(report.summary())
    if arguments.report:
        try:
            arguments.report.write_text(json.dumps(report.document(), indent=2) + "\n")
        except OSError as error:
            return say(Exit.FAILED, f"--report {arguments.report}: {error.strerror}")
    return Exit.FAILED if report.trouble else Exit.OK


def _may_fail(settings: Config, dev_id: int) -> bool:
    """Tell whether the device's flags let I/O fail when its server dies."""
    devices = document_of(settings)["devices"]
    mode = next((each["recovery_mode"] for each in devices if each["dev_id"] == dev_id), None)
    return bool(mode != RecoveryMode.REISSUE.value)
