"""``python -m bench.stand_in``: what our own part of a poll costs, on this very machine.

For who has no driver: emulated machines say little of a CPU's share. The shell, its ring, its
files and the status document are the real ones; a file is read by io_uring in GET_DEV_INFO's
place, and plain files stand for sysfs and /proc/diskstats. So what is missing is the time that
the kernel takes to answer, which is its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from ublkwatch import discover, page, status, threads
from ublkwatch.apart import Apart
from ublkwatch.async_ring import AsyncRing
from ublkwatch.bulletin import CONFIRM_S, Bulletin
from ublkwatch.care import Care, Origin
from ublkwatch.ctrl import UblkCtrl
from ublkwatch.diskstats import Idle
from ublkwatch.glance import Glance
from ublkwatch.health import Health
from ublkwatch.lanes import Lanes
from ublkwatch.metrics import Metrics
from ublkwatch.model import Generation, Policy
from ublkwatch.monitor import Monitor
from ublkwatch.perform import Edges, Threads
from ublkwatch.server import Servers
from ublkwatch.store import Store
from ublkwatch.uapi import DevFlags, DevState, ublksrv_ctrl_dev_info

DEVICES = (1, 64, 500)
SECONDS = 60.0
AIM, AT = 0.005, 500  # of a core
_OP_READ = 22
# By then it has asked the last time whether a server says which threads serve its queues.
SETTLE_S = 140.0
_FLAGS = DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_REISSUE


class Reading(Glance):
    """Reads each device's answer from a file."""

    def question(self, fd: int, dev_id: int, address: int) -> dict[str, int | bytes]:
        size = ublksrv_ctrl_dev_info.size
        # cmd_op and __pad1 lie where the offset does.
        place = {"cmd_op": dev_id * size, "addr": address, "len": size}
        return {"opcode": _OP_READ, "fd": fd, **place}


class World:
    """So many devices of one server, which is this process."""

    def __init__(self, home: Path, count: int) -> None:
        self.home, self.count = home, count
        for dev_id in range(count):
            (home / f"class/ublk-char/ublkc{dev_id}").mkdir(parents=True)
            (home / f"block/ublkb{dev_id}").mkdir(parents=True)
        lines = (f" 259 {n} ublkb{n}" + " 0" * 17 for n in range(count))
        (home / "diskstats").write_text("\n".join(lines) + "\n")
        info = {"nr_hw_queues": 1, "queue_depth": 1, "state": DevState.LIVE, "flags": int(_FLAGS),
                "max_io_buf_bytes": 1 << 19, "ublksrv_pid": os.getpid()}  # fmt: skip
        answers = (ublksrv_ctrl_dev_info.pack(dev_id=n, **info) for n in range(count))
        (home / "control").write_bytes(b"".join(answers))

    async def live(self, seconds: float, settle_s: float) -> dict[str, Any]:
        """Let it be watched; return what that cost for so long, once it was known."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(Apart())
        metrics, store = Metrics(clock=time.monotonic, wall=time.time), self._store()
        ring = AsyncRing()
        ctrl = UblkCtrl(ring, self.home / "control", metrics, Reading())
        servers = Servers("boot", lambda _server, _status: None)
        health = Health(lambda: monitor.polls, 1.0, time.monotonic)
        care = Care(("/bin/true",), Policy())
        nodes = {f"/dev/ublkc{dev_id}" for dev_id in range(self.count)}

        async def find_care(_info: object, _origin: object) -> Care:
            return care

        def beat(late_s: float) -> None:
            health.beat(late_s)
            bulletin.look()

        def nothing(*_: object) -> None:
            pass

        edges = Edges(
            ctrl=ctrl,
            workers=cast("Any", SimpleNamespace(call=self._params)),
            servers=cast("Any", servers),
            launcher=cast("Any", SimpleNamespace(keep_only=nothing, trim=nothing, up=nothing)),
            store=cast("Any", store),
            threads=Threads(
                threads.alive, threads.look, lambda _: (), servers.watch_threads, servers.watches
            ),
            present=lambda: discover.present(self.home),
            traffic=lambda dev_id: discover.traffic(dev_id, self.home),
            instance=lambda _: "boot/1",
            files=lambda _pid: nodes,
            publish=lambda _: bulletin.dirty(),
            clock=time.monotonic,
            wall=time.time,
            chance=lambda: 1.0,
            origin=lambda _: Origin(),
            care=find_care,
            kept=cast("Any", SimpleNamespace(keep=nothing, drop=nothing)),
            lanes=Lanes(),
            meter=metrics,
            idle=Idle(self.home / "diskstats"),
            beat=beat,
        )
        monitor = Monitor(edges, Policy(), {}, {})
        bulletin = Bulletin(
            lambda: (self._document(monitor), False),
            lambda: monitor.changes,
            store,
            health.wrote,
            lambda: time.time() - time.monotonic(),
        )
        tasks = [loop.create_task(monitor.run(1.0)), loop.create_task(bulletin.publish_for_ever())]
        await asyncio.sleep(settle_s)
        cost = await self._cost(lambda: monitor.polls, seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        servers.close()
        store.close()
        ctrl.close()
        ring.close()
        return {"devices": self.count, "watched": len(monitor.records())} | cost

    async def _cost(self, polls: Callable[[], int], seconds: float) -> dict[str, Any]:
        before, cpu, began = polls(), time.process_time(), time.monotonic()
        switches = _switches()
        await asyncio.sleep(seconds)
        took = time.monotonic() - began
        return {
            "seconds": took,
            "polls": polls() - before,
            "cpu_share": (time.process_time() - cpu) / took,
            "wakeups_per_s": (_switches() - switches) / took,
            "rss_bytes": _resident(),
        }

    def _document(self, monitor: Monitor) -> dict[str, Any]:
        document = status.document(
            monitor.records(),
            monitor.policy,
            wall=time.time(),
            now=time.monotonic(),
            pid=os.getpid(),
            generation=Generation.G3,
            interval_s=CONFIRM_S,
        )
        page.summary(document["devices"], page.Reader(wall=document["written_at"], running=True))
        return document

    def _store(self) -> Store:
        return Store(self.home / "run", self.home / "state")

    async def _params(self, *_: object, **__: object) -> dict[str, Any]:
        return {"params": {"basic": {"dev_sectors": 8}}}


def _switches() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches:"):
            return int(line.split()[1])
    return 0


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(
    devices: Sequence[int] = DEVICES, seconds: float = SECONDS, settle_s: float = SETTLE_S
) -> list[dict[str, Any]]:
    """Return what it costs, for each number of devices."""
    rows = []
    for count in devices:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
            rows.append(asyncio.run(World(Path(home), count).live(seconds, settle_s)))
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table, how it grows, and what became of the aim."""
    parts = ["| devices | CPU, % | wakeups/s | RSS, MiB |", "|--:|--:|--:|--:|"]
    for row in rows:
        cells = (f"{row['cpu_share'] * 100:.3f}", f"{row['wakeups_per_s']:.1f}")
        parts.append(
            f"| {row['devices']} | {' | '.join(cells)} | {row['rss_bytes'] / (1 << 20):.1f} |"
        )
    for before, after in pairwise(rows):
        each = (after["cpu_share"] - before["cpu_share"]) / (after["devices"] - before["devices"])
        parts.append(
            f"\nFrom {before['devices']} to {after['devices']} devices each one more costs "
            f"{each * 1e6:.1f} µs of CPU a second."
        )
    for row in rows:
        if row["devices"] == AT:
            verdict = "within" if row["cpu_share"] <= AIM else "**above**"
            parts.append(
                f"\nAt {AT}: {row['cpu_share']:.2%} of a core, {verdict} the aim of {AIM:.1%}."
            )
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stand_in", description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--settle", type=float, default=SETTLE_S)
    options = parser.parse_args()
    print(markdown(measure(options.devices, options.seconds, options.settle)))


if __name__ == "__main__":
    main()
