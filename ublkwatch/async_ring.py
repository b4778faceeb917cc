"""The ring under asyncio: awaitable commands, batched submission, bounded in flight.

Apart from uring.py so that a server, which has a thread for a queue and no loop, starts without
asyncio: what a server's start takes is what a program waits.
"""

from __future__ import annotations

import asyncio
import errno

from ublkwatch import uapi
from ublkwatch.uring import Buffer, Ring

# Buffers of commands that were still with the kernel when their ring was closed. A worker of io-wq
# may write into one much later, so they are never freed; bounded by the entries of the rings.
_orphaned_buffers: list[Buffer] = []


class Operation:
    """A command on its way: ``done`` becomes its result, ``buffer`` lives until then."""

    def __init__(self, user_data: int, buffer: Buffer | None, done: asyncio.Future[int]) -> None:
        self.user_data = user_data
        self.buffer = buffer
        self.done = done


class AsyncRing:
    """The ring under asyncio: awaitable commands, batched submission, bounded in flight."""

    def __init__(self, entries: int = 64) -> None:
        """Set up a ring that the running loop watches."""
        self._ring = Ring(entries)
        self._loop = asyncio.get_running_loop()
        # One more slot than operations, so that a cancellation always finds room.
        self._slots = asyncio.Semaphore(self._ring.entries - 1)
        self._pending: dict[int, Operation] = {}
        self._next = 1
        self._flushing = False
        self._closed = False
        self._loop.add_reader(self._ring.fd, self._complete)

    @property
    def in_flight(self) -> int:
        """How many commands the kernel has not completed, given up on or not."""
        return len(self._pending)

    async def start(self, *, buffer: Buffer | None = None, **sqe: int | bytes) -> Operation:
        """Submit one SQE (fields of io_uring_sqe but user_data), together with its neighbours.

        Waits for a free slot: a slot is free when the kernel is done with it, and not before.
        """
        await self._slots.acquire()
        if self._closed:
            self._slots.release()
            raise OSError(errno.EBADF, "the ring is closed")
        operation = Operation(self._next, buffer, self._loop.create_future())
        self._next += 1
        self._pending[operation.user_data] = operation
        self._push(uapi.io_uring_sqe.pack(user_data=operation.user_data, **sqe))
        return operation

    def cancel(self, operation: Operation) -> None:
        """Ask the kernel to interrupt it; its ``done`` says what came of that (mostly -EINTR)."""
        if not operation.done.done() and not self._closed:
            self._push(
                # user_data 0 is nobody's: the answer to the cancellation itself is not needed.
                uapi.io_uring_sqe.pack(
                    opcode=uapi.IORING_OP_ASYNC_CANCEL, fd=-1, addr=operation.user_data
                )
            )

    def limit_workers(self, bounded: int) -> None:
        """As Ring.limit_workers()."""
        self._ring.limit_workers(bounded)

    def close(self) -> None:
        """Stop at once; commands under way end with OSError, their buffers are kept for ever."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._ring.fd)
        self._complete()
        for operation in self._pending.values():
            if operation.buffer is not None:
                _orphaned_buffers.append(operation.buffer)
            if not operation.done.done():
                operation.done.set_exception(OSError(errno.ECANCELED, "the ring was closed"))
                operation.done.exception()  # nobody has to be waiting for it
        self._ring.close()
        self._slots.release()  # who waits for a slot finds us closed, and passes it on

    def _push(self, sqe: bytes) -> None:
        try:
            self._ring.push(sqe)
        except OSError:  # full of cancellations that were not submitted yet
            self._ring.submit()
            self._ring.push(sqe)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if not self._closed:
            self._ring.submit()
            self._complete()  # what completed inline costs no turn of the loop

    def _complete(self) -> None:
        for user_data, result in self._ring.reap():
            operation = self._pending.pop(user_data, None)
            if operation is None:
                continue
            self._slots.release()
            if not operation.done.done():  # its waiter may have been cancelled
                operation.done.set_result(result)
