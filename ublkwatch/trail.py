"""The trail of events: a bounded file in the runtime directory, which everybody may follow.

One line of JSON for each event. When the file is full it becomes `events.jsonl.old`, and a new one
is begun: so who follows looks now and then whether the name leads to another file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

NAME = "events.jsonl"
SCHEMA_VERSION = 1

_FULL = 1 << 20  # bytes of one of the two files


def add(runtime_dir: Path, events: Iterable[dict[str, Any]]) -> None:
    """Append them, each in one write; OSError. For the daemon alone, in a thread."""
    path = runtime_dir / NAME
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size >= _FULL:
            path.replace(_old(path))
    lines = (json.dumps({"schema_version": SCHEMA_VERSION} | event) for event in events)
    with open(path, "ab", buffering=0, opener=_opener) as file:
        file.writelines(f"{line}\n".encode() for line in lines)  # each in one write


class Trail:
    """The events, for who reads: the last ones, then those that come."""

    def __init__(self, runtime_dir: Path, dev_ids: Iterable[int] = ()) -> None:
        """``dev_ids`` are the devices that matter; none given: all, and ublkwatch itself."""
        self._dev_ids = set(dev_ids)
        self._path = runtime_dir / NAME
        self._file: IO[bytes] | None = None
        self._rest = b""  # of a line that is being written

    def last(self, number: int | None) -> list[dict[str, Any]]:
        """Return the last events (None: all that there are); OSError where they are not for us."""
        before: list[bytes] = []
        with contextlib.suppress(FileNotFoundError):
            before = _old(self._path).read_bytes().split(b"\n")
        return [*deque([*self._of_ours(before), *self.more()], maxlen=number)]

    def more(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        found = self._lines()
        with contextlib.suppress(FileNotFoundError):
            there = self._path.stat().st_ino
            if self._file is None or os.fstat(self._file.fileno()).st_ino != there:
                found += self._lines()  # what came last to the old one
                self.close()
                self._file = self._path.open("rb")
                found += self._lines()
        return list(self._of_ours(found))

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
        self._file, self._rest = None, b""

    def _of_ours(self, lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
        for line in lines:
            with contextlib.suppress(ValueError):  # the daemon was killed amid a write
                event = json.loads(line)
                if not self._dev_ids or event.get("dev_id") in self._dev_ids:
                    yield event

    def _lines(self) -> list[bytes]:
        if self._file is None:
            return []
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return lines


def _opener(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o644)
    os.fchmod(descriptor, 0o644)  # whatever our umask is
    return descriptor


def _old(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")
