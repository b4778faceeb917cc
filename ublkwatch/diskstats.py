"""The disks of which no request is under way, by /proc/diskstats: one file for all devices.

Its numbers are those of /sys/block/*/stat (Documentation/admin-guide/iostats.rst), and reading it
waits for no device either (block/genhd.c, diskstats_show()).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ublkwatch.model import Traffic

_CHUNK = 1 << 16
_NAME, _NUMBERS = 2, 3  # fields of a line: its name, and where those of `stat` begin
# Documentation/block/stat.rst: read, write, discard and flush requests completed; in flight.
_COMPLETED = (0, 4, 11, 15)
_IN_FLIGHT = 8


class Idle:
    """Says what is counted of those disks, as the same objects for as long as that is the same."""

    def __init__(self, path: Path = Path("/proc/diskstats")) -> None:
        """``path`` may be another file of that kind."""
        self._path = path
        self._content = b""
        self._lines: dict[bytes, tuple[int, Traffic] | None] = {}
        self._found: dict[int, Traffic] = {}

    def __call__(self) -> Mapping[int, Traffic]:
        """Return it by device; nothing is known of any where the file is not to be had."""
        try:
            content = self._read()
        except OSError:
            return {}
        if content != self._content:
            known, lines = self._lines, content.splitlines()
            self._lines = {line: known[line] if line in known else _parse(line) for line in lines}
            self._found = dict(filter(None, self._lines.values()))
            self._content = content
        return self._found

    def _read(self) -> bytes:
        file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # lxcfs mounts a file of its own there, which counts otherwise.
            if os.fstat(file).st_dev != self._path.parent.stat().st_dev:
                return b""
            return b"".join(iter(lambda: os.read(file, _CHUNK), b""))
        finally:
            os.close(file)


def _parse(line: bytes) -> tuple[int, Traffic] | None:
    """Return a device and its traffic; None of another disk, of a partition, and of a busy one."""
    fields = line.split()
    try:
        name, numbers = fields[_NAME], fields[_NUMBERS:]
        number = name.removeprefix(b"ublkb")
        if number == name or not number.isdigit() or int(numbers[_IN_FLIGHT]):
            return None
        completed = sum(int(numbers[at]) for at in _COMPLETED if at < len(numbers))
        return int(number), Traffic(0, completed)
    except (IndexError, ValueError):
        return None
