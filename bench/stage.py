"""What a scenario that needs the driver stands on."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from bench.contestant import Stage
from bench.contestants import CONTESTANTS
from bench.options import Options
from ublkwatch.async_ring import AsyncRing
from ublkwatch.ctrl import UblkCtrl

# As ublkwatch's lanes have it: so many starts at a time for each CPU, and no more than that.
_STARTS_PER_CPU, _STARTS_MOST = 4, 64


@contextlib.asynccontextmanager
async def stage(options: Options) -> AsyncIterator[Stage]:
    """Open the control device."""
    ring = AsyncRing()
    width = min(_STARTS_MOST, _STARTS_PER_CPU * (os.cpu_count() or 1))
    try:
        yield Stage(UblkCtrl(ring), Path(options.programs), width)
    finally:
        ring.close()


def names(options: Options) -> list[str]:
    """Return who is to take part, in the order of the tables."""
    return [name for name in CONTESTANTS if name in options.contestants or not options.contestants]


def say(text: str) -> None:
    """Tell the one who waits, with the time since the boot."""
    print(f"bench: [{time.monotonic():.0f} s] {text}", file=sys.stderr, flush=True)
