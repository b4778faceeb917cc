"""One standby: a server that is started beforehand, says READY, and waits for its line.

A part of the shell. It has touched nothing, so it can be taken for an attempt, or ended, at any
moment. That there may be one is on disk before its process exists, and that it waits before anybody
relies on it: so our successor finds it, and its FIFO. Two servers for a device it never is: who is
not taken is never given a line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ublkwatch.care import Job, Standby
from ublkwatch.model import ServerId
from ublkwatch.wishes import Wish

# What cannot be looked at for so long cannot be executed either: then who waits is the better one.
_LOOK_S = 1.0
CHANGED = "its command, or what it is run with, has changed"


class Launcher(Protocol):
    """launch.Launcher, as far as standbys need it."""

    async def start(self, tag: str, job: Job) -> int: ...
    def join(self, tag: str, root: str) -> None: ...
    def root(self, tag: str) -> str: ...
    def last_words(self, tag: str) -> str: ...


class Servers(Protocol):
    """server.Servers, as far as standbys need it."""

    def identify(self, pid: int) -> ServerId | None: ...
    def watch(self, server: ServerId) -> None: ...


async def _unseen(_job: Job) -> str:
    return ""


def _nothing(*_what: object) -> None:
    pass


@dataclass(frozen=True)
class Terms:
    """What a host allows its standbys, and where they are kept."""

    most: Callable[[], int] = lambda: 64
    least_free: Callable[[], float] = lambda: 0.0  # percent of the memory
    free: Callable[[], float] = lambda: 100.0  # percent of it
    # Names the program of a job as it is now; "" where nobody can tell. OSError: not to be run.
    program: Callable[[Job], Awaitable[str]] = _unseen
    former: Sequence[Standby] = ()  # of our former life
    keep: Callable[[Standby], None] = _nothing  # OSError
    drop: Callable[[str], None] = _nothing  # OSError
    tell: Callable[[int, str, bool], None] = _nothing  # of a device; whether it is bad news


class Spare:
    """A standby, until it is taken or has ended."""

    def __init__(
        self,
        kept: Standby,
        terms: Terms,
        launcher: Launcher,
        servers: Servers,
        end: Callable[[str], Awaitable[None]],
    ) -> None:
        """``end`` ends the processes of a tag; who waits for it bounds that."""
        self.kept = kept
        self.why = ""  # why it is of no use any more, and ended; "" while it is
        self.failed = False  # by itself
        self._terms, self._launcher, self._servers, self._end = terms, launcher, servers, end
        self._news = asyncio.Event()  # it is READY, or of no use

    @property
    def state(self) -> str:
        """One of measures.STANDBYS."""
        if self.why:
            return "ending"
        return "waiting" if self.kept.ready else "starting"

    @property
    def pid(self) -> int | None:
        return self.kept.server.pid if self.kept.server else None

    def ready(self) -> None:
        """Take it that it said READY=1."""
        self._news.set()

    def condemn(self, why: str) -> None:
        """Take it that it is of no use any more; the first word counts."""
        self.why = self.why or why
        self._news.set()

    async def start(self, wish: Wish) -> None:
        """Start it, and wait until it is READY or condemned; OSError says why it did not start."""
        self._keep(self.kept)
        self._keep(replace(self.kept, program=await self._terms.program(wish.job)))
        pid = await self._launcher.start(self.kept.tag, replace(wish.job, spare=True))
        if (server := self._servers.identify(pid)) is None:
            words = self._launcher.last_words(self.kept.tag)
            raise OSError(f"it ended at once{f': {words}' if words else ''}")
        self._keep(replace(self.kept, server=server))
        self._servers.watch(server)
        try:
            async with asyncio.timeout(wish.ready_timeout_s):
                await self._news.wait()
        except TimeoutError:
            raise OSError("it did not say READY=1 in time") from None
        if not self.why:
            self._keep(replace(self.kept, ready=True))

    async def misfit(self, wish: Wish) -> str:
        """Say why it is not what would be started now; "" where it is. In bounded time."""
        if wish.fingerprint() != self.kept.job:
            return CHANGED
        try:
            async with asyncio.timeout(_LOOK_S):
                program = await self._terms.program(wish.job)
        except TimeoutError:
            return ""
        except OSError as error:
            return str(error)
        return "its program has changed" if program not in ("", self.kept.program) else ""

    def lives(self) -> bool:
        server = self.kept.server
        return server is not None and self._servers.identify(server.pid) == server

    def hand_over(self, tag: str) -> ServerId:
        """Let an attempt have it: home, FIFO and process; OSError where that cannot be."""
        server = self.kept.server
        assert server is not None
        self._launcher.join(tag, self.kept.tag)  # from now on our successor finds it by that
        return server

    async def end(self) -> None:
        """End its processes, and forget it; OSError. The caller bounds the wait."""
        await self._end(self.kept.tag)
        self._terms.drop(self.kept.tag)

    def _keep(self, kept: Standby) -> None:
        self._terms.keep(kept)
        self.kept = kept
