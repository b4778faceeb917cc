"""Pages of the command line as text that can be compared: taken of the real thing, made steady."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from supervisor import DEADLINE_S, UBLKWATCH, Supervisor

from ublkwatch.page import Reader

CAPTURED = Path(__file__).parents[1] / "golden/captured"
_WIDTH = 80
_VARYING = (
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE"),
    (r"\b(pid|process) \d+", r"\1 PID"),
    (r"^new \d+ -$", "new PID -"),  # below SERVER
    (r"^\S+ \d+ [\d.]+[smhd]$", "NAME PID TIME"),
    (r"^(  Server  )\S+, ", r"\1NAME, "),
    (r"flags 0x[0-9a-f]+", "flags BITS"),  # a newer driver adds some of its own
    (r"(?<=\+) +[\d,]+ ms", " TIME"),  # of a timeline
    (r"[\d.,]+ (?:ms|s|min|h|days)\b", "TIME"),
    (r"(?<=[ <])[\d.]+(?:ms|s|m|h|d)$", "TIME"),  # ends a table's cell
)
_CONTINUED = re.compile(r"\n {10,}|(?<=\w)\n(?=\w+ .*recovered until it is started)")
_LABEL = re.compile(r" +\w+ outage: | .{9}|")


class Captures:
    """Keeps what an operator sees, and tells what is other than it was."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._differ: list[str] = []

    def take(self, name: str, *commands: str) -> None:
        """Run these, as an operator would; keep() what they write."""
        self.keep(name, "\n".join(map(self._transcript, commands)))

    def keep(self, name: str, seen: str) -> None:
        """Compare a text with the one that was kept; with UBLKWATCH_CAPTURE keep it."""
        path = CAPTURED / f"{name}.txt"
        if os.environ.get("UBLKWATCH_CAPTURE"):
            path.write_text(seen)
        kept = path.read_text() if path.exists() else ""
        if seen != kept:
            self._differ.append(f"--- {name} was:\n{kept}--- {name} is:\n{seen}")

    def compared(self) -> None:
        """Assert that all are what they were."""
        assert not self._differ, "\n".join(self._differ)

    def _transcript(self, command: str) -> str:
        done = subprocess.run(
            [*UBLKWATCH, *command.split(), "--config", str(self._supervisor.config)],
            env={**os.environ, "COLUMNS": str(_WIDTH)},
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )
        print(done.stdout)  # shown where the test fails: as it was
        assert done.stderr == "", done.stderr
        assert max(map(len, done.stdout.splitlines())) <= _WIDTH, done.stdout
        return f"$ ublkwatch {command}\n{steady(done.stdout)}[exit {done.returncode}]\n"


def steady(page: str) -> str:
    """Put a word for what is another one each time, and lay the page out anew around these."""
    lines = _CONTINUED.sub(" ", page).split("\n")
    rows = [row for row, line in enumerate(lines) if re.match(r"DEVICE |ublkb\d+ ", line)]
    table = [[_worded(cell) for cell in _cells(lines[rows[0]], lines[row])] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row, cells in zip(rows, table, strict=True):
        lines[row] = " ".join(map(str.ljust, cells, widths)).rstrip()
    reader, laid_out = Reader(0.0, running=True, width=_WIDTH), []
    for row, line in enumerate(lines):
        text = line if row in rows else _worded(line)
        label = _LABEL.match(text)[0]  # type: ignore[index]  # at least the empty one
        laid_out += reader.wrapped(text[len(label) :], label) or [text]
    return "\n".join(laid_out)


def _worded(text: str) -> str:
    for pattern, word in _VARYING:
        text = re.sub(pattern, word, text)
    return text


def _cells(header: str, row: str) -> list[str]:
    """Return what stands below each word of a table's header; in a straight table nothing juts."""
    starts = [found.start() for found in re.finditer(r"\S+", header)]
    assert all(row[at - 1 : at] in ("", " ") for at in starts[1:]), f"{header}\n{row}"
    ends = [*starts[1:], None]
    return [row[start:end].strip() for start, end in zip(starts, ends, strict=True)]
