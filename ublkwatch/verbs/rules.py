"""The verbs about rules: register, unregister, registered, reload."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from ublkwatch import config
from ublkwatch.config import Config
from ublkwatch.settings import MATCHES, OPTIONS, SERVER, ConfigError
from ublkwatch.verbs import Exit, asking, dev_id_of, say
from ublkwatch.wire import Change

_UNCHANGED = "nothing was changed"
_PAIRS = {
    "env": ("env", "a variable of its environment"),
    "limit": ("limit", "a resource limit, e.g. memlock=infinity"),
    "policy": ("policy", "a key of [recovery], for these devices"),
    "set": ("more", "any other key of a [[device]] or [[server]]"),
}


def add(verbs: Any, shared: argparse.ArgumentParser) -> None:
    """Add these verbs to the command line."""
    usage = "%(prog)s (DEV | --exe PATH | --process NAME | --tag N) [OPTION]... -- ARGV..."
    new = verbs.add_parser(
        "register", parents=[shared], help="say how to start a server", usage=usage
    )
    new.add_argument("dev_id", type=dev_id_of, nargs="?", metavar="DEV", help="N, ublkbN")
    new.add_argument("--name", help="of the registration; of a device's by default ublkbN")
    for key in (*MATCHES, *OPTIONS):
        new.add_argument(f"--{key}", help=SERVER[key].help)
    new.add_argument(
        "--accept-delete-on-failure",
        action="store_true",
        help=SERVER["accept_delete_on_failure"].help,
    )
    for option, (target, text) in _PAIRS.items():
        new.add_argument(
            f"--{option}",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            dest=target,
            help=text,
        )
    asking.add_options(new)
    new.set_defaults(verb=_change, change="register")
    drop = verbs.add_parser("unregister", parents=[shared], help="undo a `register`")
    drop.add_argument("name", metavar="NAME", help="as `ublkwatch registered` shows it")
    asking.add_options(drop)
    drop.set_defaults(verb=_change, change="unregister")
    again = verbs.add_parser(
        "reload", parents=[shared], help="have the configuration read anew, and say what is other"
    )
    asking.add_options(again)
    again.set_defaults(verb=_change, change="reload", name="")
    show = verbs.add_parser("registered", parents=[shared], help="show what is registered")
    show.add_argument("--json", action="store_true", help="the tables, for programs")
    show.set_defaults(verb=_registered)


def _change(arguments: argparse.Namespace) -> int:
    verb = arguments.change
    if verb == "register":
        from ublkwatch import registering  # noqa: PLC0415 - as in verbs.run

        change = registering.change_of(arguments)
    else:
        change = Change(verb, arguments.name, reason=arguments.reason, dry_run=arguments.dry_run)
    offline = None if verb == "reload" else partial(_keep, change)
    return asking.hand_over(arguments, change, str(change), hint=_UNCHANGED, offline=offline)


def _keep(change: Change, settings: Config) -> int:
    """Keep a change for the daemon that will run."""
    from ublkwatch import registering  # noqa: PLC0415 - as in verbs.run
    from ublkwatch.store import StoreError  # noqa: PLC0415 - as in verbs.run

    try:
        answer = registering.offline(settings, change)
    except StoreError as error:
        if isinstance(error.__cause__, PermissionError):
            only = "ublkwatch is not running, and only root may say what it is to know"
            return say(Exit.NO_PERMISSION, f"{change}: {only}; try sudo")
        return say(Exit.STATE, f"{change}: {error}")
    except (ConfigError, OSError) as error:
        return asking.refuse(str(change), str(error), _UNCHANGED)
    if answer.why:
        return asking.refuse(str(change), answer.why, _UNCHANGED)
    later = "; ublkwatch is not running, and will know when it is"
    return asking.done(
        str(change), answer, dry_run=change.dry_run, later="" if change.dry_run else later
    )


def _registered(arguments: argparse.Namespace) -> int:
    from ublkwatch import registering  # noqa: PLC0415 - as in verbs.run
    from ublkwatch.store import read_registrations  # noqa: PLC0415 - as in verbs.run

    settings = config.load(arguments.config)
    try:
        registered = read_registrations(settings.state_dir)
    except PermissionError as error:
        only = f"{error.filename}: only root may look"
        return say(Exit.NO_PERMISSION, f"registered: {only}; try sudo")
    print(registering.listing(registered, as_json=arguments.json))
    return Exit.OK
