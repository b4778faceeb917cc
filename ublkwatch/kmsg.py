"""The kernel's log: whom its OOM killer has ended."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_READS_MAX = 100_000  # one for each line, and more than any log holds
_LINE_MAX = 8192
# mm/oom_kill.c: of the host's memory and of a control group's; Documentation/ABI/testing/dev-kmsg
_KILLED = re.compile(rb"\d+,\d+,(\d+),[^;]*;.*ut of memory: Killed process (\d+) \(")


def oom_killed(pid: int, since: float, path: Path = Path("/dev/kmsg")) -> bool:
    """Tell whether the log has it that a process was killed for its memory since then.

    ``since`` is of CLOCK_MONOTONIC. For a thread. Where the log may not be read, nobody knows.
    """
    try:
        log = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    found = False
    try:
        for _ in range(_READS_MAX):
            with contextlib.suppress(BrokenPipeError):  # a line was overwritten before we read it
                lines = os.read(log, _LINE_MAX).splitlines()
                if not lines:
                    break
                killed = filter(None, map(_KILLED.match, lines))
                found |= any(int(it[2]) == pid and int(it[1]) / 1e6 >= since for it in killed)
    except OSError:  # EAGAIN: there are no more
        pass
    finally:
        os.close(log)
    return found
