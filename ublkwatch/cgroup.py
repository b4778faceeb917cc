"""Control groups (version 2): one for an attempt holds every process of it, forks included.

Files only: it works with systemd and without, wherever the hierarchy is mounted and ours to write.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

_LOOK_S = 0.01


def root(of: Path = Path("/")) -> Path | None:
    """Return where the unified hierarchy is mounted, or None.

    ``of`` is /proc/PID/root for that of another process: ours may begin in the midst of it.
    """
    mounts = Path("/proc/self/mountinfo") if of == Path("/") else of.parent / "mountinfo"
    with contextlib.suppress(OSError, ValueError):
        for line in mounts.read_text().splitlines():
            before, _, after = line.partition(" - ")
            if after.startswith("cgroup2 "):
                return of / before.split()[4].lstrip("/")
    return None


def own() -> Path | None:
    """Return the control group that we are in, or None where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/") and (top := root()) is not None:
                return top / line[len("0::/") :]
    return None


def make(parent: Path, name: str) -> Path:
    """Make a group, or take an empty one that was left behind; OSError where that is impossible."""
    group = parent / name
    with contextlib.suppress(FileExistsError):
        group.mkdir()
    return group


def enter(group: Path, pid: int) -> None:
    """Move a process there; what it forks from then on is there, too."""
    (group / "cgroup.procs").write_text(str(pid))


def pids(group: Path) -> set[int]:
    """Return the processes in a group and below it; none where there is no such group.

    One that has ended and was not waited for yet may be among them.
    """
    found: set[int] = set()
    for directory, _, _ in os.walk(group):
        with contextlib.suppress(OSError):
            found |= {int(pid) for pid in (Path(directory) / "cgroup.procs").read_text().split()}
    return found


def populated(group: Path) -> bool:
    """Tell whether any process lives in a group or below it, as the kernel says."""
    try:
        return "populated 1" in (group / "cgroup.events").read_text()
    except OSError:
        return False  # the group itself is gone, which only an empty one can be


async def end(group: Path) -> None:
    """SIGKILL all that is in a group, until it is empty; the caller bounds the wait."""
    while populated(group):
        with contextlib.suppress(OSError):
            (group / "cgroup.kill").write_text("1")
        await asyncio.sleep(_LOOK_S)


def remove(group: Path) -> None:
    """Remove an empty group; one that is not empty stays."""
    for directory, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            Path(directory).rmdir()
