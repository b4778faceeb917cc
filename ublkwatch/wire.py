"""What goes over the operator's socket: one line of JSON each way, versioned and bounded. Pure.

A client writes a line such as
``{"version": 1, "order": "hold", "dev_id": 3, "for_s": 600, "reason": "new disk"}`` and reads
``{"version": 1, "ok": true}``, or ``false`` with a ``why``; then it may ask for more. Whatever
acts takes ``"dry_run": true``: it is judged, and told in ``said`` what would be done; ``harm`` is
what of it cannot be taken back. Within one version, keys are only added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ublkwatch.model import Order

NAME = "admin.sock"
VERSION = 1
HOLD_MAX_S = 30 * 86400.0
MESSAGE_MAX = 64 << 10  # bytes of one line
REASON_MAX = 500  # characters

# Lines of an answer, and characters of each and of its other texts: JSON spends up to 12 bytes on
# one of them, so whatever is said stays below MESSAGE_MAX only if an answer is halved now and then.
_SAID_MAX, _LINE_MAX, _TEXT_MAX = 100, 300, 1000
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")


class RequestError(Exception):
    """A line that is no request; says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Request:
    """What an operator asks the machine for, over one device."""

    order: Order
    dev_id: int
    for_s: float | None = None  # of HOLD; None: until RELEASE
    reason: str = ""
    dry_run: bool = False

    def line(self) -> bytes:
        """Return it as it goes over the socket."""
        return _line(self.order.value, self, "dev_id", "for_s", "reason", "dry_run")

    def __str__(self) -> str:
        """Say it for the log."""
        for_s = "" if self.for_s is None else f" for {self.for_s:g} s"
        return f"ublk {self.dev_id}: {self.order.value}{for_s}"


@dataclass(frozen=True, slots=True)
class Deed:
    """What is done to one device, beside the machine: it is stopped, or its server is killed."""

    verb: str  # one of DEEDS
    dev_id: int
    force: bool = False  # although it is in use
    reason: str = ""
    dry_run: bool = False

    def line(self) -> bytes:
        """Return it as it goes over the socket."""
        return _line(self.verb, self, "dev_id", "force", "reason", "dry_run")

    def __str__(self) -> str:
        """Say it for the log."""
        return f"ublk {self.dev_id}: {self.verb}{' although in use' if self.force else ''}"


@dataclass(frozen=True, slots=True)
class Change:
    """What an operator wants changed of the rules by which devices are kept."""

    verb: str  # one of CHANGES
    name: str = ""  # of a registration
    table: Mapping[str, Any] = field(default_factory=dict)  # what is registered
    reason: str = ""
    dry_run: bool = False

    def line(self) -> bytes:
        """Return it as it goes over the socket."""
        return _line(self.verb, self, "name", "table", "reason", "dry_run")

    def __str__(self) -> str:
        """Say it for the log."""
        return f"{self.verb} {self.name}".strip()

    @property
    def dev_id(self) -> int | None:
        """Return the device that is registered; None: whatever the table describes."""
        dev_id = self.table.get("dev_id")
        return dev_id if type(dev_id) is int else None


@dataclass(frozen=True, slots=True)
class Question:
    """What changes nothing, and is not remembered; all else that can be read is in files."""

    verb: str = "version"

    def line(self) -> bytes:
        """Return it as it goes over the socket."""
        return _line(self.verb, self)


Wish = Request | Deed | Change | Question

DEEDS = ("stop", "drill")
CHANGES = {"register": {"name", "table"}, "unregister": {"name"}, "reload": set[str]()}
_ORDERS = {order.value: order for order in Order}
_KEYS = (
    {verb: {"dev_id", "for_s", "reason", "dry_run"} for verb in _ORDERS}
    | {verb: {"dev_id", "force", "reason", "dry_run"} for verb in DEEDS}
    | {verb: keys | {"reason", "dry_run"} for verb, keys in CHANGES.items()}
    | {"version": set[str]()}
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request."""

    why: str = ""  # it is refused; "" when it was taken
    said: tuple[str, ...] = ()  # what was done, or would be
    harm: str = ""  # of a dry run: what cannot be taken back

    def line(self) -> bytes:
        """Return it as it goes over the socket, shorter than MESSAGE_MAX."""
        content: dict[str, object] = {"version": VERSION, "ok": not self.why}
        if self.why:
            content["why"] = self.why[:_TEXT_MAX]
        if self.harm:
            content["harm"] = self.harm[:_TEXT_MAX]
        kept = min(len(self.said), _SAID_MAX)
        while True:
            if self.said:
                more = len(self.said) - kept
                rest = [f"... and {more} more"] if more else []
                content["said"] = [each[:_LINE_MAX] for each in self.said[:kept]] + rest
            line = json.dumps(content).encode() + b"\n"
            if len(line) < MESSAGE_MAX:
                return line
            kept //= 2


def understood(line: bytes) -> Answer:
    """Understand an answer; ConnectionError when it is none."""
    try:
        content = json.loads(line)
        why = "" if content["ok"] is True else str(content["why"])
        said = [str(each) for each in content.get("said", [])]
        return Answer(why, tuple(said), str(content.get("harm", "")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConnectionError(f"the answer was {line[:100]!a}") from error


def parse(line: bytes) -> Wish:
    """Understand a request; RequestError when it is none that this version knows."""
    try:
        content = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise RequestError("not a line of JSON") from error
    if not isinstance(content, dict):
        raise RequestError("not a JSON object")
    if content.get("version") != VERSION:
        raise RequestError(f"version {_shown(content.get('version'))}, where {VERSION} is spoken")
    verb = content.get("order")
    if not isinstance(verb, str) or verb not in _KEYS:
        raise RequestError(f"order: {_shown(verb)} is none of {', '.join(_KEYS)}")
    keys = _KEYS[verb] | {"version", "order"}
    for unknown in content.keys() - keys:
        raise RequestError(f"{_shown(unknown)}: unknown key; known are {', '.join(sorted(keys))}")
    if verb in _ORDERS:
        order, dev_id = _ORDERS[verb], _dev_id(content)
        return Request(
            order, dev_id, _duration(content, order), _reason(content), _truth(content, "dry_run")
        )
    if verb in DEEDS:
        dev_id, force = _dev_id(content), _truth(content, "force")
        return Deed(verb, dev_id, force, _reason(content), _truth(content, "dry_run"))
    return _change(verb, content) if verb in CHANGES else Question(verb)


def _line(verb: str, wish: Wish, *keys: str) -> bytes:
    """Write what is said of a wish; what is not said is left out."""
    content: dict[str, object] = {"version": VERSION, "order": verb}
    for key in keys:
        value = getattr(wish, key)
        if key == "dev_id" or (value is not None and value not in ("", False, {})):
            content[key] = dict(value) if isinstance(value, Mapping) else value
    return json.dumps(content).encode() + b"\n"


def _change(verb: str, content: dict[str, Any]) -> Change:
    name, table = content.get("name", ""), content.get("table", {})
    # It is the name of a file, too.
    if "name" in CHANGES[verb] and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise RequestError(f"name: {_shown(name)}: 1 to 64 letters, digits and _.-, no . first")
    if not isinstance(table, dict):
        raise RequestError("table: must be an object")
    return Change(verb, name, table, _reason(content), _truth(content, "dry_run"))


def _dev_id(content: dict[str, Any]) -> int:
    dev_id = content.get("dev_id")
    if type(dev_id) is not int or not 0 <= dev_id < 1 << 20:
        raise RequestError(f"dev_id: {_shown(dev_id)} is no number of a device")
    return dev_id


def _truth(content: dict[str, Any], key: str) -> bool:
    value = content.get(key, False)
    if type(value) is not bool:
        raise RequestError(f"{key}: {_shown(value)} is neither true nor false")
    return value


def _reason(content: dict[str, Any]) -> str:
    reason = content.get("reason", "")
    if not isinstance(reason, str) or len(reason) > REASON_MAX:
        raise RequestError(f"reason: must be a text of at most {REASON_MAX} characters")
    # It goes to logs and terminals: what could pass for anything else there is taken out.
    return "".join(each if each.isprintable() else " " for each in reason).strip()


def _duration(content: dict[str, Any], order: Order) -> float | None:
    for_s = content.get("for_s")
    if for_s is None:
        return None
    if order is not Order.HOLD:
        raise RequestError("for_s: only a hold has an end")
    if type(for_s) not in (int, float) or not 0 < for_s <= HOLD_MAX_S:
        raise RequestError(
            f"for_s: {_shown(for_s)} is no number of seconds above 0 and up to {HOLD_MAX_S:.0f}"
        )
    return float(for_s)


def _shown(value: object) -> str:
    """Quote what a client wrote, briefly; ASCII, so that it passes everywhere."""
    text = f"a {type(value).__name__}" if isinstance(value, list | dict) else ascii(value)
    return text if len(text) <= 40 else text[:40] + "..."
