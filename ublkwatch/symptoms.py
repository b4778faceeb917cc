"""What shows that a server hangs, and why: its traffic, its threads. Pure.

No number of its own says that a server hangs: one that is slow has requests in flight, and one that
is idle completes none. Both at once, for long, is a stall; its threads tell the cause.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ublkwatch.model import Traffic

_BUSY = 0.5  # of a CPU
_TOLD_MAX = 3  # threads, by their names


@dataclass(frozen=True, slots=True)
class Flow:
    """What is known of a device's traffic, as of the last look."""

    completed: int
    seen: float  # when that was
    still_s: float = 0.0  # for so long requests were seen to wait, and none to be completed


def observe(before: Flow | None, traffic: Traffic, now: float, beat_s: float) -> Flow:
    """Take a look; time between two looks beyond ``beat_s`` is our own absence, and not counted."""
    if before is None or traffic.completed != before.completed or traffic.inflight == 0:
        return Flow(traffic.completed, now)
    return Flow(traffic.completed, now, before.still_s + min(now - before.seen, beat_s))


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread at one moment (proc_pid_stat(5))."""

    name: str
    state: str  # R, S, D, T, t, Z, X or I
    cpu_s: float  # CPU time, ever
    waits_in: str  # the kernel's function; "" where nothing is said
    exiting: bool  # it ends, or is about to


def lost(declared: Iterable[int], threads: Mapping[int, Thread]) -> set[int]:
    """Return which of the declared threads are gone, of a process that does not end as a whole."""
    if all(thread.exiting for thread in threads.values()):
        return set()
    return set(declared) - threads.keys()


def cause(
    then: Mapping[int, str], first: Mapping[int, Thread], second: Mapping[int, Thread], gap_s: float
) -> str:
    """Say what keeps a server from completing requests, as far as its threads tell.

    ``then`` has the names of the threads that it had at the first look; two looks at them,
    ``gap_s`` apart, tell who is busy.
    """
    said = []
    if stopped := _in_state(second, "Tt"):
        said.append(f"{_whole(stopped, second)} stopped: SIGSTOP, or a debugger")
    if sleeping := _in_state(second, "D"):
        where = ", ".join(sorted({t.waits_in for t in sleeping.values() if t.waits_in}))
        said.append(
            f"{_named(sleeping)} in uninterruptible sleep{f' in {where}' if where else ''}, "
            "where at most SIGKILL reaches it"
        )
    if gone := {tid: name for tid, name in then.items() if tid not in second}:
        said.append(
            f"{len(gone)} of the {len(then)} threads are gone that it had when it was first looked "
            f"at: {_names(gone)}"
        )
    busy = {}
    for tid, thread in second.items():
        used = thread.cpu_s - first[tid].cpu_s if tid in first else 0.0
        if gap_s and used / gap_s >= _BUSY:
            busy[tid] = thread
    if busy:
        said.append(f"{_named(busy)} busy on a CPU")
    if not said:
        where = ", ".join(sorted({t.waits_in for t in second.values() if t.waits_in}))
        said.append(f"its threads sleep{f' in {where}' if where else ''}")
    return "; ".join(said)


def kept_back(traffic: Traffic, *, quiesces: bool) -> str:
    """Say what may keep requests from the server; "" where it has some, or nothing can.

    ``quiesces``: the device has UBLK_F_QUIESCE. Flushes that wait look the same.
    """
    if quiesces and traffic.inflight == traffic.parked:
        return "a QUIESCE_DEV that has not finished may keep the requests from it; "
    return ""


def _in_state(threads: Mapping[int, Thread], states: str) -> dict[int, Thread]:
    return {tid: thread for tid, thread in threads.items() if thread.state in states}


def _whole(some: Mapping[int, Thread], threads: Mapping[int, Thread]) -> str:
    return "its process is" if len(some) == len(threads) else _named(some)


def _named(threads: Mapping[int, Thread]) -> str:
    names = _names({tid: thread.name for tid, thread in threads.items()})
    return f"thread{'s' * (len(threads) > 1)} {names} {'are' if len(threads) > 1 else 'is'}"


def _names(threads: Mapping[int, str]) -> str:
    shown = [f"{tid} ({name})" for tid, name in sorted(threads.items())]
    more = len(shown) - _TOLD_MAX
    return ", ".join(shown[:_TOLD_MAX]) + (f" and {more} more" if more > 0 else "")
