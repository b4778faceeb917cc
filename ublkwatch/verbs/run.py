"""`ublkwatch run`: the daemon, in the foreground."""

from __future__ import annotations

import argparse
import os
import signal
from functools import partial
from typing import TYPE_CHECKING, Any

from ublkwatch import config
from ublkwatch.config import Config
from ublkwatch.verbs import Exit, may_administer, not_allowed, say

if TYPE_CHECKING:  # imported late, see _run()
    from ublkwatch.store import Store


def add(verbs: Any, shared: argparse.ArgumentParser) -> None:
    """Add this verb to the command line."""
    run = verbs.add_parser("run", parents=[shared], help="watch and recover, until SIGTERM")
    run.add_argument("--verbose", action="store_true", help="log more")
    run.set_defaults(verb=_run)


def _run(arguments: argparse.Namespace) -> int:
    # Late, like the edges that it composes: `ublkwatch status` must not pay for any of these.
    import asyncio  # noqa: PLC0415

    from ublkwatch.driver import UnavailableError  # noqa: PLC0415
    from ublkwatch.siting import PlacementError, check_own  # noqa: PLC0415
    from ublkwatch.store import Store, StoreError, lock_host  # noqa: PLC0415

    # As long as nobody handles it, a reload that is asked for would be our end; so it waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    settings = config.load(arguments.config)
    if not may_administer():
        return not_allowed("run")
    try:
        check_own(settings, arguments.config or config.DEFAULT_PATH)
        store = Store(settings.runtime_dir, settings.state_dir)
    except (PlacementError, StoreError) as error:
        return say(Exit.STATE, str(error))
    try:
        lock_host()  # until we end
        asyncio.run(_daemon(settings, store, arguments))
    except StoreError as error:
        return say(Exit.STATE, str(error))
    except UnavailableError as error:
        return say(Exit.NO_PERMISSION if error.permission else Exit.UNAVAILABLE, str(error))
    finally:
        store.close()
    return Exit.OK


async def _daemon(settings: Config, store: Store, arguments: argparse.Namespace) -> None:
    import asyncio  # noqa: PLC0415 - see _run()

    from ublkwatch.daemon import Daemon  # noqa: PLC0415 - see _run()
    from ublkwatch.notify import Manager  # noqa: PLC0415 - see _run()

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    # A file that was there, and is gone when it is read anew, does not mean: all is default.
    path = arguments.config or (config.DEFAULT_PATH if config.DEFAULT_PATH.exists() else None)
    load = partial(config.load, path)
    daemon = Daemon(settings, store, load, manager=Manager(os.environ))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, daemon.reload)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    await daemon.run(stop, verbose=arguments.verbose)
