"""The status document: written when it says something new, confirmed else."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import virtual

from ublkwatch import bulletin as bulletin_module
from ublkwatch.bulletin import CONFIRM_S, Bulletin


@dataclass
class Press:
    """What there is to say, where it is written, and what comes of it."""

    changes: int = 0
    ages: bool = False
    offset: float = 1000.0
    trouble: OSError | None = None
    there: bool = False
    written: list[float] = field(default_factory=list)
    confirmed: list[float] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def live(self, story: Callable[[Bulletin], Awaitable[None]]) -> None:
        async def run() -> None:
            bulletin = Bulletin(
                self._compose, lambda: self.changes, self, self.told.append, lambda: self.offset
            )
            task = asyncio.create_task(bulletin.publish_for_ever())
            await story(bulletin)
            task.cancel()

        virtual.run(run())

    async def polls(self, bulletin: Bulletin, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(1)
            bulletin.look()

    def _compose(self) -> tuple[dict[str, Any], bool]:
        return {"changes": self.changes}, self.ages

    def write_status(self, document: str) -> None:
        assert document == f'{{"changes": {self.changes}}}'
        if self.trouble:
            raise self.trouble
        self.there = True
        self.written.append(asyncio.get_running_loop().time())

    def confirm_status(self) -> None:
        if not self.there:
            raise FileNotFoundError(2, "No such file or directory")
        self.confirmed.append(asyncio.get_running_loop().time())


def test_what_says_nothing_new_is_confirmed_now_and_then() -> None:
    press = Press()
    press.live(lambda bulletin: press.polls(bulletin, 60))
    assert len(press.written) == 1, "at once, and never again"
    pauses = {round(b - a) for a, b in zip(press.confirmed, press.confirmed[1:], strict=False)}
    assert pauses == {CONFIRM_S}
    assert set(press.told) == {""}


def test_a_change_is_written_with_the_next_poll_and_what_is_told_of_at_once() -> None:
    press = Press()

    async def story(bulletin: Bulletin) -> None:
        await press.polls(bulletin, 10)
        press.changes += 1
        await press.polls(bulletin, 1)
        await asyncio.sleep(0.1)
        assert len(press.written) == 2
        await asyncio.sleep(1)
        bulletin.dirty()
        await asyncio.sleep(0.01)
        assert len(press.written) == 3

    press.live(story)


def test_however_much_there_is_to_say_there_is_a_pause_between_two_writes() -> None:
    press = Press()

    async def story(bulletin: Bulletin) -> None:
        for _ in range(1000):
            bulletin.dirty()
            await asyncio.sleep(0.01)

    press.live(story)
    assert 45 <= len(press.written) <= 51


def test_what_takes_long_to_compose_is_composed_the_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    press, clock = Press(), itertools.count(0.0, 0.1)
    monkeypatch.setattr(bulletin_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    async def story(bulletin: Bulletin) -> None:
        for _ in range(100):
            press.changes += 1
            bulletin.dirty()
            await asyncio.sleep(0.1)

    press.live(story)
    assert 8 <= len(press.written) <= 11, "ten times as long nothing is composed"


def test_while_time_alone_changes_it_every_poll_writes_it() -> None:
    press = Press(ages=True)

    async def story(bulletin: Bulletin) -> None:
        await press.polls(bulletin, 10)
        press.ages = False
        await press.polls(bulletin, 10)

    press.live(story)
    assert len(press.written) == 11, "and once more when it does not any longer"


def test_when_the_days_clock_is_set_it_is_written_anew() -> None:
    press = Press()

    async def story(bulletin: Bulletin) -> None:
        await press.polls(bulletin, 3)
        press.offset += 0.1
        await press.polls(bulletin, 3)
        assert len(press.written) == 1
        press.offset += 3600
        await press.polls(bulletin, 3)
        assert len(press.written) == 2

    press.live(story)


def test_what_could_not_be_written_is_told_and_tried_with_every_poll() -> None:
    press = Press(trouble=OSError(28, "No space left on device"))

    async def story(bulletin: Bulletin) -> None:
        await press.polls(bulletin, 5)
        press.trouble = None
        await press.polls(bulletin, 5)

    press.live(story)
    assert press.told.count("No space left on device") == 5
    assert len(press.written) == 1
    assert press.told[-1] == ""


def test_what_somebody_removed_is_written_anew() -> None:
    press = Press()

    async def story(bulletin: Bulletin) -> None:
        await press.polls(bulletin, 3)
        press.there = False
        await press.polls(bulletin, 10)

    press.live(story)
    assert len(press.written) == 2


def test_who_waits_is_told_when_what_is_true_now_can_be_read() -> None:
    """`systemctl start` returns, and `ublkwatch status` has every device."""
    press = Press()

    async def story(bulletin: Bulletin) -> None:
        await asyncio.sleep(0.01)  # one is written, and was begun without what is new
        press.changes += 1
        await bulletin.shown()
        assert len(press.written) == 2

    press.live(story)


def test_nobody_waits_for_ever_for_what_cannot_be_written() -> None:
    press = Press(trouble=OSError(28, "No space left on device"))
    press.live(lambda bulletin: bulletin.shown())
    assert set(press.told) == {"No space left on device"}

    async def unheard(bulletin: Bulletin) -> None:
        stuck = Bulletin(lambda: ({}, False), lambda: 0, press, press.told.append, lambda: 0.0)
        began = asyncio.get_running_loop().time()
        await stuck.shown()  # nobody publishes
        assert asyncio.get_running_loop().time() - began < 60
        await bulletin.shown()

    press.live(unheard)
