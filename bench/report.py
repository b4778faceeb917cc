"""From samples to numbers and tables. Pure.

What was measured (the JSON file) comes in, figures and Markdown go out. Percentiles are nearest
rank: each one is a sample that really occurred, so the p99 of fewer than 100 samples is their
largest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Figures = dict[str, float]
Samples = Sequence[Mapping[str, float]]

SIDES = ("ublkwatch", "oracle")
GOAL = 1.10
# (name, from, to, what it is called in the table); from "" the sample is a length itself
SERIES = (
    ("detected", "killed", "detected", "kill → detected"),
    ("spawned", "killed", "spawned", "kill → exec of the new server"),
    ("accepted", "killed", "accepted", "kill → START accepted"),
    ("ready", "killed", "ready", "kill → READY of the new server"),
    ("live", "killed", "live", "kill → LIVE"),
    ("start_up", "spawned", "ready", "exec → READY (the server's own)"),
    ("overhead", "ready", "live", "READY → LIVE"),
    ("cpu", "", "cpu", "CPU of the supervisor, kill → LIVE"),
)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest sample that ``percent`` of all samples do not exceed."""
    if not values:
        raise ValueError("no samples")
    rank = max(1, math.ceil(len(values) * percent / 100))
    return sorted(values)[rank - 1]


def figures(values: Sequence[float]) -> Figures:
    """Return what is told of one series."""
    return {
        "samples": len(values),
        "median": statistics.median(values),
        "p99": percentile(values, 99),
        "min": min(values),
        "max": max(values),
    }


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return how many times the median of ``theirs`` the median of ``ours`` is."""
    return statistics.median(ours) / statistics.median(theirs)


def median_of_ratios(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median over the pairs: neighbours in time share what disturbed the machine."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def lengths(samples: Samples, start: str, end: str) -> list[float]:
    """Return the time between two moments in each sample; empty where one is not known."""
    if not all({start or end, end} <= sample.keys() for sample in samples):
        return []
    return [sample[end] - (sample[start] if start else 0.0) for sample in samples]


def compare(recovery: Mapping[str, Samples]) -> dict[str, Any]:
    """Return the figures of every series for both sides, and how they relate."""
    result: dict[str, Any] = {}
    for name, start, end, _ in SERIES:
        values = {side: lengths(recovery[side], start, end) for side in SIDES}
        entry: dict[str, Any] = {
            side: figures(values[side]) if values[side] else None for side in SIDES
        }
        ours, theirs = (values[side] for side in SIDES)
        if ours and theirs:
            entry["ratio_of_medians"] = ratio_of_medians(ours, theirs)
            entry["median_of_ratios"] = median_of_ratios(ours, theirs)
            pairs = zip(ours, theirs, strict=True)
            entry["median_of_differences"] = statistics.median(a - b for a, b in pairs)
        result[name] = entry
    return result


def summary(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return all figures of one run."""
    return {
        "recovery": compare(run["recovery"]),
        "rest": [
            {
                "devices": rest["devices"],
                "seconds": rest["seconds"],
                "processes": {
                    name: at_rest(seen, rest["seconds"]) for name, seen in rest["processes"].items()
                },
            }
            for rest in run["rest"]
        ],
    }


def at_rest(seen: Mapping[str, Any], seconds: float) -> dict[str, float | None]:
    """Return what one process took, in units that do not depend on how long we looked."""
    return {
        "cpu_s_per_minute": seen["cpu_s"] * 60 / seconds,
        "wakeups_per_s": seen["voluntary_switches"] / seconds,
        "rss_mib": seen["rss_bytes"] / (1 << 20),
        "pss_mib": None if seen["pss_bytes"] is None else seen["pss_bytes"] / (1 << 20),
    }


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the report about some runs, one for each kernel."""
    parts = ["# Benchmark of ublkwatch", *(part for run in runs for part in _run(run))]
    return "\n\n".join(parts) + "\n"


def _run(run: Mapping[str, Any]) -> list[str]:
    found, about = summary(run), run["about"]
    return [
        f"## Linux {about['kernel']}, {about['accelerator']}",
        _about(about),
        _recovery(found["recovery"]),
        _verdict(found["recovery"]),
        _rest(found["rest"]),
    ]


def _about(about: Mapping[str, Any]) -> str:
    emulated = {
        "tcg": "An **emulated** machine (TCG): its times, CPU times as well, are many times a real "
        "one's and contain what its host took from it; only how the two sides compare is of use.",
        "kvm": "A virtual machine (KVM).",
        "real": "A real machine.",
    }[about["accelerator"]]
    host = ""
    if "host_load_start" in about:
        host = f"; of its host {_load(about['host_load_start'])}, {_load(about['host_load_end'])}"
    return (
        f"{emulated} {about['cpus']} CPUs, Python {about['python']}, ublkwatch "
        f"{about['ublkwatch']}, {about['date']}. {about['kills']} kills of each side in turn, "
        f"after {about['warm_up']} that do not count; {about['device']}. Load average at start "
        f"and end: {_load(about['load_start'])}, {_load(about['load_end'])}{host}."
    )


def _recovery(compared: Mapping[str, Any]) -> str:
    head = "| median ms | ublkwatch | p99 | min-max | oracle | p99 | min-max | ratio |"
    rows = [head, "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for name, _, _, title in SERIES:
        entry = compared[name]
        ratio = entry.get("ratio_of_medians")
        cells = [title, *(cell for side in SIDES for cell in _cells(entry[side]))]
        cells.append("-" if ratio is None else f"{ratio:.2f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _cells(told: Figures | None) -> tuple[str, str, str]:
    if told is None:
        return "-", "-", "-"
    median, p99, low, high = (told[key] * 1000 for key in ("median", "p99", "min", "max"))
    return f"{median:.1f}", f"{p99:.1f}", f"{low:.1f}-{high:.1f}"


def _verdict(compared: Mapping[str, Any]) -> str:
    live, overhead = compared["live"], compared["overhead"]
    ratio = live["ratio_of_medians"]
    verdict = "within" if ratio <= GOAL else "**above**"
    own, best = (overhead[side]["median"] * 1000 for side in SIDES)
    return (
        f"Kill to LIVE: ratio of medians **{ratio:.3f}**, {verdict} the goal of {GOAL:.2f}; median "
        f"of pairwise ratios {live['median_of_ratios']:.3f}, of pairwise differences "
        f"{live['median_of_differences'] * 1000:+.1f} ms. From READY to LIVE ublkwatch takes "
        f"{own:.1f} ms, the oracle {best:.1f} ms. The oracle kills the server itself, so it has "
        "nothing to detect, and sends START from the kill on; ublkwatch sends it after READY."
    )


def _rest(rests: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        "| at rest | process | CPU s per minute | wakeups per s | RSS MiB | PSS MiB |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for rest in rests:
        plural = "s" * (rest["devices"] != 1)
        for name, told in rest["processes"].items():
            pss = "-" if told["pss_mib"] is None else f"{told['pss_mib']:.1f}"
            rows.append(
                f"| {rest['devices']} device{plural}, {rest['seconds']:.0f} s | {name} "
                f"| {told['cpu_s_per_minute']:.2f} | {told['wakeups_per_s']:.1f} "
                f"| {told['rss_mib']:.1f} | {pss} |"
            )
    return "\n".join(rows)


def _load(load: Sequence[float]) -> str:
    return f"{load[0]:.2f}"
