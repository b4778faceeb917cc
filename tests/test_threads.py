"""The threads of real processes, and what is made of them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from patience import PATIENCE_S, until

from ublkwatch import symptoms, threads
from ublkwatch.model import Traffic
from ublkwatch.server import Servers, read_boot_id
from ublkwatch.symptoms import Thread

WORKERS = """
import threading, sys
ends = [threading.Event() for _ in range(2)]
crew = [threading.Thread(target=end.wait, name=f"q{i}") for i, end in enumerate(ends)]
for each in crew:
    each.start()
print(*(each.native_id for each in crew), flush=True)
for line in sys.stdin:
    if line == "spin\\n":
        while True: pass
    ends[int(line)].set()
    crew[int(line)].join()
    print("ended", flush=True)
"""
ASLEEP = Thread("q0", "S", 1.0, "io_cqring_wait", exiting=False)


@contextmanager
def crew() -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    with subprocess.Popen(
        [sys.executable, "-c", WORKERS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, [int(tid) for tid in process.stdout.readline().split()]
        finally:
            process.kill()


def say(process: subprocess.Popen[str], what: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{what}\n")


def end(process: subprocess.Popen[str], number: int) -> None:
    say(process, str(number))
    assert process.stdout is not None
    assert process.stdout.readline() == "ended\n"


def wait(told: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not told():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_threads_are_there_until_they_end() -> None:
    with crew() as (process, tids):
        assert threads.alive(process.pid) == {process.pid, *tids}
        # They may be on their way to it still.
        wait(lambda: {threads.look(process.pid)[tid].state for tid in tids} == {"S"})
        seen = threads.look(process.pid)
        assert not any(thread.exiting for thread in seen.values())
        end(process, 1)
        wait(lambda: threads.alive(process.pid) == {process.pid, tids[0]})
        assert symptoms.lost(tids, threads.look(process.pid)) == {tids[1]}
        process.kill()
        process.wait()
        assert threads.alive(process.pid) == set()
        assert threads.look(process.pid) == {}


def test_a_process_that_was_killed_has_lost_no_thread() -> None:
    with crew() as (process, tids):
        os.kill(process.pid, signal.SIGSTOP)
        wait(lambda: {t.state for t in threads.look(process.pid).values()} == {"T"})
        process.kill()
        wait(lambda: not threads.alive(process.pid))
        assert symptoms.lost(tids, threads.look(process.pid)) == set()


def test_a_first_thread_that_ended_is_not_alive() -> None:
    script = (
        "import ctypes, threading; threading.Thread(target=threading.Event().wait).start(); "
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as p:
        try:
            wait(lambda: len(threads.alive(p.pid)) == 1 and p.pid not in threads.alive(p.pid))
        finally:
            p.kill()


def test_what_a_stopped_process_does_is_told() -> None:
    with crew() as (process, _tids):
        os.kill(process.pid, signal.SIGSTOP)
        wait(lambda: {t.state for t in threads.look(process.pid).values()} == {"T"})
        seen = threads.look(process.pid)
        assert (
            symptoms.cause({}, seen, seen, 0.5) == "its process is stopped: SIGSTOP, or a debugger"
        )


def test_what_a_busy_process_does_is_told() -> None:
    with crew() as (process, _tids):
        name = threads.look(process.pid)[process.pid].name
        say(process, "spin")

        first = threads.look(process.pid)

        def used() -> float:
            return threads.look(process.pid)[process.pid].cpu_s - first[process.pid].cpu_s

        wait(lambda: used() >= 0.1)  # however long that takes where others are busy, too
        said = symptoms.cause({}, first, threads.look(process.pid), 0.1)
        assert said == f"thread {process.pid} ({name}) is busy on a CPU"


def test_a_pidfd_tells_of_a_threads_end() -> None:
    told = []

    async def story() -> None:
        servers = Servers(
            read_boot_id(), lambda _server, _status: None, lambda: told.append("look")
        )
        with crew() as (process, tids):
            server = servers.identify(process.pid)
            assert server is not None
            servers.watch_threads(server, tids)
            assert not servers._threads, "of a process that is not watched"
            servers.watch(server)
            servers.watch_threads(server, [*tids, 1 << 22])
            assert servers.watches(server, tids)
            assert not servers.watches(server, [*tids, 1 << 22])
            end(process, 0)
            await until(lambda: told == ["look"], "it is told")
            assert not servers.watches(server, tids)
            servers.kill(server)
            await until(lambda: not servers._threads, "forgotten with its process")
        servers.close()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({7: ASLEEP}, "its threads sleep in io_cqring_wait"),
        ({7: replace(ASLEEP, waits_in="")}, "its threads sleep"),
        (
            {7: replace(ASLEEP, state="D", waits_in="nfs"), 8: ASLEEP},
            "thread 7 (q0) is in uninterruptible sleep in nfs, where at most SIGKILL reaches it",
        ),
        ({7: replace(ASLEEP, cpu_s=1.4), 8: ASLEEP}, "thread 7 (q0) is busy on a CPU"),
        (
            {tid: replace(ASLEEP, state="t") for tid in (7, 8)} | {9: ASLEEP},
            "threads 7 (q0), 8 (q0) are stopped: SIGSTOP, or a debugger",
        ),
        (
            {tid: replace(ASLEEP, cpu_s=1.5) for tid in range(7, 12)},
            "thread 7 (q0) is busy on a CPU",
        ),
    ],
)
def test_the_cause_in_words(second: dict[int, Thread], says: str) -> None:
    assert symptoms.cause({}, {7: ASLEEP}, second, 0.5) == says


@pytest.mark.parametrize(
    ("traffic", "quiesces", "says"),
    [
        (Traffic(3, 7, parked=3), True, "a QUIESCE_DEV that has not finished"),
        (Traffic(3, 7, parked=1), True, ""),
        (Traffic(3, 7), True, ""),
        (Traffic(3, 7, parked=3), False, ""),
    ],
)
def test_a_quiesce_that_does_not_finish_is_named_where_there_can_be_one(
    traffic: Traffic, says: str, *, quiesces: bool
) -> None:
    said = symptoms.kept_back(traffic, quiesces=quiesces)
    assert said.startswith(says)
    assert bool(said) == bool(says)


def test_causes_are_told_together_and_many_threads_are_counted() -> None:
    then = {tid: f"w{tid}" for tid in range(1, 8)}
    second = {7: replace(ASLEEP, state="T"), 8: ASLEEP}
    assert symptoms.cause(then, {}, second, 0.5) == (
        "thread 7 (q0) is stopped: SIGSTOP, or a debugger; "
        "6 of the 7 threads are gone that it had when it was first looked at: "
        "1 (w1), 2 (w2), 3 (w3) and 3 more"
    )
