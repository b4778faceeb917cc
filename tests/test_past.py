"""`ublkwatch history` and `events`: the words, the JSON, the exit codes; over real files."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schema
from test_news import GIVEN_UP, RECOVERY, outage
from test_overview import GOLDEN
from test_status import WALL

from ublkwatch import chronicle, cli, past, trail
from ublkwatch.store import Store
from ublkwatch.verbs import Exit

PATIENCE_S = 60.0
HOLD: dict[str, Any] = {
    "kind": "order",
    "at": WALL + 60,
    "level": "warning",
    "text": "ublk 4: hold for 1800 s, asked by uid 0 (root), pid 9: taken",
    "reason": "new disk",
    "uid": 0,
    "pid": 9,
    "exe": "python3.11",
    "result": "taken",
    "dev_id": 4,
    "order": "hold",
    "for_s": 1800.0,
}
RELOAD = HOLD | {"dev_id": None, "order": "reload", "name": "", "reason": "", "exe": ""}
RELOAD |= {
    "for_s": None,
    "result": "refused: no such file",
    "at": WALL + 70,
    "text": "reload: refused",
}
STALL = outage(RECOVERY) | {"cause": "stall", "cause_detail": "7 requests wait"}
OOM = outage(RECOVERY) | {"cause": chronicle.OOM_KILL, "asked_by": None}
OLD: dict[str, Any] = {  # as the first version wrote it
    "dev_id": 3,
    "instance": "boot/1",
    "at": WALL - 86400,
    "result": "success",
    "reason": None,
    "detected_by": "poll",
    "attempts": 2,
    "held_s": 0.5,
    "timeline": [["lost", 0.0], ["draining", 0.0], ["starting", 0.4], ["probation", 0.5]],
}
ROWS = [OLD, outage(RECOVERY), STALL, OOM, outage(GIVEN_UP), HOLD, RELOAD]


class Place:
    """A store that a daemon has left."""

    def __init__(self, home: Path) -> None:
        self.runtime_dir = home / "run"
        self.config = home / "ublkwatch.toml"
        self.config.write_text(f'runtime_dir = "{home}/run"\nstate_dir = "{home}/state"\n')
        self.store = Store(home / "run", home / "state")

    def run(self, verb: str, *words: str) -> int:
        return cli.main([verb, *words, "--config", str(self.config)])

    def command(self, verb: str, *words: str) -> list[str]:
        return [sys.executable, "-m", "ublkwatch", verb, *words, "--config", str(self.config)]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    with contextlib.closing(place.store):
        yield place


@pytest.fixture
def full(place: Place) -> Place:
    for row in ROWS:
        place.store.add_history(row)
    return place


def history(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert schema.complaints(found, schema.of("history")) == []
    return found


# --- history --------------------------------------------------------------------------------------


def test_the_history_in_words(full: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with_utc = {**os.environ, "TZ": "UTC"}
    command = full.command("history")
    done = subprocess.run(command, env=with_utc, capture_output=True, text=True, check=True)
    assert done.stdout == (GOLDEN / "history.txt").read_text()
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert full.run("history", "--limit", "1", "4") == Exit.OK
    assert "hold for 30 min" in capsys.readouterr().out


def test_the_history_for_programs(full: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert full.run("history", "--json") == Exit.OK
    told = history(capsys)
    assert (told["schema_version"], told["left_out"]) == (1, 0)
    assert [entry["id"] for entry in told["history"]] == [1, 2, 3, 4, 5, 6, 7]
    old, recovery, *_ = told["history"]
    assert (old["kind"], old["device"], old["cause"]) == ("recovery", "ublkb3", None)
    assert recovery["phases"][0] == {
        "phase": "draining",
        "at_s": 0.0,
        "took_s": pytest.approx(0.0211),
    }
    assert [each["phase"] for each in recovery["phases"]][-1] == "probation"
    assert recovery["took_s"] == pytest.approx(1.0421)


def test_a_part_of_the_history(full: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert full.run("history", "--json", "--limit", "2") == Exit.OK
    told = history(capsys)
    assert ([entry["id"] for entry in told["history"]], told["left_out"]) == ([6, 7], 5)
    assert full.run("history", "ublkb3", "4", "--json") == Exit.OK
    assert [entry["id"] for entry in history(capsys)["history"]] == [1, 6]
    assert full.run("history", "--since", "2023-11-14T12:00:00", "--json") == Exit.OK
    assert [entry["id"] for entry in history(capsys)["history"]] == [2, 3, 4, 5, 6, 7]
    assert full.run("history", "--since", "1h", "--json") == Exit.OK
    assert history(capsys)["history"] == []
    assert full.run("history", "--limit", "2") == Exit.OK
    assert capsys.readouterr().out.startswith("... 5 before these; --limit 0 shows all\n")


def test_no_history_yet(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run("history") == Exit.OK
    assert capsys.readouterr().out == "nothing has happened, as far as is remembered\n"


@pytest.mark.parametrize(
    "words", [["--since", "yesterday"], ["--since", "1y"], ["--limit", "-1"], ["ublkx"]]
)
def test_what_is_no_time_number_or_device_is_wrong_usage(place: Place, words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        place.run("history", *words)
    assert end.value.code == Exit.USAGE


def test_a_broken_history_is_one_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.config.parent / "state/history.sqlite").write_text("no database" * 200)
    assert place.run("history") == Exit.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert "history.sqlite cannot be read: file is not a database" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="somebody else has to ask")
def test_the_history_is_roots(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        home.chmod(0o755)
        place = Place(home)
        with contextlib.closing(place.store), somebody_else():
            assert place.run("history") == Exit.NO_PERMISSION
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("history.sqlite: only root may look; try sudo")


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# --- events ---------------------------------------------------------------------------------------

EVENT = chronicle.event(RECOVERY, "info", "ublk 0: probation -> watching\x1b[2J (InfoRead)")


def test_events_in_words_and_for_programs(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    started = {"kind": "started", "at": WALL, "dev_id": None, "level": "info", "text": "watches"}
    trail.add(place.runtime_dir, [started, EVENT, HOLD])
    assert place.run("events") == Exit.OK
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith(".000  watches")
    assert second.endswith("  ublk 0: probation -> watching [2J (InfoRead)")
    assert third.endswith(HOLD["text"])
    assert place.run("events", "--json") == Exit.OK
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line in lines:
        assert schema.complaints(line, schema.of("event")) == []
    assert [line["device"] for line in lines] == [None, "ublkb0", "ublkb4"]
    assert place.run("events", "4", "--limit", "5") == Exit.OK
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_events_of_a_daemon_that_is_down_end_with_that_code(place: Place) -> None:
    trail.add(place.runtime_dir, [EVENT])
    place.store.close()
    assert place.run("events") == Exit.NOT_RUNNING
    place.store = Store(place.runtime_dir, place.config.parent / "state")


def test_who_follows_sees_events_as_they_come_and_ends_with_ctrl_c(place: Place) -> None:
    trail.add(place.runtime_dir, [EVENT])
    with follower(place) as process:
        assert json.loads(line_of(process))["kind"] == "transition"
        trail.add(place.runtime_dir, [HOLD])
        assert json.loads(line_of(process))["order"] == "hold"
        process.send_signal(2)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (out, err, process.returncode) == ("", "", Exit.OK)


def test_who_follows_ends_when_nobody_reads_though_nothing_happens(place: Place) -> None:
    trail.add(place.runtime_dir, [EVENT])
    with follower(place) as process:
        line_of(process)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(PATIENCE_S) == Exit.OK
        assert process.stderr is not None
        assert process.stderr.read() == ""


@contextlib.contextmanager
def follower(place: Place) -> Iterator[subprocess.Popen[str]]:
    command = place.command("events", "--follow", "--json")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_phase_that_has_not_ended_is_not_measured() -> None:
    entry = past.entry_of({"kind": "recovery", "timeline": [["lost", 0.0]], "dev_id": 1, "at": 1.0})
    assert (entry["phases"], entry["took_s"]) == ([], 0.0)
