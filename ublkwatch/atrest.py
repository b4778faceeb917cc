"""What is as it was is not looked at again: which devices a poll can leave alone.

A part of the shell. All that a look at a device goes by is in its Sight. Where that is the same at
two polls in a row, the first one's look has changed nothing, so that another one would not either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ublkwatch.care import Care
from ublkwatch.model import DevInfo, Phase, Record
from ublkwatch.rules import Unmanaged
from ublkwatch.uapi import DevState

# Where no clock runs. Of a server that is not in our care no pidfd tells, but the device's state.
_PHASES = (Phase.WATCHING, Phase.OBSERVED)


class Sight(NamedTuple):
    """What a look at a device goes by; what is not known, or not settled, is None."""

    info: DevInfo | OSError | None  # GET_DEV_INFO's answer
    disk: int | None  # the life of its disk
    record: Record | None
    rules: Care | Unmanaged | None  # in whose care it is


class AtRest:
    """Remembers how every device was seen."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self._seen: dict[int, Sight] = {}

    def restless(self, sights: Iterable[tuple[int, Sight]]) -> Iterator[int]:
        """Return which devices are to be looked at, of all that there are."""
        seen, before = {}, self._seen
        for dev_id, sight in sights:
            # Equal records are most often the same: a comparison takes no time.
            if dev_id not in before or before[dev_id] != sight or not _rests(sight):
                yield dev_id
            seen[dev_id] = sight
        self._seen = seen


def _rests(sight: Sight) -> bool:
    record = sight.record
    return (
        record is not None
        and record.phase in _PHASES
        and record.server is not None
        and isinstance(sight.info, DevInfo)
        and (record.info is sight.info or record.info == sight.info)  # it was stepped
        and sight.info.state is DevState.LIVE
        and sight.disk is not None
        and sight.rules is not None
    )
