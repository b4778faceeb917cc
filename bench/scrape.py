"""``python -m bench.scrape``: what a scrape costs, by the number of devices. Needs no kernel.

The page is asked for as its server asks, while a ticker on the same loop sees for how long that is
kept from anything else, a recovery for instance.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Sequence
from itertools import pairwise
from typing import Any

from ublkwatch.apart import Apart
from ublkwatch.metrics import Metrics, Sources
from ublkwatch.model import DevInfo, Phase, Policy, Record, ServerId
from ublkwatch.uapi import DevFlags, DevState

DEVICES = (1, 64, 500)
ROUNDS = 20
_TICK_S = 0.001


def measure(devices: Sequence[int] = DEVICES, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Return a row of figures for each number of devices; times are medians, in seconds."""
    return [asyncio.run(_measure(number, rounds)) for number in devices]


async def _measure(devices: int, rounds: int) -> dict[str, Any]:
    asyncio.get_running_loop().set_default_executor(Apart())
    policy = Policy()
    records = [_record(dev_id) for dev_id in range(devices)]
    metrics = Metrics(clock=time.monotonic, wall=time.time)
    metrics.sources = Sources(
        records=lambda: records, policy=lambda _: policy, started_at=lambda _: 1e9
    )
    for record in records:
        metrics.stepped(record, time.monotonic())
    page = await metrics.page()
    samples = [await _sample(metrics) for _ in range(rounds)]
    lines = page.decode().splitlines()
    return {
        "devices": devices,
        "series": sum(not line.startswith("#") for line in lines),
        "bytes": len(page),
        **{key: statistics.median(each[key] for each in samples) for key in samples[0]},
    }


async def _sample(metrics: Metrics) -> dict[str, float]:
    process, thread, began = time.process_time(), time.thread_time(), time.monotonic()
    await metrics.page()
    page_s = time.monotonic() - began
    cpu_s, loop_s = time.process_time() - process, time.thread_time() - thread
    late_s = await _late(metrics.page())
    idle_s = await _late(asyncio.sleep(page_s))
    return {
        "page_s": page_s,
        "cpu_s": cpu_s,
        "loop_s": loop_s,
        "late_s": late_s,
        "idle_s": idle_s,
    }


async def _late(work: Awaitable[object]) -> float:
    """Return how late a ticker was, at most, while something was done."""
    late: list[float] = []
    ticker = asyncio.create_task(_tick(late))
    await asyncio.sleep(2 * _TICK_S)
    await work
    await asyncio.sleep(2 * _TICK_S)
    ticker.cancel()
    return max(late, default=0.0)


async def _tick(late: list[float]) -> None:
    while True:
        due = time.monotonic() + _TICK_S
        await asyncio.sleep(_TICK_S)
        late.append(time.monotonic() - due)


def _record(dev_id: int) -> Record:
    flags = DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_REISSUE
    return Record(
        dev_id=dev_id,
        instance=f"boot/{dev_id}",
        phase=Phase.WATCHING,
        info=DevInfo(dev_id, DevState.LIVE, flags, 4, 128, 1 << 19, 1000 + dev_id),
        server=ServerId(1000 + dev_id, 1, "boot"),
        recoveries=1,
        last_held_s=0.1,
    )


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table, and how it grows: what each further device costs, row by row."""
    parts = [
        "| devices | series | KiB | ms | CPU ms | on the loop | loop late, ms | at rest |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        keys = ("page_s", "cpu_s", "loop_s", "late_s", "idle_s")
        times = (f"{row[key] * 1000:.1f}" for key in keys)
        cells = (row["devices"], row["series"], f"{row['bytes'] / 1024:.0f}", *times)
        parts.append(f"| {' | '.join(map(str, cells))} |")
    grown = [
        {key: (after[key] - before[key]) / (after["devices"] - before["devices"]) for key in before}
        for before, after in pairwise(rows)
    ]
    for (before, after), each in zip(pairwise(rows), grown, strict=True):
        parts.append(
            f"\nFrom {before['devices']} to {after['devices']} devices each one more costs "
            f"{each['series']:.0f} series, {each['bytes']:.0f} bytes, "
            f"{each['cpu_s'] * 1e6:.0f} µs of CPU."
        )
    if len(grown) == 2:
        ratios = (f"{key} {grown[1][key] / grown[0][key]:.2f}" for key in ("bytes", "cpu_s"))
        parts.append(f"\nRatio of these, 1 where it grows linearly: {', '.join(ratios)}.")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(markdown(measure()))
