"""Where operators' words come in: each is judged, handed on, logged and remembered.

A dry run is judged by the same code, and is neither performed nor remembered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ublkwatch import __version__, orders, prospect, recovery
from ublkwatch.admin import Peer
from ublkwatch.attempt import ATTEMPTING
from ublkwatch.config import Config
from ublkwatch.drilling import objection as drill_objection
from ublkwatch.events import Asked
from ublkwatch.library import Library
from ublkwatch.meter import Meter
from ublkwatch.model import DevInfo, Order, Phase, Reason, Record
from ublkwatch.monitor import Monitor
from ublkwatch.settings import ConfigError
from ublkwatch.stopping import Stopper
from ublkwatch.uapi import DevState
from ublkwatch.wire import Answer, Change, Deed, Question, Request, Wish

_log = logging.getLogger("ublkwatch")

_UNKNOWN = "no such device is known"


@dataclass
class Desk:
    """Takes orders about devices, and changes of the rules."""

    monitor: Monitor
    library: Library
    load: Callable[[], Config]  # the configuration anew; ConfigError
    stopper: Stopper
    remember: Callable[[dict[str, Any]], None]
    meter: Meter = field(default_factory=Meter)
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    _reloading: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def take(self, wish: Wish, peer: Peer) -> Answer:
        """Return what became of it, once it is taken or refused."""
        if isinstance(wish, Question):
            return Answer("", (f"ublkwatch {__version__}",))
        if wish.dry_run:
            return await self._take(wish, peer)
        taken = "interrupted, and it may be taken yet"
        try:
            answer = await self._take(wish, peer)
            taken = f"refused: {answer.why}" if answer.why else "taken"
            return answer
        finally:
            self._note(wish, peer, taken)

    async def _take(self, wish: Request | Deed | Change, peer: Peer) -> Answer:
        if isinstance(wish, Change):
            return await self._change(wish)
        if isinstance(wish, Deed):
            return await (self._stop if wish.verb == "stop" else self._drill)(wish, peer)
        return self._foresee(wish, peer) if wish.dry_run else await self._order(wish, peer)

    # --- orders ----------------------------------------------------------------------------------

    def _asked(self, request: Request, peer: Peer) -> Asked:
        until = self.clock() + request.for_s if request.for_s is not None else None
        return Asked(request.order, peer.saying(request.reason), until)

    async def _order(self, request: Request, peer: Peer) -> Answer:
        refusal = await self.monitor.order(request.dev_id, self._asked(request, peer))
        unknown = self._record(request.dev_id) is None
        if request.order is Order.FORGET and (unknown or not refusal):
            names = self.library.names_of(request.dev_id)
            for name in names:
                try:
                    self.library.unregister(name)
                except OSError as error:
                    return Answer(f"registration {name} is not removed: {error}")
            if names:
                self.monitor.reconsider()
                return Answer("", tuple(f"registration {name} is removed" for name in names))
        return Answer(refusal)

    def _foresee(self, request: Request, peer: Peer) -> Answer:
        """Step the machine, and leave it at that."""
        record, forget = self._record(request.dev_id), request.order is Order.FORGET
        names = self.library.names_of(request.dev_id) if forget else []
        gone = [f"registration {name} would be removed" for name in names]
        if record is None:
            return Answer("" if gone else _UNKNOWN, tuple(gone), "; ".join(gone))
        policy = self.monitor.policy(request.dev_id)
        if refusal := orders.objection(record, request.order, policy):
            return Answer(refusal)
        asked = self._asked(request, peer)
        after, effects = recovery.step(record, asked, self.clock(), policy)
        said = (*prospect.of_order(record, after, effects), *gone)
        lost = "ublkwatch keeps its hands off it for the rest of its life" if forget else ""
        harm = "; ".join(part for part in (lost, *gone, prospect.harm(effects)) if part)
        return Answer("", said, harm)

    def _record(self, dev_id: int) -> Record | None:
        found = (record for record in self.monitor.records() if record.dev_id == dev_id)
        return next(found, None)

    # --- deeds -----------------------------------------------------------------------------------

    async def _stop(self, deed: Deed, peer: Peer) -> Answer:
        """Stop a device; its machine is held meanwhile, or it would see a crash."""
        record = self._record(deed.dev_id)
        if why := self._in_work(record) or await self.stopper.objection(
            deed.dev_id, force=deed.force
        ):
            return Answer(why)
        if deed.dry_run:
            return self.stopper.prospect(deed.dev_id, force=deed.force)
        ours = record is not None and record.phase is not Phase.OBSERVED and not record.held
        if ours:
            by = peer.saying(deed.reason or "stop")
            if why := await self.monitor.order(deed.dev_id, Asked(Order.HOLD, by)):
                return Answer(why)
        try:
            answer = await self.stopper.stop(deed.dev_id, force=deed.force)
        except TimeoutError as error:
            return Answer(f"{error}; until then it is held" if ours else str(error))
        if not answer.why:
            await self.monitor.read(deed.dev_id)  # it is gone, and nobody's loss
        elif ours:
            await self.monitor.order(deed.dev_id, Asked(Order.RELEASE, peer.saying(answer.why)))
        return answer

    def _in_work(self, record: Record | None) -> str:
        if record is None or record.phase not in (*ATTEMPTING, Phase.FAILING):
            return ""
        return f"ublkwatch is at work on it ({record.phase.value}); hold it first, or wait"

    async def _drill(self, deed: Deed, _peer: Peer) -> Answer:
        """Judge whether its server may be killed; who asked does that."""
        if (record := self._record(deed.dev_id)) is None:
            return Answer(_UNKNOWN)
        beside = [
            other
            for other in self.monitor.records()
            if other.server is not None and other.server == record.server
        ]
        for each in beside:
            if why := drill_objection(each, self.monitor.policy(each.dev_id)):
                return Answer(f"ublkb{each.dev_id}: {why}" if each is not record else why)
            if not deed.force and (why := await self.stopper.in_use(each.dev_id)):
                return Answer(f"ublkb{each.dev_id}: {why}" if each is not record else why)
        names = ", ".join(f"ublkb{each.dev_id}" for each in beside)
        pid = record.server.pid if record.server else 0
        what = f"the server of {names}, process {pid}, would be killed"
        return Answer("", (what,), what)

    # --- rules -----------------------------------------------------------------------------------

    async def _change(self, change: Change) -> Answer:
        if change.verb == "reload":
            return await self.reload(dry_run=change.dry_run)
        work = self._register if change.verb == "register" else self._unregister
        try:
            return await work(change)
        except (ConfigError, OSError) as error:
            return Answer(str(error))

    async def _register(self, change: Change) -> Answer:
        self.library.judge(change.name, change.table)
        tables = self.library.registered() | {change.name: dict(change.table)}
        said = await self._changes(self.library.settings, tables)
        if change.dry_run:
            return Answer("", said)
        rule = self.library.register(change.name, change.table)
        self.monitor.reconsider()
        return Answer(await self._welcome_back(rule.match.dev_id), said)

    async def _unregister(self, change: Change) -> Answer:
        tables = self.library.registered()
        if tables.pop(change.name, None) is None:
            return Answer(f"{change.name}: nothing is registered by this name")
        said = await self._changes(self.library.settings, tables)
        if not change.dry_run:
            self.library.unregister(change.name)
            self.monitor.reconsider()
        return Answer("", said)

    async def reload(self, *, dry_run: bool = False) -> Answer:
        """Read the configuration anew, and say what is other; a bad one changes nothing."""
        async with self._reloading:  # the last one asked for is the last one taken
            try:
                settings = await asyncio.to_thread(self.load)
            except ConfigError as error:
                if not dry_run:
                    _log.error("configuration not reloaded, the old one goes on: %s", error)
                    self.meter.reloaded(good=False)
                return Answer(str(error))
            said = await self._changes(settings, self.library.registered())
            if not dry_run:
                self.library.reload(settings)
                self.monitor.reconsider()
                _log.info("configuration reloaded; %s", "; ".join(said))
                self.meter.reloaded(good=True)
            return Answer("", said)

    async def _changes(
        self, settings: Config, tables: dict[str, dict[str, Any]]
    ) -> tuple[str, ...]:
        """Say what other rules change; in a thread: profiles look at files."""
        records = self.monitor.records()
        known = [(each.info, self.monitor.origin(each)) for each in records if each.info]
        changes = partial(self.library.changes, settings, tables, known)
        return tuple(await asyncio.to_thread(lambda: list(changes()))) or ("nothing is other",)

    async def _welcome_back(self, dev_id: int | None) -> str:
        """Take up a device that we were told to forget, and now to keep."""
        for record in self.monitor.records():
            live = isinstance(record.info, DevInfo) and record.info.state is DevState.LIVE
            if record.dev_id == dev_id and record.reason is Reason.FORGOTTEN and live:
                await self.monitor.refresh(dev_id)
                return await self.monitor.order(dev_id, Asked(Order.RECOVER, "registered anew"))
        return ""

    def _note(self, wish: Request | Deed | Change, peer: Peer, taken: str) -> None:
        exe = f" ({peer.exe})" if peer.exe else ""
        why = f", because of {wish.reason!r}" if wish.reason else ""
        text = f"{wish}, asked by {peer}{exe}{why}: {taken}"
        _log.warning("%s", text)
        entry = {
            "kind": "order",
            "at": self.wall(),
            "level": "warning",
            "text": text,
            "dev_id": wish.dev_id,
            "reason": wish.reason,
            "uid": peer.uid,
            "pid": peer.pid,
            "exe": peer.exe,
            "result": taken,
        }
        match wish:
            case Request():
                entry |= {"order": wish.order.value, "for_s": wish.for_s}
            case Deed():
                entry |= {"order": wish.verb, "force": wish.force}
            case Change():
                entry |= {"order": wish.verb, "name": wish.name}
        self.remember(entry)
