"""Start processes: ublk servers, the operators' commands, and our own control workers.

A server gets no descriptor but its three, a clean environment, and a tag by which it is found
again. Its standard input is a FIFO in the runtime directory that the server itself holds open for
writing too, so that our death is no end of file. Who starts it is a strategy: ourselves (`fork`),
or systemd (`units`); all else is the same under both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ublkwatch import cgroup, outside
from ublkwatch.bus import USUAL, Patience
from ublkwatch.care import Job
from ublkwatch.fork import ForkStarter, how
from ublkwatch.homes import Homes
from ublkwatch.host import OURS
from ublkwatch.identity import Judge
from ublkwatch.model import TAG_VARIABLE
from ublkwatch.together import Together
from ublkwatch.units import UnitStarter

_log = logging.getLogger("ublkwatch")

LAUNCHERS = ("auto", "systemd", "fork")
# What a server may inherit from our environment; everything else is ours alone.
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TZ", "HOME")
_SHUTDOWN_ANSWER_S = 5.0


class Launcher:
    """Starts the servers of attempts, and speaks to them."""

    def __init__(  # noqa: PLR0913 - each by its name
        self,
        runtime_dir: Path,
        ready: Callable[[str], None],
        systemd: Path = Path("/run/systemd/system"),
        *,
        kind: str = "fork",
        groups: Path | None = None,
        answer_s: float = _SHUTDOWN_ANSWER_S,
        judge: Judge | None = None,
        usual_oom_score_adj: int | None = None,
        host: Path = OURS,
        patience: Patience = USUAL,
    ) -> None:
        """``ready`` is told, from the loop, the tag of an attempt whose server said READY=1.

        ``systemd`` is there where systemd is the host's init (sd_booted(3)). ``kind`` is one of
        LAUNCHERS: "auto" takes systemd where it is the init and answers on the system bus.
        ``groups`` is the control group for those of forked servers; as a rule our own. ``answer_s``
        is the time that systemctl has to say whether the host shuts down. ``judge`` says which
        programs are run, and as whom.
        ``usual_oom_score_adj`` is for servers whose own is not given; None: they have ours.
        ``host`` is where systemd's root is seen from here (host.systemd_root). ``patience`` is with
        systemd.
        """
        self._systemd = systemd
        self._shutdown = Together(self._ask_systemd)
        self._kind = kind
        self._answer_s = answer_s
        self._homes = Homes(runtime_dir, ready)
        self._fork = ForkStarter(groups or cgroup.own(), usual_oom_score_adj)
        homes = {tag: self._homes.path(tag) for tag in self._homes.all()}
        self._units = UnitStarter(homes, host, patience)
        self._host = host
        self._fallen_back = False
        self._judge = judge or Judge()

    # --- start -----------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Do beforehand what can be: be connected to systemd. It is tried again with each start."""
        with contextlib.suppress(OSError):
            await self._choose()

    async def start(self, tag: str, job: Job) -> int:
        """Start the server of an attempt and return its pid; OSError says why it did not start.

        The program is judged first (trust.TrustError), and its user looked up.
        """
        if job.run.unit:
            return await self._start_named(tag, job)
        units = await self._choose()
        # In a thread: the program's file system, or a name service, may be slow or hang.
        root = self._host if units else OURS
        identity = await asyncio.to_thread(self._judge.identity, job, root)
        home = self._homes.make(tag, identity.uid)
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment |= dict(job.run.env)
        environment |= {TAG_VARIABLE: tag, "NOTIFY_SOCKET": str(home / "notify")}
        starter = self._units if units else self._fork
        return await starter.start(tag, home, job, identity, environment)

    async def program(self, job: Job) -> str:
        """Name the program that would be executed now, or "" where nobody can tell; TrustError."""
        root = self._host if await self._choose() else OURS
        return await asyncio.to_thread(self._judge.program, job, root)

    async def _start_named(self, tag: str, job: Job) -> int:
        """Start a unit that somebody else wrote: as whom and how it runs is systemd's to know."""
        if not await self._choose(needed=f"unit {job.run.unit}"):
            raise OSError(f"unit {job.run.unit}: needs systemd, and launcher is {self._kind!r}")
        return await self._units.start_named(tag, self._homes.make(tag, 0), job.run.unit)

    async def _choose(self, needed: str = "") -> bool:
        """Tell whether systemd is to start the next server; OSError if it must, and cannot."""
        if self._kind == "fork":
            return False
        if self._kind == "auto" and not (self._systemd.exists() and os.geteuid() == 0):
            return False
        try:
            await self._units.connect()
        except OSError as error:
            if self._kind == "systemd" or needed:
                raise
            if not self._fallen_back:
                _log.warning("systemd does not answer (%s); servers are our own children", error)
            self._fallen_back = True
            return False
        self._fallen_back = False
        return True

    def join(self, tag: str, root: str) -> None:
        """Let an attempt share the process of another one, its root; OSError if there is none."""
        self._homes.join(tag, root)

    def root(self, tag: str) -> str:
        """Return the attempt whose process, tag and home an attempt shares: as a rule its own."""
        return self._homes.root(tag)

    def known(self, tag: str) -> bool:
        """Tell whether the attempt's process was started by us."""
        return self._homes.path(tag).is_dir()

    # --- speak -----------------------------------------------------------------------------------

    def listen(self, tag: str) -> None:
        """Hear READY=1 of an attempt's server; after our restart as well."""
        self._homes.listen(tag)

    def write_line(self, tag: str, line: str) -> None:
        """Give the server its go. It is written whole or not at all (less than PIPE_BUF)."""
        self._homes.write_line(tag, line)

    def unread(self, tag: str) -> bool:
        """Tell whether the line was written and is known not to have been read."""
        return self._homes.unread(tag)

    # --- the end ---------------------------------------------------------------------------------

    def how_ended(self, pid: int) -> tuple[str, int | None]:
        """Say how a process ended, and its exit code: where it was our child, never by guessing."""
        return self._fork.how_ended(pid)

    def must_ask(self, pid: int) -> bool:
        """Tell whether it was systemd that started a process: then autopsy() knows more."""
        return self._units.started(pid)

    async def autopsy(self, tag: str, pid: int) -> tuple[str, int | None, str]:
        """Ask systemd how a process ended: in words, its exit code, its last words; within 2 s."""
        return await self._units.autopsy(self._homes.path(tag), pid)

    def pids(self, tag: str) -> set[int]:
        """Return the processes of an attempt, as its control group has them; none without one."""
        group = self._group(tag)
        return cgroup.pids(group) if group else set()

    async def end(self, tag: str) -> None:
        """Kill what an attempt's control group, or its unit, holds; the caller bounds the wait."""
        home = self._homes.path(tag)
        group = self._group(tag)
        if group is None and (home / "unit").exists():
            group = await self._units.group(home)  # we died before we knew it
        if group is not None:
            await cgroup.end(group)
        await self._units.put_away(home)

    def _group(self, tag: str) -> Path | None:
        with contextlib.suppress(OSError):
            # Empty, if we died as we wrote it; and no group is where we happen to be.
            if name := (self._homes.path(tag) / "cgroup").read_text():
                return Path(name)
        return None

    def last_words(self, tag: str) -> str:
        """Return the last line that the attempt's server printed, where we keep its output."""
        return self._homes.last_words(tag)

    def trim(self) -> None:
        """Keep the outputs bounded."""
        self._homes.trim()

    def keep_only(self, tags: set[str]) -> None:
        """Remove what attempts that are over left behind."""
        for tag in self._homes.others(tags):
            if (group := self._group(tag)) is not None and self._homes.root(tag) == tag:
                cgroup.remove(group)
            self._units.discard(self._homes.path(tag))
            self._homes.remove(tag)

    # --- what else is started --------------------------------------------------------------------

    async def set_apart(self, pid: int) -> None:
        """Have a control worker outside our unit: while it is stuck, a stop would wait for it."""
        try:
            if await self._choose():
                await self._units.set_apart(pid)
        except OSError as error:
            _log.warning("the control worker stays in our own control group: %s", error)

    async def decide(
        self, command: tuple[str, ...], about: dict[str, str], timeout_s: float
    ) -> tuple[str, int | None]:
        """Run the operator's command about a device, and return how it ended, and its exit code."""
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.to_thread(self._judge.check, Path(command[0]), OURS)
                status, _ = await outside.run(command, environment=environment | about)
        except TimeoutError:
            return f"killed after {timeout_s:g} s", None
        except OSError as error:
            return str(error), None
        return how(status)

    async def shutting_down(self) -> bool:
        """Tell whether the host shuts down, as systemd says; where it does not run, nobody does."""
        return await self._shutdown.ask()

    async def _ask_systemd(self) -> bool:
        command = ("systemctl", "is-system-running")
        try:
            async with asyncio.timeout(self._answer_s):
                await asyncio.to_thread(os.stat, self._systemd)
                if self._kind != "fork":
                    with contextlib.suppress(OSError):  # a container has no systemctl
                        return await self._units.state() == "stopping"
                _, output = await outside.run(command, output=True)
        except OSError:  # TimeoutError, too
            return False
        return output.strip() == b"stopping"

    def close(self) -> None:
        """Stop listening; the servers live on, and so do their FIFOs."""
        self._homes.close()
        self._fork.close()
        self._units.close()


def start_worker(*, lock_memory: bool = False) -> socket.socket:
    """Start a control worker and return our end of its line; it ends when that is closed.

    For a thread: Python is read from a file system that may hang.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "ublkwatch.ctrl_worker", *(["lock-memory"] * lock_memory)],
            stdin=theirs.fileno(),
            start_new_session=True,
        )
    # Nobody waits for a worker: it may be in uninterruptible sleep long after we are gone. Leaving
    # it a zombie until we end costs one process table entry for each retired worker.
    process.returncode = 0
    ours.setblocking(False)
    return ours
