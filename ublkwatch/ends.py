"""Finding, ending and judging the processes of attempts.

A part of the hands (perform.py). A process that serves other devices well is not ended for one
device's sake.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Protocol

from ublkwatch.care import Care, filled
from ublkwatch.events import AttemptOver, AttemptShared, Kill, ServerExited, ServerFound
from ublkwatch.model import Generation, Phase, Policy, Record, ServerId
from ublkwatch.starts import Caller as Poster
from ublkwatch.starts import Kept, tag_of, values

_log = logging.getLogger("ublkwatch")


class Launcher(Protocol):
    """launch.Launcher, as far as it ends servers."""

    def root(self, tag: str) -> str: ...
    def unread(self, tag: str) -> bool: ...
    def how_ended(self, pid: int) -> tuple[str, int | None]: ...
    def last_words(self, tag: str) -> str: ...
    def must_ask(self, pid: int) -> bool: ...
    async def autopsy(self, tag: str, pid: int) -> tuple[str, int | None, str]: ...
    def pids(self, tag: str) -> set[int]: ...
    async def end(self, tag: str) -> None: ...


class Servers(Protocol):
    """server.Servers."""

    def identify(self, pid: int) -> ServerId | None: ...
    def watch(self, server: ServerId) -> None: ...
    def kill(self, server: ServerId) -> None: ...
    async def tagged(self, tag: str) -> list[ServerId]: ...
    async def holders(self, node: str) -> tuple[bool, str]: ...
    async def end_tagged(self, tag: str) -> None: ...


class Caller(Poster, Protocol):
    """monitor.Monitor, as far as ends speak to it."""

    def policy(self, dev_id: int) -> Policy: ...


class Ends:
    """The processes of attempts, from being looked for to being gone."""

    def __init__(  # noqa: PLR0913 - each by its name
        self,
        *,
        launcher: Launcher,
        servers: Servers,
        kept: Kept,
        files: Callable[[int], Collection[str]],
        fork: Callable[[int], asyncio.Lock],
        monitor: Caller,
    ) -> None:
        """Work for ``monitor``; ``fork`` is held while a server is being started."""
        self._launcher = launcher
        self._servers = servers
        self._kept = kept
        self._files = files
        self._fork = fork
        self._monitor = monitor
        self._ending: set[str] = set()  # attempts whose processes are being ended just now

    async def find(self, tag: str) -> list[ServerId]:
        """Find the processes of an attempt: by its tag, and in its control group."""
        servers = self._servers
        found = await servers.tagged(self._launcher.root(tag))
        grouped = (servers.identify(pid) for pid in sorted(self._launcher.pids(tag)))
        return [*found, *(server for server in grouped if server and server not in found)]

    async def find_server(self, record: Record) -> None:
        """Post which process of the attempt has the character device open."""
        node = f"/dev/ublkc{record.dev_id}"
        found = await self.find(tag_of(record))
        holding = [server for server in found if node in self._files(server.pid)]
        self._monitor.post(record.dev_id, ServerFound(record.seq, holding[0] if holding else None))

    async def end(self, tag: str) -> None:
        """SIGKILL the processes of an attempt, until there are none; the caller bounds the wait."""
        await self._launcher.end(tag)
        await self._servers.end_tagged(self._launcher.root(tag))

    async def end_attempt(self, record: Record) -> None:
        """End it, and post that it is over; nothing where that takes too long."""
        tag = tag_of(record)
        if tag in self._ending:  # the machine asks again and again; a search is going on already
            return
        self._ending.add(tag)
        try:
            async with asyncio.timeout(self._monitor.policy(record.dev_id).stop_timeout_s):
                async with self._fork(record.dev_id):  # one that is just being started
                    if shared := self._shared(record, self._launcher.root(tag)):
                        self._monitor.post(record.dev_id, shared)
                        return
                    await self.end(tag)
            await self._restore(record)
            self._monitor.post(record.dev_id, AttemptOver(record.seq, self._launcher.unread(tag)))
        except TimeoutError:
            pass  # the machine's own deadline speaks of it
        except OSError as error:  # systemd, or its bus: the machine asks again
            _log.warning("ublk %d: attempt %d is not ended: %s", record.dev_id, record.seq, error)
        finally:
            self._ending.discard(tag)

    async def abandon(self, record: Record) -> None:
        """End what an attempt of our former life left of a device that is gone."""
        tag = tag_of(record)
        try:
            async with asyncio.timeout(self._monitor.policy(record.dev_id).stop_timeout_s):
                if self._shared(record, self._launcher.root(tag)) is None:
                    await self.end(tag)
        except OSError as error:
            trouble = str(error) or "not in time"
            _log.error("attempt %s of a device that is gone may have processes still: %s; look for "
                       "UBLKWATCH_ATTEMPT in /proc/*/environ", tag, trouble)  # fmt: skip

    def kill(self, record: Record, effect: Kill) -> None:
        """SIGKILL a process, unless others are to be spared."""
        served = self._fine_beside(record)
        beside = [r for r in served if effect.server in (r.server, r.candidate)]
        if effect.sparing is None or not beside:
            self._servers.kill(effect.server)
        else:
            self._monitor.post(record.dev_id, _shared(effect.sparing, effect.server, beside))

    def _shared(self, record: Record, root: str) -> AttemptShared | None:
        """Tell whether the attempt's process serves others, which are not to suffer."""
        root_of = self._launcher.root
        beside = [r for r in self._fine_beside(record) if root_of(tag_of(r)) == root]
        for each in beside:
            server = each.server or each.candidate
            if server is not None and self._servers.identify(server.pid) == server:
                return _shared(record.seq, server, beside)
        return None

    def _fine_beside(self, record: Record) -> list[Record]:
        """Return the other devices that would suffer: on G2 those that attach just now, too."""
        fine = {Phase.WATCHING, Phase.PROBATION}
        if self._monitor.policy(record.dev_id).generation is Generation.G2:
            fine.add(Phase.ATTACHING)
        others = [r for r in self._monitor.all_records() if r.dev_id != record.dev_id]
        return [other for other in others if other.phase in fine]

    async def _restore(self, record: Record) -> None:
        """Bring back what a failed recover command has removed."""
        care: Care | None = self._monitor.care(record.dev_id)
        if care is not None and care.keep:
            files = filled(care.keep, values(record.dev_id, care, None))
            await asyncio.to_thread(self._kept.restore, record.dev_id, files)

    # --- how they ended --------------------------------------------------------------------------

    async def autopsy(self, tag: str, pid: int) -> tuple[str, int | None, str]:
        """Say how an attempt's process ended, its exit code, and its last words."""
        if self._launcher.must_ask(pid):
            return await self._launcher.autopsy(tag, pid)
        return *self._launcher.how_ended(pid), self._launcher.last_words(tag)

    async def tell_end(self, record: Record, candidate: ServerId) -> None:
        """Post how a candidate ended, once that is known: it decides about another attempt."""
        how, code, words = await self.autopsy(tag_of(record), candidate.pid)
        said = f"{how}: {words}" if words else how
        self._monitor.post(record.dev_id, ServerExited(candidate, said, code))


def _shared(seq: int, server: ServerId, beside: list[Record]) -> AttemptShared:
    return AttemptShared(seq, server, ", ".join(f"ublkb{other.dev_id}" for other in beside))
