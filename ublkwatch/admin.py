"""The operator's socket: root's orders to a running ublkwatch, one line of JSON each.

`admin.sock` in the runtime directory, for root alone. A client writes a line such as
``{"version": 1, "order": "hold", "dev_id": 3, "for_s": 600, "reason": "new disk"}`` and reads
``{"version": 1, "ok": true}``, or ``false`` with a ``why``; then it may ask for more. ``for_s`` is
for "hold" only, and may be left out, as ``reason`` may. Three more speak of no device: "register"
with a ``name`` and a ``table``, "unregister" with a ``name``, and "reload". What is none of these
ends the conversation.

Clients are bounded in number, and each in time and in what it may write; nothing that one of them
does reaches another, or the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ublkwatch.model import Order

NAME = "admin.sock"
VERSION = 1
HOLD_MAX_S = 30 * 86400.0
MESSAGE_MAX = 64 << 10  # bytes of one line
REASON_MAX = 500  # characters

_CLIENTS_MAX = 16
_CLIENT_S = 10.0
_TAKE_S = 5.0
_PATIENCE_S = 15.0  # of our own client: longer than whatever the server takes
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
_KEYS = {"version", "order", "dev_id", "for_s", "reason"}
_log = logging.getLogger("ublkwatch")


class RequestError(Exception):
    """A line that is no order; says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Request:
    """What an operator asks for."""

    order: Order
    dev_id: int
    for_s: float | None = None  # of HOLD; None: until RELEASE
    reason: str = ""

    def line(self) -> bytes:
        """Return it as it goes over the socket."""
        content: dict[str, object] = {"version": VERSION}
        content |= {"order": self.order.value, "dev_id": self.dev_id}
        if self.for_s is not None:
            content["for_s"] = self.for_s
        if self.reason:
            content["reason"] = self.reason
        return json.dumps(content).encode() + b"\n"

    def __str__(self) -> str:
        """Say it for the log."""
        for_s = "" if self.for_s is None else f" for {self.for_s:g} s"
        return f"ublk {self.dev_id}: {self.order.value}{for_s}"


@dataclass(frozen=True, slots=True)
class Change:
    """What an operator wants changed of the rules by which devices are kept."""

    verb: str  # one of VERBS
    name: str = ""  # of a registration
    table: Mapping[str, Any] = field(default_factory=dict)  # what is registered
    reason: str = ""

    def line(self) -> bytes:
        """Return it as it goes over the socket."""
        content: dict[str, object] = {"version": VERSION, "order": self.verb}
        parts = {"name": self.name, "table": dict(self.table), "reason": self.reason}
        return json.dumps(content | {k: v for k, v in parts.items() if v}).encode() + b"\n"

    def __str__(self) -> str:
        """Say it for the log."""
        return f"{self.verb} {self.name}".strip()

    @property
    def dev_id(self) -> int | None:
        """Return the device that is registered; None: whatever the table describes."""
        dev_id = self.table.get("dev_id")
        return dev_id if type(dev_id) is int else None


VERBS = {"register": {"name", "table"}, "unregister": {"name"}, "reload": set[str]()}


@dataclass(frozen=True, slots=True)
class Peer:
    """Who asks, as the kernel says."""

    uid: int
    pid: int  # 0: of a pid namespace that we do not see
    exe: str  # "" where it may not be read, or is gone

    def __str__(self) -> str:
        """Name it, for people: "uid 0 (root), pid 123"."""
        return f"uid {self.uid}{' (root)' if self.uid == 0 else ''}, pid {self.pid}"

    def saying(self, reason: str) -> str:
        """Return who asks, and why if that was said."""
        return f"{self}: {reason}" if reason else str(self)


Take = Callable[[Request | Change, Peer], Awaitable[str]]


def parse(line: bytes) -> Request | Change:
    """Understand a line; RequestError when it is no order that this version knows."""
    try:
        content = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise RequestError("not a line of JSON") from error
    if not isinstance(content, dict):
        raise RequestError("not a JSON object")
    if content.get("version") != VERSION:
        raise RequestError(f"version {_shown(content.get('version'))}, where {VERSION} is spoken")
    orders = {order.value: order for order in Order}
    verb = content.get("order")
    if not isinstance(verb, str) or verb not in orders | VERBS:
        raise RequestError(f"order: {_shown(verb)} is none of {', '.join([*orders, *VERBS])}")
    keys = VERBS[verb] | {"version", "order", "reason"} if verb in VERBS else _KEYS
    for unknown in content.keys() - keys:
        raise RequestError(f"{_shown(unknown)}: unknown key; known are {', '.join(sorted(keys))}")
    if verb in VERBS:
        return _change(verb, content)
    dev_id = content.get("dev_id")
    if type(dev_id) is not int or not 0 <= dev_id < 1 << 20:
        raise RequestError(f"dev_id: {_shown(dev_id)} is no number of a device")
    return Request(orders[verb], dev_id, _duration(content, orders[verb]), _reason(content))


def _change(verb: str, content: dict[str, Any]) -> Change:
    name, table = content.get("name", ""), content.get("table", {})
    # It is the name of a file, too.
    if "name" in VERBS[verb] and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise RequestError(f"name: {_shown(name)}: 1 to 64 letters, digits and _.-, no . first")
    if not isinstance(table, dict):
        raise RequestError("table: must be an object")
    return Change(verb, name, table, _reason(content))


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


# --- the daemon's side ---------------------------------------------------------------------------


class Admin:
    """Listens, and hands each order to ``take``, whose answer is why it is refused, or ""."""

    def __init__(
        self,
        runtime_dir: Path,
        take: Take,
        *,
        client_s: float = _CLIENT_S,
        take_s: float = _TAKE_S,
    ) -> None:
        """``client_s`` is for all that one client has to say, ``take_s`` for one order."""
        self._client_s, self._take_s = client_s, take_s
        self._path = runtime_dir / NAME
        self._take = take
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._allowed = {0, os.geteuid()}  # whatever the file's mode becomes

    async def start(self) -> None:
        """Listen, in the place of whatever a former life left there; OSError when impossible.

        Who holds the store's lock is alone here, so nobody listens any more on what is replaced.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(listener.fileno(), 0o600)  # before it has a name: never open to others
            self._path.unlink(missing_ok=True)
            listener.bind(str(self._path))
            self._server = await asyncio.start_unix_server(
                self._accept, sock=listener, limit=MESSAGE_MAX
            )
        except OSError:
            listener.close()
            raise

    def close(self) -> None:
        """Stop listening, and let go of every client."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._path.unlink(missing_ok=True)
        for task in self._clients:
            task.cancel()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._client_s):
                if len(self._clients) > _CLIENTS_MAX:
                    await _answer(writer, "too many clients at once; try again")
                else:
                    await self._converse(reader, writer)
        except OSError:  # gone, or silent for too long (TimeoutError)
            pass
        except Exception:  # noqa: BLE001 - a bug harms this client only
            _log.exception("a bug in ublkwatch, over a client of %s", self._path)
        finally:
            if writer.transport.get_write_buffer_size():  # it does not read: no use in waiting
                writer.transport.abort()
            else:
                writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = _peer(writer)
        if peer.uid not in self._allowed:
            await _answer(writer, "only root may ask for anything")
            return
        while True:
            try:
                line = await reader.readuntil(b"\n")
            except asyncio.LimitOverrunError:
                await _answer(writer, f"longer than {MESSAGE_MAX} bytes")
                return
            except asyncio.IncompleteReadError as end:
                if end.partial:
                    await _answer(writer, "a line that does not end")
                return
            try:
                request = parse(line)
            except RequestError as error:
                await _answer(writer, str(error))
                return
            try:
                async with asyncio.timeout(self._take_s):
                    why = await self._take(request, peer)
            except TimeoutError:
                why = "not taken in time, and it may be taken yet: the log says why"
            await _answer(writer, why)
            await asyncio.sleep(0)  # however much it has written ahead, others have their turn


async def _answer(writer: asyncio.StreamWriter, why: str) -> None:
    content = (
        {"version": VERSION, "ok": False, "why": why} if why else {"version": VERSION, "ok": True}
    )
    writer.write(json.dumps(content).encode() + b"\n")
    await writer.drain()


def _peer(writer: asyncio.StreamWriter) -> Peer:
    credentials = struct.Struct("iII")  # struct ucred: pid, uid, gid
    raw = writer.get_extra_info("socket").getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size
    )
    pid, uid, _ = credentials.unpack(raw)
    exe = ""
    with contextlib.suppress(OSError):
        exe = Path(f"/proc/{pid}/exe").readlink().name
    return Peer(uid, pid, exe)


# --- the command line's side ---------------------------------------------------------------------


def ask(runtime_dir: Path, request: Request | Change) -> str:
    """Hand an order to the ublkwatch that runs; return why it was refused, or "" when taken.

    FileNotFoundError and ConnectionRefusedError: none runs. PermissionError: it is not for us.
    TimeoutError: no answer came. ConnectionError: none that could be understood.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PATIENCE_S)
        connection.connect(str(runtime_dir / NAME))
        connection.sendall(request.line())
        with connection.makefile("rb") as answers:
            line = answers.readline(MESSAGE_MAX)
    try:
        answer = json.loads(line)
        return "" if answer["ok"] is True else str(answer["why"])
    except (ValueError, TypeError, KeyError) as error:
        raise ConnectionError(f"the answer was {line[:100]!a}") from error
