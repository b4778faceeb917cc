"""What happened, on its way to those who remember it: the trail of events, and the history.

Nothing here delays an effect: what comes faster than it can be written is dropped, and counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

from ublkwatch import chronicle, kmsg, trail
from ublkwatch.meter import Meter
from ublkwatch.store import HISTORY_KINDS, Store

_log = logging.getLogger("ublkwatch")

_PENDING_MAX = 1000
_OOM_S = 60.0  # that a process may take to end, once the OOM killer has chosen it


class News:
    """A bounded queue, and its way to the files; what is in it is written by a thread."""

    def __init__(self, runtime_dir: Path, store: Store, meter: Meter | None = None) -> None:
        self._runtime_dir = runtime_dir
        self._store = store
        self._pending: asyncio.Queue[dict[str, Any]] = asyncio.Queue(_PENDING_MAX)
        self._dropped = 0
        self._meter = meter or Meter()

    def take(self, entry: dict[str, Any]) -> None:
        """Keep what happened."""
        try:
            self._pending.put_nowait(entry)
        except asyncio.QueueFull:
            self._dropped += 1
            self._lost(entry)

    def tell(self, kind: str, text: str, level: str = "info", dev_id: int | None = None) -> None:
        """Keep what happened to ublkwatch itself, or beside what the machine knows of a device."""
        event = {"kind": kind, "at": time.time(), "dev_id": dev_id, "level": level, "text": text}
        self.take(event)

    async def write_for_ever(self) -> None:
        """Write it as it comes."""
        while True:
            first = await self._pending.get()
            await asyncio.to_thread(self._write, [first, *self._rest()])

    async def finish(self) -> None:
        """Write what is left."""
        await asyncio.to_thread(self._write, self._rest())

    def _rest(self) -> list[dict[str, Any]]:
        found = [self._pending.get_nowait() for _ in range(self._pending.qsize())]
        if self._dropped:
            self.tell("dropped", f"{self._dropped} events came too fast and are lost", "warning")
            self._dropped = 0
        return found

    def _write(self, news: list[dict[str, Any]]) -> None:
        events = [entry for entry in news if "text" in entry]
        try:
            trail.add(self._runtime_dir, events)
        except OSError as error:
            _log.warning("events not written: %s", error)
            for _ in events:
                self._meter.dropped("event")
        for entry in news:
            if entry["kind"] in HISTORY_KINDS:
                self._write_history(entry)

    def _write_history(self, entry: dict[str, Any]) -> None:
        if entry.get("lost_pid") and entry["cause"] in chronicle.MAY_BE_OOM:
            since = time.monotonic() - entry["timeline"][-1][1] - _OOM_S
            if kmsg.oom_killed(entry["lost_pid"], since):
                entry = entry | {"cause": chronicle.OOM_KILL}
        if "cause" in entry:
            self._meter.cause(entry["cause"])
        try:
            self._store.add_history(entry)
        except (OSError, self._store.HistoryError) as error:
            _log.warning("history not written: %s", error)
            self._meter.dropped("history")

    def _lost(self, entry: dict[str, Any]) -> None:
        if "text" in entry:
            self._meter.dropped("event")
        if entry["kind"] in HISTORY_KINDS:
            self._meter.dropped("history")
