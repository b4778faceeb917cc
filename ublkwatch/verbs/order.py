"""Orders about a device to the daemon: hold, release, retry, recover, forget."""

from __future__ import annotations

import argparse
from typing import Any

from ublkwatch.model import Order
from ublkwatch.verbs import asking, seconds
from ublkwatch.wire import Request

_ORDERS = {
    Order.HOLD: "keep the hands off a device, until it is released or for a time",
    Order.RELEASE: "end a hold, and take up what waits",
    Order.RETRY: "try again to recover a device that was given up",
    Order.RECOVER: "recover a device now, whatever it waits for",
    Order.FORGET: "keep the hands off this life of a device for good",
}
_MAY_HARM = (Order.RECOVER, Order.FORGET)


def add(verbs: Any, shared: argparse.ArgumentParser, device: argparse.ArgumentParser) -> None:
    """Add these verbs to the command line."""
    for order, text in _ORDERS.items():
        verb = verbs.add_parser(order.value, parents=[shared, device], help=text)
        asking.add_options(verb, asks=order in _MAY_HARM)
        verb.set_defaults(verb=_order, order=order, for_s=None)
        if order is Order.HOLD:
            verb.add_argument(
                "--for", dest="for_s", type=seconds, metavar="TIME", help="90s, 30m, 2h or 1d"
            )


def _order(arguments: argparse.Namespace) -> int:
    order, dev_id = arguments.order, arguments.dev_id
    wish = Request(order, dev_id, arguments.for_s, arguments.reason, arguments.dry_run)
    hint = f"`ublkwatch explain {dev_id}` says what can be done"
    return asking.hand_over(arguments, wish, f"{order.value} ublkb{dev_id}", hint=hint)
