"""How many servers are started at once, and who comes first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from ublkwatch.lanes import Lanes


class Queue:
    """Comers to the lanes, by name, and who has had a turn so far."""

    def __init__(self, at_once: int) -> None:
        self.lanes = Lanes(at_once)
        self.entered: list[str] = []
        self.leave: dict[str, Callable[[], None]] = {}

    def comes(self, name: str, priority: int = 0, *, again: bool = False) -> asyncio.Task[None]:
        async def come() -> None:
            self.leave[name] = await self.lanes.enter(priority, again=again)
            self.entered.append(name)

        return asyncio.create_task(come())

    async def settled(self) -> list[str]:
        for _ in range(10):
            await asyncio.sleep(0)
        return self.entered


def test_no_more_than_so_many_at_once_in_the_order_of_priority_then_of_arrival() -> None:
    async def story() -> None:
        queue = Queue(2)
        for name, priority in (("a", 0), ("b", 0), ("c", 0), ("d", 0), ("e", 5)):
            queue.comes(name, priority)
        assert await queue.settled() == ["a", "b"]
        queue.leave["a"]()
        queue.leave["a"]()  # once is enough
        assert await queue.settled() == ["a", "b", "e"]
        queue.leave["b"]()
        queue.leave["e"]()
        assert await queue.settled() == ["a", "b", "e", "c", "d"]

    asyncio.run(story())


def test_who_failed_before_never_keeps_those_waiting_who_come_the_first_time() -> None:
    async def story() -> None:
        queue = Queue(8)
        for number in range(100):
            queue.comes(f"bad {number}", 99, again=True)
        assert await queue.settled() == ["bad 0", "bad 1"]
        queue.comes("good")
        assert await queue.settled() == ["bad 0", "bad 1", "good"]

    asyncio.run(story())


@pytest.mark.parametrize("had_its_turn", [False, True])
def test_who_is_cancelled_takes_nobodys_turn(*, had_its_turn: bool) -> None:
    async def story() -> None:
        queue = Queue(1)
        queue.comes("a")
        await queue.settled()
        gone = queue.comes("gone")
        queue.comes("b")
        await queue.settled()
        if had_its_turn:
            queue.leave["a"]()  # "gone" has its turn now, and does not know it yet
        gone.cancel()
        if not had_its_turn:
            queue.leave["a"]()
        assert await queue.settled() == ["a", "b"]
        queue.leave["b"]()
        queue.comes("c")
        assert await queue.settled() == ["a", "b", "c"]

    asyncio.run(story())


def test_there_are_always_lanes() -> None:
    async def story() -> None:
        queue = Queue(0)
        queue.comes("first")
        queue.comes("again", again=True)
        assert await queue.settled() == ["first", "again"]

    asyncio.run(story())
