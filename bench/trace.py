"""What happens inside, by the kernel's tracing: of every contestant alike, at next to no cost.

Its clock is CLOCK_MONOTONIC. When a server was exec'ed and said READY=1 are events that every
kernel has. When START returned and /dev/ublkcN was opened (which is what a server does with its
line) takes two probes on the driver's own functions; a kernel that has no kprobes does without.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ublkwatch.uapi import Cmd

TRACING = Path("/sys/kernel/tracing")
_GROUP = "ublkwatch_bench"
# struct io_uring_cmd has its SQE at 8. That has cmd_op at 8, its command, so dev_id, at 48.
_PROBES = {
    "start": "r:{} ublk_ctrl_uring_cmd op=+8(+8($arg1)):x32 dev=+48(+8($arg1)):u32",
    "open": "p:{} ublk_ch_open",
}
_EVENTS = {
    "sched/sched_process_exec": "",
    "syscalls/sys_enter_sendto": f"len == {len(b'READY=1')}",
    f"{_GROUP}/start": f"op == {Cmd.START_USER_RECOVERY:#x}",
    f"{_GROUP}/open": "",
}
_LINE = re.compile(r"-(?P<tid>\d+) +\[\d+\].*? (?P<at>\d+\.\d+): (?P<what>\w+)(?P<rest>.*)")


def moments(trace: str, pid: int, dev_id: int, live: float) -> dict[str, float]:
    """Return what led to that server of that device, which was seen LIVE at ``live``.

    "spawned" and "ready": when it was exec'ed, and first said READY=1. "accepted": when the last
    START returned, since those before that were EBUSY. "opened": when /dev/ublkcN was last opened.
    Other devices' servers must not be killed meanwhile.
    """
    found: dict[str, float] = {}
    for match in _LINE.finditer(trace):
        at, own = float(match["at"]), int(match["tid"]) == pid
        if at > live:
            continue
        match match["what"]:
            case "sched_process_exec" if own:
                found.setdefault("spawned", at)
            case "sys_sendto" if own:
                found.setdefault("ready", at)
            case "start" if re.search(rf"\bdev={dev_id}\b", match["rest"]):
                found["accepted"] = at
            case "open":
                found["opened"] = at
    return found


class Trace:
    """A tracing instance of our own, which disturbs nobody else's."""

    def __init__(self, home: Path) -> None:
        self._trace = home / "trace"

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[Trace]:
        """Trace; what the kernel cannot is left out."""
        home = TRACING / f"instances/ublkwatch-bench-{os.getpid()}"
        with contextlib.ExitStack() as stack:
            for name, probe in _PROBES.items():
                with contextlib.suppress(OSError):
                    _append(probe.format(f"{_GROUP}/{name}"))
                    stack.callback(_append, f"-:{_GROUP}/{name}")
            home.mkdir()
            stack.callback(home.rmdir)
            (home / "trace_clock").write_text("mono")
            (home / "buffer_size_kb").write_text("1024")
            for event, condition in _EVENTS.items():
                if (directory := home / "events" / event).exists():
                    if condition:
                        (directory / "filter").write_text(condition)
                    (directory / "enable").write_text("1")
            yield cls(home)

    def clear(self) -> None:
        """Forget what was seen so far."""
        self._trace.write_text("")

    def seen(self) -> str:
        """Return all since clear()."""
        return self._trace.read_text(errors="replace")


def _append(probe: str) -> None:
    # Not by open("a"), whose seek to the end this file refuses.
    events = os.open(TRACING / "kprobe_events", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        os.write(events, f"{probe}\n".encode())
    finally:
        os.close(events)
