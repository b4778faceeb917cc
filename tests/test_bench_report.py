"""What the benchmark tells of what it measured: tables, pictures, and the page that has them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from bench import mass, plot, recovery, report, scrape
from bench.scenarios import SCENARIOS

PAGE = Path(__file__).parents[1] / "docs/performance.md"
KIND = {"handoff": "managed", "target": "null", "queues": 1, "depth": 32, "group": False}


def killed(live: float, **more: float) -> dict[str, float]:
    return {"quiesced": 0.04, "live": live, "io": live, "stall": live, "cpu": 0.01, "attempts": 1,
            **more}  # fmt: skip


def of_recovery() -> dict[str, Any]:
    samples = {
        "ublkwatch": [killed(0.33, detected=0.005), killed(0.44, detected=0.006)],
        "oracle": [killed(0.30), killed(0.40)],
        "fixed-sleeps": [killed(6.3, cpu=0.0), killed(6.4, cpu=0.0)],
    }
    cell = {"kind": KIND, "flavour": "", "samples": samples, "missing": {"unit": "no systemd here"}}
    return {"kills": 2, "warm_up": 1, "cells": [cell]}


def crash(last: float, again: int = 0) -> dict[str, float]:
    return {"first": 0.5, "median": last / 2, "last": last, "cpu": 0.3, "again": again}


def of_mass() -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"shape": "single", "devices": 1,
         "samples": {"ublkwatch": [crash(0.6)], "oracle": [crash(0.5)]}},
        {"shape": "single", "devices": 64,
         "samples": {"ublkwatch": [crash(11.0, again=2)], "oracle": [crash(10.0)]}},
        {"shape": "single", "devices": 128, "samples": {}, "missing": "takes 9 MiB of 8"},
    ]  # fmt: skip
    return {"rounds": 1, "warm_up": 1, "width": 8, "rows": rows}


def run() -> dict[str, Any]:
    about = {
        "kernel": "6.12.0+deb13", "accelerator": "tcg", "cpus": 2, "memory_mib": 2000,
        "python": "3.12.1", "compiler": "cc 12", "init": "systemd", "ublkwatch": "0.1.0",
        "date": "2030-01-02", "load": [[0.5, 0.4, 0.3], [1.5, 0.4, 0.3]],
    }  # fmt: skip
    return {"about": about, "recovery": of_recovery(), "mass": of_mass()}


# --- scenarios -----------------------------------------------------------------------------------


def test_recovery_has_a_row_for_each_contestant_and_says_who_is_missing() -> None:
    text = recovery.markdown(of_recovery())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    ours, oracle, sleeps = rows[2:]
    assert ours.startswith("| ublkwatch | 5.5 | 40.0 | - |")
    assert "| **385.0** | - | 330.0-440.0 | 385.0 | - | 1.10 | 1.10 | 10.0 |" in ours
    assert oracle.startswith("| oracle | - |")  # it detects nothing
    assert sleeps.endswith("| 18.14 | 18.50 | - |")
    assert "unit: no systemd here." in text
    assert recovery.ratio(of_recovery()) == pytest.approx(1.1)


def test_a_p99_takes_so_many_kills_that_it_is_no_accident() -> None:
    result = of_recovery()
    result["cells"][0]["samples"] = samples = {"oracle": [killed(0.30)] * 199}
    assert "| **300.0** | - | 300.0-300.0 | 300.0 | - |" in recovery.markdown(result)
    samples["oracle"] = [killed(0.30)] * 197 + [killed(0.40), killed(0.50), killed(0.60)]
    assert "| **300.0** | 400.0 | 300.0-600.0 | 300.0 | 400.0 |" in recovery.markdown(result)


@pytest.mark.parametrize(
    ("live", "verdict"),
    [(0.3, "1.50 x kill to START, within"), (0.4, "2.00 x kill to START, **above**")],
)
def test_a_standby_is_held_against_its_aim(live: float, verdict: str) -> None:
    result = of_recovery()
    assert "kill to START," not in recovery.markdown(result)
    result["cells"][0]["samples"]["ublkwatch-standby"] = [killed(live, accepted=0.2)] * 2
    assert f"Kill to LIVE takes {verdict} the aim of 1.5." in recovery.markdown(result)


def test_a_step_that_some_kills_lack_is_told_of_none() -> None:
    result = of_recovery()
    del result["cells"][0]["samples"]["ublkwatch"][1]["detected"]
    assert "| ublkwatch | - | 40.0 |" in recovery.markdown(result)


def test_more_than_one_attempt_is_told() -> None:
    result = of_recovery()
    assert "attempt" not in recovery.markdown(result)
    result["cells"][0]["samples"]["ublkwatch"][0]["attempts"] = 2
    assert "More than one attempt: ublkwatch, 1 times." in recovery.markdown(result)


def test_mass_is_judged_at_64() -> None:
    text = mass.markdown(of_mass())
    assert "| 64 | ublkwatch | 0.50 | 5.50 | 11.00 | 11.00-11.00 | 1.10 | 0.30 | 2 |" in text
    assert "At 64: 1.10 x the oracle, within the aim of 1.15." in text
    assert "128: takes 9 MiB of 8." in text
    assert mass.ratio(of_mass()) == pytest.approx(1.2)
    slow = of_mass()
    slow["rows"][1]["samples"]["ublkwatch"] = [crash(12.0)]
    assert "**above** the aim" in mass.markdown(slow)


def test_there_is_no_ratio_without_an_oracle() -> None:
    result = of_recovery()
    del result["cells"][0]["samples"]["oracle"]
    assert recovery.ratio(result) is None
    assert "| - | - | 10.0 |" in recovery.markdown(result)


def test_a_scrape_is_measured_by_the_number_of_devices() -> None:
    rows = scrape.measure((1, 2, 3), rounds=1)
    each = rows[1]["series"] - rows[0]["series"]
    assert rows[2]["series"] - rows[1]["series"] == each > 0
    assert all(row["cpu_s"] >= row["loop_s"] > 0 for row in rows)
    text = scrape.markdown(rows)
    assert f"From 1 to 2 devices each one more costs {each} series" in text
    assert "Ratio of these, 1 where it grows linearly: bytes" in text


# --- pictures ------------------------------------------------------------------------------------


def elements(svg: str, tag: str) -> list[ET.Element]:
    tree = ET.fromstring(svg)  # noqa: S314 - our own
    return [each for each in tree.iter() if each.tag.endswith(tag)]


def texts(svg: str) -> list[str]:
    return [each.text or "" for each in elements(svg, "text")]


def test_ranges_have_a_row_for_each_series_and_its_median() -> None:
    svg = plot.ranges("a < b", {"ublkwatch": [300.0, 400.0, 500.0], "sleeps": [6000.0], "none": []})
    found = texts(svg)
    assert {"a < b", "ublkwatch", "400", "sleeps", "6000", "500 ms"} <= set(found)
    assert "none" not in found


@pytest.mark.parametrize(("low", "high"), [(0.4, 40.0), (300.0, 390.0), (7.0, 9.0), (5.0, 5.0)])
def test_an_axis_can_be_read(low: float, high: float) -> None:
    found = [text for text in texts(plot.ranges("", {"a": [low, high]})) if text.endswith(" ms")]
    assert 2 <= len(found) <= 12


def test_ranges_grow_to_the_right() -> None:
    svg = plot.ranges("", {"a": [1.0], "b": [10.0], "c": [100.0]})
    circles = [float(each.attrib["cx"]) for each in elements(svg, "circle")]
    assert circles[1] - circles[0] == pytest.approx(circles[2] - circles[1], abs=0.2)
    assert plot.LEFT <= circles[0] < circles[2] <= plot.WIDTH - plot.RIGHT


def test_lines_grow_upwards_and_their_names_do_not_lie_on_each_other() -> None:
    svg = plot.lines("t", {"a": [(1, 1.0), (64, 10.0)], "b": [(1, 1.1), (64, 10.1)]})
    circles = [float(each.attrib["cy"]) for each in elements(svg, "circle")]
    assert circles[1] < circles[0]
    names = {each.text: float(each.attrib["y"]) for each in elements(svg, "text")}
    assert abs(names["a"] - names["b"]) >= 14


def test_one_point_is_a_picture_too() -> None:
    assert "ublkwatch" in texts(plot.lines("t", {"ublkwatch": [(16, 3.0)]}))
    assert "ublkwatch" in texts(plot.ranges("t", {"ublkwatch": [3.0]}))


# --- the page ------------------------------------------------------------------------------------


def test_the_page_has_a_place_for_each_scenario_and_keeps_its_words() -> None:
    before = PAGE.read_text()
    made = {name: f"made of {name}" for name in ("about", *SCENARIOS)}
    text = report.filled(before, made)
    assert all(f"\nmade of {name}\n" in text for name in made)
    assert text.count("<!-- end -->") == before.count("<!-- end -->") == len(made)
    assert report.filled(text, made) == text
    made_parts = re.compile(r"<!-- made: (\S+) -->.*?<!-- end -->", re.DOTALL)
    assert made_parts.sub(r"\1", before) == made_parts.sub(r"\1", text)


def test_what_was_not_measured_stays() -> None:
    page = "a\n<!-- made: mass -->\nold\n<!-- end -->\nb\n<!-- made: scrape -->\nx\n<!-- end -->\n"
    text = report.filled(page, {"scrape": r"new \1"})
    assert text == page.replace("\nx\n", "\n\nnew \\1\n\n")


def test_what_took_several_runs_is_told_together(tmp_path: Path) -> None:
    """Two runs on one kernel, each of some scenarios: `make bench` in parts."""
    for name in ("recovery", "mass"):
        part = {"about": run()["about"], name: run()[name]}
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    words = [f"{tmp_path}/recovery.json", f"{tmp_path}/mass.json", "--out", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-m", "bench", "--report", *words],
        check=True, capture_output=True, cwd=PAGE.parents[1],
    )  # fmt: skip
    text = (tmp_path / "performance.md").read_text()
    assert "kills of each contestant" in text
    assert "At 64: 1.10 x the oracle" in text
    assert len(list((tmp_path / "performance").glob("*.svg"))) == 2


def test_a_section_without_a_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place for 'rest'"):
        report.filled("nothing", {"rest": "x"})


def test_sections_name_kernel_and_emulation_and_show_their_pictures() -> None:
    here = {"scrape": scrape.measure((1,), rounds=1)}
    made = report.sections([run(), here])
    assert made.keys() == {"about", "recovery", "mass", "scrape"}
    assert "**emulated** machine (TCG)" in made["about"]
    assert "Load average from start to end: 0.50, 1.50." in made["about"]
    assert made["recovery"].startswith("### Linux 6.12.0+deb13, tcg")
    assert "(performance/recovery-managed-null-1-6.12.svg)" in made["recovery"]
    assert "### " not in made["scrape"]
    pictures = report.pictures([run(), here])
    assert pictures.keys() == {"recovery-managed-null-1-6.12", "mass-single-6.12"}
    assert all(svg.startswith("<svg ") for svg in pictures.values())


def test_the_worst_ratio_is_anywhere() -> None:
    assert report.worst([run(), {}]) == pytest.approx(1.2)
    assert report.worst([{}]) is None
