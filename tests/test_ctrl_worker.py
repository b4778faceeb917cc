"""The daemon's side of the workers, with a worker that the test plays."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from notes import Notes
from patience import PATIENCE_S, until

from ublkwatch.ctrl import CtrlError
from ublkwatch.ctrl_worker import Workers


class Peer:
    """Plays a worker: reads requests and answers them as the test says."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self) -> dict[str, Any] | None:
        """Return the next request; None when the daemon let go of the line."""
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(sock=self._line)
        line = await asyncio.wait_for(self._streams[0].readline(), PATIENCE_S)
        message: dict[str, Any] | None = json.loads(line) if line else None
        return message

    def answer(self, request: dict[str, Any] | None, error: int = 0, **more: int) -> None:
        assert request is not None
        assert self._streams is not None
        message = {"id": request["id"], "error": error, **more}
        self._streams[1].write(json.dumps(message).encode() + b"\n")

    async def serve_one(self, error: int = 0) -> None:
        self.answer(await self.request(), error)

    def die(self) -> None:
        if self._streams is None:
            self._line.close()
        else:
            self._streams[1].close()


class Stage:
    """Workers whose worker processes are Peers."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.notes = Notes()
        self.settled: list[int] = []
        self.workers = Workers(self._start, self.notes, self._settle)

    async def _settle(self, pid: int) -> None:
        self.settled.append(pid)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.send(b'{"id": 0, "pid": %d}\n' % (7000 + len(self.peers)))  # hello
        self.peers.append(Peer(theirs))
        return ours

    def call(
        self, dev_id: int, *, key: str = "", timeout_s: float = 30
    ) -> asyncio.Task[dict[str, Any]]:
        call = self.workers.call("GET_PARAMS", dev_id, key or f"key {dev_id}", timeout_s=timeout_s)
        return asyncio.create_task(call)


def play(work: Callable[[Stage], Awaitable[None]]) -> None:
    async def main() -> None:
        stage = Stage()
        try:
            await stage.workers.prepare()
            await work(stage)
        finally:
            stage.workers.close()
            for peer in stage.peers:
                peer.die()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_answers_find_their_call_in_whatever_order_they_come() -> None:
    async def work(stage: Stage) -> None:
        calls = [stage.call(dev_id) for dev_id in range(3)]
        peer = stage.peers[0]
        requests = [await peer.request() for _ in calls]
        for request in reversed(requests):
            assert request is not None
            peer.answer(request, at=request["dev_id"] * 10)
        assert [(await call)["at"] for call in calls] == [0, 10, 20]
        assert len(stage.peers) == 1

    play(work)


def test_an_error_is_raised_with_command_and_device_and_the_worker_is_kept() -> None:
    async def work(stage: Stage) -> None:
        call = stage.call(4)
        await stage.peers[0].serve_one(errno.EBUSY)
        with pytest.raises(CtrlError, match=r"GET_PARAMS ublk 4: EBUSY"):
            await call
        assert stage.workers.retired == 0

    play(work)


def test_a_silent_worker_is_retired_at_the_deadline_and_closed_after_its_late_answer() -> None:
    async def work(stage: Stage) -> None:
        old = stage.peers[0]
        silent, other = stage.call(1, timeout_s=0), stage.call(2)
        requests = [await old.request(), await old.request()]
        with pytest.raises(CtrlError, match="ETIMEDOUT"):
            await silent
        assert stage.workers.retired == 1
        next_one = stage.call(3)
        await until(lambda: len(stage.peers) > 1, "another worker is started")
        await stage.peers[1].serve_one()
        await next_one
        old.answer(requests[1])  # what was pending is finished all the same
        assert (await other)["error"] == 0
        old.answer(requests[0])
        assert await old.request() is None
        assert stage.settled == [7000, 7001]  # each by its pid, once

    play(work)


def test_a_worker_that_says_etimedout_itself_is_retired_too() -> None:
    async def work(stage: Stage) -> None:
        call = stage.call(1)
        await stage.peers[0].serve_one(errno.ETIMEDOUT)
        with pytest.raises(CtrlError, match="ETIMEDOUT"):
            await call
        assert await stage.peers[0].request() is None

    play(work)


def test_calls_at_the_same_time_share_one_new_worker() -> None:
    async def work(stage: Stage) -> None:
        call = stage.call(1)
        await stage.peers[0].serve_one(errno.ETIMEDOUT)
        with pytest.raises(CtrlError):
            await call
        calls = [stage.call(dev_id) for dev_id in range(5)]
        await until(lambda: len(stage.peers) > 1, "another worker is started")
        for _ in calls:
            await stage.peers[1].serve_one()
        await asyncio.gather(*calls)
        assert len(stage.peers) == 2

    play(work)


def test_cancel_names_the_command_that_is_meant_and_none_once_it_is_answered() -> None:
    async def work(stage: Stage) -> None:
        peer = stage.peers[0]
        call, other = stage.call(1, key="mine"), stage.call(2, key="other")
        mine, its = await peer.request(), await peer.request()
        assert mine is not None
        stage.workers.cancel("nobody's")
        stage.workers.cancel("mine")
        assert await peer.request() == {"id": mine["id"], "command": "cancel"}
        peer.answer(mine, errno.EINTR)
        with pytest.raises(CtrlError, match="EINTR"):
            await call
        stage.workers.cancel("mine")
        stage.workers.cancel("other")
        cancelled = await peer.request()
        assert cancelled is not None
        assert its is not None
        assert cancelled["id"] == its["id"]
        peer.answer(its)
        await other

    play(work)


def test_a_worker_that_dies_fails_its_commands_and_is_replaced() -> None:
    async def work(stage: Stage) -> None:
        call = stage.call(1)
        await stage.peers[0].request()
        stage.peers[0].die()
        with pytest.raises(CtrlError, match=r"ublk 1: EIO"):
            await call
        again = stage.call(1)
        await until(lambda: len(stage.peers) > 1, "another worker is started")
        await stage.peers[1].serve_one()
        assert (await again)["error"] == 0

    play(work)


def test_a_command_that_is_cancelled_before_it_is_sent_is_not_sent() -> None:
    async def work(stage: Stage) -> None:
        silent = stage.call(1, timeout_s=0)
        await stage.peers[0].request()
        with pytest.raises(CtrlError, match="ETIMEDOUT"):
            await silent
        early, other = stage.call(2, key="early"), stage.call(3)  # a worker is started for them
        await asyncio.sleep(0)
        stage.workers.cancel("early")
        with pytest.raises(CtrlError, match="EINTR"):
            await early
        request = await stage.peers[1].request()
        assert request is not None
        assert request["dev_id"] == 3
        stage.peers[1].answer(request)
        await other

    play(work)


def test_end_has_no_deadline_until_it_is_cancelled() -> None:
    async def work(stage: Stage) -> None:
        end = asyncio.create_task(
            stage.workers.call("END_USER_RECOVERY", 1, "end", timeout_s=0, pid=7)
        )
        sent = await stage.peers[0].request()
        await asyncio.sleep(1.2)  # longer than the deadline of any other
        assert not end.done()
        assert stage.workers.retired == 0
        stage.workers.cancel("end")
        assert await stage.peers[0].request() == {
            "id": sent["id"] if sent else 0,
            "command": "cancel",
        }
        with pytest.raises(CtrlError, match="ETIMEDOUT"):
            await end
        assert stage.workers.retired == 1

    play(work)


def test_commands_are_told_with_their_answers() -> None:
    async def work(stage: Stage) -> None:
        good, bad = stage.call(1), stage.call(2)
        await stage.peers[0].serve_one()
        await stage.peers[0].serve_one(errno.EBUSY)
        await asyncio.wait({good, bad})
        assert isinstance(bad.exception(), CtrlError)
        assert stage.notes.commands == [("GET_PARAMS", 0), ("GET_PARAMS", errno.EBUSY)]
        assert min(stage.notes.took_s) >= 0
        silent = stage.call(3, timeout_s=0)
        with pytest.raises(CtrlError, match="ETIMEDOUT"):
            await silent
        assert stage.notes.commands[2:] == [("GET_PARAMS", errno.ETIMEDOUT)]

    play(work)


def test_a_command_is_wedged_from_its_deadline_until_its_late_answer() -> None:
    async def work(stage: Stage) -> None:
        old = stage.peers[0]
        silent, other = stage.call(1, timeout_s=0), stage.call(2)
        requests = [await old.request(), await old.request()]
        assert stage.workers.wedged == 0
        with pytest.raises(CtrlError, match="ETIMEDOUT"):
            await silent
        assert stage.workers.wedged == 1
        old.answer(requests[1])
        await other
        assert stage.workers.wedged == 1
        old.answer(requests[0])
        await until(lambda: stage.workers.wedged == 0, "it is answered")

    play(work)


def test_a_command_that_its_worker_gave_up_is_wedged_until_that_has_ended() -> None:
    async def work(stage: Stage) -> None:
        call = stage.call(1)
        await stage.peers[0].serve_one(errno.ETIMEDOUT)
        with pytest.raises(CtrlError, match="ETIMEDOUT"):
            await call
        assert await stage.peers[0].request() is None  # it was told to end, and the kernel waits
        next_one = stage.call(2)
        await until(lambda: len(stage.peers) > 1, "another worker is started")
        await stage.peers[1].serve_one()
        await next_one
        assert stage.workers.wedged == 1
        stage.peers[0].die()
        await until(lambda: stage.workers.wedged == 0, "it has ended")

    play(work)
