"""What the reference server's devices store their data in: nothing, memory, or a file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ublkwatch.uapi import IoOp

SECTOR: Final = 512
UBLK_ATTR_VOLATILE_CACHE: Final = 1 << 2  # ublk_cmd.h; without it the kernel sends no FLUSH

# Performs one request: operation, byte offset, the data's memory. Returns the bytes done or a
# negative errno, which is what the kernel wants to be told; None keeps the request unanswered.
Serve = Callable[[int, int, memoryview], int | None]


class TargetError(Exception):
    """The target cannot be what it should be; starting again would not help."""


class NullTarget:
    """Forgets what is written; a read finds whatever the buffer held."""

    attrs = 0

    def __init__(self, sectors: int | None) -> None:
        """``sectors`` is None when it does not matter, as for a device that exists already."""
        self.sectors = sectors

    def serve(self, op: int, _offset: int, data: memoryview) -> int:
        """Perform one request."""
        if op in (IoOp.READ, IoOp.WRITE):
            return len(data)
        return 0 if op == IoOp.FLUSH else -errno.EOPNOTSUPP


class FileTarget:
    """A file or a block device, read and written in place."""

    def __init__(self, fd: int, sectors: int, *, durable: bool) -> None:
        """``durable``: FLUSH means something, so ask the kernel for it."""
        self._fd = fd
        self._durable = durable
        self.sectors: int | None = sectors
        self.attrs = UBLK_ATTR_VOLATILE_CACHE if durable else 0

    def serve(self, op: int, offset: int, data: memoryview) -> int:
        """Perform one request; a short count is an answer too, the kernel sends the rest again."""
        try:
            if op == IoOp.READ:
                return os.preadv(self._fd, [data], offset)
            if op == IoOp.WRITE:
                return os.pwritev(self._fd, [data], offset)
            if op == IoOp.FLUSH:
                if self._durable:
                    os.fdatasync(self._fd)
                return 0
        except OSError as error:
            return -(error.errno or errno.EIO)
        return -errno.EOPNOTSUPP


Target = NullTarget | FileTarget


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """A target as the command line names it."""

    kind: str  # null, ram or loop
    file: str = ""  # may contain {dev_id}
    size: int | None = None  # bytes; None: as large as the file is

    @property
    def needs_dev_id(self) -> bool:
        """Whether it can be opened only once the device is known."""
        return "{dev_id}" in self.file

    def open(self, dev_id: int | None, *, create: bool) -> Target:
        """Open it; with ``create`` make a missing file. TargetError names what is wrong."""
        if self.kind == "null":
            if create and self.size is None:
                raise TargetError("--target null has no size of its own; give --size")
            return NullTarget(None if self.size is None else self.size // SECTOR)
        path = self.file.replace("{dev_id}", str(dev_id))
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
            have = self._prepare(fd, create=create)
        except OSError as error:
            raise TargetError(f"{path}: {error.strerror}; check --file") from error
        size = have if self.size is None else self.size
        if create and not size:
            raise TargetError(f"{path}: is new, and has no size of its own; give --size")
        if size > have or size < SECTOR:
            raise TargetError(f"{path}: has {have} bytes, not {size}; check --file and --size")
        return FileTarget(fd, size // SECTOR, durable=self.kind == "loop")

    def _prepare(self, fd: int, *, create: bool) -> int:
        """Return the file's size, having given new memory or a new file what was asked for."""
        have = os.lseek(fd, 0, os.SEEK_END)  # st_size of a block device is 0
        ours = self.kind == "ram" or (have == 0 and stat.S_ISREG(os.fstat(fd).st_mode))
        if create and ours and self.size is not None:
            os.ftruncate(fd, self.size)
            return self.size
        return have
