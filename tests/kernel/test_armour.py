"""A supervisor that cannot hang with its devices: what of it is in memory, and what it opens."""

from __future__ import annotations

import contextlib
import importlib.util
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import DEADLINE_S, end_tagged, wait_until
from stack import Stack, tool
from supervisor import Supervisor, worker_of

import ublkwatch
from ublkwatch.client import Client
from ublkwatch.model import Order
from ublkwatch.wire import Request

if TYPE_CHECKING:
    from conftest import Servers

# PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE (include/linux/sched.h): what PR_SET_IO_FLUSHER sets.
IO_FLUSHER = 0x00080000 | 0x00100000
VM = Path("/proc/sys/vm")
MIB = 1 << 20


# --- a supervisor on a root file system of its own -----------------------------------------------


class Root:
    """A root file system with Python and ublkwatch, which can be stalled, and a /run in memory."""

    # All that a daemon and its worker import or map, by their names.
    LIST = """
import runpy, sys, sysconfig
from ublkwatch import cli, ctrl_worker, daemon, discover, siting, store
discover.load_uevents()
sysconfig.get_path("purelib")
modules = [module for each in list(sys.modules.values())
           if (module := getattr(each, "__file__", None))]
mapped = {line.split()[5] for line in open("/proc/self/maps") if " /" in line}
print(*modules, *mapped)
"""
    SHELL, LOADER = "/bin/sh", "/lib64/ld-linux-x86-64.so.2"

    def __init__(self, directory: Path, stack: Stack) -> None:
        """Make it of what this Python needs, at the same places."""
        self.point, self.run = directory / "root", directory / "memory"
        for each in (self.point, self.run):
            each.mkdir()
        image = directory / "image"
        with image.open("wb") as file:
            file.truncate(256 * MIB)
        tool("mkfs.ext4", "-q", "-F", image)
        stack.attach(stack.linear(stack.loop(image)), self.point)
        ours = map(str, Path(ublkwatch.__file__).parent.rglob("*.py"))
        for name in (*tool(sys.executable, "-c", self.LIST).split(), *ours):
            self._copy(Path(name))
            if name.endswith(".py"):
                self._copy(Path(importlib.util.cache_from_source(name)))
            elif ".so" in name:  # by each name that it is asked for by
                for link in Path(name).parent.glob(f"{Path(name).name.partition('.so')[0]}.so*"):
                    self._copy(link, follow_symlinks=False)
        self._copy(Path(self.SHELL))
        self._copy(Path(self.LOADER))
        for name in ("etc", "proc", "sys", "dev", "run", "mnt"):
            (self.point / name).mkdir(exist_ok=True)
        (self.point / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
        (self.point / "etc/witness").write_bytes(os.urandom(MIB))
        tool("mount", "-o", "remount,ro,noatime", self.point)
        stack.attach("-t", "tmpfs", "tmpfs", self.run)
        self.run.chmod(0o755)
        stack.attach("--bind", self.run, self.point / "run")
        for name in ("proc", "sys", "dev"):
            stack.attach("--bind", f"/{name}", self.point / name)

    def _copy(self, source: Path, *, follow_symlinks: bool = True) -> None:
        target = self.point / str(source)[1:]
        if source.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=follow_symlinks)


class Inside(Supervisor):
    """`ublkwatch run` in the root, with all that is its own in memory."""

    def __init__(self, root: Root) -> None:
        super().__init__(root.run, {})
        self.config.write_text(
            'runtime_dir = "/run/run"\nstate_dir = "/run/state"\npoll_interval_s = 0.5\n'
            'launcher = "fork"\n[metrics]\nport = 0\n[recovery]\nprobation_s = 0.3\n'
            '[[device]]\ndev_id = 0\ncommand = ["/run/attach", "/run/disk-"]\n'
            'pre_recover = ["/run/hook"]\n'
        )
        self._root = root

    def start(self) -> Inside:
        python = str(Path(sys.executable).resolve())
        packages = f"{Path(ublkwatch.__file__).parents[1]}:{sysconfig.get_path('purelib')}"
        with self.log.open("ab") as log:
            self.proc = subprocess.Popen(
                ["/usr/sbin/chroot", self._root.point, python, "-m", "ublkwatch", "run",
                 "--config", "/run/ublkwatch.toml"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, cwd="/",
                env={"PYTHONPATH": packages},
            )  # fmt: skip
        return self

    def ask(self, order: Order) -> None:
        """Give an order; not by the command, whose new Python takes memory."""
        assert Client(self.home / "run").ask(Request(order, 0)).why == ""


@pytest.mark.usefixtures("no_block_errors")
def test_it_recovers_whatever_hangs(
    server: Servers, stack: Stack, attach: Path, tmp_path: Path
) -> None:
    root = Root(tmp_path, stack)
    shutil.copy(attach, root.run / "attach")
    hook = root.run / "hook"
    hook.write_text(
        '#!/bin/sh\nuntil read -r score </proc/$$/oom_score_adj && [ "$score" = 0 ]; do :; done\n'
        'read -r stat </proc/$$/stat\necho "$stat" >/run/told\n'
    )
    hook.chmod(0o755)
    server(target="loop", queues=2, size="96M", more=("--file", f"{root.run}/disk-{{dev_id}}"))
    supervisor = Inside(root).start()
    try:
        supervisor.watching()
        supervisor.until_said("memory locked, and ")
        point = root.point / "mnt"
        stack.mount("/dev/ublkb0", point)
        armoured_it_touches_nothing_of_the_dead_device_and_reads_nothing_else(supervisor, tmp_path)
        memory_may_be_short_and_full_of_what_the_dead_device_is_to_keep(supervisor, point)
        the_root_file_system_may_hang(supervisor, stack, root)
        stack.down()  # while somebody serves
    finally:
        supervisor.kill()
        end_tagged()


# --- what is opened ------------------------------------------------------------------------------


def flags(stat: str) -> int:
    """Return field 9 of a /proc/PID/stat."""
    return int(stat.rpartition(")")[2].split()[6])


def tasks(pid: int, name: str) -> list[str]:
    """Return a file of each of its threads, but of those that end meanwhile: theirs are short."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append((task / name).read_text())
    return found


def flags_of(pid: int) -> set[int]:
    return {flags(stat) & IO_FLUSHER for stat in tasks(pid, "stat")}


def not_whole(pid: int) -> list[str]:
    """Return what a process has mapped from files that is not in memory whole, and locked."""
    found, name = [], ""
    sizes: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", words[0]):
            name = " ".join(words[5:]) if words[1][:3] != "---" else ""
        elif words[0] in ("Size:", "Rss:"):
            sizes[words[0]] = int(words[1])
        elif words[0] == "VmFlags:" and re.match(r"/(?!memfd:|dev/)", name):
            whole = sizes["Rss:"] >= sizes["Size:"] and "lo" in words
            found += [] if whole else [f"{name}: {sizes} {words}"]
    return found


class Trace:
    """strace of a supervisor and its worker: the files that they look at, from now on."""

    CALLS = "%file,sync,syncfs,fsync,fdatasync,fstatfs,clone,clone3,fork,vfork"
    LINE = re.compile(r"(\d+) +(?:<\.\.\. )?(\w+)")

    def __init__(self, output: Path, *pids: int) -> None:
        self._output = output
        attach = [word for pid in pids for word in ("-p", str(pid))]
        command = ["strace", "-f", "-q", "-s", "300", "-e", f"trace={self.CALLS}",
                   "-o", str(output), *attach]  # fmt: skip
        self._proc = subprocess.Popen(command)
        wait_until(lambda: all(self._traced(pid) for pid in pids), DEADLINE_S, "strace is attached")

    def _traced(self, pid: int) -> bool:
        return all(f"TracerPid:\t{self._proc.pid}" in each for each in tasks(pid, "status"))

    def lines(self) -> list[str]:
        """Stop, and return what they did, and none of what the programs did that they started."""
        self._proc.terminate()
        self._proc.wait(DEADLINE_S)
        lines = self._output.read_text().splitlines()
        foreign: set[str] = set()
        for line in lines:  # who executes something is no thread of ours
            found = self.LINE.match(line)
            if found and found[2] == "execve":
                foreign.add(found[1])
        for line in lines:  # and whoever it started neither; in the order of time
            found, child = self.LINE.match(line), re.search(r"\) += (\d+)$", line)
            if found and child and found[1] in foreign and "clone" in found[2]:
                foreign.add(child[1])
        return [line for line in lines if line.partition(" ")[0] not in foreign]


def armoured_it_touches_nothing_of_the_dead_device_and_reads_nothing_else(
    supervisor: Inside, tmp_path: Path
) -> None:
    assert supervisor.proc is not None
    ours, worker = supervisor.proc.pid, worker_of(supervisor.proc.pid)
    for pid in (ours, worker):
        (locked,) = re.findall(r"VmLck:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert int(locked) > 10 << 10
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "-950\n"
        assert not_whole(pid) == []
    trace = Trace(tmp_path / "trace", ours, worker)

    after = supervisor.recovered(supervisor.kill_server())

    lines = trace.lines()
    assert flags((supervisor.home / "told").read_text()) & IO_FLUSHER == 0, "a hook has none of it"
    assert flags_of(after["server_pid"]) == {IO_FLUSHER}
    assert Path(f"/proc/{after['server_pid']}/oom_score_adj").read_text() == "-900\n"
    for pid in (ours, worker):
        assert flags_of(pid) == {IO_FLUSHER}

    opened = [found for line in lines for found in re.findall(r'open(?:at)?\([^"]*"([^"]*)"', line)]
    assert "/dev/ublk-control" in opened, "strace saw them"
    assert [line for line in lines if re.search(r"\b(sync|syncfs|f?statfs)\(", line)] == []
    # What a call was given, not what it answered: readlink tells of others' open files.
    given = [re.sub(r'(readlink\w*\([^"]*"[^"]*").*', r"\1", line) for line in lines]
    assert [line for line in given if re.search("/dev/ublk[bc]|/mnt", line)] == []
    # The last two are the history's: sqlite, and whom the OOM killer ended.
    kernels = ("/proc/", "/sys/", "/dev/ublk-control", "/dev/null", "/dev/urandom", "/dev/kmsg")
    # One component at a time: how trust judges programs, and run files where rules are asked.
    walked = {"/", "/.", "run", "attach", "hook", "bin", "sh", "ublk-servers"}
    # Where draining takes long, all processes are listed: /proc itself is opened.
    rest = [path for path in opened if not f"{path}/".startswith((*kernels, "/run/"))]
    assert set(rest) <= walked


# --- memory pressure -----------------------------------------------------------------------------


class Hog:
    """A process that takes all memory but so much; the OOM killer's first choice."""

    CODE = """
import sys, time
from mmap import MAP_ANONYMOUS, MAP_POPULATE, MAP_PRIVATE, mmap
def available():
    for line in open("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
open("/proc/self/oom_score_adj", "w").write("1000")
kept = []
def take():
    kept.append(mmap(-1, 8 << 20, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE))
while available() > int(sys.argv[1]):
    take()
print("full", flush=True)
while True:
    if available() > int(sys.argv[1]):
        take()
    time.sleep(0.05)
"""

    def __init__(self, but: int) -> None:
        self.proc = subprocess.Popen(
            [sys.executable, "-c", self.CODE, str(but)], stdout=subprocess.PIPE
        )
        assert self.proc.stdout is not None
        self.full = self.proc.stdout.readline() == b"full\n"

    def end(self) -> None:
        self.proc.kill()
        self.proc.communicate()


def waiting() -> int:
    """Return how many bytes wait to be written; some may be on their way to a device already."""
    text = Path("/proc/meminfo").read_text()
    return sum(int(each) << 10 for each in re.findall(r"(?:Dirty|Writeback):\s+(\d+) kB", text))


def memory_may_be_short_and_full_of_what_the_dead_device_is_to_keep(
    supervisor: Inside, point: Path
) -> None:
    data = os.urandom(MIB) * 48
    file = (point / "data").open("wb", buffering=0)
    file.write(data[:MIB])
    os.fsync(file.fileno())  # so that all is known that more of it needs
    writing = threading.Thread(target=file.write, args=(data[MIB:],))
    supervisor.ask(Order.HOLD)
    os.kill(supervisor.watching()["server_pid"], signal.SIGSTOP)  # it is to take none of it
    writing.start()
    wait_until(lambda: waiting() > 24 * MIB, DEADLINE_S, "pages are dirty")
    before = supervisor.kill_server()
    supervisor.until("its server is lost", state="QUIESCED")
    assert waiting() > 24 * MIB
    hog = Hog(48 * MIB)
    try:
        assert hog.full
        supervisor.ask(Order.RELEASE)
        supervisor.recovered(before)
    finally:
        hog.end()
    writing.join()
    os.fsync(file.fileno())
    file.close()
    VM.joinpath("drop_caches").write_text("3")
    assert (point / "data").read_bytes() == data


# --- a root file system that hangs ---------------------------------------------------------------


def the_root_file_system_may_hang(supervisor: Inside, stack: Stack, root: Root) -> None:
    config = supervisor.config.read_text()  # a hook has a shell, which is on that file system
    supervisor.config.write_text(config.replace('pre_recover = ["/run/hook"]\n', ""))
    supervisor.reload()
    supervisor.until_said("configuration reloaded")
    stack.stall()
    VM.joinpath("drop_caches").write_text("3")
    reading = subprocess.Popen(["cat", root.point / "etc/witness"], stdout=subprocess.DEVNULL)
    try:
        for _ in range(2):  # the second time with nothing left that the first had brought
            after = supervisor.recovered(supervisor.kill_server())
            assert Path(f"/proc/{after['server_pid']}/exe").readlink().name == "attach"
            descriptor = os.open("/dev/ublkb0", os.O_RDONLY | os.O_DIRECT)
            with mmap.mmap(-1, 4096) as page:
                assert os.preadv(descriptor, [page], 4096) == 4096, "it serves"
            os.close(descriptor)
            VM.joinpath("drop_caches").write_text("3")
        assert reading.poll() is None, "the root file system did not hang"
    finally:
        stack.go_on()
        reading.wait(DEADLINE_S)
