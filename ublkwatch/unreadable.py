"""Devices that cannot be read: said once of each, and not with every poll.

A part of the shell.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable

_log = logging.getLogger("ublkwatch")

_UNPRIVILEGED = errno.EINVAL  # GET_DEV_INFO about a device that only its owner may read


class Unreadable:
    """Remembers with what GET_DEV_INFO failed, of each device that it fails of."""

    def __init__(self) -> None:
        self._errors: dict[int, int | None] = {}

    def add(self, dev_id: int, error: OSError) -> None:
        """Take it that a device could not be read."""
        if self._errors.get(dev_id) != error.errno:
            self._errors[dev_id] = error.errno
            hint = "; an unprivileged device?" if error.errno == _UNPRIVILEGED else ""
            _log.warning("ublk %d: %s%s", dev_id, error, hint)

    def drop(self, dev_id: int) -> None:
        """Take it that it could be, or is not there."""
        self._errors.pop(dev_id, None)

    def among(self, dev_ids: Iterable[int]) -> bool:
        """Tell whether some of them could not be read that are ours to read."""
        return bool(self._errors) and any(
            self._errors.get(each, _UNPRIVILEGED) != _UNPRIVILEGED for each in dev_ids
        )
