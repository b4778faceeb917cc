"""The bare ring, on the real kernel."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from ublkwatch import uapi
from ublkwatch.uring import Buffer, Ring, _syscall

OP_READ = 22


def nop(user_data: int) -> bytes:
    return uapi.io_uring_sqe.pack(opcode=uapi.IORING_OP_NOP, user_data=user_data)


def test_every_nop_is_completed_once_round_and_round_the_queue() -> None:
    ring = Ring(4)
    with contextlib.closing(ring):
        seen: list[tuple[int, int]] = []
        for start in range(0, 40, 4):
            for number in range(start, start + 4):
                ring.push(nop(number))
            ring.submit(wait=4)
            seen += ring.reap()
    assert sorted(seen) == [(number, 0) for number in range(40)]


def test_what_was_laid_out_is_sent_again_and_again_in_one_call() -> None:
    ring = Ring(8)
    with contextlib.closing(ring):
        for slot in range(ring.entries):
            ring.lay(slot, nop(slot))
        for count in (5, 8, 1, 3, 7) * 10:  # over the end of both queues
            assert ring.send(count, 5) == count
            assert sorted(ring.results()) == [(slot, 0) for slot in range(count)]
        assert ring.results() == []


def test_what_was_not_taken_does_not_wait_for_the_next_time() -> None:
    ring = Ring(4)
    ring.lay(0, nop(7))
    descriptor, ring.fd = ring.fd, -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        ring.send(1, 0)
    ring.fd = descriptor
    with contextlib.closing(ring):
        assert ring.send(1, 5) == 1
        assert ring.results() == [(7, 0)]


def test_a_send_waits_no_longer_than_it_may() -> None:
    reading, writing = os.pipe()
    buffer = Buffer(1)
    ring = Ring(2)
    with contextlib.closing(ring):
        read = uapi.io_uring_sqe.pack(opcode=OP_READ, fd=reading, addr=buffer.address, len=1)
        ring.lay(0, read)
        ring.send(1, 0.001)
        assert ring.results() == []
        os.write(writing, b"x")
        ring.lay(1, nop(1))
        ring.submit(wait=1)
        assert ring.results() == [(0, 1)]
    os.close(reading)
    os.close(writing)


def test_a_full_queue_is_ebusy_until_it_is_submitted() -> None:
    ring = Ring(2)
    with contextlib.closing(ring):
        for number in range(ring.entries):
            ring.push(nop(number))
        with pytest.raises(OSError, match="full") as caught:
            ring.push(nop(99))
        assert caught.value.errno == errno.EBUSY
        ring.submit(wait=2)
        ring.push(nop(99))
        ring.submit(wait=1)
        assert (99, 0) in list(ring.reap())


def test_too_many_entries_are_clamped_and_none_is_refused() -> None:
    ring = Ring(1 << 20)
    with contextlib.closing(ring):
        assert ring.entries < 1 << 20
    with pytest.raises(OSError, match="Invalid argument"):
        Ring(0)


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_no_descriptor_of_a_ring_is_inherited_or_left() -> None:
    before = descriptors()
    ring = Ring(4)
    assert not os.get_inheritable(ring.fd)
    ring.close()
    assert descriptors() == before


def test_the_bound_of_workers_is_the_one_that_the_kernel_keeps() -> None:
    ring = Ring(4)
    with contextlib.closing(ring):
        ring.limit_workers(57)
        asked = Buffer(8)  # 0 changes nothing, and is answered with what is set
        register = uapi.IORING_REGISTER_IOWQ_MAX_WORKERS
        _syscall(uapi.SYS_IO_URING_REGISTER, ring.fd, register, asked.address, 2)
    assert int.from_bytes(asked.bytes()[:4], "little") == 57


def test_a_failed_syscall_says_why() -> None:
    with pytest.raises(OSError, match=r"Bad file descriptor"):
        _syscall(uapi.SYS_IO_URING_ENTER, (1 << 31) - 1, 0, 0, 0, 0, 0)
