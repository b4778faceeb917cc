"""Armour: what keeps this process going while devices are dead and memory is short.

A supervisor whose own page has to be read from a dead device waits for itself. So, once all is
imported and opened, its memory is locked, and what it has mapped from files is read in whole and
kept (mlockall(2), mlock(2)). Its threads, and the servers that they fork, are said to be part of
the way that I/O goes (PR_SET_IO_FLUSHER, prctl(2)): then the kernel never has them write out
somebody's dirty pages, to the very device that they are to bring back, in order to get memory. And
the OOM killer looks elsewhere first (proc_pid_oom_score_adj(5)).

A home of ctypes, beside uring: mlockall, mlock and prctl are in no module of Python's. Whatever may
not be done is told, each with the way out, and nothing fails by it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OOM_SCORE_ADJ = -950  # rather a server (-900) than who starts it again, and both long after others
_STACK_BYTES = 1 << 20  # of a thread; only what was touched takes memory
_CAP_IPC_LOCK = 14
# Linux 5.6; for the calling thread, inherited over fork and exec.
_PR_SET_IO_FLUSHER, _PR_GET_IO_FLUSHER = 57, 58
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_WHOLE_ID_MAP = ["0", "0", "4294967295"]
# Mapped, but not from a file system: nothing would be read from a device for these.
_NO_FILES = ("/dev/", "/memfd:", "/SYSV")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.prctl.argtypes = [ctypes.c_int, *([ctypes.c_ulong] * 4)]


class Armour:
    """One process's armour, and what is missing of it."""

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        """``proc`` is where the process looks at itself."""
        self._proc = proc
        # What servers get that are to have what we had.
        self.usual_oom_score_adj = int((proc / "oom_score_adj").read_text())
        self.missing: list[str] = []  # in words, each with the way out

    def put_on(self) -> None:
        """Do what must come before there is another thread: all of them inherit it."""
        threading.stack_size(_STACK_BYTES)
        try:
            _io_flusher(on=True)
        except OSError as error:
            self.missing.append(
                f"PR_SET_IO_FLUSHER is not to be had ({error.strerror}): where memory is short, "
                "the kernel may have us wait for the very device that we are to bring back; try: "
                "give ublkwatch CAP_SYS_RESOURCE"
            )
        wanted = min(OOM_SCORE_ADJ, self.usual_oom_score_adj)
        try:
            (self._proc / "oom_score_adj").write_text(str(wanted))
        except OSError as error:
            self.missing.append(
                f"oom_score_adj stays {self.usual_oom_score_adj} ({error.strerror}): the OOM "
                "killer may take the supervisor; try: give ublkwatch CAP_SYS_RESOURCE, or start it "
                f"with OOMScoreAdjust={OOM_SCORE_ADJ}"
            )

    def lock(self) -> int:
        """Lock this process's memory, now and to come; return how many bytes of files are kept.

        To be called when all is imported, opened and mapped. 0 where it cannot be done.
        """
        if not self._may_lock():
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
            self.missing.append(
                f"memory is not locked (no CAP_IPC_LOCK, and RLIMIT_MEMLOCK is {limit} bytes): a "
                "page of ours that has to be read from a dead device stops us; try: give ublkwatch "
                "CAP_IPC_LOCK or LimitMEMLOCK=infinity; lock_memory = false says that it is meant"
            )
            return 0
        try:
            _call(_libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT))
            return sum(
                _locked(mapping) for mapping in file_mappings((self._proc / "maps").read_text())
            )
        except OSError as error:
            self.missing.append(
                f"memory is not locked ({error.strerror}): a page of ours that has to be read from "
                "a dead device stops us; try: LimitMEMLOCK=infinity, or lock_memory = false says "
                "that it is meant"
            )
            return 0

    def _may_lock(self) -> bool:
        """Tell whether there is no limit.

        Within one, what is mapped later than mlockall() would fail, at any time: then rather not.
        The capability counts in the first user name space alone (can_do_mlock()).
        """
        if self._capable(_CAP_IPC_LOCK):
            return True
        soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if soft != hard == resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
        return hard == resource.RLIM_INFINITY

    def _capable(self, capability: int) -> bool:
        if (self._proc / "uid_map").read_text().split() != _WHOLE_ID_MAP:
            return False
        for line in (self._proc / "status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> capability & 1)
        return False


@dataclass(frozen=True, slots=True)
class Mapping:
    """A part of a file in a process's memory."""

    address: int
    size: int
    path: str


def file_mappings(maps: str) -> list[Mapping]:
    """Return what a process has mapped from files, and can touch, by its proc_pid_maps(5).

    Not code alone: the constants and the data of a library that were never touched are read from
    its file as well.
    """
    found = []
    for line in maps.splitlines():
        bounds, permissions, _, _, inode, *rest = line.split(maxsplit=5)
        path = rest[0] if rest else ""
        if path.startswith("/") and not path.startswith(_NO_FILES) and inode != "0":
            start, end = (int(each, 16) for each in bounds.split("-"))
            if permissions[:3] != "---":
                found.append(Mapping(start, end - start, path))
    return found


@contextlib.contextmanager
def taken_off() -> Iterator[None]:
    """Take the calling thread out of the armour while it forks what is not ours.

    The flag would make other people's programs allocate as if they served a device.
    """
    worn = _libc.prctl(_PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1
    if worn:
        _io_flusher(on=False)
    try:
        yield
    finally:
        if worn:
            _io_flusher(on=True)


def _io_flusher(*, on: bool) -> None:
    _call(_libc.prctl(_PR_SET_IO_FLUSHER, int(on), 0, 0, 0))


def _locked(mapping: Mapping) -> int:
    """Read a mapping in and keep it; return its size, or 0 where it is gone or cannot be read."""
    try:
        _call(_libc.mlock(mapping.address, mapping.size))
    except OSError:
        return 0
    return mapping.size


def _call(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
