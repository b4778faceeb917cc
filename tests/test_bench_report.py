"""The pure part of the benchmark: percentiles, ratios, and the tables made of them."""

from __future__ import annotations

from typing import Any

import pytest

from bench import observer, report, scrape


def sample(spawned: float, ready: float, live: float, **more: float) -> dict[str, float]:
    return {"killed": 0.0, "spawned": spawned, "ready": ready, "live": live, **more}


def run() -> dict[str, Any]:
    usage = {"cpu_s": 0.3, "voluntary_switches": 120, "rss_bytes": 3 << 20, "pss_bytes": None}
    return {
        "about": {
            "kernel": "6.12.0", "accelerator": "tcg", "cpus": 2, "python": "3.12.1",
            "ublkwatch": "0.1.0", "date": "2030-01-02", "kills": 3, "warm_up": 1,
            "device": "null", "load_start": [0.5, 0.4, 0.3], "load_end": [1.5, 0.4, 0.3],
        },
        "recovery": {
            "ublkwatch": [
                sample(0.02, 0.30, 0.33, detected=0.005, accepted=0.31),
                sample(0.03, 0.40, 0.44, detected=0.006, accepted=0.41),
                sample(0.02, 0.20, 0.22, detected=0.004, accepted=0.21),
            ],
            "oracle": [
                sample(0.01, 0.29, 0.30, accepted=0.03),
                sample(0.01, 0.39, 0.40, accepted=0.03),
                sample(0.01, 0.19, 0.20, accepted=0.03),
            ],
        },
        "rest": [{"devices": 1, "seconds": 60.0, "processes": {"daemon": usage}}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1), (1, 1), (50, 50), (99, 99), (99.5, 100), (100, 100)]
)
def test_percentile_is_a_sample(percent: float, expected: float) -> None:
    assert report.percentile(list(range(100, 0, -1)), percent) == expected


def test_p99_of_few_samples_is_the_largest() -> None:
    assert report.percentile([3.0, 9.0, 1.0], 99) == 9.0


def test_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        report.percentile([], 50)


def test_figures() -> None:
    assert report.figures([4.0, 1.0, 3.0, 2.0]) == {
        "samples": 4, "median": 2.5, "p99": 4.0, "min": 1.0, "max": 4.0,
    }  # fmt: skip


def test_the_two_ratios_differ_where_the_machine_was_disturbed() -> None:
    ours, theirs = [1.1, 2.2, 9.9], [1.0, 2.0, 3.0]
    assert report.ratio_of_medians(ours, theirs) == pytest.approx(1.1)
    assert report.median_of_ratios(ours, theirs) == pytest.approx(1.1)
    assert report.ratio_of_medians([1.1, 9.9, 9.9], theirs) == pytest.approx(4.95)
    assert report.median_of_ratios([1.1, 2.0, 9.9], theirs) == pytest.approx(1.1)


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="shorter"):
        report.median_of_ratios([1.0, 2.0], [1.0])


def test_compare_follows_the_moments() -> None:
    compared = report.compare(run()["recovery"])
    assert compared["live"]["ublkwatch"]["median"] == pytest.approx(0.33)
    assert compared["live"]["ratio_of_medians"] == pytest.approx(1.1)
    assert compared["live"]["median_of_differences"] == pytest.approx(0.03)
    assert compared["overhead"]["ublkwatch"]["median"] == pytest.approx(0.03)
    assert compared["overhead"]["oracle"]["median"] == pytest.approx(0.01)
    assert compared["overhead"]["ratio_of_medians"] == pytest.approx(3.0)


def test_the_oracle_detects_nothing() -> None:
    detected = report.compare(run()["recovery"])["detected"]
    assert detected["ublkwatch"]["median"] == pytest.approx(0.005)
    assert detected["oracle"] is None
    assert "ratio_of_medians" not in detected


def test_a_length_needs_no_beginning() -> None:
    samples = [{"cpu": 0.25, "killed": 0.0}]
    assert report.lengths(samples, "", "cpu") == [0.25]
    assert report.lengths([*samples, {}], "", "cpu") == []


def test_rest_is_told_by_the_minute_and_by_the_second() -> None:
    usage = {"cpu_s": 0.1, "voluntary_switches": 40, "rss_bytes": 2 << 20, "pss_bytes": 1 << 20}
    assert report.at_rest(usage, 10.0) == {
        "cpu_s_per_minute": pytest.approx(0.6),
        "wakeups_per_s": 4.0,
        "rss_mib": 2.0,
        "pss_mib": 1.0,
    }


def test_markdown_names_an_emulated_machine_and_the_verdict() -> None:
    text = report.markdown([run()])
    assert "**emulated**" in text
    assert "## Linux 6.12.0, tcg" in text
    assert "ratio of medians **1.100**" in text
    assert "| kill → LIVE | 330.0 | 440.0 | 220.0-440.0 | 300.0 |" in text
    assert "| 1 device, 60 s | daemon | 0.30 | 2.0 | 3.0 | - |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| kill")}
    assert len(widths) == 1


def test_markdown_says_when_the_goal_is_missed() -> None:
    slow = run()
    for each in slow["recovery"]["ublkwatch"]:
        each["live"] *= 2
    assert "**above** the goal" in report.markdown([slow])


def test_trace_is_read_for_one_process() -> None:
    trace = """# tracer: nop
          python-77      [001] .....    12.000100: sched_process_exec: filename=/usr/bin/python
           <...>-78      [000] .N...    12.000200: sched_process_exec: filename=/bin/sh
          python-77      [001] .....    12.500000: sys_sendto(fd: 4, buff: 7f, len: 7)
          python-77      [001] .....    12.600000: sys_sendto(fd: 4, buff: 7f, len: 7)
 my [odd] name-79      [001] .....    13.000000: sys_sendto(fd: 4, buff: 7f, len: 7)
"""
    assert observer.moments(trace, 77) == {"spawned": 12.0001, "ready": 12.5}
    assert observer.moments(trace, 79) == {"ready": 13.0}
    assert observer.moments(trace, 7) == {}


def test_a_scrape_is_measured_by_the_number_of_devices() -> None:
    rows = scrape.measure((1, 2, 3), rounds=1)
    each = rows[1]["series"] - rows[0]["series"]
    assert rows[2]["series"] - rows[1]["series"] == each > 0
    assert all(row["cpu_s"] >= row["loop_s"] > 0 for row in rows)
    text = scrape.markdown(rows)
    assert f"From 1 to 2 devices each one more costs {each} series" in text
    assert "Ratio of these, 1 where it grows linearly: bytes" in text
