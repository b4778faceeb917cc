"""Where operators' words come in: each is handed on, logged and remembered."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ublkwatch import admin
from ublkwatch.events import Asked
from ublkwatch.library import Library
from ublkwatch.model import DevInfo, Order, Reason
from ublkwatch.monitor import Monitor
from ublkwatch.settings import ConfigError
from ublkwatch.uapi import DevState

_log = logging.getLogger("ublkwatch")


@dataclass
class Desk:
    """Takes orders about devices, and changes of the rules."""

    monitor: Monitor
    library: Library
    reload: Callable[[], str]  # the configuration; returns why it could not be
    remember: Callable[[dict[str, Any]], None]
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time

    async def take(self, request: admin.Request | admin.Change, peer: admin.Peer) -> str:
        """Return why it is refused, or "" once it is taken."""
        taken = "interrupted, and it may be taken yet"
        try:
            if isinstance(request, admin.Request):
                refusal = await self._order(request, peer)
            else:
                refusal = await self._change(request)
            taken = f"refused: {refusal}" if refusal else "taken"
            return refusal
        finally:
            self._note(request, peer, taken)

    async def _order(self, request: admin.Request, peer: admin.Peer) -> str:
        until = self.clock() + request.for_s if request.for_s is not None else None
        by = peer.saying(request.reason)
        refusal = await self.monitor.order(request.dev_id, Asked(request.order, by, until))
        unknown = request.dev_id not in {record.dev_id for record in self.monitor.records()}
        if request.order is Order.FORGET and (unknown or not refusal):
            names = self.library.names_of(request.dev_id)
            for name in names:
                try:
                    self.library.unregister(name)
                except OSError as error:
                    return f"registration {name} is not removed: {error}"
            if names:
                self.monitor.reconsider()
                return ""
        return refusal

    async def _change(self, change: admin.Change) -> str:
        try:
            match change.verb:
                case "reload":
                    return self.reload()
                case "unregister" if not self.library.unregister(change.name):
                    return f"{change.name}: nothing is registered by this name"
                case "register":
                    rule = self.library.register(change.name, change.table)
                    self.monitor.reconsider()
                    return await self._welcome_back(rule.match.dev_id)
        except (ConfigError, OSError) as error:
            return str(error)
        self.monitor.reconsider()
        return ""

    async def _welcome_back(self, dev_id: int | None) -> str:
        """Take up a device that we were told to forget, and now to keep."""
        for record in self.monitor.records():
            live = isinstance(record.info, DevInfo) and record.info.state is DevState.LIVE
            if record.dev_id == dev_id and record.reason is Reason.FORGOTTEN and live:
                await self.monitor.refresh(dev_id)
                return await self.monitor.order(dev_id, Asked(Order.RECOVER, "registered anew"))
        return ""

    def _note(self, request: admin.Request | admin.Change, peer: admin.Peer, taken: str) -> None:
        exe = f" ({peer.exe})" if peer.exe else ""
        why = f", because of {request.reason!r}" if request.reason else ""
        text = f"{request}, asked by {peer}{exe}{why}: {taken}"
        _log.warning("%s", text)
        entry = {
            "kind": "order",
            "at": self.wall(),
            "level": "warning",
            "text": text,
            "reason": request.reason,
            "uid": peer.uid,
            "pid": peer.pid,
            "exe": peer.exe,
            "result": taken,
        }
        if isinstance(request, admin.Request):
            entry |= {
                "dev_id": request.dev_id,
                "order": request.order.value,
                "for_s": request.for_s,
            }
        else:
            entry |= {"dev_id": request.dev_id, "order": request.verb, "name": request.name}
        self.remember(entry)
