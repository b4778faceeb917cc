"""ublk servers as processes: identify, watch, find, and end them.

The only home of pidfds, kill and psutil. A process is (boot id, pid, start ticks), and a signal
goes through a pidfd whose owner was checked, so that a reused pid is never mistaken for a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import signal
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import psutil

from ublkwatch.care import Origin
from ublkwatch.model import TAG_VARIABLE, ServerId
from ublkwatch.together import Together

_NODE = "/dev/ublkc"
_THREADS_MAX = 256  # watched at once: each is a descriptor
# include/uapi/linux/pidfd.h
_PIDFD_THREAD = os.O_EXCL
_PIDFD_GET_INFO = 0xC040FF0B  # _IOWR(0xFF, 11, struct pidfd_info), of 64 bytes
_PIDFD_INFO_EXIT = 1 << 3  # since Linux 6.15
_PIDFD_INFO = struct.Struct("=Q52xi")  # mask; exit_code


def read_boot_id() -> str:
    """Return the kernel's name for this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def origin(pid: int) -> Origin | None:
    """Return what a process is, for another one in its place; None where it is gone.

    What may not be read is left empty.
    """
    home = Path(f"/proc/{pid}")
    try:
        status = (home / "status").read_text(errors="replace")
        exe, name = "", (home / "comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return None
    with contextlib.suppress(OSError):
        exe = str((home / "exe").readlink())
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return Origin(
        exe=exe,
        name=name,
        uid=int(fields["Uid"].split()[1]),
        gid=int(fields["Gid"].split()[1]),
        groups=tuple(int(gid) for gid in fields["Groups"].split()),
        cgroup=_cgroup(home),
        foreign_ns=_namespace(home) != _namespace(Path("/proc/self")),
    )


def _namespace(home: Path) -> str:
    try:
        return str((home / "ns/pid").readlink())
    except OSError:
        return ""


def _cgroup(home: Path) -> str:
    """Return its path in the unified hierarchy (cgroups(7))."""
    with contextlib.suppress(OSError):
        for line in (home / "cgroup").read_text(errors="replace").splitlines():
            if line.startswith("0::"):
                return line[3:]
    return ""


class Keeper(Protocol):
    """notify.Manager, as far as it keeps descriptors for our next life."""

    def keep(self, name: str, descriptor: int) -> None: ...
    def take(self, name: str) -> int | None: ...
    def drop(self, name: str) -> None: ...


class Servers:
    """The processes that ublkwatch knows, each by a pidfd."""

    def __init__(
        self,
        boot_id: str,
        report: Callable[[ServerId, int | None], None],
        thread_ended: Callable[[], None] = lambda: None,
        keeper: Keeper | None = None,
    ) -> None:
        """``report`` is told, from the loop, of each watched process that has ended, once.

        And how: its exit code, a signal's number below zero, or None where that cannot be known.
        ``thread_ended`` is called when a watched thread has: then is the time to look.
        ``keeper`` has the pidfds meanwhile, should we end: so it is known how a server ended then.
        """
        self._keeper = keeper
        self._thread_ended = thread_ended
        self._threads: dict[ServerId, dict[int, int]] = {}  # pidfds, by thread
        self._boot_id = boot_id
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._pidfds: dict[ServerId, int] = {}
        # Of their own: a slow search must not keep a server from being started.
        self._searches = ThreadPoolExecutor(2, thread_name_prefix="search")
        self._tags = Together(self._look_for_tags)
        self._nodes = Together(self._look_for_nodes)

    def identify(self, pid: int) -> ServerId | None:
        """Return who ``pid`` is now, or None where there is no such process or it has ended."""
        return identify(pid, self._boot_id)

    def watch(self, server: ServerId) -> None:
        """Report its end; at once, if it has ended already or its pid is somebody else's."""
        if server in self._pidfds:
            return
        pidfd = self._keeper.take(_kept_name(server)) if self._keeper else None
        if pidfd is None:
            pidfd = self._open(server)
        if pidfd is None:
            self._loop.call_soon(self._report, server, None)
            return
        self._pidfds[server] = pidfd
        self._loop.add_reader(pidfd, self._exited, server)
        if self._keeper:
            self._keeper.keep(_kept_name(server), pidfd)

    def watch_threads(self, server: ServerId, tids: Iterable[int]) -> None:
        """Call ``thread_ended`` when one of these threads of a watched process has ended.

        A hint, for a bounded number of threads, and none before Linux 6.9: the poll looks, too.
        """
        if server not in self._pidfds:
            return  # it has ended
        watched = self._threads.setdefault(server, {})
        for tid in set(tids) - watched.keys():
            if sum(map(len, self._threads.values())) >= _THREADS_MAX:
                return
            with contextlib.suppress(OSError):
                watched[tid] = os.pidfd_open(tid, _PIDFD_THREAD)
                self._loop.add_reader(watched[tid], self._end_thread, server, tid)

    def watches(self, server: ServerId, tids: Iterable[int]) -> bool:
        """Tell whether all of these threads are watched, so that none of them has ended."""
        return set(tids) <= self._threads.get(server, {}).keys()

    def _end_thread(self, server: ServerId, tid: int) -> None:
        pidfd = self._threads[server].pop(tid)
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        self._thread_ended()

    def _forget_threads(self, server: ServerId) -> None:
        for pidfd in self._threads.pop(server, {}).values():
            self._loop.remove_reader(pidfd)
            os.close(pidfd)

    def kill(self, server: ServerId) -> None:
        """SIGKILL it; its end is reported as any other (also when there is nobody to kill)."""
        self.watch(server)
        if (pidfd := self._pidfds.get(server)) is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    async def tagged(self, tag: str) -> list[ServerId]:
        """Find the processes of an attempt by the tag in their environment; slow."""
        return (await self._tags.ask()).get(tag, [])

    async def end_tagged(self, tag: str) -> None:
        """SIGKILL the processes of an attempt, until there are none; the caller bounds the wait."""
        while strays := await self.tagged(tag):
            for server in strays:
                self.kill(server)
            await asyncio.sleep(0.02)

    async def holders(self, node: str) -> tuple[bool, str]:
        """Tell whether no process is seen to have that device node open, and in words which have.

        Slow. The node itself is not touched.
        """
        pids = (await self._nodes.ask()).get(node)
        if not pids:
            return True, f"no visible holder of {node}"
        names = ", ".join(f"{pid} ({_name(pid)})" for pid in sorted(pids)[:8])
        return False, f"{node} is held by process {names}"

    async def _look_for_tags(self) -> dict[str, list[ServerId]]:
        return await self._loop.run_in_executor(self._searches, tagged, self._boot_id)

    async def _look_for_nodes(self) -> dict[str, set[int]]:
        return await self._loop.run_in_executor(self._searches, open_nodes)

    def close(self) -> None:
        """Stop watching; the processes live on."""
        for server in list(self._threads):
            self._forget_threads(server)
        for pidfd in self._pidfds.values():
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        self._pidfds.clear()
        self._searches.shutdown(wait=False, cancel_futures=True)

    def _open(self, server: ServerId) -> int | None:
        if server.boot_id != self._boot_id:
            return None
        try:
            pidfd = os.pidfd_open(server.pid)
        except OSError:
            return None
        if _start_ticks(server.pid) == server.start_ticks:
            return pidfd
        os.close(pidfd)
        return None

    def _exited(self, server: ServerId) -> None:
        pidfd = self._pidfds.pop(server)
        self._loop.remove_reader(pidfd)
        if self._keeper:
            self._keeper.drop(_kept_name(server))
        status = _exit_status(pidfd, server)
        os.close(pidfd)
        self._forget_threads(server)
        self._report(server, status)


def _kept_name(server: ServerId) -> str:
    return f"server-{server.pid}-{server.start_ticks}"  # what is kept does not outlive the boot


def identify(pid: int, boot_id: str) -> ServerId | None:
    """Return who ``pid`` is now, or None where there is no such process or it has ended.

    A number of 1 or less is nobody: DEAD devices say -1, and Linux before 6.17 stores whatever
    number a server inside a pid namespace thought it had.
    """
    if pid <= 1:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        ticks = _start_ticks(pid)
        return None if ticks is None or _ended(pidfd) else ServerId(pid, ticks, boot_id)
    finally:
        os.close(pidfd)


def tagged(boot_id: str) -> dict[str, list[ServerId]]:
    """Return all processes of attempts that may be looked at, by the attempt's tag; slow."""
    found: dict[str, list[ServerId]] = {}
    for process in psutil.process_iter():
        # Identified first: should the pid be reused in between, kill() finds nobody.
        server = identify(process.pid, boot_id)
        with contextlib.suppress(psutil.Error, OSError):
            if server and (tag := process.environ().get(TAG_VARIABLE)):
                found.setdefault(tag, []).append(server)
    return found


def end(server: ServerId) -> bool:
    """SIGKILL a process, if it still is the one that is meant; tell whether it was."""
    try:
        pidfd = os.pidfd_open(server.pid)
    except OSError:
        return False
    try:
        if server.boot_id != read_boot_id() or _start_ticks(server.pid) != server.start_ticks:
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


def open_nodes() -> dict[str, set[int]]:
    """Return which processes have which character device of ublk open."""
    found: dict[str, set[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - thousands of files: objects take too long
        if entry.isdigit():
            for file in files(int(entry)):
                if file.startswith(_NODE):
                    found.setdefault(file, set()).add(int(entry))
    return found


def files(pid: int) -> set[str]:
    """Return the names of the files that a process has open; none of those that we may not see.

    None of them is touched. A server of many devices has many: ask once for all of them.
    """
    home, found = f"/proc/{pid}/fd", set()
    try:
        for entry in os.listdir(home):  # noqa: PTH208 - as above
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"{home}/{entry}"))  # noqa: PTH115 - as above
    except OSError:
        return set()
    return found


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    return "?"


def _start_ticks(pid: int) -> int | None:
    """Return field 22 of /proc/PID/stat."""
    fields = _stat(pid)
    return int(fields[22 - 3]) if fields else None


def _stat(pid: int) -> list[bytes]:
    """Return the fields of /proc/PID/stat from the third on: the name before may hold anything."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return []
    return stat[stat.rindex(b")") + 2 :].split()


def _exit_status(pidfd: int, server: ServerId) -> int | None:
    """Return how a process ended whoever's child it was, as os.waitstatus_to_exitcode() does.

    The kernel says so once its parent has waited for it (Linux 6.15), and /proc until then; there
    0 may also mean that we may not look.
    """
    fields = _stat(server.pid)
    if fields and int(fields[22 - 3]) == server.start_ticks and (status := int(fields[52 - 3])):
        return os.waitstatus_to_exitcode(status)
    answer = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, 0))
    with contextlib.suppress(OSError):
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, answer)
        mask, status = _PIDFD_INFO.unpack(answer)
        return os.waitstatus_to_exitcode(status) if mask & _PIDFD_INFO_EXIT else None
    return None


def _ended(pidfd: int) -> bool:
    """Tell whether the whole thread group has ended (a zombie has)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
