"""Who uses a disk, by what the kernel shows: never by opening it, which could hang, or be the use.

Mounts of all mount namespaces, what is stacked on it, swap, and the descriptors of all processes.
Not to be seen are mounts of a namespace that has no process, and what the kernel itself has opened
for others (an NVMe or SCSI target): there only TRY_STOP_DEV knows better.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_SHOWN_MAX = 5


@dataclass(frozen=True, slots=True)
class Usage:
    """How a disk is used, in words; and of how many processes nobody could tell."""

    uses: tuple[str, ...] = ()
    unseen: int = 0

    def __str__(self) -> str:
        """Say it in one line; "" where nobody is seen to use it."""
        more = len(self.uses) - _SHOWN_MAX
        rest = f", and {more} more" if more > 0 else ""
        return "; ".join(self.uses[:_SHOWN_MAX]) + rest


def usage(dev_id: int, root: Path = Path("/")) -> Usage:
    """Look who uses /dev/ublkbN and its partitions; slow. ``root`` has proc and sys, for tests."""
    disk = _Disk.of(dev_id, root)
    processes = _Processes(disk, root)
    found = (*_stacked(disk, root), *_swaps(disk, root), *processes.mounts(), *processes.opens())
    return Usage(tuple(dict.fromkeys(found)), processes.unseen)


@dataclass(frozen=True, slots=True)
class _Disk:
    """Its names and numbers, those of its partitions too."""

    homes: tuple[Path, ...]
    numbers: frozenset[str]  # "259:0"
    name: re.Pattern[str]

    @classmethod
    def of(cls, dev_id: int, root: Path) -> _Disk:
        home = root / f"sys/block/ublkb{dev_id}"
        homes = (home, *sorted(home.glob(f"ublkb{dev_id}p*")))
        numbers = set()
        for each in homes:
            with contextlib.suppress(OSError):
                numbers.add((each / "dev").read_text().strip())
        # In a container, the node may lie elsewhere than in /dev.
        name = re.compile(rf"(?:/.*)?/ublkb{dev_id}(?:p\d+)?(?: \(deleted\))?")
        return cls(homes, frozenset(numbers), name)


def _stacked(disk: _Disk, root: Path) -> Iterator[str]:
    for home in disk.homes:
        for holder in _entries(home / "holders"):
            yield f"{holder} is stacked on {home.name}"
        for device in root.glob(f"sys/fs/btrfs/*/devices/{home.name}"):
            yield f"{home.name} is part of the btrfs {device.parts[-3]}, which is mounted"
    for file in root.glob("sys/block/loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if disk.name.fullmatch(file.read_text().strip()):
                yield f"{file.parts[-3]} is a loop device on it"


def _swaps(disk: _Disk, root: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for line in (root / "proc/swaps").read_text().splitlines()[1:]:
            if disk.name.fullmatch(line.split()[0]):
                yield f"{line.split()[0]} is swapped on"


@dataclass
class _Processes:
    """What all processes show of the disk."""

    disk: _Disk
    root: Path
    unseen: int = 0
    _blind: set[str] = field(default_factory=set)

    def mounts(self) -> Iterator[str]:
        """Yield where it is mounted, in whichever mount namespace a process has."""
        seen = set()
        for pid in self._pids():
            home = self.root / "proc" / pid
            try:
                space = os.readlink(home / "ns/mnt")  # noqa: PTH115 - thousands of them
                if space in seen:
                    continue
                text = (home / "mountinfo").read_text(errors="surrogateescape")
            except PermissionError:
                self._not_seen(pid)
                continue
            except OSError:  # it has ended
                continue
            seen.add(space)
            for line in text.splitlines():
                # proc_pid_mountinfo(5); a btrfs has a number of its own, and the source's name.
                words = line.split()
                source = words[words.index("-") + 2] if "-" in words[:-2] else ""
                if words[2] in self.disk.numbers or self.disk.name.fullmatch(source):
                    where = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), words[4])
                    yield f"mounted on {where} (process {pid} sees it)"

    def opens(self) -> Iterator[str]:
        """Yield the processes that have it open."""
        for pid in self._pids():
            home = f"{self.root}/proc/{pid}/fd"
            try:
                entries = os.listdir(home)  # noqa: PTH208 - thousands of them
            except PermissionError:
                self._not_seen(pid)
                continue
            except OSError:  # it has ended
                continue
            for entry in entries:
                with contextlib.suppress(OSError):
                    name = os.readlink(f"{home}/{entry}")  # noqa: PTH115 - as above
                    if self.disk.name.fullmatch(name):
                        yield f"{name} is open in process {pid} ({self._name(pid)})"

    def _pids(self) -> list[str]:
        return sorted(filter(str.isdigit, _entries(self.root / "proc")), key=int)

    def _not_seen(self, pid: str) -> None:
        if pid not in self._blind:
            self._blind.add(pid)
            self.unseen += 1

    def _name(self, pid: str) -> str:
        with contextlib.suppress(OSError):
            return (self.root / f"proc/{pid}/comm").read_text(errors="replace").strip()
        return "?"


def _entries(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))  # noqa: PTH208 - names are all that is wanted
    except OSError:
        return []
