"""How many servers may be started at once, and who comes first.

A machine that loses a hundred devices at once must not start a hundred processes at once: none of
them would be ready in time. Who failed before has a lane of his own, so that devices that fail
again and again never keep those waiting that would come back at once.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
from collections.abc import Callable

_CPU_SHARE = 4
_MOST = 64
_AGAIN_SHARE = 4  # one for each so many of the first lane


class Lanes:
    """Two lanes, each bounded, each in the order of priority and then of arrival."""

    def __init__(self, at_once: int = 0) -> None:
        """``at_once``: starts at a time; 0: four for each CPU, and at most 64."""
        at_once = at_once or min(_MOST, _CPU_SHARE * (os.cpu_count() or 1))
        self._first, self._again = _Lane(at_once), _Lane(max(1, at_once // _AGAIN_SHARE))

    async def enter(self, priority: int, *, again: bool) -> Callable[[], None]:
        """Wait for a turn; return what ends it. The highest priority has the first turn."""
        lane = self._again if again else self._first
        await lane.enter(priority)
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                lane.leave()

        return leave


class _Lane:
    def __init__(self, width: int) -> None:
        self._free = width
        self._order = itertools.count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    async def enter(self, priority: int) -> None:
        if self._free > 0:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-priority, next(self._order), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had its turn already
                self.leave()
            raise

    def leave(self) -> None:
        while self._waiting:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
