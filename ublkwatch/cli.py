"""The command line: verbs, the composition of the daemon, exit codes.

The only home of argparse, signals, clocks and exit.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ublkwatch import __version__, config, status
from ublkwatch.config import Config, ConfigError

if TYPE_CHECKING:  # imported late, see _run()
    from ublkwatch.store import Store

EXIT_OK = 0
EXIT_FAILED = 1  # something went wrong that is none of the below
EXIT_USAGE = 2  # the command line
EXIT_NOT_RUNNING = 3  # status: ublkwatch is not running
EXIT_UNHEALTHY = 5  # status: a device is neither watched nor observed
EXIT_UNAVAILABLE = 69  # no /dev/ublk-control, or io_uring is disabled (EX_UNAVAILABLE)
EXIT_STATE = 73  # a directory cannot be written, or is in use (EX_CANTCREAT)
EXIT_NO_PERMISSION = 77  # no CAP_SYS_ADMIN (EX_NOPERM)
EXIT_CONFIG = 78  # the configuration (EX_CONFIG)

_CAP_SYS_ADMIN = 21


def main(argv: list[str] | None = None) -> int:
    """Run a verb and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.verb(arguments))
    except ConfigError as error:
        return _say(EXIT_CONFIG, str(error))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def _say(code: int, message: str) -> int:
    print(f"ublkwatch: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ublkwatch", description="Keeps userspace block devices (ublk) alive."
    )
    parser.add_argument("--version", action="version", version=f"ublkwatch {__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--config", type=Path, metavar="FILE", help=f"default: {config.DEFAULT_PATH}"
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    run = verbs.add_parser("run", parents=[shared], help="watch and recover, until SIGTERM")
    run.add_argument("--verbose", action="store_true", help="log more")
    run.set_defaults(verb=_run)
    show = verbs.add_parser("status", parents=[shared], help="show the devices")
    show.add_argument("--json", action="store_true", help="the status document, for programs")
    show.set_defaults(verb=_status)
    return parser


# --- status --------------------------------------------------------------------------------------


def _status(arguments: argparse.Namespace) -> int:
    settings = config.load(arguments.config)
    path = settings.runtime_dir / "status.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return _say(EXIT_NOT_RUNNING, f"{path}: ublkwatch is not running, and has not been")
    except (OSError, ValueError) as error:
        return _say(EXIT_FAILED, f"{path}: {error}")
    running = _locked(settings.runtime_dir / "lock")
    if arguments.json:
        print(json.dumps(document | {"running": running}, indent=2))
    else:
        print(status.table(document, running=running))
    if not running:
        return EXIT_NOT_RUNNING
    healthy = all(device["phase"] in ("watching", "observed") for device in document["devices"])
    return EXIT_OK if healthy else EXIT_UNHEALTHY


def _locked(path: Path) -> bool:
    """Tell whether a daemon holds the lock; one that we may not open is held by somebody else."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


# --- run -----------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    # Late, like the edges that it composes: `ublkwatch status` must not pay for any of these.
    from ublkwatch.daemon import UnavailableError  # noqa: PLC0415
    from ublkwatch.store import Store, StoreError  # noqa: PLC0415

    settings = config.load(arguments.config)
    if not _may_administer():
        return _say(EXIT_NO_PERMISSION, "no CAP_SYS_ADMIN, which ublk's commands need; run as root")
    try:
        store = Store(settings.runtime_dir, settings.state_dir)
    except StoreError as error:
        return _say(EXIT_STATE, str(error))
    try:
        asyncio.run(_daemon(settings, store, verbose=arguments.verbose))
    except UnavailableError as error:
        return _say(EXIT_NO_PERMISSION if error.permission else EXIT_UNAVAILABLE, str(error))
    finally:
        store.close()
    return EXIT_OK


def _may_administer() -> bool:
    """Root in a container may lack the capability: it is what the kernel asks for, not the uid."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False


async def _daemon(settings: Config, store: Store, *, verbose: bool) -> None:
    from ublkwatch.daemon import Daemon  # noqa: PLC0415 - see _run()

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await Daemon(settings, store).run(stop, verbose=verbose)
