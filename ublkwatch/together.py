"""One look for many who ask at the same time.

A machine that loses a hundred devices at once has a hundred times the same question, and each
look through all processes takes long. Nobody is answered by a look that began before he asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Together(Generic[T]):
    """Asks ``look`` once for all who wait for the next answer."""

    def __init__(self, look: Callable[[], Awaitable[T]]) -> None:
        """``look`` is called again only when it has returned."""
        self._look = look
        self._lock = asyncio.Lock()
        self._begun = 0  # looks, ever
        self._answered = 0  # the number of the last one that had an answer
        self._answer: T | None = None

    async def ask(self) -> T:
        """Return what a look says that began after this call."""
        came = self._begun
        async with self._lock:
            while self._answered <= came:  # also where the one who looked was cancelled
                self._begun += 1
                number, answer = self._begun, await self._look()
                self._answer, self._answered = answer, number
            return self._answer  # type: ignore[return-value]
