"""The daemon's side of the operator's socket: who may ask, and how much. `wire` has the words.

`admin.sock` in the runtime directory, for root, and for the members of one group where the
configuration names one: these give orders about devices, but do not say what root runs. What is
none of the requests that are known ends the conversation.

Clients are bounded in number, and each in time and in what it may write; nothing that one of them
does reaches another, or the loop.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import grp
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from ublkwatch.settings import ConfigError
from ublkwatch.wire import MESSAGE_MAX, NAME, Answer, Change, Deed, RequestError, Wish, parse

_CLIENTS_MAX = 16
_GUESTS_MAX = 8  # of these, who are not root: they cannot keep root out
_CLIENT_S = 10.0
_TAKE_S = 5.0
_DEED_S = 90.0  # for those that look at all processes, or wait for the kernel
_SO_PEERGROUPS = 59  # include/uapi/asm-generic/socket.h
_GROUPS_BYTES = 1024  # the most that Python asks for: 256 groups
_log = logging.getLogger("ublkwatch")


@dataclass(frozen=True, slots=True)
class Peer:
    """Who asks, as the kernel says."""

    uid: int
    pid: int  # 0: of a pid namespace that we do not see
    exe: str  # "" where it may not be read, or is gone
    groups: frozenset[int] = frozenset()

    def __str__(self) -> str:
        """Name it, for people: "uid 0 (root), pid 123"."""
        return f"uid {self.uid}{' (root)' if self.uid == 0 else ''}, pid {self.pid}"

    def saying(self, reason: str) -> str:
        """Return who asks, and why if that was said."""
        return f"{self}: {reason}" if reason else str(self)


Take = Callable[[Wish, Peer], Awaitable[Answer]]


class Admin:
    """Listens, and hands each request to ``take``, whose answer goes back."""

    def __init__(
        self,
        runtime_dir: Path,
        take: Take,
        *,
        group: int | None = None,
        client_s: float = _CLIENT_S,
        take_s: float = _TAKE_S,
    ) -> None:
        """``client_s`` is for all that one client has to say, ``take_s`` for one request.

        ``group`` may ask, too, beside root.
        """
        self._client_s, self._take_s = client_s, take_s
        self._path = runtime_dir / NAME
        self._take = take
        self._group = group
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._guests = 0
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
            if self._group is not None:
                os.chown(self._path, -1, self._group)
                self._path.chmod(0o660)
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
        peer = _peer(writer)
        guest = peer.uid not in self._allowed
        self._guests += guest
        try:
            async with asyncio.timeout(self._client_s) as limit:
                if len(self._clients) > _CLIENTS_MAX or (guest and self._guests > _GUESTS_MAX):
                    await _answer(writer, Answer("too many clients at once; try again"))
                elif guest and self._group not in peer.groups:
                    whom = "root" if self._group is None else "root, or a member of admin_group,"
                    await _answer(writer, Answer(f"only {whom} may ask for anything"))
                else:
                    await self._converse(reader, writer, peer, limit)
        except OSError:  # gone, or silent for too long (TimeoutError)
            pass
        except Exception:  # noqa: BLE001 - a bug harms this client only
            _log.exception("a bug in ublkwatch, over a client of %s", self._path)
        finally:
            self._guests -= guest
            if writer.transport.get_write_buffer_size():  # it does not read: no use in waiting
                writer.transport.abort()
            else:
                writer.close()

    async def _converse(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        peer: Peer,
        limit: asyncio.Timeout,
    ) -> None:
        while True:
            try:
                line = await reader.readuntil(b"\n")
            except asyncio.LimitOverrunError:
                await _answer(writer, Answer(f"longer than {MESSAGE_MAX} bytes"))
                return
            except asyncio.IncompleteReadError as end:
                if end.partial:
                    await _answer(writer, Answer("a line that does not end"))
                return
            try:
                wish = parse(line)
            except RequestError as error:
                await _answer(writer, Answer(str(error)))
                return
            await _answer(writer, await self._judged(wish, peer, limit))
            await asyncio.sleep(0)  # however much it has written ahead, others have their turn

    async def _judged(self, wish: Wish, peer: Peer, limit: asyncio.Timeout) -> Answer:
        """Have it taken within its time, in which the client's own does not run."""
        if isinstance(wish, Change) and wish.table and peer.uid not in self._allowed:
            return Answer("only root may say what root runs")
        loop = asyncio.get_running_loop()
        began, until = loop.time(), limit.when()
        assert until is not None
        limit.reschedule(None)
        try:
            take_s = _DEED_S if isinstance(wish, Deed) else self._take_s
            async with asyncio.timeout(take_s):
                return await self._take(wish, peer)
        except TimeoutError:
            return Answer("not taken in time, and it may be taken yet: the log says why")
        finally:
            limit.reschedule(until + loop.time() - began)


async def _answer(writer: asyncio.StreamWriter, answer: Answer) -> None:
    writer.write(answer.line())
    await writer.drain()


def _peer(writer: asyncio.StreamWriter) -> Peer:
    credentials = struct.Struct("iII")  # struct ucred: pid, uid, gid
    connection = writer.get_extra_info("socket")
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    pid, uid, gid = credentials.unpack(raw)
    groups = array.array("I", [gid])
    with contextlib.suppress(OSError):  # in more than can be asked for: only the first one counts
        groups.frombytes(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES))
    exe = ""
    with contextlib.suppress(OSError):
        exe = Path(f"/proc/{pid}/exe").readlink().name
    return Peer(uid, pid, exe, frozenset(groups))


def group(name: str) -> int | None:
    """Return the number of the group that may give orders; ConfigError where there is none."""
    try:
        return grp.getgrnam(name).gr_gid if name else None
    except KeyError:
        raise ConfigError(
            f"admin_group: there is no group {name!r} on this machine; create it, or leave it out"
        ) from None
