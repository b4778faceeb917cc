"""One look for many who ask: begun after each of them asked, whoever is cancelled or fails."""

from __future__ import annotations

import asyncio

import pytest

from ublkwatch.together import Together


class Looks:
    """Looks that end when they are told to, and answer with their number."""

    def __init__(self) -> None:
        self.begun: list[asyncio.Future[None]] = []
        self.together = Together(self.look)

    async def look(self) -> int:
        ending = asyncio.get_running_loop().create_future()
        self.begun.append(ending)
        number = len(self.begun)
        await ending
        return number

    async def ask(self) -> asyncio.Task[int]:
        """Ask, and come back once that waits."""
        task = asyncio.create_task(self.together.ask())
        await rest()
        return task

    async def end(self, error: Exception | None = None) -> None:
        """End the look that is under way."""
        if error is None:
            self.begun[-1].set_result(None)
        else:
            self.begun[-1].set_exception(error)
        await rest()


async def rest() -> None:
    """Let everybody go on until he waits."""
    for _ in range(9):
        await asyncio.sleep(0)


def test_all_who_ask_amid_a_look_share_the_next_one() -> None:
    async def story() -> None:
        looks = Looks()
        first = await looks.ask()
        others = [await looks.ask() for _ in range(9)]
        await looks.end()
        await looks.end()
        assert await first == 1
        assert await asyncio.gather(*others) == [2] * 9
        assert len(looks.begun) == 2

    asyncio.run(story())


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_who_waited_behind_a_look_that_came_to_nothing_has_one_of_his_own(how: str) -> None:
    async def story() -> None:
        looks = Looks()
        first = await looks.ask()
        leader = await looks.ask()
        other = await looks.ask()
        await looks.end()
        assert await first == 1
        if how == "cancelled":
            leader.cancel()
            await rest()
        else:
            await looks.end(OSError("a look that failed"))
        with pytest.raises((asyncio.CancelledError, OSError)):
            await leader
        await looks.end()
        assert await other == 3

    asyncio.run(story())
