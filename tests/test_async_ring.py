"""The ring under asyncio, on the real kernel."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import weakref
from collections.abc import Iterator

import pytest
from patience import PATIENCE_S, some_turns

from ublkwatch import async_ring, uapi
from ublkwatch.async_ring import AsyncRing, Operation
from ublkwatch.uring import Buffer

OP_READ = 22  # IORING_OP_READ: of an empty pipe it sleeps until somebody writes


@contextlib.contextmanager
def empty_pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


async def start_read(ring: AsyncRing, fd: int) -> Operation:
    buffer = Buffer(8)
    return await ring.start(
        buffer=buffer, opcode=OP_READ, fd=fd, addr=buffer.address, len=buffer.size
    )


class CountingRing(AsyncRing):
    """Counts how often it went to the kernel with submissions."""

    enters = 0

    def _flush(self) -> None:
        self.enters += 1
        super()._flush()


def test_more_commands_than_entries_all_complete() -> None:
    async def main() -> list[int]:
        ring = AsyncRing(8)

        async def one() -> int:
            return await (await ring.start(opcode=uapi.IORING_OP_NOP)).done

        results = await asyncio.gather(*(one() for _ in range(200)))
        assert ring.in_flight == 0
        ring.close()
        return results

    assert asyncio.run(main()) == [0] * 200


def test_what_starts_in_one_turn_goes_to_the_kernel_at_once() -> None:
    async def main() -> None:
        ring = CountingRing(64)
        operations = [await ring.start(opcode=uapi.IORING_OP_NOP) for _ in range(30)]
        assert ring.enters == 0
        await asyncio.gather(*(operation.done for operation in operations))
        assert ring.enters == 1
        ring.close()

    asyncio.run(main())


def test_in_flight_is_bounded_by_the_slots() -> None:
    async def main(reading: int, writing: int) -> None:
        ring = AsyncRing(4)
        for _ in range(3):
            await start_read(ring, reading)
        fourth = asyncio.create_task(start_read(ring, reading))
        await some_turns()
        assert not fourth.done()
        assert ring.in_flight == 3
        os.write(writing, b"x" * 8)
        await asyncio.wait_for(fourth, PATIENCE_S)
        assert ring.in_flight == 3
        ring.close()

    with empty_pipe() as ends:
        asyncio.run(main(*ends))


def test_a_waiter_that_gave_up_frees_neither_slot_nor_buffer_before_the_completion() -> None:
    async def main(reading: int, writing: int) -> None:
        ring = AsyncRing(2)
        operation = await start_read(ring, reading)
        assert operation.buffer is not None
        buffer = weakref.ref(operation.buffer)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(operation.done, 0)
        del operation
        second = asyncio.create_task(start_read(ring, reading))
        await some_turns()
        gc.collect()
        assert buffer() is not None
        assert ring.in_flight == 1
        assert not second.done()
        os.write(writing, b"x" * 8)
        await asyncio.wait_for(second, PATIENCE_S)
        gc.collect()
        assert buffer() is None
        ring.close()

    with empty_pipe() as ends:
        asyncio.run(main(*ends))


def test_what_was_read_is_in_the_buffer() -> None:
    async def main(reading: int, writing: int) -> None:
        ring = AsyncRing()
        operation = await start_read(ring, reading)
        await some_turns()
        os.write(writing, b"go!")
        assert await asyncio.wait_for(operation.done, PATIENCE_S) == 3
        assert operation.buffer is not None
        assert operation.buffer.bytes() == b"go!".ljust(8, b"\0")
        ring.close()

    with empty_pipe() as ends:
        asyncio.run(main(*ends))


def test_a_sleeping_command_can_be_cancelled_and_a_done_one_does_not_mind() -> None:
    async def main(reading: int) -> None:
        ring = AsyncRing()
        operation = await start_read(ring, reading)
        await some_turns()
        ring.cancel(operation)
        assert await asyncio.wait_for(operation.done, PATIENCE_S) == -errno.ECANCELED
        ring.cancel(operation)
        assert ring.in_flight == 0
        ring.close()
        ring.cancel(operation)

    with empty_pipe() as (reading, _):
        asyncio.run(main(reading))


def test_more_cancellations_than_the_queue_holds_are_all_sent() -> None:
    async def main(reading: int) -> None:
        ring = AsyncRing(4)
        operations = [await start_read(ring, reading) for _ in range(3)]
        for operation in operations * 7:
            ring.cancel(operation)
        results = await asyncio.wait_for(asyncio.gather(*(o.done for o in operations)), PATIENCE_S)
        assert results == [-errno.ECANCELED] * 3
        ring.close()

    with empty_pipe() as (reading, _):
        asyncio.run(main(reading))


def test_closing_ends_the_waiters_and_keeps_the_buffers() -> None:
    async def main(reading: int) -> None:
        ring = AsyncRing(2)
        operation = await start_read(ring, reading)
        waiter = asyncio.ensure_future(operation.done)
        without_slot = asyncio.create_task(start_read(ring, reading))
        another = asyncio.create_task(start_read(ring, reading))
        await some_turns()
        ring.close()
        ring.close()
        for waiting in (waiter, without_slot, another):
            with pytest.raises(OSError, match="closed"):
                await asyncio.wait_for(waiting, PATIENCE_S)
        assert operation.buffer in async_ring._orphaned_buffers

    with empty_pipe() as (reading, _):
        asyncio.run(main(reading))


def test_a_closed_ring_takes_no_command() -> None:
    async def main() -> None:
        ring = AsyncRing()
        ring.close()
        with pytest.raises(OSError, match="closed") as caught:
            await ring.start(opcode=uapi.IORING_OP_NOP)
        assert caught.value.errno == errno.EBADF

    asyncio.run(main())
