"""`ublkwatch stop`: the disk of a device is removed, unless somebody uses it."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from ublkwatch import client
from ublkwatch.config import Config
from ublkwatch.verbs import Exit, asking, may_administer, not_allowed, say
from ublkwatch.wire import Answer, Deed


def add(verbs: Any, shared: argparse.ArgumentParser, device: argparse.ArgumentParser) -> None:
    """Add this verb to the command line."""
    stop = verbs.add_parser(
        "stop", parents=[shared, device], help="end a device's disk, unless it is in use"
    )
    stop.add_argument("--force", action="store_true", help="although it is mounted or open")
    asking.add_options(stop, asks=True)
    stop.set_defaults(verb=_stop)


def _stop(arguments: argparse.Namespace) -> int:
    dev_id = arguments.dev_id
    deed = Deed("stop", dev_id, arguments.force, arguments.reason, arguments.dry_run)
    what = f"stop ublkb{dev_id}"
    return asking.hand_over(
        arguments,
        deed,
        what,
        hint="nothing was done",
        offline=partial(_directly, deed, what, arguments.yes),
        patience_s=client.DEED_S,
    )


def _directly(deed: Deed, what: str, yes: bool, _settings: Config) -> int:  # noqa: FBT001
    """Stop it without a daemon."""
    # Late: `ublkwatch status` must not pay for these.
    import asyncio  # noqa: PLC0415

    from ublkwatch.driver import UnavailableError  # noqa: PLC0415

    if not may_administer():
        return not_allowed(what)
    try:
        answer = asyncio.run(_without_daemon(deed, what, yes=yes))
    except UnavailableError as error:
        code = Exit.NO_PERMISSION if error.permission else Exit.UNAVAILABLE
        return say(code, f"{what}: {error}")
    except OSError as error:
        return say(Exit.FAILED, f"{what}: {error}")
    if answer is None:
        return Exit.REFUSED
    if answer.why:
        return asking.refuse(what, answer.why, "nothing was done")
    return asking.done(what, answer, dry_run=deed.dry_run)


async def _without_daemon(deed: Deed, what: str, *, yes: bool) -> Answer | None:
    """Return what became of it; None where the person at the terminal did not want it."""
    from ublkwatch import driver  # noqa: PLC0415 - as above
    from ublkwatch.ctrl import UblkCtrl  # noqa: PLC0415
    from ublkwatch.ctrl_worker import Workers  # noqa: PLC0415
    from ublkwatch.launch import start_worker  # noqa: PLC0415
    from ublkwatch.stopping import Stopper  # noqa: PLC0415
    from ublkwatch.usage import usage  # noqa: PLC0415

    ring = driver.open_ring()
    workers = Workers(start_worker)
    try:
        ctrl = UblkCtrl(ring)
        stopper = Stopper(ctrl, workers, await driver.ask_features(ctrl), usage)
        if why := await stopper.objection(deed.dev_id, force=deed.force):
            return Answer(why)
        foreseen = stopper.prospect(deed.dev_id, force=deed.force)
        if deed.dry_run:
            return foreseen
        if not yes and not asking.confirmed(what, foreseen.harm):
            return None
        return await stopper.stop(deed.dev_id, force=deed.force)
    finally:
        workers.close()
        ring.close()
