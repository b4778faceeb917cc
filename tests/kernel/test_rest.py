"""At rest: what a poll does to the kernel, the disks and the files, however many devices there are.

Counted by strace, which sees every system call; none of it is about time.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import DEADLINE_S, wait_until
from supervisor import Supervisor, worker_of
from test_armour import tasks

from ublkwatch.discover import present
from ublkwatch.profiles import RUN_FILES

if TYPE_CHECKING:
    from conftest import Control, Servers

    Watch = Callable[..., Supervisor]

ENOUGH = 6  # polls: more than a confirmation of the status document takes
POLL = re.compile(r'openat\(.*"/sys/class/ublk-char"')
SUBMISSION = re.compile(r"io_uring_enter\(\d+, (\d+), (\d+), ")
OPENED = re.compile(r'openat\([^"]*"([^"]*)", (\S+?)[,)]')
WRITING = re.compile(
    r"\b(p?writev?(64|2)?|f(data)?sync|sync(fs|_file_range)?|ftruncate|truncate|fallocate|"
    r"(rename|unlink|mkdir|link|symlink|mknod)(at2?)?)\("
)
CALLS = "%file,%desc,io_uring_enter"


@contextmanager
def traced(output: Path, *pids: int) -> Iterator[None]:
    attach = [word for pid in pids for word in ("-p", str(pid))]
    command = ["strace", "-f", "-q", "-e", f"trace={CALLS}", "-o", str(output), *attach]
    tracer = subprocess.Popen(command)

    def attached(pid: int) -> bool:
        return all(f"TracerPid:\t{tracer.pid}" in each for each in tasks(pid, "status"))

    wait_until(lambda: all(map(attached, pids)), DEADLINE_S, "strace is attached")
    try:
        yield
    finally:
        tracer.terminate()
        tracer.wait(DEADLINE_S)


def polls(output: Path) -> list[list[str]]:
    """Return what was done in each poll that was seen whole, and until the next one."""
    found: list[list[str]] = []
    for line in output.read_text().splitlines():
        if POLL.search(line):
            found.append([])
        if found:
            found[-1].append(line)
    return found[:-1]


def is_calm(poll: list[str]) -> bool:
    """Tell whether no device was looked at, nor what its server declares, as each is at first."""
    looked = r'"/(proc/\d|run/ublk|sys/block/)|"\d+\.json"'
    return not any(re.search(looked, line) for line in poll)


def written(pid: int) -> int:
    """Return how many bytes it has had written to disks (proc_pid_io(5))."""
    (line,) = re.findall(r"^write_bytes: \d+$", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE)
    return int(line.split()[1])


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.full), 12])
def test_a_poll_at_rest_is_one_submission_a_few_files_and_no_write(
    server: Servers, watch: Watch, attach: Path, tmp_path: Path, count: int
) -> None:
    devices = range(count)
    RUN_FILES.mkdir(exist_ok=True)
    # It says which threads serve its queues: else it is asked for that again and again at first.
    server(tuple(devices), depth=1, more=("--run-dir", str(RUN_FILES)))
    tables = "".join(f'[[device]]\ndev_id = {n}\ncommand = ["{attach}"]\n' for n in devices)
    supervisor = watch({}, tables)
    for dev_id in devices:
        supervisor.watching(dev_id)
    assert supervisor.proc is not None
    pids = (supervisor.proc.pid, worker_of(supervisor.proc.pid))
    output, document = tmp_path / "trace", supervisor.runtime / "status.json"

    def calm() -> list[list[str]]:
        """Return the last polls in which nobody was looked at, one behind the other."""
        seen = polls(output)
        last = len(seen)
        while last and is_calm(seen[last - 1]):
            last -= 1
        return seen[last:]

    before = {pid: written(pid) for pid in pids}
    with traced(output, *pids):
        try:
            wait_until(lambda: len(calm()) >= ENOUGH, DEADLINE_S, "it is at rest for some polls")
        finally:
            print(*output.read_text().splitlines()[-200:], sep="\n")
        was = document.stat()
        wait_until(
            lambda: document.stat().st_mtime > was.st_mtime, DEADLINE_S, "the status is confirmed"
        )
        now = document.stat()
        found = calm()

    assert now.st_ino == was.st_ino, "and was not written anew"
    for poll in found:
        submissions = [each.groups() for line in poll if (each := SUBMISSION.search(line))]
        assert submissions == [(str(count), str(count))]
        opened = [each.groups() for line in poll if (each := OPENED.search(line))]
        assert {name for name, _ in opened} <= {
            *("/sys/class/ublk-char", "/sys/block", "/dev/ublk-control", "/proc/diskstats"),
            f"{supervisor.runtime}/attempts",
        }
        assert {name for name, how in opened if "O_RDONLY" not in how} == {"/dev/ublk-control"}
        assert [line for line in poll if WRITING.search(line)] == []
    assert {pid: written(pid) for pid in pids} == before


def test_a_disk_that_takes_anothers_place_has_another_number(
    server: Servers, control: Control
) -> None:
    """GET_DEV_INFO may say the same of both."""
    numbers = []
    for _ in range(3):
        creator = server(0, depth=1)
        numbers.append(present()[0])
        assert present() == {0: numbers[-1]}
        creator.kill()
        control.remove(0)
        assert present() == {}
    assert None not in numbers
    assert len(set(numbers)) == 3
