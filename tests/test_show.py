"""`ublkwatch status` as it is called: what it prints to whom, how it ends, and how it goes on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schema
from test_overview import ALL, ATTACHING, EXHAUSTED, RECOVERED, document
from test_past import Place, somebody_else
from test_status import HEALTHY, UNMANAGED

from ublkwatch.model import Record
from ublkwatch.verbs import Exit

PATIENCE_S = 30.0
MODULES_MAX = 145  # 119 of Python's own; with all verbs there are some 200 more
CURSOR_GONE, CURSOR_BACK = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    with contextlib.closing(place.store):
        yield place


def write(place: Place, *records: Record, age_s: float = 0.0) -> dict[str, Any]:
    at = time.time() - age_s
    made = document(*records) | {"written_at": at}
    place.store.write_status(json.dumps(made))
    os.utime(place.runtime_dir / "status.json", (at, at))
    return made


def out(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


# --- once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "code"),
    [
        ((HEALTHY, UNMANAGED), Exit.OK),
        ((), Exit.OK),
        ((HEALTHY, ATTACHING), Exit.UNHEALTHY),
        ((EXHAUSTED,), Exit.UNHEALTHY),
    ],
    ids=["well", "none", "being recovered", "given up"],
)
def test_the_exit_code_says_whether_all_is_well(
    place: Place, records: tuple[Record, ...], code: Exit, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place, *records)
    assert place.run("status") == code
    assert ("ublkb" in out(capsys)) is bool(records)


def test_without_a_daemon_the_last_page_is_shown_and_said_to_be_old(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place, HEALTHY, age_s=600)
    place.store.close()
    assert place.run("status") == Exit.NOT_RUNNING
    assert "ublkwatch is NOT RUNNING since " in (text := out(capsys))
    assert "(10 min ago)" in text
    assert place.run("status", "ublkb0", "--json") == Exit.NOT_RUNNING
    assert json.loads(out(capsys))["running"] is False
    place.store = Place(place.config.parent).store


def test_before_the_first_daemon_there_is_one_line(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run("status") == Exit.NOT_RUNNING
    line = error(capsys)
    assert "run/status.json: ublkwatch is not running, and has not been" in line
    assert line.endswith("start `ublkwatch run`")


def test_a_broken_document_is_one_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.store.write_status('{"schema_version"')
    assert place.run("status") == Exit.FAILED
    assert "run/status.json: " in error(capsys)


@pytest.mark.skipif(os.geteuid() != 0, reason="somebody else has to ask")
def test_who_is_not_root_may_look_and_where_that_is_forbidden_it_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        home.chmod(0o755)
        place = Place(home)
        write(place, HEALTHY)
        with contextlib.closing(place.store), somebody_else():
            assert place.run("status", "0") == Exit.OK
            assert out(capsys).startswith("ublkb0: well; watching, LIVE, for ")
            assert place.run("events") == Exit.OK
        with somebody_else():
            assert place.run("status") == Exit.NOT_RUNNING, "though the lock is not for them"
            assert "ublkwatch is NOT RUNNING since " in out(capsys)
        (home / "run/status.json").chmod(0o600)
        with somebody_else():
            assert place.run("status") == Exit.NO_PERMISSION
    assert error(capsys).endswith("run/status.json: Permission denied; try sudo")


def test_json_is_the_document_and_says_whether_somebody_keeps_it_fresh(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    made = write(place, *ALL)
    assert place.run("status", "--json") == Exit.UNHEALTHY
    told = json.loads(out(capsys))
    assert told == made | {"running": True}
    assert schema.complaints(told, schema.of("status")) == []
    assert place.run("status", "-o", "json") == Exit.UNHEALTHY
    assert json.loads(out(capsys)) == told


def test_what_is_for_programs_can_be_chosen_and_filtered(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    made = write(place, *ALL)
    devices = {device["dev_id"]: device for device in made["devices"]}
    place.run("status", "-o", "jsonl")
    assert [json.loads(line) for line in out(capsys).splitlines()] == made["devices"]
    place.run("status", "-o", "name")
    assert out(capsys).split() == [device["device"] for device in made["devices"]]
    place.run("status", "-x", "-o", "name")
    assert out(capsys).split() == ["ublkb4", "ublkb5", "ublkb8", "ublkb12"]
    place.run("status", "-x", "--json", "0", "/dev/ublkb8")
    assert json.loads(out(capsys))["devices"] == [devices[8]]
    write(place, HEALTHY)
    assert place.run("status", "-x", "-o", "name") == Exit.OK
    assert out(capsys) == ""


def test_some_devices_are_shown_in_full_and_their_health_decides(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place, RECOVERED, EXHAUSTED)
    assert place.run("status", "ublkb0") == Exit.OK
    text = out(capsys)
    assert text.startswith("ublkb0: well;")
    assert "    +     21 ms  starting   took 9 ms\n" in text
    assert place.run("status", "9", "0") == Exit.UNHEALTHY
    first, second = out(capsys).split("\n\n")
    assert (first[:7], second[:7]) == ("ublkb9:", "ublkb0:")
    assert place.run("status", "-x", "0") == Exit.OK
    assert out(capsys) == "all is well: 1 device: 1 well\n"
    assert place.run("status", "-o", "wide", "0") == Exit.OK
    assert "LAST HELD" in out(capsys)


def test_a_device_that_is_not_known_is_one_line(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place, HEALTHY)
    assert place.run("status", "0", "7") == Exit.REFUSED
    assert error(capsys) == (
        "ublkwatch: ublkb7: no such device is known; `ublkwatch status` shows those that are"
    )
    place.store.close()
    assert place.run("status", "7") == Exit.NOT_RUNNING
    assert error(capsys).endswith("and ublkwatch is not running")
    place.store = Place(place.config.parent).store


def test_an_old_document_that_was_confirmed_is_fresh(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place, *ALL, age_s=3600)
    place.run("status")
    assert "SILENT" in capsys.readouterr().out
    place.store.confirm_status()
    place.run("status")
    assert "SILENT" not in out(capsys)
    place.run("status", "-o", "json")
    assert json.loads(out(capsys))["written_at"] == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize("words", [["--watch", "ublkb0"], ["--watch=0"], ["-o", "xml"], ["sda"]])
def test_wrong_usage(place: Place, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        place.run("status", *words)
    assert end.value.code == Exit.USAGE
    assert "ublkwatch status: error: argument " in capsys.readouterr().err


def test_it_imports_little(place: Place) -> None:
    write(place, *ALL)
    python, *words = place.command("status")
    done = subprocess.run(
        [python, "-X", "importtime", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == Exit.UNHEALTHY, done.stderr
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    heavy = {"asyncio", "sqlite3", "psutil", "pyroute2", "prometheus_client", "jeepney", "logging"}
    assert not modules & heavy
    assert {"ublkwatch.page", "json"} <= modules
    assert len(modules) <= MODULES_MAX, sorted(modules)


# --- on a terminal --------------------------------------------------------------------------------


class Terminal:
    """A pseudo terminal, and a program that runs in it."""

    def __init__(self, command: list[str], columns: int = 100, lines: int = 30, **env: str) -> None:
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
        plain = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=plain | {"TERM": "xterm"} | env
        )
        os.close(theirs)
        self.text = ""

    def until(self, what: str, times: int = 1) -> str:
        """Return all that was shown, once it has this."""
        deadline = time.monotonic() + PATIENCE_S
        while self.text.count(what) < times and time.monotonic() < deadline and self._read():
            pass
        assert self.text.count(what) >= times, f"no {what!r} in {self.text!r}"
        return self.text

    def end(self) -> tuple[str, int]:
        """Return all that was shown, and the exit code; one that goes on for ever fails."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and self._read():
            pass
        return self.text, self.process.wait(PATIENCE_S)

    def _read(self) -> bool:
        if not select.select([self.ours], [], [], PATIENCE_S)[0]:
            return False
        try:
            self.text += os.read(self.ours, 1 << 16).decode()
        except OSError as gone:  # EIO: nobody has the other end any more
            if gone.errno != errno.EIO:
                raise
            return False
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


@contextlib.contextmanager
def terminal(command: list[str], **how: Any) -> Iterator[Terminal]:
    made = Terminal(command, **how)
    try:
        yield made
    finally:
        made.close()


def test_a_terminal_gets_colour_and_its_own_width(place: Place) -> None:
    write(place, HEALTHY, EXHAUSTED)
    with terminal(place.command("status"), columns=60) as shown:
        text, code = shown.end()
    assert code == Exit.UNHEALTHY
    assert "\x1b[31m1 in trouble\x1b[0m" in text
    plain = text.replace("\x1b[0m", "")
    for colour in ("1", "31", "32"):
        plain = plain.replace(f"\x1b[{colour}m", "")
    assert max(map(len, plain.splitlines())) <= 60


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colour_can_be_declined(place: Place, env: dict[str, str]) -> None:
    write(place, EXHAUSTED)
    with terminal(place.command("status"), **env) as shown:
        assert "\x1b" not in shown.end()[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_watched_page_is_redrawn_in_place_and_leaves_the_cursor(
    place: Place, number: int
) -> None:
    write(place, HEALTHY)
    with terminal(place.command("status", "--watch=0.1")) as shown:
        shown.until("1 well")
        write(place, EXHAUSTED)
        text = shown.until("1 in trouble")
        assert text.startswith(CURSOR_GONE)
        assert text.count("\x1b[H") >= 2
        assert text.count("\x1b[2J") == 1, "the screen is cleared once, and does not flicker"
        assert CURSOR_BACK not in text
        shown.process.send_signal(number)
        text, code = shown.end()
    assert code == Exit.OK
    assert CURSOR_BACK in text
    assert "Traceback" not in text


def test_a_watched_page_that_is_too_long_says_so(place: Place) -> None:
    write(place, *ALL)
    with terminal(place.command("status", "--watch"), lines=10) as shown:
        text = shown.until("more lines")
        assert text.partition("\x1b[H")[2].count("\r\n") == 9


def test_a_terminal_that_goes_away_ends_it(place: Place) -> None:
    write(place, HEALTHY)
    made = Terminal(place.command("status", "--watch=600"))
    made.until("1 well")
    os.close(made.ours)
    assert made.process.wait(PATIENCE_S) in (Exit.OK, -signal.SIGHUP)


def test_a_watched_page_in_a_pipe_is_repeated_and_ends_when_nobody_reads(place: Place) -> None:
    with subprocess.Popen(
        place.command("status", "--watch=0.1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "has not been" in process.stdout.readline(), "it waits for a daemon to come"
        write(place, HEALTHY)
        pages = 0
        while pages < 2:
            line = process.stdout.readline()
            assert "\x1b" not in line
            pages += line == "1 device: 1 well\n"
        process.stdout.close()
        assert process.wait(PATIENCE_S) == Exit.OK
        assert process.stderr.read() == ""
