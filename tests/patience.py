"""Waiting for what must come: with a deadline, and never longer than it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

PATIENCE_S = 60.0  # it bounds hangs; beside three emulated guests all takes ten times as long
_POLL_S = 0.005


async def until(condition: Callable[[], object], what: str) -> None:
    """Let the loop run until ``condition`` holds; fail with ``what`` when it never does."""
    clock = asyncio.get_running_loop().time  # which may be virtual
    deadline = clock() + PATIENCE_S
    while not condition():
        if clock() > deadline:
            pytest.fail(f"not within {PATIENCE_S:g} s: {what}")
        await asyncio.sleep(_POLL_S)


async def some_turns() -> None:
    """Let the loop run whatever is ready, for as many turns as any of it could need."""
    for _ in range(20):
        await asyncio.sleep(0)
