"""One device loses its server: from the kill to each step, to LIVE, and to the first I/O."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from bench import plot, stats
from bench.contest import ORACLE, Contest, Round
from bench.contestants import lineups
from bench.lot import Kind
from bench.options import Options
from bench.stage import names, say, stage
from bench.trace import Trace, moments
from bench.witness import Witness

WARM_UP = 1
TITLE = "Recovery of one device"
STANDBY_AIM = 1.5
Sample = dict[str, float]
# What the tables have: (key, head). Moments, in the order in which they come in a recovery.
STEPS = (
    ("detected", "detected"),
    ("quiesced", "QUIESCED"),
    ("spawned", "exec"),
    ("ready", "READY"),
    ("accepted", "START"),
    ("opened", "line"),
)


def measure(options: Options, keep: Callable[[dict[str, Any]], None]) -> None:
    asyncio.run(_measure(options, keep))


async def _measure(options: Options, keep: Callable[[dict[str, Any]], None]) -> None:
    cells: list[dict[str, Any]] = []
    async with stage(options) as on:
        with Trace.running() as trace:
            for kind, first in options.kinds():
                for flavour, who in lineups(names(options)):
                    if flavour and not first:
                        continue
                    async with (
                        Witness.running(on.programs, read=True) as witness,
                        Contest.running(on, who, kind, first=first) as contest,
                    ):
                        samples = await _kind(contest, witness, trace, options.kills, kind)
                    cell = {"kind": asdict(kind), "flavour": flavour, "samples": samples}
                    cells.append({**cell, "missing": contest.missing})
                    keep({"kills": options.kills, "warm_up": WARM_UP, "cells": cells})


async def _kind(
    contest: Contest, witness: Witness, trace: Trace, kills: int, kind: Kind
) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {name: [] for name in contest.entrants}
    for number in range(1 - WARM_UP, kills + 1):
        for name in contest.order(number):
            trace.clear()
            got = sample(await contest.strike(name, witness), trace.seen())
            if number > 0:
                samples[name].append(got)
                times = f"LIVE after {got['live'] * 1e3:.1f} ms, I/O after {got['io'] * 1e3:.1f}"
                say(f"{kind.title}: kill {number} of {kills}, {name}: {times}")
    return samples


def sample(got: Round, trace: str) -> Sample:
    """Return the moments of a recovery in seconds since the kill; "cpu" and "stall" are lengths."""
    ((dev_id, seen),) = got.devices.items()
    found = {
        **moments(trace, seen["pid"], dev_id, seen["live"]),
        "quiesced": seen["quiesced"],
        "live": seen["live"],
        "io": got.io["io"],
    }
    if "detected" in (told := got.told.get(dev_id, {})):
        found["detected"] = told["detected"]
    # What happened before the kill is of a former recovery; zero is what was not seen.
    since = {name: at - got.killed for name, at in found.items() if at >= got.killed}
    return since | {
        "stall": got.io["stall"],
        "cpu": got.cpu_s,
        "attempts": told.get("attempts", 1),
    }


# --- the report ----------------------------------------------------------------------------------


def ratio(result: Mapping[str, Any]) -> float | None:
    """Return the largest ratio of medians, ublkwatch's LIVE to the oracle's; None without both."""
    found = [
        stats.ratio_of_medians(_values(ours, "live"), _values(theirs, "live"))
        for cell in result["cells"]
        if (ours := cell["samples"].get("ublkwatch")) and (theirs := cell["samples"].get(ORACLE))
    ]
    return max(found, default=None)


def markdown(result: Mapping[str, Any]) -> str:
    intro = (
        f"{result['kills']} kills of each contestant, in turn, after {result['warm_up']} that does "
        "not count. Milliseconds since the kill, medians; p99 is nearest rank, of no less than "
        f"{stats.P99_FROM} kills. *line*: the new server opened /dev/ublkcN, which is what it does "
        "with its line. *I/O*: the read that waited completed. *ratio*: kill to LIVE beside the "
        "Python oracle's, of medians, and the median over neighbouring kills. *CPU*: of the "
        "supervisor itself, to LIVE."
    )
    return "\n\n".join([intro, *(_cell(cell) for cell in result["cells"])])


def plots(result: Mapping[str, Any]) -> dict[str, str]:
    """Return pictures by their names."""
    return {
        _name(cell): plot.ranges(
            f"Kill to LIVE: {_title(cell)}",
            {who: _milliseconds(each, "live") for who, each in cell["samples"].items()},
        )
        for cell in result["cells"]
    }


def _name(cell: Mapping[str, Any]) -> str:
    kind = Kind(**cell["kind"])
    flavour = f"-{cell['flavour']}" if cell["flavour"] else ""
    return f"recovery-{kind.handoff}-{kind.target}-{kind.queues}{flavour}"


def _title(cell: Mapping[str, Any]) -> str:
    return ": ".join(filter(None, (cell["flavour"], Kind(**cell["kind"]).title)))


def _cell(cell: Mapping[str, Any]) -> str:
    heads = [head for _, head in STEPS]
    heads += ["**LIVE**", "p99", "min-max", "I/O", "p99", "ratio", "pairs", "CPU"]
    rows = [f"| | {' | '.join(heads)} |", f"|---|{'--:|' * len(heads)}"]
    oracle = cell["samples"].get(ORACLE)
    rows += [_row(name, each, oracle) for name, each in cell["samples"].items()]
    parts = [f"#### {_title(cell)}", "\n".join(rows)]
    again = {n: sum(s["attempts"] > 1 for s in each) for n, each in cell["samples"].items()}
    parts += [f"More than one attempt: {n}, {count} times." for n, count in again.items() if count]
    parts += _standby(cell["samples"].get("ublkwatch-standby", []))
    if cell["missing"]:
        parts.append("; ".join(f"{n}: {why}" for n, why in cell["missing"].items()) + ".")
    return "\n\n".join(parts)


def _standby(samples: list[Sample]) -> list[str]:
    """Return what became of the aim for standbys: with one, a recovery costs attach time only."""
    accepted, live = (_values(samples, key) for key in ("accepted", "live"))
    if not accepted or not live:
        return []
    found = stats.ratio_of_medians(live, accepted)
    verdict = "within" if found <= STANDBY_AIM else "**above**"
    return [f"Kill to LIVE takes {found:.2f} x kill to START, {verdict} the aim of {STANDBY_AIM}."]


def _row(name: str, samples: list[Sample], oracle: list[Sample] | None) -> str:
    cells = [name]
    for key, _ in STEPS:
        values = _milliseconds(samples, key)
        cells.append(f"{stats.figures(values)['median']:.1f}" if values else "-")
    live, io = (stats.figures(_milliseconds(samples, key)) for key in ("live", "io"))
    cells += [f"**{live['median']:.1f}**", _p99(live)]
    cells += [f"{live['min']:.1f}-{live['max']:.1f}", f"{io['median']:.1f}", _p99(io)]
    if oracle:
        ours, theirs = _values(samples, "live"), _values(oracle, "live")
        cells.append(f"{stats.ratio_of_medians(ours, theirs):.2f}")
        cells.append(f"{stats.median_of_ratios(ours, theirs):.2f}")
    else:
        cells += ["-", "-"]
    cpu = stats.figures(_milliseconds(samples, "cpu"))["median"]
    cells.append(f"{cpu:.1f}" if cpu else "-")
    return f"| {' | '.join(cells)} |"


def _p99(figures: stats.Figures) -> str:
    return f"{figures['p99']:.1f}" if figures["samples"] >= stats.P99_FROM else "-"


def _values(samples: list[Sample], key: str) -> list[float]:
    """Return a series; nothing where some of its samples lack it."""
    return [each[key] for each in samples] if all(key in each for each in samples) else []


def _milliseconds(samples: list[Sample], key: str) -> list[float]:
    return [value * 1e3 for value in _values(samples, key)]
