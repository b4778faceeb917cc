"""Facts that wait for the disk: what could not be committed must not be acted on.

A part of the shell. What is told anew anyway is not kept: a read that is seconds old is no truth
any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ublkwatch.events import (
    Event,
    InfoMissing,
    InfoRead,
    ServerAils,
    ServerExited,
    ServerWell,
    Woken,
)

_TOLD_ANEW = (InfoRead, InfoMissing, ServerAils, ServerWell, Woken)  # by a poll, or the timer


class Unsaved:
    """The devices whose record the disk does not take, each with its facts in their order."""

    def __init__(self) -> None:
        """Nobody waits."""
        self._facts: dict[int, deque[Event]] = {}

    def __contains__(self, dev_id: object) -> bool:
        """Tell whether a device's facts wait."""
        return dev_id in self._facts

    def keep(self, dev_id: int, *events: Event) -> None:
        """Keep facts behind those that wait."""
        facts = self._facts.setdefault(dev_id, deque())
        facts.extend(event for event in events if not isinstance(event, _TOLD_ANEW))

    def release(self, dev_id: int, now_true: Iterable[Event]) -> deque[Event]:
        """Return what waited: ended processes, then what is true now, then what was answered."""
        put_off = self._facts.pop(dev_id, deque())
        ends = [event for event in put_off if isinstance(event, ServerExited)]
        rest = [event for event in put_off if not isinstance(event, ServerExited)]
        return deque([*ends, *now_true, *rest])

    def drop(self, dev_id: int) -> None:
        """Forget them."""
        self._facts.pop(dev_id, None)
