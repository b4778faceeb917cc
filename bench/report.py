"""The report: tables and pictures between words that people wrote. Pure.

The words are docs/performance.md's. What is made stands between the lines ``<!-- made: NAME -->``,
with the name of a scenario or "about", and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bench.scenarios import SCENARIOS

PICTURES = "performance"  # the directory of the pictures, beside the report
_EMULATED = {
    "tcg": "an **emulated** machine (TCG): its times, CPU times as well, are many times a real "
    "one's and contain what its host took from it; only how contestants compare is of use",
    "kvm": "a virtual machine (KVM)",
    "real": "a real machine",
}
Run = Mapping[str, Any]


def sections(runs: Sequence[Run]) -> dict[str, str]:
    """Return what is made, by name. ``runs``: one for each kernel, and one of this machine."""
    found = {"about": "\n".join(_about(run["about"]) for run in runs if "about" in run)}
    for name, scenario in SCENARIOS.items():
        parts = []
        for run in runs:
            if name in run:
                if "about" in run:
                    about = run["about"]
                    parts.append(f"### Linux {about['kernel']}, {about['accelerator']}")
                parts.append(scenario.markdown(run[name]))
                parts += [
                    f"![{picture}]({PICTURES}/{picture}.svg)" for picture in _pictures(name, run)
                ]
        if parts:
            found[name] = "\n\n".join(parts)
    return found


def pictures(runs: Sequence[Run]) -> dict[str, str]:
    """Return all pictures, by the names of their files without the suffix."""
    return {
        picture: svg
        for run in runs
        for name in SCENARIOS
        if name in run
        for picture, svg in _pictures(name, run).items()
    }


def filled(text: str, made: Mapping[str, str]) -> str:
    """Put what was made into its places; the places of what was not are left as they are."""
    for name, section in made.items():
        place = re.compile(rf"(<!-- made: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        match = place.search(text)
        if match is None:
            raise ValueError(f"no place for {name!r}")
        text = f"{text[: match.end(1)]}\n{section}\n\n{text[match.start(2) :]}"
    return text


def worst(runs: Sequence[Run]) -> float | None:
    """Return the largest ratio to the oracle that was found anywhere; None if there is none."""
    found = (
        scenario.ratio(run[name])
        for run in runs
        for name, scenario in SCENARIOS.items()
        if name in run
    )
    return max((each for each in found if each is not None), default=None)


def _pictures(name: str, run: Run) -> dict[str, str]:
    # "6.12.117+deb13-amd64" is 6.12 in the name of a picture: the next one replaces it.
    kernel = ".".join(run["about"]["kernel"].split(".")[:2]) if "about" in run else "host"
    plots = SCENARIOS[name].plots(run[name])
    return {f"{picture}-{kernel}": svg for picture, svg in plots.items()}


def _about(about: Mapping[str, Any]) -> str:
    load = ", ".join(f"{each[0]:.2f}" for each in about["load"])
    host = ""
    if "host_load" in about:
        host = "; of its host " + ", ".join(f"{each[0]:.2f}" for each in about["host_load"])
    return (
        f"- Linux {about['kernel']}: {_EMULATED[about['accelerator']]}. {about['cpus']} CPUs, "
        f"{about['memory_mib']} MiB, process 1 is {about['init']}, Python {about['python']}, "
        f"{about['compiler']}; ublkwatch {about['ublkwatch']}; {about['date']}. Load average from "
        f"start to end: {load}{host}."
    )
