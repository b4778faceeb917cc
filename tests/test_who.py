"""In whose care a device is: asked when it matters, and nobody waits for rules that hang."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest
from patience import until
from test_monitor import ORIGIN, World, phase, play

from ublkwatch.care import Care
from ublkwatch.model import Phase, Reason
from ublkwatch.rules import Unmanaged
from ublkwatch.uapi import DevState


def test_rules_that_hang_hold_nobody_up_and_are_asked_once_at_a_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "ublkwatch")
    world = World()

    async def story() -> None:
        await phase(world, Phase.WATCHING)
        world.rules_hang = asyncio.Event()
        world.seen.reconsider()
        looks = world.seen.polls
        await until(lambda: world.seen.polls > looks + 5, "it looks on")
        assert len(world.asked) == 2
        world.crash()
        await until(lambda: world.seen.records()[0].recoveries == 1, "by the care of before")
        world.rules_hang.set()
        world.seen.reconsider()
        await until(lambda: len(world.asked) > 2, "it is asked again")

    play(world, story)
    assert caplog.text.count("ublk 0: the rules about it take long") == 1


def test_a_device_whose_rules_hang_from_the_start_is_asked_about_once() -> None:
    world = World()

    async def story() -> None:
        world.rules_hang = asyncio.Event()
        await until(lambda: world.seen.polls > 5, "it looks, and looks on")
        assert len(world.asked) == 1
        world.rules_hang.set()
        await phase(world, Phase.WATCHING)

    play(world, story)


def test_an_attempt_goes_on_by_the_care_that_it_was_begun_with() -> None:
    world = World()

    async def story() -> None:
        await phase(world, Phase.WATCHING)
        world.start_hangs = True
        world.crash()
        await phase(world, Phase.STARTING)
        asked = len(world.asked)
        world.care = Care(("/bin/other",))
        world.seen.reconsider()
        looks = world.seen.polls
        await until(lambda: world.seen.polls > looks + 5, "it looks on")
        assert len(world.asked) == asked
        assert world.seen.care(0) != world.care

    play(world, story)


def test_what_is_not_safe_to_run_is_judged_again_with_every_look() -> None:
    world = World()

    async def story() -> None:
        await phase(world, Phase.WATCHING)
        mended = world.care
        world.care = Unmanaged(Reason.UNTRUSTED, "chmod go-w /s")
        world.seen.reconsider()
        record = await phase(world, Phase.OBSERVED)
        assert (record.reason, record.detail) == (Reason.UNTRUSTED, "chmod go-w /s")
        world.care = mended
        await phase(world, Phase.WATCHING)

    play(world, story)


def test_the_next_device_of_a_number_is_another() -> None:
    world = World()

    async def story() -> None:
        await phase(world, Phase.WATCHING)
        world.care, new = Care(("/bin/old",)), world.care
        hang = world.rules_hang = asyncio.Event()  # the question about the old one is open ...
        world.seen.reconsider()
        looks = world.seen.polls
        await until(lambda: world.seen.polls > looks + 2, "it looks on")
        before, world.info = world.info, None
        await until(lambda: not world.seen.records(), "it is gone")
        world.rules_hang, world.care = None, new
        world.origin = replace(ORIGIN, exe="/bin/new")
        world.info = before
        assert before
        assert before.state is DevState.LIVE
        await phase(world, Phase.WATCHING)
        assert world.asked[-1] == (0, world.origin)
        hang.set()  # ... and answered when it is about nobody any more
        looks = world.seen.polls
        await until(lambda: world.seen.polls > looks + 3, "it looks on")
        assert world.seen.care(0) == new

    play(world, story)


def test_the_dice_fall_once_for_each_attempt() -> None:
    world = World(dice=iter(range(1000)))

    async def story() -> None:
        await phase(world, Phase.WATCHING)
        before = {world.seen.policy(0).chance for _ in range(10)}
        world.crash()
        await until(lambda: world.seen.records()[0].recoveries == 1, "it is back")
        after = {world.seen.policy(0).chance for _ in range(10)}
        assert len(before) == len(after) == 1
        assert before != after

    play(world, story)
