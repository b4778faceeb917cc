"""Whether ublkwatch itself is well: its event loop, its poll, its runtime directory.

Never whether the devices are: who restarts a supervisor because a device is down makes it worse.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

_LAG_S = 60.0  # for which a lag is remembered
_STALE_S = 30.0  # without a poll, or a status document, beyond three polls' time


class Health:
    """Feels the supervisor's own pulse; on the running loop."""

    def __init__(
        self, polls: Callable[[], int], poll_interval_s: float, clock: Callable[[], float]
    ) -> None:
        """Begin well; ``polls`` returns how many looks at all devices are over."""
        self._polls, self._clock = polls, clock
        self._stale_s = _STALE_S + 3 * poll_interval_s
        self.seen_all = asyncio.Event()  # set: ready()
        self._seen = 0  # polls
        self._polled_at = self._wrote_at = clock()
        self._trouble = ""  # with the runtime directory
        self._lags: deque[tuple[float, float]] = deque()  # (when, how long), ever smaller

    def beat(self, late_s: float) -> None:
        """Take it that the loop had its turn, so much too late; to be told with every poll."""
        now = self._clock()
        while self._lags and self._lags[-1][1] <= late_s:
            self._lags.pop()  # what was less, and will be forgotten earlier
        self._lags.append((now, late_s))
        self._forget(now)
        if self._seen != (polls := self._polls()):
            self._seen, self._polled_at = polls, now
            self.seen_all.set()

    def lag_s(self) -> float:
        """Return by how much the loop was late, at most, in the last minute."""
        self._forget(self._clock())
        return self._lags[0][1] if self._lags else 0.0

    def _forget(self, now: float) -> None:
        while self._lags and self._lags[0][0] < now - _LAG_S:
            self._lags.popleft()

    def wrote(self, trouble: str = "") -> None:
        """Take it that the status document was written, or why it could not be."""
        self._trouble = trouble
        if not trouble:
            self._wrote_at = self._clock()

    def ready(self) -> bool:
        """Tell whether all devices were looked at once."""
        return self._polls() > 0

    def progresses(self) -> bool:
        """Tell whether the poll goes on, so that nobody has to end us."""
        return self._clock() - self._polled_at <= self._stale_s

    def complaint(self) -> str:
        """Say in one line what is wrong; "" when nothing is."""
        now = self._clock()
        if not self.progresses():
            return f"no look at all devices was over for {now - self._polled_at:.0f} s"
        if self._trouble:
            return f"the runtime directory cannot be written: {self._trouble}"
        if now - self._wrote_at > self._stale_s:
            return f"nothing was written to the runtime directory for {now - self._wrote_at:.0f} s"
        return ""
