"""The real shell over the twins: stories that seeds tell, and our own death at every step.

A story that breaks a law is replayed by ``python -m tests.world SEED``.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from world import PLAIN, REISSUE, Story, World, play

from ublkwatch.model import Generation, Phase, Reason, Record

SEEDS, PART = 1200, 100
pytestmark = pytest.mark.timeout(600)
GENERATIONS = [Generation.G2, Generation.G3]


@pytest.mark.parametrize("part", range(0, SEEDS, PART))
def test_every_story_keeps_the_laws(part: int) -> None:
    broken = {
        seed: world.laws.broken
        for seed in range(part, part + PART)
        if (world := play(Story.of(seed))).laws.broken
    }
    assert not broken


# What must meet for a rule to show, and seldom does by chance: servers, and faults.
MEETINGS = [
    (("hang-after-open",), ("undying",)),
    (("exit-after-line", "exit-after-open"), ("undying",)),
    (("exit-after-ready",), ("stranger",)),
    (("exit-after-ready", "exit-after-ready"), ("saturated",)),
    ((), ("death", "delete and add again")),
    (("slow-start",), ("death", "delete and add again")),
    (("slow-start",), ("rival",)),
]


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda generation: generation.name)
@pytest.mark.parametrize(("kinds", "faults"), MEETINGS)
def test_what_seldom_meets(
    kinds: tuple[str, ...], faults: tuple[str, ...], generation: Generation
) -> None:
    stories = [Story(seed, generation, kinds=kinds, faults=faults) for seed in range(25)]
    broken = {
        story.seed: world.laws.broken for story in stories if (world := play(story)).laws.broken
    }
    assert not broken


# What our own death is tried in, at every step.
SCENES: dict[str, tuple[str, ...]] = {
    "a good server": (),
    "one that ends before its line": ("exit-at-start",),
    "one that cannot be started": ("no-start",),
    "one that is never ready": ("hang-at-start",),
    "one that ends half attached": ("exit-after-mmap",),
    "one that hangs half attached": ("hang-after-some-tags",),
    "one that ends when it has attached": ("exit-after-all",),
    "one that ends in probation": ("exit-after-live",),
}
# The same for servers that wait for no line.
OTHER_SCENES = [
    *(("start", kinds) for kinds in ((), ("exit-after-mmap",), ("fork-away",))),
    *(("delegated", kinds) for kinds in ((), ("exit-at-start",))),
]


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda generation: generation.name)
@pytest.mark.parametrize("scene", SCENES)
def test_we_may_die_before_amid_and_after_every_effect(scene: str, generation: Generation) -> None:
    die_everywhere(Story(7, generation, kinds=SCENES[scene]))


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda generation: generation.name)
@pytest.mark.parametrize(("way", "kinds"), OTHER_SCENES)
def test_we_may_die_everywhere_also_where_servers_wait_for_no_line(
    way: str, kinds: tuple[str, ...], generation: Generation
) -> None:
    die_everywhere(Story(7, generation, kinds=kinds, way=way))


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda generation: generation.name)
@pytest.mark.parametrize("kinds", [(), ("exit-after-line",)])
def test_we_may_die_everywhere_also_with_a_standby(
    kinds: tuple[str, ...], generation: Generation
) -> None:
    die_everywhere(Story(7, generation, kinds=kinds).with_standby("waits"))


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda generation: generation.name)
@pytest.mark.parametrize(
    ("when", "taken"), [("waits", True), ("killed", False), ("outdated", False)]
)
def test_a_standby_is_taken_or_a_new_server_started_and_no_attempt_lost(
    when: str, *, taken: bool, generation: Generation
) -> None:
    async def tell(world: World) -> None:
        await World.tell(world)
        (record,) = world.records.values()
        tag = next(p.tag for p in world.processes.alive() if p.id == record.server)
        assert tag.startswith("s-") == taken == record.standby
        assert record.failures == ()

    for seed in range(30):
        world = play(Story(seed, generation).with_standby(when), tell)
        assert world.laws.broken == []
        assert world.recovered == 1


def die_everywhere(story: Story) -> None:
    alive = play(story)
    assert alive.laws.broken == []
    assert alive.effects >= 8
    broken = {}
    for number in range(1, alive.effects + 1):
        for when in ("before", "amid", "after"):
            world = play(replace(story, seed=number, death=(when, number)))
            if world.laws.broken:
                broken[when, number] = world.laws.broken
    assert not broken


def test_the_same_story_twice_is_the_same_story() -> None:
    for seed in range(20):
        first, second = play(Story.of(seed)), play(Story.of(seed))
        assert first.transcript == second.transcript


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda generation: generation.name)
def test_without_a_fault_every_story_ends_live(generation: Generation) -> None:
    for seed in range(30):
        world = play(Story(seed, generation, flags=(PLAIN, REISSUE)[seed % 2]))
        assert world.laws.broken == []
        assert (world.recovered, world.lives) == (1, 1)


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda generation: generation.name)
@pytest.mark.parametrize("kind", ["no-start", "exit-at-start"])
def test_a_server_that_ends_before_its_line_costs_little_time(
    kind: str, generation: Generation
) -> None:
    async def tell(world: World) -> None:
        await World.tell(world)
        record = await phase_of(world, 0)
        assert record.phase is Phase.WATCHING
        assert record.last_held_s is not None
        assert record.last_held_s < 3, world.transcript

    for seed in range(10):
        assert play(Story(seed, generation, kinds=(kind, kind)), tell).laws.broken == []


# --- promises of the shell that a story of one device does not show ------------------------------


async def phase_of(world: World, dev_id: int) -> Record:
    assert world.life
    return next(one for one in world.life.monitor.records() if one.dev_id == dev_id)


@pytest.mark.parametrize("fault", ["mutex", "hanging server", "bug", "lost command"])
def test_one_device_never_delays_another(fault: str) -> None:
    async def tell(world: World) -> None:
        world.cares[1] = world.cares[0]
        await world.create(0)
        await world.create(1)
        world.begin_life()
        assert world.life
        await asyncio.sleep(1)
        if fault == "mutex":
            await world.device.mutex.acquire()
        if fault == "lost command":
            world.losing["START_USER_RECOVERY"] = "command"
        if fault == "bug":
            world.life.monitor.post(0, "no event at all")  # type: ignore[arg-type]
        world.serving(0).end()  # type: ignore[union-attr]
        await asyncio.sleep(2)
        server = world.serving(1)
        assert server is not None
        server.end()
        lost_at = world.loop.time()
        while (await phase_of(world, 1)).recoveries == 0:
            await asyncio.sleep(0.1)
            assert world.loop.time() - lost_at < 3, world.transcript
        if fault == "bug":
            assert world.laws.broken.pop().startswith("a bug: ")
        else:
            assert (await phase_of(world, 0)).phase in (Phase.DRAINING, Phase.STARTING)

    kinds = ("hang-at-start",) if fault == "hanging server" else ()
    assert play(Story(1, Generation.G3, kinds=kinds), tell).laws.broken == []


def test_one_task_steps_every_event_and_a_late_answer_changes_nothing() -> None:
    """START's answer is lost; it comes when the attempt has long been given up."""

    async def tell(world: World) -> None:
        await world.create()
        world.begin_life()
        assert world.life
        steppers = set()
        save = world.life.save_record

        def noted(record: Record) -> None:
            steppers.add(asyncio.current_task())
            save(record)

        world.life.save_record = noted  # type: ignore[method-assign]
        await asyncio.sleep(1)
        world.losing["START_USER_RECOVERY"] = "reply"
        world.serving().end()  # type: ignore[union-attr]
        await asyncio.sleep(200)
        record = await phase_of(world, 0)
        assert record.phase is Phase.FAILED
        assert record.reason is Reason.NO_ANSWER
        assert len(steppers) == 1
        await asyncio.sleep(300)
        assert replace(await phase_of(world, 0), info=None, agreed=0) == replace(
            record, info=None, agreed=0
        )

    assert play(Story(1, Generation.G3), tell).laws.broken == []
