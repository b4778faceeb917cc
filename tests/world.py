"""The whole world over which the real shell and the real machine run, on virtual time.

A story is a seed: it chooses the driver's dialect, the device's flags, the servers that come, what
goes wrong besides and when. ``python -m tests.world SEED`` prints one, ``--range A B`` plays many.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if __package__:  # as `python -m tests.world`; pytest and mypy find the neighbours by themselves
    sys.path.insert(0, str(Path(__file__).parent))

import virtual
from cast import KINDS, Cast, Home, holder
from faults import FAULTS, HALF, excuses, kill_silent_servers
from laws import Laws
from life import Life
from processes import Process, Processes
from twin import Driver
from twin_device import Device

from ublkwatch.care import Care, Spec, Standby
from ublkwatch.events import Asked, Transition
from ublkwatch.model import (
    Attach,
    Exhausted,
    Generation,
    Handoff,
    Order,
    Phase,
    Policy,
    Reason,
    Record,
    RecoveryMode,
)
from ublkwatch.uapi import DevFlags

PLAIN = DevFlags.USER_RECOVERY
REISSUE = PLAIN | DevFlags.USER_RECOVERY_REISSUE
FAIL_IO = PLAIN | DevFlags.USER_RECOVERY_FAIL_IO
_RESTS = {Phase.WATCHING, Phase.OBSERVED, Phase.FAILED, Phase.HELD}
_QUIET_S = 12.0  # at rest for so long is at rest
_MOST_S = 900.0  # what all deadlines together may take, once nothing interferes any more


# What an operator may have chosen, besides the defaults.
POLICIES: tuple[tuple[tuple[str, Any], ...], ...] = (
    (),
    (("on_exhausted", Exhausted.FAIL),),
    (("hold_timeout_s", 20.0),),
    (("grace_s", 2.0),),
    (("on_exhausted", Exhausted.EXEC), ("decisions_max", 2)),
)


@dataclass(frozen=True)
class Story:
    """What happens; ``death`` kills the supervisor "before", "amid" or "after" its n-th effect."""

    seed: int
    generation: Generation
    flags: DevFlags = REISSUE
    queues: int = 2
    depth: int = 4
    kinds: tuple[str, ...] = ()  # of the servers, one for each attempt, then good ones
    faults: tuple[str, ...] = ()
    death: tuple[str, int] | None = None
    way: str = "line"  # how servers attach: by their line, as they "start", or "delegated"
    policy: tuple[tuple[str, Any], ...] = ()  # what the operator chose besides
    standby: bool = False  # the next server is started beforehand
    when: str = ""  # its server is killed when the standby "waits", is "killed" or "outdated" too

    @property
    def mode(self) -> RecoveryMode:
        known = self.flags if self.generation is Generation.G3 else self.flags & ~(FAIL_IO ^ PLAIN)
        return RecoveryMode.of(known)

    @property
    def reasons(self) -> frozenset[Reason]:
        """For which of the permanent reasons giving up is excused."""
        found: set[Reason] = set()
        for name in self.faults:
            found |= FAULTS[name].reasons
            if self.generation is Generation.G2:
                found |= FAULTS[name].on_g2
        for kind in self.kinds:
            if self.generation is Generation.G2:
                # Who waits for no line may have touched the device whenever he fails.
                found |= excuses(kind) if self.way == "line" else HALF
            if kind == "leak":
                found |= {Reason.NOT_QUIESCED, Reason.CHAR_DEVICE_BUSY}
        if self.death and self.generation is Generation.G2:
            found |= {Reason.HALF_ATTACHED, Reason.LIVE_WITHOUT_SERVER}
        return frozenset(found)

    @property
    def observes(self) -> frozenset[Reason]:
        """For what keeping the hands off is right."""
        found = {reason for name in self.faults for reason in FAULTS[name].observes}
        if self.mode is RecoveryMode.NONE:
            found.add(Reason.NO_RECOVERY_FLAG)
        if self.death or "death" in self.faults:
            found.add(Reason.NEVER_SEEN_LIVE)  # it died before the spec was kept
        return frozenset(found)

    @property
    def stops(self) -> bool:
        return any(FAULTS[name].stops for name in self.faults)

    @classmethod
    def of(cls, seed: int) -> Story:
        """Let a seed choose."""
        rng = random.Random(seed)  # noqa: S311 - chance that can be replayed
        bad = rng.choices((0, 1, 2, 6), (3, 4, 2, 1))[0]
        wrong = rng.choices((0, 1, 2, 3), (3, 5, 2, 1))[0]
        story = cls(
            seed=seed,
            generation=rng.choice((Generation.G2, Generation.G3)),
            flags=rng.choices((REISSUE, PLAIN, FAIL_IO, DevFlags(0)), (6, 2, 2, 1))[0],
            queues=rng.choice((1, 2, 3)),
            depth=rng.choice((1, 2, 4)),
            kinds=tuple(rng.choice(KINDS) for _ in range(bad)),
            faults=tuple(rng.sample(sorted(FAULTS), wrong)),
            way=rng.choices(("line", "start", "delegated"), (4, 1, 1))[0],
            policy=rng.choices(POLICIES, (8, 2, 2, 2, 1))[0],
        )
        return story.with_standby() if story.way == "line" and rng.random() < 0.3 else story

    def with_standby(self, when: str = "") -> Story:
        """Have the next server started beforehand, and soon."""
        return replace(self, standby=True, policy=(*self.policy, ("stable_s", 0.1)), when=when)


@dataclass
class World:
    """The machine room: driver, processes, disk, people; and the laws, who look on."""

    story: Story
    loop: virtual.Loop
    records: dict[int, Record] = field(default_factory=dict)
    specs: dict[int, Spec] = field(default_factory=dict)
    homes: dict[str, Home] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)  # attempts that share another's home
    standbys: dict[str, Standby] = field(default_factory=dict)
    program: str = "1"  # what is executed
    transcript: list[str] = field(default_factory=list)
    losing: dict[str, str] = field(default_factory=dict)
    decision: int | None = None  # what the operator's command says
    host_ends: bool = False
    disk_full: bool = False
    info_error: int = 0
    state_shown: int | None = None
    torn: int = 0  # so many reads show QUIESCED while the device is LIVE
    dies_in_s: float = 0.0  # how long a server that is started now takes to die
    stopped: bool = False  # somebody sent STOP_DEV or DEL_DEV
    stops_late: bool = False  # the supervisor's STOP_DEV is with the kernel still
    decisions: int = 0  # how often the operator's command was asked
    budgets: int = 1  # every order to go on brings another
    effects: int = 0
    lives: int = 0
    recovered: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.story.seed)  # noqa: S311 - chance that can be replayed
        delegated, start = self.story.way == "delegated", self.story.way == "start"
        self.policy = Policy(
            generation=self.story.generation,
            handoff=Handoff.DELEGATED if delegated else Handoff.MANAGED,
            attach=Attach.START if start else Attach.LINE,
            attach_timeout_s=60 if delegated else 15,
            **dict(self.story.policy),
        )
        care = Care(("/bin/server",), self.policy, decider=("/bin/decide",))
        self.cares = {0: replace(care, standby=self.story.standby)}
        self.decision = self.rng.choice([None, 0, 10, 20])
        self.processes = Processes()
        self.driver = Driver(
            self.story.generation, self.rng, note=lambda text: self.note("kernel", text)
        )
        self.cast = Cast(self.driver, self.processes, self.rng, self.note)
        self.laws = Laws(self)
        self.life: Life | None = None
        self._kinds = list(self.story.kinds)
        self._changed_at = 0.0

    # --- told by the others ----------------------------------------------------------------------

    def note(self, who: str, what: str) -> None:
        if who == "kernel":
            self._changed_at = self.loop.time()
            if self.transcript and self.transcript[-1].endswith(f"{who:<22} {what}"):
                return  # START again and again, EBUSY
        self.transcript.append(f"{self.loop.time():12.4f}  {who:<22} {what}")

    def published(self, transition: Transition) -> None:
        before, after = transition.before, transition.after
        why = f" ({after.reason.name}: {after.detail})" if after.reason else ""
        path = f"{before.phase.value} -> {after.phase.value}{why}"
        self.note("  machine", f"{path}, attempt {after.seq}, by {transition.event}")
        self._changed_at = self.loop.time()
        self.recovered += (before.phase, after.phase) == (Phase.PROBATION, Phase.WATCHING)
        self.laws.transition(transition)

    def effect(self, when: str, what: str) -> None:
        """Count an effect; kill the supervisor if this is its hour."""
        self.effects += when == "before"
        death = self.story.death
        if death is None or self.lives != 1 or self.effects != death[1] or self.life is None:
            return
        if death[0] == when:
            self.note("effect", f"{self.effects}, {what}: killed {when} it")
            self.life.die()
        elif death[0] == "amid" and when == "before":
            self.note("effect", f"{self.effects}, {what}: killed amid it")
            life, delay = self.life, self.rng.choice([0.0, 0.001, 0.01])
            self.loop.call_later(delay, lambda: life.die() if life.alive else None)

    def died(self) -> None:
        self.life = None
        self.loop.call_later(self.rng.choice([0.05, 1.0, 30.0]), self.begin_life)

    def lost(self, command: str) -> str:
        return self.losing.pop(command, "")

    def next_kind(self, dev_id: int) -> str:
        return self._kinds.pop(0) if dev_id == 0 and self._kinds else "good"

    # --- what faults do --------------------------------------------------------------------------

    @property
    def device(self) -> Device:
        return self._device

    async def pause(self, least: float, most: float) -> None:
        await asyncio.sleep(self.rng.uniform(least, most))

    def serving(self, dev_id: int = 0) -> Process | None:
        device = self.driver.devices.get(dev_id)
        return holder(device) if device else None

    def rival_server(self) -> Process:
        return self.cast.start("good", 0, "", _lined())

    def submit(self) -> None:
        if 0 in self.driver.devices:
            self.driver.devices[0].submit()

    def kill_supervisor(self) -> None:
        if self.life is not None:
            self.life.die()

    @property
    def forgiven(self) -> bool:
        """Whether the device may be gone without a record that says why."""
        return self.story.stops or self.stops_late or "forget" in self.story.faults

    def order(self, order: Order, until: float | None = None) -> None:
        """Ask the supervisor for something, as its admin socket does."""
        if self.life is not None:
            refusal = self.life.monitor.ask(0, Asked(order, "somebody", until))
            self.budgets += not refusal and order in (Order.RETRY, Order.RECOVER)
            self.note("operator", f"asks: {order.value}{refusal and ', refused: '}{refusal}")

    async def operator(self, command: str) -> None:
        self.note("operator", f"sends {command}")
        self.stopped = True
        sent = self.driver.send(command, 0)
        await asyncio.wait({sent.done}, timeout=self.rng.choice([5, 60]))
        if not sent.done.done():  # a server sits on its requests; killed, it lets go of them
            for process in self.processes.alive():
                process.end()
        await asyncio.shield(sent.done)

    async def create(self, dev_id: int = 0) -> None:
        """Add a device, and let its first server bring it up."""
        story = self.story
        await self.driver.call(
            "ADD_DEV", dev_id, queues=story.queues, depth=story.depth, flags=int(story.flags)
        )
        device = self.driver.devices[dev_id]
        if dev_id == 0:
            self._device = device
        self.cast.create("good", dev_id)
        while device.diskseq is None:
            await self.driver.pulse.wait()
        self.laws.created(dev_id)

    def begin_life(self) -> None:
        self.lives += 1
        self._changed_at = self.loop.time()
        self.life = Life(self)

    # --- the story -------------------------------------------------------------------------------

    async def tell(self) -> list[str]:
        """Tell it; return the laws that it broke."""
        await self.create()
        self.begin_life()
        faults = [FAULTS[name] for name in self.story.faults]
        early = [asyncio.create_task(fault.act(self)) for fault in faults if fault.early]
        load = asyncio.create_task(self._load())
        await self.pause(0.5, 3)
        await self._standby()
        late = [asyncio.create_task(fault.act(self)) for fault in faults if not fault.early]
        await asyncio.sleep(0)
        if server := self.serving():
            self.note("somebody", f"kills {server}")
            server.end()
        await asyncio.gather(load, *early, *late)
        settled = await self._settle()
        record = next(iter(self.life.monitor.records()), None) if self.life else None
        self.laws.verdict(record, settled=settled)
        if self.life is not None:
            self.life.alive = False
            self.life.task.cancel()
        return self.laws.broken

    async def _standby(self) -> None:
        """Wait for the standby, where the story wants that, and let befall it what is to."""
        if not self.story.when:
            return
        for _ in range(6000):  # it may not come: a device that was never seen LIVE has none
            if any(standby.ready for standby in self.standbys.values()):
                break
            await asyncio.sleep(0.01)
        self.program = "2" if self.story.when == "outdated" else self.program
        for process in self.processes.alive():
            if self.story.when == "killed" and process.tag in self.standbys:
                process.end()

    async def _load(self) -> None:
        for _ in range(40):
            self.submit()
            await self.pause(0.02, 0.4)

    async def _settle(self) -> bool:
        """Wait until nothing happens any more; an operator sees to who only sits there."""
        for tidied in (False, True):
            give_up = self.loop.time() + _MOST_S
            while self.loop.time() < give_up:
                await asyncio.sleep(1)
                records = self.life.monitor.records() if self.life else []
                quiet = not any(device.letting_go for device in self.driver.devices.values())
                rests = quiet and self.life is not None and {one.phase for one in records} <= _RESTS
                if rests and self.loop.time() - self._changed_at > _QUIET_S:
                    break
            else:
                return False
            if tidied or not any(
                one.silent or one.name == "leaked" for one in self.processes.alive()
            ):
                break
            await kill_silent_servers(self)
        return True


def _lined() -> Home:
    home = Home()
    home.write("go")
    return home


def play(story: Story, teller: Callable[[World], Coroutine[Any, Any, Any]] = World.tell) -> World:
    """Play a story to its end; ``laws.broken`` has the verdict. ``teller`` may tell another."""
    loop = virtual.Loop(max_virtual_s=10_000, max_turns=300_000)
    world = World(story, loop)
    said = _Said(world)
    logger = logging.getLogger("ublkwatch")
    logger.addHandler(said)
    logger.propagate = False
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(teller(world))
    except virtual.RunAwayError as error:
        world.laws.broken.append(f"run away: {error}")
    finally:
        logger.removeHandler(said)
        logger.propagate = True
    return world


class _Said(logging.Handler):
    """Puts what the supervisor logs into the transcript."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world, self._last = world, ""

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) != self._last:
            self._world.note("  log", text)
        self._last = text


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.world", description=__doc__)
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("--range", type=int, nargs=2, metavar=("A", "B"))
    options = parser.parse_args(arguments)
    seeds = range(*options.range) if options.range else [options.seed or 0]
    bad = 0
    for seed in seeds:
        story = Story.of(seed)
        world = play(story)
        bad += bool(world.laws.broken)
        if not options.range:
            print(story, *world.transcript, sep="\n")
        if world.laws.broken or not options.range:
            print(
                f"{seed} {story.generation.name} {story.mode.value} {story.kinds} {story.faults}:"
            )
            print(*(world.laws.broken or ["every law was kept"]), sep="\n")
    print(f"{len(seeds)} stories, {bad} of them broke a law")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
