"""One io_uring with 128-byte SQEs, by hand over raw syscalls.

The only home of ctypes, mmap and syscall numbers. PyPI's bindings cannot fill the 80-byte command
area that ublk's control commands need, hence this module. Semantics: io_uring_setup(2),
io_uring_enter(2); sources cited by function name are Linux 7.2's ``io_uring/``.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from array import array
from collections.abc import Iterator

from ublkwatch import uapi

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _syscall(number: int, *args: int) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(arg) for arg in args)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class Buffer:
    """Memory at a fixed address that the kernel reads or writes for a command."""

    def __init__(self, content: bytes | int) -> None:
        """Hold a copy of ``content``, or that many zero bytes."""
        size = content if isinstance(content, int) else len(content)
        self._memory = ctypes.create_string_buffer(size)
        if isinstance(content, bytes):
            self._memory.raw = content
        self.size = size
        self.address = ctypes.addressof(self._memory)

    def bytes(self) -> bytes:
        """Return a copy of what is in it now."""
        return self._memory.raw


def address_of(memory: mmap.mmap) -> int:
    """Return the address of a writable mapping; it is valid while the mapping is open."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Ring:
    """A submission and a completion queue, to be used by one thread."""

    def __init__(self, entries: int) -> None:
        """Set up the ring; OSError says why not (EPERM, ENOSYS: io_uring is not to be had)."""
        params = Buffer(
            uapi.io_uring_params.pack(flags=uapi.IORING_SETUP_SQE128 | uapi.IORING_SETUP_CLAMP)
        )
        self.fd = _syscall(uapi.SYS_IO_URING_SETUP, entries, params.address)
        try:
            self._map(params.bytes())
        except BaseException:
            os.close(self.fd)
            raise
        self._to_submit = 0

    def _map(self, params: bytes) -> None:
        p = uapi.io_uring_params
        values = p.unpack(params)
        needed = uapi.IORING_FEAT_SINGLE_MMAP | uapi.IORING_FEAT_NODROP
        if values["features"] & needed != needed:
            raise OSError(errno.ENOSYS, "io_uring is older than Linux 5.5")
        sq = uapi.io_sqring_offsets.unpack(params[p.offsets["sq_off"] :])
        cq = uapi.io_cqring_offsets.unpack(params[p.offsets["cq_off"] :])
        self.entries = values["sq_entries"]
        cqes_end = cq["cqes"] + values["cq_entries"] * uapi.io_uring_cqe.size
        ring_size = max(cqes_end, sq["array"] + self.entries * 4)
        self._rings = mmap.mmap(self.fd, ring_size, offset=uapi.IORING_OFF_SQ_RING)
        self._sqes = mmap.mmap(
            self.fd, self.entries * uapi.SQE128_SIZE, offset=uapi.IORING_OFF_SQES
        )
        self._words = memoryview(self._rings).cast("I")
        self._signed = memoryview(self._rings).cast("i")
        self._sq_head, self._sq_tail = sq["head"] // 4, sq["tail"] // 4
        self._cq_head, self._cq_tail = cq["head"] // 4, cq["tail"] // 4
        self._sq_mask, self._cq_mask = self.entries - 1, values["cq_entries"] - 1
        self._cqes, self._array = cq["cqes"], sq["array"] // 4
        self._in_order = memoryview(array("I", range(self.entries)))
        # push() needs no indirection: identity, for ever.
        self._words[self._array : self._array + self.entries] = self._in_order

    def push(self, sqe: bytes) -> None:
        """Queue one SQE for the next submit(); OSError EBUSY when the queue is full."""
        tail = self._words[self._sq_tail]
        if tail - self._words[self._sq_head] & 0xFFFFFFFF >= self.entries:
            raise OSError(errno.EBUSY, "the submission queue is full")
        at = (tail & self._sq_mask) * uapi.SQE128_SIZE
        self._sqes[at : at + uapi.SQE128_SIZE] = sqe
        # The syscall that follows is the barrier: no SQPOLL thread could look earlier.
        self._words[self._sq_tail] = tail + 1 & 0xFFFFFFFF
        self._to_submit += 1

    def submit(self, wait: int = 0) -> None:
        """Hand what was pushed to the kernel; sleep until ``wait`` completions are there."""
        flags = uapi.IORING_ENTER_GETEVENTS if wait else 0
        while self._to_submit or wait:
            try:
                taken = _syscall(
                    uapi.SYS_IO_URING_ENTER, self.fd, self._to_submit, wait, flags, 0, 0
                )
            except InterruptedError:
                continue
            self._to_submit -= taken
            wait = 0

    def reap(self) -> Iterator[tuple[int, int]]:
        """Yield (user_data, res) of the completions that are there; never sleeps."""
        head = self._words[self._cq_head]
        while head != self._words[self._cq_tail]:
            at = self._cqes + (head & self._cq_mask) * uapi.io_uring_cqe.size
            cqe = uapi.io_uring_cqe.unpack(self._rings[at : at + uapi.io_uring_cqe.size])
            head = head + 1 & 0xFFFFFFFF
            self._words[self._cq_head] = head
            yield cqe["user_data"], cqe["res"]

    def lay(self, slot: int, sqe: bytes) -> None:
        """Put an SQE into a slot, where it stays for every send(); not for a ring of push()."""
        at = slot * uapi.SQE128_SIZE
        self._sqes[at : at + uapi.SQE128_SIZE] = sqe

    def send(self, count: int, wait_s: float) -> int:
        """Submit what was laid into the first slots, and wait at most so long for the answers.

        In one system call. Nothing may be under way meanwhile. Returns how many were taken: all, or
        as many as there was memory for; OSError when none was.
        """
        span = uapi.kernel_timespec.pack(tv_sec=int(wait_s), tv_nsec=int(wait_s % 1 * 1e9))
        until = Buffer(span)
        more = Buffer(uapi.io_uring_getevents_arg.pack(ts=until.address))
        tail = self._words[self._sq_tail]
        at = tail & self._sq_mask
        ahead = min(count, self.entries - at)  # before the end of the queue
        first = self._array + at
        self._words[first : first + ahead] = self._in_order[:ahead]
        self._words[self._array : self._array + count - ahead] = self._in_order[ahead:count]
        self._words[self._sq_tail] = tail + count & 0xFFFFFFFF
        flags = uapi.IORING_ENTER_GETEVENTS | uapi.IORING_ENTER_EXT_ARG
        try:
            return _syscall(
                uapi.SYS_IO_URING_ENTER, self.fd, count, count, flags, more.address, more.size
            )
        finally:
            self._words[self._sq_tail] = self._words[self._sq_head]  # who was not taken waits not

    def results(self) -> list[tuple[int, int]]:
        """Return what reap() yields, for many: the lower half of user_data, and res."""
        head = self._words[self._cq_head]
        count = self._words[self._cq_tail] - head & 0xFFFFFFFF
        self._words[self._cq_head] = head + count & 0xFFFFFFFF
        found: list[tuple[int, int]] = []
        words = uapi.io_uring_cqe.size // 4
        while count:
            at = head & self._cq_mask
            here = min(count, self._cq_mask + 1 - at)
            first = self._cqes // 4 + at * words
            last = first + here * words
            whose = self._words[first:last:words].tolist()
            found += zip(whose, self._signed[first + 2 : last : words].tolist(), strict=True)
            head, count = head + here, count - here
        return found

    def limit_workers(self, bounded: int) -> None:
        """Allow this thread's commands so many sleeping io-wq workers.

        Without it the bound is min(entries of the thread's first ring, 4 x CPUs) and one command
        too many that sleeps keeps the next from starting (io_uring/tctx.c, io_init_wq_offload).
        """
        counts = Buffer(bounded.to_bytes(4, "little") + bytes(4))
        register = uapi.IORING_REGISTER_IOWQ_MAX_WORKERS
        _syscall(uapi.SYS_IO_URING_REGISTER, self.fd, register, counts.address, 2)

    def close(self) -> None:
        """Give the ring back; commands that are still under way are cancelled by the kernel."""
        self._words.release()
        self._signed.release()
        self._rings.close()
        self._sqes.close()
        os.close(self.fd)
