"""Many devices lose their servers at once: until the first, the median and the last is LIVE."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import psutil

from bench import plot, stats
from bench.contest import ORACLE, Contest, Round
from bench.lot import Kind
from bench.options import Options
from bench.stage import names, say, stage
from bench.witness import Witness

WARM_UP = 1  # by which each device gets the server that the contestant gives it
TITLE = "Mass crashes"
KIND = Kind(depth=4)
SERVER_BYTES = 24 << 20  # of one more server: what it has for itself, and the kernel for it
AIM, AT = 1.15, 64
EVENTS = ("first", "median", "last")
_WHO = ("ublkwatch", ORACLE, "oracle-c")
Sample = dict[str, float]


def measure(options: Options, keep: Callable[[dict[str, Any]], None]) -> None:
    asyncio.run(_measure(options, keep))


async def _measure(options: Options, keep: Callable[[dict[str, Any]], None]) -> None:
    rows: list[dict[str, Any]] = []
    who = [name for name in names(options) if name in _WHO]
    async with stage(options) as on:
        for shape in options.shapes:
            kind = replace(KIND, group=shape == "group")
            for count in options.devices:
                row: dict[str, Any] = {"shape": shape, "devices": count, "samples": {}}
                needed = len(who) * SERVER_BYTES * (1 if kind.group else count)
                if needed > (free := psutil.virtual_memory().available):
                    row["missing"] = f"takes {needed >> 20} MiB, and there are {free >> 20}"
                else:
                    async with (
                        Witness.running(on.programs) as witness,
                        Contest.running(on, who, kind, count) as contest,
                    ):
                        row["samples"] = await _rounds(contest, witness, options.rounds, row)
                rows.append(row)
                head = {"rounds": options.rounds, "warm_up": WARM_UP, "width": on.width}
                keep({**head, "rows": rows})


async def _rounds(
    contest: Contest, witness: Witness, rounds: int, row: Mapping[str, Any]
) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {name: [] for name in contest.entrants}
    for number in range(1 - WARM_UP, rounds + 1):
        for name in contest.order(number):
            got = sample(await contest.strike(name, witness))
            say(
                f"{row['devices']} devices, {row['shape']}: round {number} of {rounds}, {name}: "
                + ", ".join(f"{each} LIVE after {got[each]:.2f} s" for each in EVENTS)
            )
            if number > 0:
                samples[name].append(got)
    return samples


def sample(got: Round) -> Sample:
    """Return when the devices were LIVE, in seconds since the kill, and what that took."""
    live = sorted(each["live"] - got.killed for each in got.devices.values())
    return {
        "first": live[0],
        "median": statistics.median_low(live),
        "last": live[-1],
        "cpu": got.cpu_s,
        "again": sum(each.get("attempts", 1) > 1 for each in got.told.values()),
    }


# --- the report ----------------------------------------------------------------------------------


def ratio(result: Mapping[str, Any]) -> float | None:
    """Return the largest ratio of medians, until ublkwatch's last is LIVE and the oracle's."""
    found = [each for row in result["rows"] if (each := _ratio(row, "ublkwatch", "last"))]
    return max(found, default=None)


def markdown(result: Mapping[str, Any]) -> str:
    heads = "| devices | | first s | median s | last s | min-max | last, ratio | CPU s | again |"
    intro = (
        f"{result['rounds']} rounds of each contestant, in turn, after {result['warm_up']} that "
        f"does not count; null target, 1 queue of {KIND.depth}. Each starts {result['width']} "
        "servers at a time. Medians over the rounds; the ratio is of medians, beside the Python "
        "oracle. *again*: recoveries that took more than one attempt."
    )
    parts = [intro]
    for shape, title in (("single", "A server for each device"), ("group", "One server for all")):
        rows = [row for row in result["rows"] if row["shape"] == shape]
        if rows:
            lines = [heads, "|--:|---|--:|--:|--:|--:|--:|--:|--:|"]
            lines += [line for row in rows for line in _lines(row)]
            parts += [f"#### {title}", "\n".join(lines)]
        parts += [f"{row['devices']}: {row['missing']}." for row in rows if "missing" in row]
        for row in rows:
            if row["devices"] == AT and (found := _ratio(row, "ublkwatch", "last")):
                verdict = "within" if found <= AIM else "**above**"
                parts.append(f"At {AT}: {found:.2f} x the oracle, {verdict} the aim of {AIM}.")
    return "\n\n".join(parts)


def plots(result: Mapping[str, Any]) -> dict[str, str]:
    """Return pictures by their names."""
    pictures = {}
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in result["rows"]:
            if row["shape"] == shape:
                for name, samples in row["samples"].items():
                    last = statistics.median(each["last"] for each in samples)
                    lines.setdefault(name, []).append((row["devices"], last))
        pictures[f"mass-{shape}"] = plot.lines(
            f"Seconds until the last is LIVE, by devices lost at once: {shape}", lines
        )
    return pictures


def _lines(row: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, samples in row["samples"].items():
        medians = {key: statistics.median(each[key] for each in samples) for key in samples[0]}
        last = stats.figures([each["last"] for each in samples])
        found = _ratio(row, name, "last")
        cells = [str(row["devices"]), name, *(f"{medians[each]:.2f}" for each in EVENTS)]
        cells += [f"{last['min']:.2f}-{last['max']:.2f}", f"{found:.2f}" if found else "-"]
        cells += [f"{medians['cpu']:.2f}", f"{sum(each['again'] for each in samples):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratio(row: Mapping[str, Any], name: str, event: str) -> float | None:
    ours, theirs = (row["samples"].get(each) for each in (name, ORACLE))
    if not ours or not theirs:
        return None
    return stats.ratio_of_medians([s[event] for s in ours], [s[event] for s in theirs])
