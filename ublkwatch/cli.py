"""The command line: verbs, the composition of the daemon, exit codes.

The only home of argparse, signals, clocks and exit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import re
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ublkwatch import __version__, admin, config, explain, foretell, status
from ublkwatch.config import Config
from ublkwatch.model import Generation, Order, Phase, Policy, Reason, Record
from ublkwatch.settings import MATCHES, OPTIONS, SERVER, ConfigError

if TYPE_CHECKING:  # imported late, see _run()
    from ublkwatch.store import Store

EXIT_OK = 0
EXIT_FAILED = 1  # something went wrong that is none of the below
EXIT_USAGE = 2  # the command line
EXIT_NOT_RUNNING = 3  # ublkwatch is not running
EXIT_REFUSED = 4  # an order was refused, or there is no such device
EXIT_UNHEALTHY = 5  # status: a device is neither watched nor observed
EXIT_UNAVAILABLE = 69  # no /dev/ublk-control, or io_uring is disabled (EX_UNAVAILABLE)
EXIT_STATE = 73  # a directory cannot be written, or is in use (EX_CANTCREAT)
EXIT_NO_PERMISSION = 77  # no CAP_SYS_ADMIN, or not root (EX_NOPERM)
EXIT_CONFIG = 78  # the configuration (EX_CONFIG)

_CAP_SYS_ADMIN = 21
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_ORDERS = {
    Order.HOLD: "keep the hands off a device, until it is released or for a time",
    Order.RELEASE: "end a hold, and take up what waits",
    Order.RETRY: "try again to recover a device that was given up",
    Order.RECOVER: "recover a device now, whatever it waits for",
    Order.FORGET: "keep the hands off this life of a device for good",
}


def main(argv: list[str] | None = None) -> int:
    """Run a verb and return its exit code."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        return int(arguments.verb(arguments))
    except ConfigError as error:
        return _say(EXIT_CONFIG, str(error))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def parse(argv: list[str]) -> argparse.Namespace:
    """Understand a command line; what follows `--` in `register` is the server's own."""
    cut = argv.index("--") if argv[:1] == ["register"] and "--" in argv else len(argv)
    arguments = _parser().parse_args(argv[:cut])
    arguments.command = argv[cut + 1 :]
    return arguments


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
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("dev_id", type=_dev_id, metavar="DEV", help="N, ublkbN or /dev/ublkbN")
    tell = verbs.add_parser("explain", parents=[shared, device], help="say all about a device")
    tell.set_defaults(verb=_explain)
    _add_rules(verbs, shared)
    for order, text in _ORDERS.items():
        verb = verbs.add_parser(order.value, parents=[shared, device], help=text)
        verb.set_defaults(verb=_order, order=order, for_s=None)
        verb.add_argument("--reason", default="", metavar="TEXT", help="for the log and for others")
        if order is Order.HOLD:
            verb.add_argument(
                "--for", dest="for_s", type=_seconds, metavar="TIME", help="90s, 30m, 2h or 1d"
            )
    return parser


def _add_rules(verbs: Any, shared: argparse.ArgumentParser) -> None:
    usage = "%(prog)s (DEV | --exe PATH | --process NAME | --tag N) [OPTION]... -- ARGV..."
    asked = argparse.ArgumentParser(add_help=False)
    asked.add_argument("--reason", default="", metavar="TEXT", help="for the log and for others")
    add = verbs.add_parser(
        "register", parents=[shared, asked], help="say how to start a server", usage=usage
    )
    add.add_argument("dev_id", type=_dev_id, nargs="?", metavar="DEV", help="N, ublkbN")
    add.add_argument("--name", help="of the registration; of a device's by default ublkbN")
    for key in (*MATCHES, *OPTIONS):
        add.add_argument(f"--{key}", help=SERVER[key].help)
    add.add_argument("--accept-delete-on-failure", action="store_true")
    for option, target in (
        ("env", "env"),
        ("limit", "limit"),
        ("policy", "policy"),
        ("set", "more"),
    ):
        add.add_argument(
            f"--{option}", action="append", default=[], metavar="KEY=VALUE", dest=target
        )
    add.set_defaults(verb=_change, change="register")
    drop = verbs.add_parser("unregister", parents=[shared, asked], help="undo a `register`")
    drop.add_argument("name", metavar="NAME", help="as `ublkwatch registered` shows it")
    drop.set_defaults(verb=_change, change="unregister")
    again = verbs.add_parser(
        "reload", parents=[shared, asked], help="have the configuration read anew"
    )
    again.set_defaults(verb=_change, change="reload", name="")
    show = verbs.add_parser("registered", parents=[shared], help="show what is registered")
    show.add_argument("--json", action="store_true", help="the tables, for programs")
    show.set_defaults(verb=_registered)


def _dev_id(text: str) -> int:
    match = re.fullmatch(r"(?:(?:/dev/)?ublk[bc])?([0-9]{1,7})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; write N, ublkbN or /dev/ublkbN")
    return int(match[1])


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", text)
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0
    if not 0 < seconds <= admin.HOLD_MAX_S:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 30m, 2h or up to 30d")
    return seconds


# --- status --------------------------------------------------------------------------------------


def _status(arguments: argparse.Namespace) -> int:
    settings = config.load(arguments.config)
    path = settings.runtime_dir / "status.json"
    try:
        document = _document(settings)
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
    devices = document["devices"]
    healthy = all(status.is_well(device) or device["phase"] == "observed" for device in devices)
    return EXIT_OK if healthy else EXIT_UNHEALTHY


def _document(settings: Config) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((settings.runtime_dir / "status.json").read_text())
    return document


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


# --- orders --------------------------------------------------------------------------------------


def _order(arguments: argparse.Namespace) -> int:
    order, dev_id = arguments.order, arguments.dev_id
    request = admin.Request(order, dev_id, arguments.for_s, arguments.reason)
    hint = f"`ublkwatch explain {dev_id}` says what can be done"
    return _hand_over(arguments, request, f"{order.value} ublkb{dev_id}", hint)


def _change(arguments: argparse.Namespace) -> int:
    from ublkwatch import registering  # noqa: PLC0415 - as in _run()

    if arguments.change == "register":
        change = registering.change_of(arguments)
    else:
        change = admin.Change(arguments.change, arguments.name, reason=arguments.reason)
    return _hand_over(arguments, change, str(change), "nothing was changed")


def _hand_over(
    arguments: argparse.Namespace, asked: admin.Request | admin.Change, what: str, hint: str
) -> int:
    settings = config.load(arguments.config)
    if len(arguments.reason) > admin.REASON_MAX:
        return _say(EXIT_USAGE, f"--reason: at most {admin.REASON_MAX} characters")
    try:
        refusal = admin.ask(settings.runtime_dir, asked)
    except (FileNotFoundError, ConnectionRefusedError):
        if isinstance(asked, admin.Request) or asked.verb == "reload":
            again = "start it, then ask again"
            return _say(EXIT_NOT_RUNNING, f"{what}: ublkwatch is not running; {again}")
        return _keep(settings, asked)
    except PermissionError:
        return _say(EXIT_NO_PERMISSION, f"{what}: only root may give orders; try sudo")
    except TimeoutError:
        return _say(EXIT_FAILED, f"{what}: no answer from ublkwatch; its log may say why")
    except OSError as error:
        return _say(EXIT_FAILED, f"{what}: {settings.runtime_dir / admin.NAME}: {error}")
    if refusal:
        return _say(EXIT_REFUSED, f"{what}: refused: {refusal}; {hint}")
    print(f"{what}: done")
    return EXIT_OK


def _keep(settings: Config, change: admin.Change) -> int:
    """Keep a change for the daemon that will run."""
    from ublkwatch import registering  # noqa: PLC0415 - as in _run()
    from ublkwatch.store import StoreError  # noqa: PLC0415 - as in _run()

    try:
        refusal = registering.offline(settings, change)
    except StoreError as error:
        return _say(EXIT_STATE, f"{change}: {error}")
    except (ConfigError, OSError) as error:
        refusal = str(error)
    if refusal:
        return _say(EXIT_REFUSED, f"{change}: refused: {refusal}; nothing was changed")
    print(f"{change}: done; ublkwatch is not running, and will know when it is")
    return EXIT_OK


def _registered(arguments: argparse.Namespace) -> int:
    from ublkwatch import registering  # noqa: PLC0415 - as in _run()
    from ublkwatch.store import read_registrations  # noqa: PLC0415 - as in _run()

    settings = config.load(arguments.config)
    try:
        registered = read_registrations(settings.state_dir)
    except PermissionError as error:
        return _say(EXIT_NO_PERMISSION, f"registered: {error.filename}: try sudo")
    print(registering.listing(registered, as_json=arguments.json))
    return EXIT_OK


def _explain(arguments: argparse.Namespace) -> int:
    from ublkwatch.store import StoreError, read_record  # noqa: PLC0415 - as in _run()

    settings, dev_id = config.load(arguments.config), arguments.dev_id
    running = _locked(settings.runtime_dir / "lock")
    try:
        record = read_record(settings.runtime_dir, dev_id)
    except PermissionError as error:
        return _say(EXIT_NO_PERMISSION, f"explain ublkb{dev_id}: {error.filename}: try sudo")
    except StoreError as error:
        return _say(EXIT_FAILED, f"explain ublkb{dev_id}: {error}")
    document: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # the record says what matters
        document = _document(settings)
    if record is None or not record.instance.startswith(f"{_boot_id()}/"):
        if not running:
            return _say(EXIT_NOT_RUNNING, f"ublkb{dev_id}: unknown, and ublkwatch is not running")
        hint = "`ublkwatch status` shows the devices that are"
        return _say(EXIT_REFUSED, f"ublkb{dev_id}: no such device is known; {hint}")
    record = _completed(record, document)
    times = foretell.Times(time.monotonic(), time.time(), _clock)
    policy = _policy(dev_id, document)
    written_at = document.get("written_at")
    print(explain.explain(record, policy, times, running=running, written_at=written_at))
    return EXIT_OK if running else EXIT_NOT_RUNNING


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _clock(wall: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall))


def _policy(dev_id: int, document: dict[str, Any]) -> Policy:
    """Return the device's policy as the daemon that wrote the document has it."""
    known = Generation.__members__.get(document.get("generation", ""), Generation.UNKNOWN)
    devices = document.get("devices", [])
    care = next((each.get("care") for each in devices if each["dev_id"] == dev_id), None)
    return replace(status.policy_from(care), generation=known)


def _completed(record: Record, document: dict[str, Any]) -> Record:
    """Add what is not saved with a record: the kernel's answer, and that our code failed."""
    for device in document.get("devices", []):
        if device["dev_id"] == record.dev_id:
            record = replace(record, info=status.info_from(device))
            if device["reason"] == Reason.INTERNAL_ERROR.name:
                record = replace(
                    record,
                    phase=Phase.FAILED,
                    reason=Reason.INTERNAL_ERROR,
                    detail=device.get("detail") or "",
                    wake=None,
                )
    return record


# --- run -----------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    # Late, like the edges that it composes: `ublkwatch status` must not pay for any of these.
    from ublkwatch.daemon import UnavailableError  # noqa: PLC0415
    from ublkwatch.store import Store, StoreError, lock_host  # noqa: PLC0415

    settings = config.load(arguments.config)
    if not _may_administer():
        return _say(EXIT_NO_PERMISSION, "no CAP_SYS_ADMIN, which ublk's commands need; run as root")
    try:
        store = Store(settings.runtime_dir, settings.state_dir)
    except StoreError as error:
        return _say(EXIT_STATE, str(error))
    try:
        lock_host()  # until we end
        asyncio.run(_daemon(settings, store, arguments))
    except StoreError as error:
        return _say(EXIT_STATE, str(error))
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


async def _daemon(settings: Config, store: Store, arguments: argparse.Namespace) -> None:
    from ublkwatch.daemon import Daemon  # noqa: PLC0415 - see _run()

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    # A file that was there, and is gone when it is read anew, does not mean: all is default.
    path = arguments.config or (config.DEFAULT_PATH if config.DEFAULT_PATH.exists() else None)
    daemon = Daemon(settings, store, partial(config.load, path))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, daemon.reload)
    await daemon.run(stop, verbose=arguments.verbose)
