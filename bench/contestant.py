"""What every contestant is to the benchmark; who they are: bench/contestants.py."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.cast import DEADLINE_S, BenchError
from bench.lot import Lot
from bench.witness import Witness
from ublkwatch.ctrl import UblkCtrl

Told = Mapping[int, Mapping[str, float]]  # by device: moments, in seconds of CLOCK_MONOTONIC


@dataclass(frozen=True, slots=True)
class Stage:
    """What all contestants of a run share."""

    ctrl: UblkCtrl
    programs: Path  # the directory of those in C
    width: int  # how many servers an oracle starts at a time: as many as ublkwatch


class Contestant(Protocol):
    """One way to bring devices back. It has devices of its own, and sees nobody else's."""

    everywhere: bool  # whether it is of interest for each kind of device, or only for the first

    def unfit(self) -> str:
        """Say why it cannot take part here, or return ""."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Let it prepare itself: inside, a kill may come."""

    def pids(self) -> list[int]:
        """Return its processes, servers not among them: their CPU time is its cost."""

    async def poise(self) -> None:
        """Let it do what belongs before the kill."""

    async def strike(self, witness: Witness, pids: Mapping[int, int]) -> None:
        """Have the servers of its devices killed."""

    async def over(self) -> Told:
        """Wait until another kill may come; return what it says of itself, if anything.

        "killed" is among that only where it killed by itself. BenchError if it has failed.
        """

    def said(self) -> str:
        """Quote its log."""


class Plain:
    """What most contestants have in common."""

    everywhere = False

    def __init__(self, stage: Stage, lot: Lot) -> None:
        self.stage = stage
        self.lot = lot

    def unfit(self) -> str:
        return ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    def pids(self) -> list[int]:
        return []

    async def poise(self) -> None:
        pass

    async def strike(self, witness: Witness, pids: Mapping[int, int]) -> None:  # noqa: ARG002
        await witness.kill()

    async def over(self) -> Told:
        return {}

    def said(self) -> str:
        return ""


class Script:
    """A shell script of somebody's, and what it said."""

    def __init__(self, text: str, log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self._proc = subprocess.Popen(["sh", "-c", text], stdout=output, stderr=output)

    async def ended(self) -> None:
        """Wait for its end, which must be a good one."""
        loop = asyncio.get_running_loop()
        status = await loop.run_in_executor(None, self._wait)
        if status != 0:
            raise BenchError(f"the script ended with status {status}: {self._log.read_text()}")

    def _wait(self) -> int:
        try:
            return self._proc.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._proc.send_signal(signal.SIGKILL)
            return self._proc.wait()
