"""``python -m bench.scrape``: what a scrape costs, by the number of devices. Needs no kernel.

The page is asked for as its server asks, while a ticker on the same loop sees for how long that is
kept from anything else, a recovery for instance.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
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
    records = [_record(dev_id) for dev_id in range(devices)]
    metrics = Metrics(clock=time.monotonic, wall=time.time)
    metrics.sources = Sources(records=lambda: records, policy=_policy, started_at=lambda _: 1e9)
    for record in records:
        metrics.stepped(record, time.monotonic())
    page = await metrics.page()
    took_s, late_s = [], []
    for _ in range(rounds):
        late: list[float] = []
        ticker = asyncio.create_task(_tick(late))
        await asyncio.sleep(0.02)
        began = time.monotonic()
        page = await metrics.page()
        took_s.append(time.monotonic() - began)
        await asyncio.sleep(0.02)
        ticker.cancel()
        late_s.append(max(late))
    lines = page.decode().splitlines()
    return {
        "devices": devices,
        "series": sum(not line.startswith("#") for line in lines),
        "bytes": len(page),
        "page_s": statistics.median(took_s),
        "late_s": statistics.median(late_s),
        "latest_s": max(late_s),
    }


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


def _policy(dev_id: int) -> Policy:
    """Return one as the monitor does, which makes two of them on its way."""
    return replace(replace(Policy(), chance=0.5), bystander="" if dev_id else " ")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table, and how it grows: what each further device costs, row by row."""
    parts = [
        "| scrape, devices | series | KiB | ms | loop late, ms | at most |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        times = (f"{row[key] * 1000:.1f}" for key in ("page_s", "late_s", "latest_s"))
        cells = (row["devices"], row["series"], f"{row['bytes'] / 1024:.0f}", *times)
        parts.append(f"| {' | '.join(map(str, cells))} |")
    grown = [
        {key: (after[key] - before[key]) / (after["devices"] - before["devices"]) for key in before}
        for before, after in pairwise(rows)
    ]
    for (before, after), each in zip(pairwise(rows), grown, strict=True):
        parts.append(
            f"\nFrom {before['devices']} to {after['devices']} devices each one more costs "
            f"{each['series']:.0f} series, {each['bytes']:.0f} bytes, {each['page_s'] * 1e6:.0f} µs."
        )
    if len(grown) == 2:
        ratios = (f"{key} {grown[1][key] / grown[0][key]:.2f}" for key in ("bytes", "page_s"))
        parts.append(f"\nRatio of these, 1 where it grows linearly: {', '.join(ratios)}.")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(markdown(measure()))
