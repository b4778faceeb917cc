"""The threads of a server, read from /proc: that needs nothing of the server, nor of any disk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ublkwatch.symptoms import Thread

_PF_EXITING = 0x4  # include/linux/sched.h
_SIGKILL = 1 << 8  # in a mask of signals
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


def alive(pid: int, proc: Path = _PROC) -> set[int]:
    """Return the ids of a process's threads that have not ended; none where it is gone."""
    home = proc / str(pid) / "task"
    try:
        tids = {int(entry) for entry in os.listdir(home)}  # noqa: PTH208 - with every poll
        # A first thread that ended stays, as a zombie, for as long as the others live.
        return tids - {pid} if _read(home / str(pid)).state in "ZX" else tids
    except OSError:
        return set()


def look(pid: int, proc: Path = _PROC) -> dict[int, Thread]:
    """Return what the threads of a process do that have not ended; none where it is gone."""
    found = {}
    for tid in alive(pid, proc):
        with contextlib.suppress(OSError):
            found[tid] = _read(proc / str(pid) / "task" / str(tid))
    return found


def _read(home: Path) -> Thread:
    """Read one thread (proc_pid_stat(5), proc_pid_status(5), proc_pid_wchan(5))."""
    stat = (home / "stat").read_text(errors="replace")
    name, _, rest = stat.partition("(")[2].rpartition(")")
    fields = rest.split()
    status = (home / "status").read_text(errors="replace")
    lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    killed = bool(int(lines["SigPnd"], 16) & _SIGKILL)
    waits_in = ""
    with contextlib.suppress(OSError):  # for root alone
        waits_in = (home / "wchan").read_text().strip("0\n")
    return Thread(
        name="".join(c if c.isprintable() else "?" for c in name),  # its own word
        state=fields[0],
        cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS_PER_S,
        waits_in=waits_in,
        exiting=killed or bool(int(fields[6]) & _PF_EXITING),
    )
