"""The process of bench/c/witness.c, which sees every contestant by the same means."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from bench.cast import DEADLINE_S, BenchError, said_by


class Witness:
    """Kills, and says when each device was what."""

    def __init__(self, proc: asyncio.subprocess.Process) -> None:
        self._proc = proc

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, programs: Path, *, read: bool = False) -> AsyncIterator[Witness]:
        """``read``: the first device is read from meanwhile, by a program that notes its stall."""
        pipe = asyncio.subprocess.PIPE
        command = (str(programs / "witness"), *(["--read"] * read))
        proc = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        try:
            yield cls(proc)
        finally:
            if proc.returncode is None:
                proc.kill()
            await proc.wait()

    async def arm(self, servers: Mapping[int, int]) -> None:
        """Name the devices of the next round, and the servers that they have."""
        self._say("arm " + " ".join(f"{dev_id}:{pid}" for dev_id, pid in servers.items()))
        await self._heard("armed")

    async def kill(self) -> None:
        """Have those servers killed."""
        self._say("kill")

    async def watch(self) -> dict[str, Any]:
        """Wait until all devices are LIVE under other servers.

        Returns "killed" (0 if it was not the witness), for each of "devices" "quiesced", "live" and
        the new "pid", and, with a reader, "io": when the read that waited longest completed,
        "stall": for how long it waited, and "io_errno".
        """
        self._say(f"watch {DEADLINE_S:g}")
        seen: dict[str, Any] = json.loads(await self._heard("of the devices", DEADLINE_S + 10))
        if seen["late"]:
            raise BenchError(f"not LIVE after {DEADLINE_S:g} s: {seen}")
        return seen | {"devices": {int(n): each for n, each in seen["devices"].items()}}

    def _say(self, command: str) -> None:
        assert self._proc.stdin is not None
        self._proc.stdin.write(f"{command}\n".encode())

    async def _heard(self, what: str, seconds: float = DEADLINE_S) -> str:
        if not (line := await said_by(self._proc, seconds)):
            raise BenchError(f"the witness did not say {what!r}; it may have said why")
        return line.decode()
