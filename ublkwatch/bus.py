"""The system bus: one connection, made when it is needed, and again when it went away.

The only home of jeepney, which knows D-Bus's format and leaves the waiting to us: its own asyncio
side passes no file descriptors, and a server's standard input is one.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jeepney import (
    DBusAddress,
    HeaderFields,
    MatchRule,
    Message,
    MessageType,
    message_bus,
    new_method_call,
)
from jeepney.auth import BEGIN, AuthenticationError, Authenticator
from jeepney.bus import find_system_bus
from jeepney.low_level import Parser

_PROPERTIES = "org.freedesktop.DBus.Properties"


class BusError(OSError):
    """The bus, or who was asked over it, refused: ``name`` is D-Bus's name of the error."""

    def __init__(self, name: str, message: str) -> None:
        """``message`` is for people."""
        super().__init__(f"{message} ({name.rpartition('.')[2]})")
        self.name = name


@dataclass(frozen=True)
class Patience:
    """How long the bus, and systemd behind it, is waited for; in seconds."""

    connect_s: float = 2.0
    answer_s: float = 10.0
    start_s: float = 30.0  # for exec: the program's file system may be slow
    leftover_s: float = 0.5  # for a unit whose processes have ended to be gone
    autopsy_s: float = 2.0


USUAL = Patience()


class Bus:
    """A connection to the system bus."""

    def __init__(self, signalled: Callable[[Message], None], patience: Patience = USUAL) -> None:
        """``signalled`` is told of each signal that was subscribed to."""
        self._patience = patience
        self._signalled = signalled
        self._socket: socket.socket | None = None
        self._connecting = asyncio.Lock()
        self._parser = Parser()
        self._serial = 0
        self._waiting: dict[int, asyncio.Future[Message]] = {}

    async def connect(self, prepare: list[tuple[DBusAddress, str]], rule: MatchRule) -> None:
        """Connect, if that is not done; then call ``prepare``, and subscribe to a signal.

        OSError within two seconds, if the bus does not answer.
        """
        async with self._connecting:
            if self._socket is not None:
                return
            try:
                async with asyncio.timeout(self._patience.connect_s):
                    await self._connect()
                    await self._call(message_bus.Hello())
                    await self._call(message_bus.AddMatch(rule))
                    for address, method in prepare:
                        await self._call(new_method_call(address, method))
            except (TimeoutError, AuthenticationError) as error:
                self.close()
                raise OSError(f"system bus: {str(error) or 'no answer'}") from error
            except OSError:
                self.close()
                raise

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket, self._parser = connection, Parser()
        await loop.sock_connect(connection, find_system_bus())
        sasl = Authenticator(enable_fds=True)
        for line in sasl:
            if line:
                await loop.sock_sendall(connection, line)
            if not sasl.authenticated:
                data = await loop.sock_recv(connection, 1024)
                if not data:
                    raise ConnectionResetError("system bus: it hung up")
                sasl.feed(data)
        await loop.sock_sendall(connection, BEGIN)
        loop.add_reader(connection, self._readable, connection)

    async def call(
        self, address: DBusAddress, method: str, signature: str = "", body: tuple[Any, ...] = ()
    ) -> tuple[Any, ...]:
        """Call a method and return its answer; BusError, or another OSError, in time."""
        try:
            async with asyncio.timeout(self._patience.answer_s):
                return await self._call(new_method_call(address, method, signature or None, body))
        except TimeoutError:
            raise OSError(
                f"systemd did not answer {method} within {self._patience.answer_s:g} s"
            ) from None

    async def properties(self, address: DBusAddress, interface: str) -> dict[str, Any]:
        """Return the properties of an object's interface, by name."""
        asked = DBusAddress(address.object_path, address.bus_name, _PROPERTIES)
        (answer,) = await self.call(asked, "GetAll", "s", (interface,))
        return {name: value for name, (_, value) in answer.items()}

    async def _call(self, message: Message) -> tuple[Any, ...]:
        self._serial += 1
        serial = self._serial
        answer = asyncio.get_running_loop().create_future()
        self._waiting[serial] = answer
        try:
            await self._send(message, serial)
            reply: Message = await answer
        finally:
            self._waiting.pop(serial, None)
        if reply.header.message_type is MessageType.error:
            name = str(reply.header.fields.get(HeaderFields.error_name, "error"))
            raise BusError(name, str(reply.body[0]) if reply.body else "refused")
        return tuple(reply.body)

    async def _send(self, message: Message, serial: int) -> None:
        """Send a message whole: nobody else may write amid it, and it must not be broken off."""
        descriptors = array.array("i")
        data = message.serialise(serial=serial, fds=descriptors)
        if self._socket is None:
            raise ConnectionResetError("system bus: not connected")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)] if descriptors else []
        try:
            sent = self._socket.sendmsg([data], rights)
        except OSError:  # BlockingIOError, too: the bus has not read for long
            self.close()
            raise
        if sent < len(data):
            self.close()
            raise ConnectionResetError("system bus: it does not read what it is told")

    def _readable(self, connection: socket.socket) -> None:
        try:
            data, ancillary, _, _ = connection.recvmsg(
                1 << 16, socket.CMSG_SPACE(16 * array.array("i").itemsize)
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, ancillary = b"", []
        for _, _, rights in ancillary:  # nobody was asked for any
            for descriptor in array.array("i", rights[: len(rights) // 4 * 4]):
                os.close(descriptor)
        if not data:
            self.close()
            return
        self._parser.add_data(data)
        while (message := self._parser.get_next_message()) is not None:
            serial = message.header.fields.get(HeaderFields.reply_serial, -1)
            waiting = self._waiting.get(serial)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
            elif message.header.message_type is MessageType.signal:
                self._signalled(message)

    def close(self) -> None:
        """Hang up; whoever waits for an answer gets an OSError."""
        if self._socket is None:
            return
        with contextlib.suppress(OSError, ValueError):
            asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        self._socket = None
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ConnectionResetError("system bus: the connection was lost"))
