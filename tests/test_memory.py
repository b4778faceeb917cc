"""How much memory is free, from a file as /proc has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ublkwatch.memory import free_percent


def test_it_is_a_share_of_what_there_is(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2000 kB\nMemFree: 9 kB\nMemAvailable: 500 kB\n")
    assert free_percent(meminfo) == 25


@pytest.mark.parametrize("text", ["", "MemTotal: 2000 kB\n", "MemTotal: x\nMemAvailable: 1 kB\n"])
def test_where_nobody_can_tell_nothing_is_short(tmp_path: Path, text: str) -> None:
    (tmp_path / "meminfo").write_text(text)
    assert free_percent(tmp_path / "meminfo") == free_percent(tmp_path / "none") == 100


def test_this_machine_says_something() -> None:
    assert 0 < free_percent() <= 100
