"""Orders to the daemon: hold, release, retry, recover, forget; register, unregister, reload."""

from __future__ import annotations

import argparse
from typing import Any

from ublkwatch import admin, config
from ublkwatch.config import Config
from ublkwatch.model import Order
from ublkwatch.settings import MATCHES, OPTIONS, SERVER, ConfigError
from ublkwatch.verbs import Exit, dev_id_of, say, seconds

_ORDERS = {
    Order.HOLD: "keep the hands off a device, until it is released or for a time",
    Order.RELEASE: "end a hold, and take up what waits",
    Order.RETRY: "try again to recover a device that was given up",
    Order.RECOVER: "recover a device now, whatever it waits for",
    Order.FORGET: "keep the hands off this life of a device for good",
}


def add(verbs: Any, shared: argparse.ArgumentParser, device: argparse.ArgumentParser) -> None:
    """Add these verbs to the command line."""
    _add_rules(verbs, shared)
    for order, text in _ORDERS.items():
        verb = verbs.add_parser(order.value, parents=[shared, device], help=text)
        verb.set_defaults(verb=_order, order=order, for_s=None)
        verb.add_argument("--reason", default="", metavar="TEXT", help="for the log and for others")
        if order is Order.HOLD:
            verb.add_argument(
                "--for", dest="for_s", type=seconds, metavar="TIME", help="90s, 30m, 2h or 1d"
            )


def _add_rules(verbs: Any, shared: argparse.ArgumentParser) -> None:
    usage = "%(prog)s (DEV | --exe PATH | --process NAME | --tag N) [OPTION]... -- ARGV..."
    asked = argparse.ArgumentParser(add_help=False)
    asked.add_argument("--reason", default="", metavar="TEXT", help="for the log and for others")
    add = verbs.add_parser(
        "register", parents=[shared, asked], help="say how to start a server", usage=usage
    )
    add.add_argument("dev_id", type=dev_id_of, nargs="?", metavar="DEV", help="N, ublkbN")
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


def _order(arguments: argparse.Namespace) -> int:
    order, dev_id = arguments.order, arguments.dev_id
    request = admin.Request(order, dev_id, arguments.for_s, arguments.reason)
    hint = f"`ublkwatch explain {dev_id}` says what can be done"
    return _hand_over(arguments, request, f"{order.value} ublkb{dev_id}", hint)


def _change(arguments: argparse.Namespace) -> int:
    from ublkwatch import registering  # noqa: PLC0415 - as in verbs.run

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
        return say(Exit.USAGE, f"--reason: at most {admin.REASON_MAX} characters")
    try:
        refusal = admin.ask(settings.runtime_dir, asked)
    except (FileNotFoundError, ConnectionRefusedError):
        if isinstance(asked, admin.Request) or asked.verb == "reload":
            again = "start it, then ask again"
            return say(Exit.NOT_RUNNING, f"{what}: ublkwatch is not running; {again}")
        return _keep(settings, asked)
    except PermissionError:
        return say(Exit.NO_PERMISSION, f"{what}: only root may give orders; try sudo")
    except TimeoutError:
        return say(Exit.FAILED, f"{what}: no answer from ublkwatch; its log may say why")
    except OSError as error:
        return say(Exit.FAILED, f"{what}: {settings.runtime_dir / admin.NAME}: {error}")
    if refusal:
        return say(Exit.REFUSED, f"{what}: refused: {refusal}; {hint}")
    print(f"{what}: done")
    return Exit.OK


def _keep(settings: Config, change: admin.Change) -> int:
    """Keep a change for the daemon that will run."""
    from ublkwatch import registering  # noqa: PLC0415 - as in verbs.run
    from ublkwatch.store import StoreError  # noqa: PLC0415 - as in verbs.run

    try:
        refusal = registering.offline(settings, change)
    except StoreError as error:
        return say(Exit.STATE, f"{change}: {error}")
    except (ConfigError, OSError) as error:
        refusal = str(error)
    if refusal:
        return say(Exit.REFUSED, f"{change}: refused: {refusal}; nothing was changed")
    print(f"{change}: done; ublkwatch is not running, and will know when it is")
    return Exit.OK


def _registered(arguments: argparse.Namespace) -> int:
    from ublkwatch import registering  # noqa: PLC0415 - as in verbs.run
    from ublkwatch.store import read_registrations  # noqa: PLC0415 - as in verbs.run

    settings = config.load(arguments.config)
    try:
        registered = read_registrations(settings.state_dir)
    except PermissionError as error:
        return say(Exit.NO_PERMISSION, f"registered: {error.filename}: try sudo")
    print(registering.listing(registered, as_json=arguments.json))
    return Exit.OK
