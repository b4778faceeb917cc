"""Who has a standby, and who shall: begun at rest, bounded, replaced when it is out of date.

A part of the shell. A standby is a comfort: none is started while a device is being recovered, one
at a time, and whatever is wrong with one leads to a cold start, never to a wait. What is true of
them is looked at with every poll; those of our former life are taken on, unless an attempt has
them by now.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ublkwatch.care import Spec, Standby, StandbyShown
from ublkwatch.model import STANDBY_TAG, Phase, Record, ServerId
from ublkwatch.standby import CHANGED, Launcher, Servers, Spare, Terms
from ublkwatch.starts import job_name, tag_of
from ublkwatch.wishes import Caller as Asked
from ublkwatch.wishes import Wish, Wishes

_log = logging.getLogger("ublkwatch")

_RECOVERING = (Phase.DRAINING, Phase.STARTING, Phase.ATTACHING, Phase.STOPPING)
_END_S = 30.0
_PAUSE_MAX_S = 600.0  # until one is started again that failed
_LONG_S = 60.0  # who has waited so long was no failure


class Caller(Asked, Protocol):
    """monitor.Monitor, as far as standbys ask it."""

    @property
    def changes(self) -> int: ...
    def all_records(self) -> list[Record]: ...


@dataclass
class _Setback:
    """Standbys of a name that failed, one after the other."""

    why: str
    times: int = 0
    until: float = 0.0


class Standbys:
    """All standbys of this host."""

    def __init__(  # noqa: PLR0913 - each by its name
        self,
        *,
        terms: Terms,
        launcher: Launcher,
        servers: Servers,
        end: Callable[[str], Awaitable[None]],
        specs: Mapping[int, Spec],
        clock: Callable[[], float],
        monitor: Caller,
    ) -> None:
        """Take on those of our former life."""
        self._terms, self._launcher, self._servers = terms, launcher, servers
        self._clock, self._monitor = clock, monitor
        self._wishes = Wishes(specs, clock, monitor)
        self._end = end
        self._spares: dict[str, Spare] = {}  # by tag
        self._waiting_since: dict[str, float] = {}
        self._setbacks: dict[str, _Setback] = {}  # by name
        self._starting: Spare | None = None
        self._looking, self._turn = False, 0
        self._ending: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._number = 0
        self.begun = 0  # how many were started
        self._nobody = -1  # the monitor's changes, when nobody wanted one
        taken = {launcher.root(tag_of(record)) for record in monitor.all_records()}
        for kept in terms.former:
            self._adopt(kept, taken=kept.tag in taken)

    def _adopt(self, kept: Standby, *, taken: bool) -> None:
        """Take on one of our former life; what it was amid is ended, and begun anew."""
        if taken:
            self._drop(kept.tag)
            return
        spare = self._spares[kept.tag] = self._spare(kept)
        self._waiting_since[kept.tag] = self._clock()
        if not kept.ready:
            spare.condemn("ublkwatch was restarted before it was ready")
        elif not spare.lives():
            spare.condemn("it ended while ublkwatch was down")
        elif kept.server is not None:
            self._servers.watch(kept.server)

    def _spare(self, kept: Standby) -> Spare:
        return Spare(kept, self._terms, self._launcher, self._servers, self._end)

    # --- taking one ------------------------------------------------------------------------------

    def waits(self, name: str) -> bool:
        """Tell whether one waits; one that is being started is given up for who cannot wait."""
        for spare in self._of(name):
            if spare.state == "waiting":
                return True
            spare.condemn("it was not ready when its device was lost")
        return False

    async def take(self, tag: str, name: str) -> ServerId | None:
        """Give an attempt the standby of that name; None where a new server is to be started.

        READY is told anew.
        """
        wish = self._wishes.all().get(name)
        for spare in self._of(name):
            if spare.state != "waiting":
                continue
            why = await spare.misfit(wish) if wish else "nobody wants it any more"
            if why or not spare.lives():
                spare.condemn(why or "it has ended")
            if spare.why:  # or else by who looked meanwhile
                continue
            try:
                server = spare.hand_over(tag)
            except OSError as error:
                spare.condemn(str(error))
                continue
            del self._spares[spare.kept.tag]
            self._setbacks.pop(name, None)
            self._drop(spare.kept.tag)
            self._tell(spare, "is taken")
            return server
        return None

    # --- news ------------------------------------------------------------------------------------

    def ready(self, tag: str) -> None:
        """Take it that a server said READY=1."""
        if (spare := self._spares.get(tag)) is not None:
            spare.ready()

    def exited(self, server: ServerId, how: str) -> None:
        """Take it that a watched process has ended."""
        for spare in self._spares.values():
            if spare.kept.server == server and not spare.why:
                words = self._launcher.last_words(spare.kept.tag)
                self._fails(spare, f"it ended: {how}{f': {words}' if words else ''}")

    # --- what is shown ---------------------------------------------------------------------------

    def tags(self) -> set[str]:
        """Return whose homes are still needed."""
        return set(self._spares)

    def of(self, record: Record) -> StandbyShown | None:
        """Return a device's standby; None where it shall have none."""
        care = self._monitor.care(record.dev_id)
        if care is None or not care.standby:
            return None
        name = job_name(care, record.dev_id)
        for spare in self._of(name):
            if not spare.why:
                return StandbyShown(spare.state, spare.pid)
        setback = self._setbacks.get(name)
        return StandbyShown("missing", note=setback.why if setback else "")

    def counts(self) -> Counter[str]:
        """Return how many there are in each state; "missing" are those that there shall be."""
        found = Counter(spare.state for spare in self._spares.values())
        there = {spare.kept.name for spare in self._spares.values() if not spare.why}
        found["missing"] = len(self._wishes.all().keys() - there)
        return found

    # --- looking ---------------------------------------------------------------------------------

    def look(self) -> None:
        """See what is to be done, and begin it; the poll calls this."""
        monitor = self._monitor
        changes = monitor.changes
        if changes == self._nobody and not self._spares:
            return  # where nobody wants any, a poll costs nothing
        wishes = self._wishes.all()
        self._nobody = -1 if self._wishes.anyone() else changes
        # Who was not met yet, in this life of ours, may want it.
        met = len(monitor.all_records()) == len(monitor.records())
        for spare in self._spares.values():
            wish = wishes.get(spare.kept.name)
            if wish is None and met:
                spare.condemn("nobody wants it any more")
            elif wish is not None and wish.fingerprint() != spare.kept.job:
                spare.condemn(CHANGED)
        self._keep_bounds()
        for tag, spare in self._spares.items():
            if spare.why and spare is not self._starting and tag not in self._ending:
                self._ending.add(tag)
                self._spawn(self._see_off(spare))
        if not any(record.phase in _RECOVERING for record in self._monitor.records()):
            self._look_at_one(wishes)
            self._start_one(wishes)

    def _keep_bounds(self) -> None:
        """End the youngest, where there are more than allowed, or memory is short."""
        useful = [spare for spare in self._spares.values() if not spare.why]
        for spare in useful[self._terms.most() :]:
            spare.condemn("there are more than standby_max")
        if useful and self._terms.free() < self._terms.least_free() / 2:
            useful[-1].condemn("less than half of standby_free_percent of the memory is free")

    def _look_at_one(self, wishes: Mapping[str, Wish]) -> None:
        """See, of one after the other, whether it is what would be started now."""
        waiting = [spare for spare in self._spares.values() if spare.state == "waiting"]
        if not waiting or self._looking:
            return
        self._turn += 1
        spare = waiting[self._turn % len(waiting)]
        if (wish := wishes.get(spare.kept.name)) is not None:
            self._looking = True
            self._spawn(self._look_at(spare, wish))

    async def _look_at(self, spare: Spare, wish: Wish) -> None:
        try:
            if why := await spare.misfit(wish):
                spare.condemn(why)
        finally:
            self._looking = False

    # --- starting and ending ---------------------------------------------------------------------

    def _start_one(self, wishes: Mapping[str, Wish]) -> None:
        there, now = {spare.kept.name for spare in self._spares.values()}, self._clock()
        wanted = [
            wish
            for name, wish in wishes.items()
            if wish.now and name not in there and self._pause_over(name, now)
        ]
        if not wanted or self._starting is not None or len(self._spares) >= self._terms.most():
            return
        if self._terms.free() < self._terms.least_free():
            return
        wish = max(wanted, key=lambda wish: wish.priority)
        # Of this boot none has had that tag: it is a time. A short one: it is in a socket's path.
        self._number = max(self._number + 1, int(now * 1000))
        name, tag = wish.job.name, f"{STANDBY_TAG}{self._number:x}"
        kept = Standby(tag, name, wish.dev_id, wish.fingerprint())
        self._starting = self._spares[kept.tag] = self._spare(kept)
        self.begun += 1
        self._spawn(self._start(self._starting, wish))

    def _pause_over(self, name: str, now: float) -> bool:
        setback = self._setbacks.get(name)
        return setback is None or now >= setback.until

    async def _start(self, spare: Spare, wish: Wish) -> None:
        try:
            await spare.start(wish)
        except OSError as error:
            if not spare.why:
                self._fails(spare, str(error))
        finally:
            self._starting = None
            if not spare.kept.ready:  # whatever the reason: nobody would see to it any more
                spare.condemn("it was not started")
        if not spare.why:
            self._waiting_since[spare.kept.tag] = self._clock()
            self._tell(spare, "is ready")

    def _fails(self, spare: Spare, why: str) -> None:
        """Take it that one is lost by itself: the next one has to wait."""
        now, name, tag = self._clock(), spare.kept.name, spare.kept.tag
        setback = self._setbacks.setdefault(name, _Setback(why))
        if now - self._waiting_since.get(tag, now) >= _LONG_S:
            setback.times = 0
        setback.why, setback.times = why, setback.times + 1
        setback.until = now + min(_PAUSE_MAX_S, 2.0**setback.times)
        spare.failed = True
        spare.condemn(why)

    async def _see_off(self, spare: Spare) -> None:
        tag = spare.kept.tag
        try:
            async with asyncio.timeout(_END_S):
                await spare.end()
        except OSError as error:  # TimeoutError, too: at the next look again
            _log.warning("standby %s is not ended: %s", tag, error or "not in time")
        else:
            del self._spares[tag]
            self._waiting_since.pop(tag, None)
            self._tell(spare, f"is ended: {spare.why}")
        finally:
            self._ending.discard(tag)

    def _tell(self, spare: Spare, what: str) -> None:
        who = f"its standby, process {spare.pid}," if spare.pid else "its standby"
        self._terms.tell(spare.kept.dev_id, f"{who} {what}", spare.failed)

    def _of(self, name: str) -> list[Spare]:
        return [spare for spare in self._spares.values() if spare.kept.name == name]

    def _drop(self, tag: str) -> None:
        self._waiting_since.pop(tag, None)
        try:
            self._terms.drop(tag)
        except OSError as error:
            _log.warning("standby %s is not forgotten: %s", tag, error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="standbys")
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("standbys: a bug in ublkwatch: %r", error, exc_info=error)

    def close(self) -> None:
        """Stop everything under way; the standbys live on."""
        for task in self._tasks:
            task.cancel()
