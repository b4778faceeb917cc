"""The virtual clock: time passes only where somebody waits, and no story runs away."""

from __future__ import annotations

import asyncio

import pytest
import virtual


def test_time_jumps_to_the_next_timer_and_order_is_that_of_the_deadlines() -> None:
    order: list[tuple[str, int]] = []

    async def at(name: str, delay: float) -> None:
        await asyncio.sleep(delay)
        order.append((name, round(asyncio.get_running_loop().time())))

    async def story() -> None:
        await asyncio.gather(at("late", 86_000), at("soon", 1), at("now", 0))

    virtual.run(story())
    assert order == [("now", 0), ("soon", 1), ("late", 86_000)]


def test_work_for_a_thread_is_done_at_once() -> None:
    async def story() -> tuple[int, float]:
        before = asyncio.get_running_loop().time()
        done = await asyncio.to_thread(sum, [1, 2])
        return done, asyncio.get_running_loop().time() - before

    assert virtual.run(story()) == (3, 0.0)


def test_what_a_stall_swallowed_is_late_and_in_order() -> None:
    order: list[float] = []

    async def story() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual.Loop)
        for delay in (1.0, 2.0):
            loop.call_later(delay, order.append, delay)
        loop.jump(100)
        loop.call_later(0, order.append, 100.0)
        await asyncio.sleep(1)
        assert order == [1.0, 2.0, 100.0]
        assert loop.time() > 101

    virtual.run(story())


async def for_ever_busy() -> None:
    while True:  # noqa: ASYNC110 - that is the point
        await asyncio.sleep(0)


async def for_ever_idle() -> None:
    await asyncio.Event().wait()


async def for_ever_slow() -> None:
    while True:  # noqa: ASYNC110
        await asyncio.sleep(100)


@pytest.mark.parametrize("story", [for_ever_busy, for_ever_idle, for_ever_slow])
def test_a_story_that_does_not_end_is_stopped(story: object) -> None:
    assert callable(story)
    with pytest.raises(virtual.RunAwayError):
        virtual.run(story(), virtual.Loop(max_virtual_s=10_000, max_turns=5_000))


def test_an_error_that_nobody_took_is_found() -> None:
    async def broken() -> None:
        raise ValueError("lost")

    async def story() -> None:
        task = asyncio.create_task(broken(), name="careless")
        await asyncio.sleep(1)
        assert task.done()

    with pytest.raises(AssertionError, match=r"careless: ValueError\('lost'\)"):
        virtual.run(story())
