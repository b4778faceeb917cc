"""What is made of the samples at rest: what is there anyway, and what each device adds."""

from __future__ import annotations

from typing import Any

from bench import rest, stand_in


def row(devices: int) -> dict[str, Any]:
    return {
        "devices": devices,
        "pss_bytes": (40_000 + 50 * devices) * 1024,
        "cpu_s_per_s": 0.001 + 0.00002 * devices,
        "syscalls_per_poll": 30 + devices / 64,
    }


def rounded(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {key: round(value, 6) for key, value in of.items()} for name, of in found.items()}


def test_what_is_fixed_and_what_each_device_adds() -> None:
    assert rounded(rest.summary([row(1), row(64), row(500)])) == {
        "pss_kib": {"fixed": 40_000, "per_device": 50},
        "cpu_us_per_s": {"fixed": 1000, "per_device": 20},
        "syscalls_per_poll": {"fixed": 30, "per_device": round(1 / 64, 6)},
    }


def test_of_one_number_of_devices_nothing_is_said_for_each() -> None:
    assert rounded(rest.summary([row(7)]))["pss_kib"] == {"fixed": 40_350, "per_device": 0}


def alone(devices: int, cpu_share: float) -> dict[str, Any]:
    return {"devices": devices, "cpu_share": cpu_share, "wakeups_per_s": 8.0, "rss_bytes": 1 << 25}


def test_our_own_part_is_held_against_its_aim() -> None:
    text = stand_in.markdown([alone(100, 0.001), alone(500, 0.0048)])
    assert "| 500 | 0.480 | 8.0 | 32.0 |" in text
    assert "From 100 to 500 devices each one more costs 9.5 µs of CPU a second." in text
    assert "At 500: 0.48% of a core, within the aim of 0.5%." in text
    assert "0.51% of a core, **above** the aim" in stand_in.markdown([alone(500, 0.0051)])


def test_our_own_part_is_measured_as_it_runs() -> None:
    (row,) = stand_in.measure((2,), seconds=1.0, settle_s=1.0)
    assert row["watched"] == row["devices"] == 2
    assert row["polls"] >= 1
    assert row["cpu_share"] > 0
