"""`ublkwatch run` that SIGKILLs itself at a point of a recovery: `dying.py POINT CONFIG`.

A point is "before-X" or "after-X", X one of spawn, start, line, end: right before the effect is
performed, or right after the world has done it and before we know. Composed from the daemon's own
parts, through the door that it has for that.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ublkwatch import config
from ublkwatch.care import Job
from ublkwatch.daemon import Daemon
from ublkwatch.perform import Edges, Launcher, Workers
from ublkwatch.store import Store

POINTS = [
    f"{when}-{what}" for what in ("spawn", "start", "line", "end") for when in ("before", "after")
]
COMMANDS = {"START_USER_RECOVERY": "start", "END_USER_RECOVERY": "end"}


class DyingLauncher:
    def __init__(self, inner: Launcher, point: str) -> None:
        self._inner, self._point = inner, point

    async def start(self, tag: str, job: Job) -> int:
        die_at(self._point, "before-spawn")
        pid = await self._inner.start(tag, job)
        die_at(self._point, "after-spawn")
        return pid

    def write_line(self, tag: str, line: str) -> None:
        die_at(self._point, "before-line")
        self._inner.write_line(tag, line)
        die_at(self._point, "after-line")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class DyingWorkers:
    def __init__(self, inner: Workers, point: str) -> None:
        self._inner, self._point = inner, point

    async def call(
        self, command: str, dev_id: int, key: str, *, timeout_s: float, **arguments: float
    ) -> dict[str, Any]:
        what = COMMANDS.get(command, "")
        die_at(self._point, f"before-{what}")
        answer = await self._inner.call(command, dev_id, key, timeout_s=timeout_s, **arguments)
        die_at(self._point, f"after-{what}")
        return answer

    def cancel(self, key: str) -> None:
        self._inner.cancel(key)


def die_at(wanted: str, point: str) -> None:
    if wanted == point:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    point, path = sys.argv[1], Path(sys.argv[2])
    assert point in POINTS

    def wrap(edges: Edges) -> Edges:
        return replace(
            edges,
            launcher=DyingLauncher(edges.launcher, point),
            workers=DyingWorkers(edges.workers, point),
        )

    async def run() -> None:
        settings = config.load(path)
        store = Store(settings.runtime_dir, settings.state_dir)
        await Daemon(settings, store, lambda: settings, wrap).run(asyncio.Event(), verbose=False)

    asyncio.run(run())


if __name__ == "__main__":
    main()
