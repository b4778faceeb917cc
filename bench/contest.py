"""Contestants side by side in one boot, each with devices of its own; they are struck in turn."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import cast
from bench.cast import BenchError
from bench.contestant import Contestant, Stage, Told
from bench.contestants import CONTESTANTS
from bench.lot import Kind, Lot
from bench.witness import Witness

ORACLE = "oracle"  # whom the others are compared with


@dataclass(frozen=True, slots=True)
class Entrant:
    """A contestant on the stage."""

    contestant: Contestant
    lot: Lot


@dataclass(frozen=True, slots=True)
class Round:
    """What came of one strike."""

    killed: float
    devices: dict[int, dict[str, Any]]  # the witness's word: "quiesced", "live", "pid"
    io: dict[str, float]  # "io", "stall", where there was a reader
    told: Told
    cpu_s: float  # of the contestant, from the kill to the last LIVE


class Contest:
    """Who takes part, and why others do not."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.entrants: dict[str, Entrant] = {}
        self.missing: dict[str, str] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls, stage: Stage, names: Sequence[str], kind: Kind, count: int = 1, *, first: bool = True
    ) -> AsyncIterator[Contest]:
        """Bring the contestants on, each with ``count`` devices of that kind.

        ``first``: no contest before was about the same, so that everybody is of interest.
        """
        contest = cls(stage)
        async with AsyncExitStack() as stack:
            for name in names:
                make = CONTESTANTS[name]
                home = Path(stack.enter_context(TemporaryDirectory(prefix="bench-", dir="/run")))
                lot = Lot(home, tuple(cast.free_ids(count)), kind)
                contestant = make(stage, lot)
                if reason := contestant.unfit():
                    contest.missing[name] = reason
                    continue
                if not (first or contestant.everywhere):
                    continue
                await stack.enter_async_context(
                    cast.devices(
                        stage.ctrl, home, lot.dev_ids, kind.queues, kind.depth,
                        lot.attach,
                    )
                )  # fmt: skip
                stack.callback(cast.end_servers, home)
                await stack.enter_async_context(contestant.running())
                contest.entrants[name] = Entrant(contestant, lot)
            yield contest

    def order(self, number: int) -> Iterator[str]:
        """Yield who is struck in this round: everybody, each time another one first."""
        names = list(self.entrants)
        for index in range(len(names)):
            yield names[(index + number) % len(names)]

    async def strike(self, name: str, witness: Witness) -> Round:
        """Have a contestant's servers killed; wait until it has brought back all its devices."""
        contestant, lot = self.entrants[name].contestant, self.entrants[name].lot
        ctrl = self._stage.ctrl
        servers = {n: (await ctrl.get_dev_info(n)).ublksrv_pid for n in lot.dev_ids}
        everybody = [pid for each in self.entrants.values() for pid in each.contestant.pids()]
        await cast.quiet([*everybody, *set(servers.values())])
        pids = contestant.pids()
        try:
            await contestant.poise()
            await witness.arm(servers)
            ran = cast.ran_ns(pids)
            await contestant.strike(witness, servers)
            seen = await witness.watch()
            cpu_s = (cast.ran_ns(pids) - ran) / 1e9
            told = await contestant.over()
        except BenchError as error:
            raise BenchError(f"{name}: {error}\n{contestant.said()}") from error
        killed = seen.pop("killed") or next(iter(told.values()))["killed"]
        if seen.get("io_errno"):
            raise BenchError(f"{name}: a read failed, errno {seen['io_errno']}; none may")
        io: dict[str, float] = {key: seen[key] for key in ("io", "stall") if key in seen}
        return Round(killed, seen["devices"], io, told, cpu_s)
