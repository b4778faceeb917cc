"""Start a server by fork: our child, in a session and, where possible, a cgroup of its own.

The child waits at a gate, a program that does nothing else, until its group, limits and priorities
are in place: so nothing that the server does can come before them, a fork least of all. Should we
die at that moment, the gate never opens, and the child ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

from ublkwatch import cgroup, gate
from ublkwatch.care import Job, Run
from ublkwatch.identity import Identity

_log = logging.getLogger("ublkwatch")


class ForkStarter:
    """Servers as our children, which outlive us."""

    def __init__(self, groups: Path | None, usual_oom_score_adj: int | None = None) -> None:
        """Give each attempt a control group of its own below ``groups``; None: do without.

        ``usual_oom_score_adj`` is for servers whose own is not given; None: they have ours.
        """
        self._groups = groups
        self._usual_oom_score_adj = usual_oom_score_adj
        self._gate = gate.make()  # beforehand: what it reads may hang later
        self._unprotected = False
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    async def start(
        self, tag: str, home: Path, job: Job, identity: Identity, environment: dict[str, str]
    ) -> int:
        """Start the job and return its pid; OSError says why it did not start."""
        # In a thread: exec reads the program from a file system that may be slow or hang.
        process = await asyncio.to_thread(self._start, tag, home, job, identity, environment)
        self._children[process.pid] = process
        return process.pid

    def how_ended(self, pid: int) -> tuple[str, int | None]:
        """Say how a child of ours ended, and its exit code; "unknown" if it was none."""
        process = self._children.pop(pid, None)
        if process is None:
            return "unknown", None
        try:
            status = process.wait(timeout=1)  # its pidfd was readable: it has been a zombie already
        except subprocess.TimeoutExpired:
            return "unknown", None
        return how(status)

    def close(self) -> None:
        self._gate.close()
        for process in self._children.values():
            process.returncode = 0  # not ours to wait for any more; init inherits it

    def _start(
        self, tag: str, home: Path, job: Job, identity: Identity, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        # A server inherits this thread's signal mask: nothing may be blocked in it.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        # For reading and writing: then no end of file comes when the last other writer is gone.
        stdin = os.open(home / "stdin", os.O_RDWR | os.O_CLOEXEC)
        output = os.open(
            home / "output", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        closed, opener = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                process = self._gate.started(
                    job.command,
                    stdin=stdin,
                    stdout=closed,
                    stderr=output,
                    env=environment,
                    cwd=job.run.cwd,
                    **_as(identity),
                )
            finally:
                for descriptor in (closed, stdin, output):
                    os.close(descriptor)
            try:
                self._prepare(process.pid, tag, home, job.run)
                os.write(opener, b"\n")
            except OSError:
                process.kill()
                process.wait()
                raise
        finally:
            os.close(opener)
        return process

    def _prepare(self, pid: int, tag: str, home: Path, run: Run) -> None:
        self._enter_group(pid, tag, home)
        for name, value in run.limits:
            try:
                resource.prlimit(pid, getattr(resource, f"RLIMIT_{name.upper()}"), _limit(value))
            except (AttributeError, ValueError, OSError) as error:
                raise OSError(f"limit {name} = {value!r}: {error}") from error
        wanted = self._usual_oom_score_adj if run.oom_score_adj is None else run.oom_score_adj
        if wanted is not None:
            self._protect(pid, wanted)
        if run.cpus:
            try:
                os.sched_setaffinity(pid, run.cpus)
            except (ValueError, OSError) as error:
                raise OSError(f"cpus {list(run.cpus)}: {error}") from error

    def _protect(self, pid: int, oom_score_adj: int) -> None:
        """Set how unlikely the OOM killer picks it; no recovery fails because we may not."""
        try:
            Path(f"/proc/{pid}/oom_score_adj").write_text(str(oom_score_adj))
        except PermissionError:
            if not self._unprotected:
                _log.warning("oom_score_adj of servers is not set: no CAP_SYS_RESOURCE")
            self._unprotected = True  # said once

    def _enter_group(self, pid: int, tag: str, home: Path) -> None:
        """Put the server into a group of its own; without one, it is found by its tag."""
        if self._groups is None:
            return
        try:
            group = cgroup.make(self._groups, f"ublkwatch-{tag}")
            (home / "cgroup").write_text(str(group))
            cgroup.enter(group, pid)
        except OSError as error:
            self._groups = None  # said once
            _log.info(
                "servers get no control group of their own (%s); they are found by tag", error
            )


def _as(identity: Identity) -> dict[str, Any]:
    """Return what Popen has to be told for a process of that user."""
    if identity.ours:
        return {}
    return {"user": identity.uid, "group": identity.gid, "extra_groups": identity.groups}


def _limit(value: str) -> tuple[int, int]:
    """Return a limit's soft and hard value: "soft:hard", or one for both."""
    soft, _, hard = value.partition(":")
    return _number(soft), _number(hard or soft)


def _number(value: str) -> int:
    return resource.RLIM_INFINITY if value in ("infinity", "unlimited") else int(value)


def how(status: int) -> tuple[str, int | None]:
    """Say what an exit status means: in words, and the exit code if there is one."""
    if status >= 0:
        return f"exit status {status}", status
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name, None
    return f"signal {-status}", None
