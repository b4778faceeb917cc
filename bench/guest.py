"""The scenario: measures, where the driver is, and writes every sample down as JSON.

``python -m bench`` runs this in the lab's guest, or on a host that has the driver. It needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ublkwatch
from bench import cast
from bench.cast import BenchError, OracleProcess, Supervisor, Usage
from bench.observer import Trace, until_live
from ublkwatch.async_ring import AsyncRing
from ublkwatch.ctrl import UblkCtrl

WARM_UP = 1
QUEUES, DEPTH = 2, 32
REST_DEVICES = (1, 16)
_MARKS = {"lost": "detected", "attaching": "accepted", "probation": "told_live"}

Sample = dict[str, float]


class Race:
    """ublkwatch and the oracle, each with a device of its own, recover from kills in turn."""

    def __init__(
        self, ctrl: UblkCtrl, trace: Trace, supervisor: Supervisor, oracle: OracleProcess
    ) -> None:
        self._ctrl = ctrl
        self._trace = trace
        self._supervisor = supervisor
        self._oracle = oracle
        self._ours = list(supervisor.processes().values())
        self._theirs = [oracle.pid]

    async def kill_ours(self, dev_id: int) -> Sample:
        """Kill the server that ublkwatch watches."""
        before = self._supervisor.device(dev_id)
        assert before is not None
        former = before["server_pid"]
        await self._settle(former)
        ran = cast.ran_ns(self._ours)
        pidfd = os.pidfd_open(former)
        killed = time.monotonic()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        live, pid = await self._live_again(dev_id, former, self._supervisor.said)
        cpu = (cast.ran_ns(self._ours) - ran) / 1e9
        after = await self._supervisor.watching(dev_id, before["recoveries"] + 1)
        if after["attempts"] != 1 or after["server_pid"] != pid:
            raise BenchError(f"not one recovery by one attempt: {after}; {self._supervisor.said()}")
        # The document speaks of the day's clock; its step from ours is the same for all of it.
        lost = after["detected_at"] - (time.time() - time.monotonic())
        told = {_MARKS[name]: lost + s for name, s in after["timeline"] if name in _MARKS}
        return self._sample(pid, cpu, killed=killed, live=live, **told)

    async def kill_theirs(self, dev_id: int, former: int) -> tuple[Sample, int]:
        """Have the oracle kill its server; returns the new one's pid as well."""
        await self._settle(former)
        ran = cast.ran_ns(self._theirs)
        self._oracle.recover(former)
        live, pid = await self._live_again(dev_id, former, self._oracle.said)
        cpu = (cast.ran_ns(self._theirs) - ran) / 1e9
        told = await self._oracle.answer()
        if told["pid"] != pid:
            raise BenchError(f"ublk {dev_id} is served by {pid}, not by the oracle's {told['pid']}")
        sample = self._sample(
            pid,
            cpu,
            killed=told["killed"],
            live=live,
            accepted=told["accepted"],
            told_live=told["ended"],
        )
        return sample, pid

    async def _live_again(
        self, dev_id: int, former: int, said: Callable[[], str]
    ) -> tuple[float, int]:
        try:
            return await until_live(self._ctrl, self._trace, dev_id, former, cast.DEADLINE_S)
        except TimeoutError:
            within = f"within {cast.DEADLINE_S:g} s"
            raise BenchError(f"ublk {dev_id} was not LIVE {within}; {said()}") from None

    async def _settle(self, former: int) -> None:
        await cast.quiet([*self._ours, *self._theirs, former])
        self._trace.clear()

    def _sample(self, pid: int, cpu: float, *, killed: float, **moments: float) -> Sample:
        """Return the moments in seconds since the kill, and the CPU time that recovering took."""
        seen = self._trace.moments(pid)
        if seen.keys() != {"spawned", "ready"}:
            raise BenchError(f"the trace does not show the start of server {pid}: {seen}")
        all_of_them = {"killed": killed, **seen, **moments}
        return {name: at - killed for name, at in all_of_them.items()} | {"cpu": cpu}


async def measure_recovery(ctrl: UblkCtrl, home: Path, kills: int) -> dict[str, list[Sample]]:
    """Kill A, B, A, B ..."""
    samples: dict[str, list[Sample]] = {"ublkwatch": [], "oracle": []}
    ours, theirs = cast.free_ids(2)
    async with contextlib.AsyncExitStack() as stack:
        trace = stack.enter_context(Trace.running())
        enter = stack.enter_async_context
        await enter(cast.devices(ctrl, home, [ours], QUEUES, DEPTH))
        former = await enter(cast.devices(ctrl, home, [theirs], QUEUES, DEPTH))
        stack.callback(cast.end_servers, home)
        supervisor = stack.enter_context(Supervisor(home, [ours]).running())
        oracle = await enter(OracleProcess.running(home, theirs))
        await supervisor.learnt([ours])
        race = Race(ctrl, trace, supervisor, oracle)
        for number in range(1 - WARM_UP, kills + 1):
            sample = await race.kill_ours(ours)
            other, former = await race.kill_theirs(theirs, former)
            if number > 0:
                samples["ublkwatch"].append(sample)
                samples["oracle"].append(other)
                a, b = sample["live"] * 1000, other["live"] * 1000
                say(f"kill {number} of {kills}: LIVE after {a:.1f} ms, the oracle's {b:.1f} ms")
    return samples


async def measure_rest(ctrl: UblkCtrl, home: Path, count: int, seconds: float) -> dict[str, Any]:
    """Look at ublkwatch while it watches, and nothing happens."""
    dev_ids = cast.free_ids(count)
    async with cast.devices(ctrl, home, dev_ids, 1, 4):
        with Supervisor(home, dev_ids).running() as supervisor:
            await supervisor.learnt(dev_ids)
            processes = supervisor.processes()
            await cast.quiet(processes.values())
            before = {name: Usage.of(pid) for name, pid in processes.items()}
            started = time.monotonic()
            await asyncio.sleep(seconds)
            after = {name: Usage.of(pid) for name, pid in processes.items()}
            if supervisor.processes() != processes:
                raise BenchError(f"ublkwatch changed its worker; {supervisor.said()}")
            took = time.monotonic() - started
    say(f"rested {took:.1f} s with {count} devices")
    return {
        "devices": count,
        "seconds": took,
        "processes": {
            name: asdict(usage)
            | {
                "cpu_s": usage.cpu_s - before[name].cpu_s,
                "voluntary_switches": usage.voluntary_switches - before[name].voluntary_switches,
            }
            for name, usage in after.items()
        },
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    about: dict[str, Any] = {
        "kernel": os.uname().release,
        "accelerator": options.accelerator,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "ublkwatch": ublkwatch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kills": options.kills,
        "warm_up": WARM_UP,
        "device": f"null target, {QUEUES} queues x {DEPTH}, USER_RECOVERY and REISSUE, no I/O",
        "load_start": cast.load(),
    }
    ring = AsyncRing()
    try:
        ctrl = UblkCtrl(ring)
        with contextlib.ExitStack() as stack:
            homes = [
                Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/run")))
                for _ in range(1 + len(REST_DEVICES))
            ]
            recovery = await measure_recovery(ctrl, homes[0], options.kills)
            rest = [
                await measure_rest(ctrl, home, count, options.rest)
                for home, count in zip(homes[1:], REST_DEVICES, strict=True)
            ]
    finally:
        ring.close()
    about["load_end"] = cast.load()
    return {"about": about, "recovery": recovery, "rest": rest}


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.guest")
    parser.add_argument("--accelerator", choices=("kvm", "tcg", "real"), required=True)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--rest", type=float, required=True, help="seconds to look at it at rest")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    if not Path("/dev/ublk-control").exists():
        subprocess.run(["modprobe", "ublk_drv"], check=True)
    try:
        run = asyncio.run(measure(options))
    except BenchError as error:
        say(f"FAILED: {error}")
        return 1
    options.out.write_text(json.dumps(run, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
