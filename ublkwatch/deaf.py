"""Which facts change nothing in which phase: the quiet half of a total machine. Pure."""

from __future__ import annotations

from ublkwatch.events import Event
from ublkwatch.model import Phase

DEAF: dict[Phase, frozenset[type[Event]]] = {phase: frozenset() for phase in Phase}
