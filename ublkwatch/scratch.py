"""A drill's I/O: writes blocks past the page cache, and reads back what they must hold.

    python -m ublkwatch.scratch /dev/ublkbN

A process of its own, since a device whose server is not brought back never lets go of it. It goes
on until its standard input ends; then it reads all that it has written, and says in one line of
JSON what it met. What is on the disk is destroyed. A disk that is mounted refuses it (O_EXCL).
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import random
import select
import sys
import time
from collections import Counter
from collections.abc import Callable

BLOCK = 4096
AREA = 16 << 20  # of the disk, from its beginning
_PAUSE_MS = 10  # behind an error
_Transfer = Callable[[int, list[mmap.mmap], int], int]


class Scratch:
    """Blocks of a disk, and what each must hold."""

    def __init__(self, fd: int) -> None:
        """``fd`` is open for direct I/O."""
        self._fd = fd
        self._blocks = min(os.lseek(fd, 0, os.SEEK_END), AREA) // BLOCK
        self._dice = random.Random()  # noqa: S311 - nobody has to guess it
        self._salt = os.urandom(8)
        self._memory = mmap.mmap(-1, BLOCK)  # aligned, as direct I/O wants it
        self._sequence = 0
        self._held: dict[int, int] = {}  # by block: the write that it must hold
        self._errors: Counter[str] = Counter()
        self._written = self._verified = self._corrupt = 0
        self._longest_s = 0.0

    def turn(self) -> bool:
        """Write a block, and read one back; tell whether both went well."""
        block = self._dice.randrange(self._blocks)
        self._sequence += 1
        self._memory[:] = self._content(block, self._sequence)
        if not self._run(os.pwritev, block):
            # It may have been done, in full or in part of its sectors.
            self._held.pop(block, None)
            return False
        self._written += 1
        self._held[block] = self._sequence
        return self.verify(self._dice.choice(list(self._held)))

    def verify(self, block: int) -> bool:
        """Read a block back; tell whether that was possible."""
        if not self._run(os.preadv, block):
            return False
        self._verified += 1
        self._corrupt += self._memory[:] != self._content(block, self._held[block])
        return True

    def verify_all(self) -> None:
        """Read back all that was written without an error."""
        for block in sorted(self._held):
            self.verify(block)

    def document(self) -> dict[str, object]:
        """Return what was met."""
        return {
            "written": self._written,
            "verified": self._verified,
            "corrupt": self._corrupt,
            "errors": dict(self._errors),
            "longest_s": self._longest_s,
        }

    def _run(self, transfer: _Transfer, block: int) -> bool:
        began = time.monotonic()
        try:
            done = transfer(self._fd, [self._memory], block * BLOCK)
        except OSError as error:
            self._errors[errno.errorcode.get(error.errno or 0, str(error.errno))] += 1
            return False
        finally:
            self._longest_s = max(self._longest_s, time.monotonic() - began)
        if done != BLOCK:
            self._errors["short"] += 1
        return bool(done == BLOCK)

    def _content(self, block: int, sequence: int) -> bytes:
        seed = self._salt + block.to_bytes(8, "little") + sequence.to_bytes(8, "little")
        return hashlib.sha256(seed).digest() * (BLOCK // 32)


def main() -> int:
    """Serve a drill on standard input and output."""
    try:
        fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        print(json.dumps({"trouble": f"{sys.argv[1]}: {error.strerror}"}), flush=True)
        return 1
    scratch, end = Scratch(fd), select.poll()
    end.register(0, select.POLLIN | select.POLLHUP)
    scratch.turn()
    print(json.dumps({}), flush=True)
    well = True
    while not end.poll(0 if well else _PAUSE_MS):
        well = scratch.turn()
    scratch.verify_all()
    print(json.dumps(scratch.document()), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
