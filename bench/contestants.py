"""Who takes part: ublkwatch, the oracle in two languages, and what people do without either."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from bench import lot as lots
from bench.cast import BenchError, Supervisor, said_by
from bench.contestant import Contestant, Plain, Stage, Told
from bench.lot import Lot
from bench.usual import FixedSleeps, ShellLoop, Unit, no_systemd
from bench.witness import Witness

# Phases of ublkwatch, by the moments with which they begin.
_MARKS = {"lost": "detected", "probation": "told_live"}


class Ublkwatch(Plain):
    """`ublkwatch run` with its defaults, and a table for each device."""

    everywhere = True

    def __init__(
        self, stage: Stage, lot: Lot, *, launcher: str = "fork", standby: bool = False
    ) -> None:
        super().__init__(stage, lot)
        rule: dict[str, object] = {"command": lot.command, "handoff": lot.kind.handoff}
        if lot.kind.group:
            rule["group"] = "bench"
        if standby:
            rule |= {"standby": True, "stable_s": 1}
        self._launcher, self._standby = launcher, standby
        # Forked as the oracles' servers are, and by no other rule than this one.
        top = {"launcher": launcher, "profiles": False}
        self._daemon = Supervisor(lot.home, lot.dev_ids, rule, top)
        self._before: dict[int, dict[str, Any]] = {}

    def unfit(self) -> str:
        if self._standby and self.lot.kind.handoff == "delegated":
            return "no standby, which waits for a line"
        return no_systemd() if self._launcher == "systemd" else ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        with self._daemon.running():
            await self._daemon.learnt(self.lot.dev_ids)
            await self._prepared()
            yield

    def pids(self) -> list[int]:
        return list(self._daemon.processes().values())

    async def poise(self) -> None:
        self._before = {dev_id: self._daemon.device(dev_id) or {} for dev_id in self.lot.dev_ids}

    async def over(self) -> Told:
        told = {}
        for dev_id in self.lot.dev_ids:
            recoveries = self._before[dev_id]["recoveries"] + 1
            after = await self._daemon.watching(dev_id, recoveries)
            # The document speaks of the day's clock; its step from ours is the same for all of it.
            lost = after["detected_at"] - (time.time() - time.monotonic())
            marks = {_MARKS[name]: lost + s for name, s in after["timeline"] if name in _MARKS}
            told[dev_id] = {**marks, "attempts": after["attempts"]}
        await self._prepared()
        return told

    async def _prepared(self) -> None:
        """Wait until the next servers are up, where there shall be any."""
        for dev_id in self.lot.dev_ids if self._standby else ():
            await self._daemon.spared(dev_id)

    def said(self) -> str:
        return self._daemon.said()


class Oracle(Plain):
    """A process of bench/oracle.py or bench/c/oracle.c: it kills, and knows what comes."""

    everywhere = True

    def __init__(self, stage: Stage, lot: Lot, program: tuple[str, ...]) -> None:
        super().__init__(stage, lot)
        mode = "group" if lot.kind.group else lot.kind.handoff
        self._command = (*program, mode, str(stage.width), str(lot.home), *lot.command)
        self._log = lot.home / "oracle.log"
        self._proc: asyncio.subprocess.Process | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        pipe = asyncio.subprocess.PIPE
        with self._log.open("wb") as output:
            proc = await asyncio.create_subprocess_exec(
                *self._command, stdin=pipe, stdout=pipe, stderr=output
            )
        self._proc = proc
        try:
            for dev_id in self.lot.dev_ids:
                self._say(f"device {dev_id} {await lots.line(self.stage.ctrl, dev_id)}")
            yield
        finally:
            if proc.returncode is None:
                proc.kill()
            await proc.wait()

    def pids(self) -> list[int]:
        assert self._proc is not None
        return [self._proc.pid]

    async def strike(self, witness: Witness, pids: Mapping[int, int]) -> None:  # noqa: ARG002
        self._say("go " + " ".join(f"{dev_id}:{pid}" for dev_id, pid in pids.items()))

    async def over(self) -> Told:
        assert self._proc is not None
        if not (line := await said_by(self._proc)):
            raise BenchError(f"no answer from the oracle; {self.said()}")
        answer = json.loads(line)
        killed = {"killed": answer["killed"]}
        return {int(dev_id): {**killed, **each} for dev_id, each in answer["devices"].items()}

    def said(self) -> str:
        return f"the oracle said:\n{self._log.read_text()}"

    def _say(self, command: str) -> None:
        assert self._proc is not None
        assert self._proc.stdin is not None
        self._proc.stdin.write(f"{command}\n".encode())


def _oracle(stage: Stage, lot: Lot) -> Contestant:
    return Oracle(stage, lot, (sys.executable, "-m", "bench.oracle"))


def _oracle_c(stage: Stage, lot: Lot) -> Contestant:
    return Oracle(stage, lot, (str(stage.programs / "oracle"),))


# ublkwatch, otherwise configured. A host has one ublkwatch at a time, so each of these has a
# contest of its own, beside the oracle.
FLAVOURS: dict[str, Callable[[Stage, Lot], Contestant]] = {
    "ublkwatch-standby": partial(Ublkwatch, standby=True),
    "ublkwatch-units": partial(Ublkwatch, launcher="systemd"),
}
# In the order in which the tables have them.
CONTESTANTS: dict[str, Callable[[Stage, Lot], Contestant]] = {
    "ublkwatch": Ublkwatch,
    "oracle": _oracle,
    "oracle-c": _oracle_c,
    "shell-loop": ShellLoop,
    "unit": Unit,
    "fixed-sleeps": FixedSleeps,
    **FLAVOURS,
}


def lineups(names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield who is in the same contest, with the flavour that it is about or ""."""
    plain = [name for name in names if name not in FLAVOURS]
    if plain and (plain == list(names) or plain != ["oracle"]):  # who is in each of the others, too
        yield "", plain
    for name in names:
        if name in FLAVOURS:
            yield name, [name, "oracle"]
