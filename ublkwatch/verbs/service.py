"""`ublkwatch install-systemd`: ublkwatch as a service of this host, and no longer."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ublkwatch.verbs import Exit, say


def add(verbs: Any, shared: argparse.ArgumentParser) -> None:
    """Add this verb to the command line."""
    install = verbs.add_parser(
        "install-systemd",
        parents=[shared],
        help="write and enable the unit for this very installation",
    )
    install.add_argument("--now", action="store_true", help="start it, or start it anew")
    install.add_argument(
        "--remove", action="store_true", help="stop, disable and remove it; servers live on"
    )
    install.add_argument(
        "--early-boot",
        action="store_true",
        help="start it beside the local file systems, not behind them; with --children",
    )
    install.add_argument(
        "--children",
        action="store_true",
        help='without its sandbox, for servers that are its children (launcher = "fork")',
    )
    install.add_argument("--dry-run", action="store_true", help="say what would be done, only")
    install.set_defaults(verb=_install)


def _install(arguments: argparse.Namespace) -> int:
    # Late: `ublkwatch status` must not pay for it.
    from ublkwatch import service  # noqa: PLC0415

    what = "install-systemd"
    if os.geteuid() and not arguments.dry_run:
        return say(Exit.NO_PERMISSION, f"{what}: only root may change what root runs; try sudo")
    if not service.booted():
        return say(Exit.UNAVAILABLE, f"{what}: systemd is not the init here; start it your own way")
    unit = service.Service()
    # A server that is lost before the system bus is there becomes a child.
    wanted = {"early-boot"} if arguments.early_boot else set()
    wanted |= {"children"} if arguments.early_boot or arguments.children else set()
    try:
        steps = (
            unit.remove()
            if arguments.remove
            else unit.install(
                service.own_command(),
                arguments.config,
                wanted,
                now=arguments.now,
            )
        )
        for step, do in steps:
            print(f"{'would be done: ' if arguments.dry_run else ''}{step}")
            if not arguments.dry_run:
                do()
    except service.ServiceError as error:
        return say(Exit.REFUSED, f"{what}: {error}")
    except OSError as error:
        return say(Exit.FAILED, f"{what}: {error}")
    return Exit.OK
