"""How long devices were down: no server, or one that the kernel does not let serve. Pure.

What is told of a device whose server is lost is a gauge, and an outage between two scrapes is seen
by none; so the time is summed up, and goes on while the device is down.
"""

from __future__ import annotations

from ublkwatch.model import Phase, Record, RecoveryMode
from ublkwatch.uapi import DevState

_UP = frozenset({Phase.WATCHING, Phase.PROBATION, Phase.GONE})
_DOWN = frozenset({DevState.QUIESCED, DevState.FAIL_IO})


def counts(record: Record) -> bool:
    """Tell whether a device can be down, and not just gone: it is recoverable."""
    info = record.info
    return info is not None and RecoveryMode.of(info.flags) is not RecoveryMode.NONE


def is_down(record: Record) -> bool:
    """Tell whether nobody serves the device, as far as that was noticed.

    Of a device in our care the phase says it, from the detection on; of another one the kernel's
    state, since it may be LIVE under a server that we cannot see. A server that hangs is up.
    """
    if record.phase is Phase.OBSERVED:
        return counts(record) and record.info is not None and record.info.state in _DOWN
    return record.phase not in _UP


class Downtime:
    """Sums up, for each device, the time in which it was down, since we first saw it so."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}
        self._before_s: dict[int, float] = {}  # of the outages that are over

    def note(self, record: Record, now: float) -> None:
        """Take a device's record of now; one that is gone is forgotten."""
        dev_id = record.dev_id
        if record.phase is Phase.GONE:
            self._since.pop(dev_id, None)
            self._before_s.pop(dev_id, None)
        elif is_down(record):
            self._since.setdefault(dev_id, now)
        elif (since := self._since.pop(dev_id, None)) is not None:
            self._before_s[dev_id] = self._before_s.get(dev_id, 0.0) + (now - since)

    def seconds(self, dev_id: int, now: float) -> float:
        """Return how long a device was down until now; it never becomes less."""
        # Not by one rounding error less either: Prometheus would take that for a start at 0.
        return self._before_s.get(dev_id, 0.0) + (now - self._since.get(dev_id, now))
