"""What is measured: each scenario under its name. A further one is a further line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench import mass, recovery, rest, scrape, stand_in
from bench.options import Options

Keep = Callable[[Any], None]  # takes the result so far, which then cannot be lost


def _no_plots(_result: Any) -> Mapping[str, str]:
    return {}


def _no_ratio(_result: Any) -> float | None:
    return None


@dataclass(frozen=True, slots=True)
class Scenario:
    """Something that is measured, and how it is told."""

    title: str
    # Keeps what JSON can hold, as often as there is more of it; BenchError if it failed.
    measure: Callable[[Options, Keep], None]
    markdown: Callable[[Any], str]
    plots: Callable[[Any], Mapping[str, str]] = _no_plots  # SVG, by the pictures' names
    ratio: Callable[[Any], float | None] = _no_ratio  # to the oracle; None: there is none
    driver: bool = True  # it is measured where the driver is; else on this machine


SCENARIOS: Mapping[str, Scenario] = {
    "recovery": Scenario(
        recovery.TITLE, recovery.measure, recovery.markdown, recovery.plots, recovery.ratio
    ),
    "mass": Scenario(mass.TITLE, mass.measure, mass.markdown, mass.plots, mass.ratio),
    "rest": Scenario("At rest", lambda _, keep: rest.measure(keep), rest.markdown),
    "stand-in": Scenario(
        "Our own part", lambda _, keep: keep(stand_in.measure()), stand_in.markdown, driver=False
    ),
    "scrape": Scenario(
        "A scrape", lambda _, keep: keep(scrape.measure()), scrape.markdown, driver=False
    ),
}


def chosen(options: Options, *, driver: bool) -> dict[str, Scenario]:
    """Return those that are wanted, and are measured there."""
    return {
        name: each
        for name, each in SCENARIOS.items()
        if each.driver is driver and (name in options.only or not options.only)
    }
