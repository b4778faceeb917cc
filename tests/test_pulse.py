"""Servers that live while I/O hangs in them: what is seen, when it is told, and when it is not."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import virtual
from patience import until
from stories import INFO, OLD
from test_monitor import World, play

from ublkwatch.events import Asked, Event, ServerAils, ServerWell
from ublkwatch.model import (
    Ailment,
    DevInfo,
    Illness,
    Order,
    Phase,
    Policy,
    Record,
    Remedy,
    ServerId,
    Traffic,
)
from ublkwatch.perform import Edges, Threads
from ublkwatch.pulse import Pulse
from ublkwatch.symptoms import Thread
from ublkwatch.uapi import DevFlags, DevState

POLL_S = 1.0
SLEEPS = Thread("worker", "S", 0.0, "io_cqring_wait", exiting=False)
RECORD = Record(dev_id=0, instance="boot/1", phase=Phase.WATCHING, info=INFO, server=OLD)


@dataclass
class Ward:
    """One device, looked after for a while: what is true of it, and what was told of it."""

    record: Record = RECORD
    policy_now: Policy = field(default_factory=Policy)
    traffic: Traffic | None = field(default_factory=lambda: Traffic(0, 0))
    threads: dict[int, Thread] = field(default_factory=lambda: {100: SLEEPS, 101: SLEEPS})
    declares: tuple[int, ...] = ()
    told: list[tuple[float, Event]] = field(default_factory=list)
    watched: set[int] = field(default_factory=set)
    asked: int = 0
    looks: int = 0
    reads: int = 0
    sees_idle: bool = True  # /proc/diskstats is to be had
    tells: bool = False  # of watched threads that end
    traffics: int = 0
    listed: int = 0
    everywhere: bool = False  # other devices are asked about, too

    def policy(self, dev_id: int) -> Policy:
        assert dev_id == 0 or self.everywhere
        return self.policy_now

    def post(self, dev_id: int, event: Event) -> None:
        assert dev_id == 0
        self.told.append((asyncio.get_running_loop().time(), event))

    async def read(self, dev_id: int) -> None:
        assert dev_id == 0
        self.reads += 1

    def live(self, story: Callable[[Pulse], Awaitable[None]]) -> list[Event]:
        """Tell a story of it; return what was told."""

        async def run() -> None:
            loop = asyncio.get_running_loop()
            edges = SimpleNamespace(
                traffic=self._traffic,
                idle=self._idle,
                threads=Threads(
                    self._alive, self._look, self._declared, self._watch, self._watches
                ),
                clock=loop.time,
            )
            tasks = set()

            def spawn(_dev_id: int, work: Any) -> None:
                tasks.add(loop.create_task(work))

            await story(Pulse(cast("Edges", edges), self, spawn))
            await asyncio.gather(*tasks)

        virtual.run(run(), virtual.Loop(max_turns=10_000_000))
        return [event for _, event in self.told]

    async def polls(self, pulse: Pulse, count: int) -> None:
        for _ in range(count):
            pulse.look([self.record], 2 * POLL_S)
            await asyncio.sleep(POLL_S)

    def _traffic(self, dev_id: int) -> Traffic | None:
        assert dev_id == 0 or self.everywhere
        self.traffics += 1
        return self.traffic

    def _idle(self) -> dict[int, Traffic]:
        return (
            {0: self.traffic}
            if self.sees_idle and self.traffic and not self.traffic.inflight
            else {}
        )

    def _alive(self, pid: int) -> set[int]:
        assert pid == OLD.pid
        self.listed += 1
        return set(self.threads)

    def _watches(self, server: ServerId, tids: Iterable[int]) -> bool:
        assert server == OLD
        return self.tells and set(tids) <= set(self.threads)

    def _look(self, pid: int) -> dict[int, Thread]:
        assert pid == OLD.pid
        self.looks += 1
        return dict(self.threads)

    def _declared(self, info: DevInfo) -> tuple[int, ...]:
        assert info == INFO
        self.asked += 1
        return self.declares

    def _watch(self, server: ServerId, tids: Iterable[int]) -> None:
        assert server == OLD
        self.watched |= set(tids)


def stalls(ward: Ward) -> list[ServerAils]:
    return [event for _, event in ward.told if isinstance(event, ServerAils)]


# --- traffic -------------------------------------------------------------------------------------


def test_a_server_that_completes_nothing_is_told_of_once_the_time_is_over() -> None:
    ward = Ward(traffic=Traffic(3, 7))
    ward.live(lambda pulse: ward.polls(pulse, 35))
    [(at, event)] = ward.told
    assert isinstance(event, ServerAils)
    assert (event.server, event.kind) == (OLD, Ailment.STALL)
    assert 30.0 <= at <= 33.0
    assert event.since == pytest.approx(0.0, abs=0.01)
    assert event.what == "process 100: its threads sleep in io_cqring_wait"


def test_who_completes_something_at_the_last_moment_is_not_told_of() -> None:
    ward = Ward(traffic=Traffic(3, 7))

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 30)
        pulse.look([RECORD], 2.0)
        await asyncio.sleep(0.2)
        ward.traffic = Traffic(3, 8)
        await asyncio.sleep(0.5)
        await ward.polls(pulse, 20)

    assert ward.live(story) == []
    assert ward.looks == 3, "it had been suspected"


def test_the_threads_of_a_server_are_looked_at_once_however_many_devices_it_has() -> None:
    ward = Ward()

    async def story(pulse: Pulse) -> None:
        for _ in range(5):
            pulse.look([replace(RECORD, dev_id=dev_id) for dev_id in range(40)], 2 * POLL_S)
            await asyncio.sleep(POLL_S)

    ward.traffic = None
    ward.everywhere = True
    assert ward.live(story) == []
    assert ward.asked > 40, "each device was asked which of them serve its queues"
    assert ward.looks == 1


def test_a_look_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    ward = Ward(traffic=Traffic(3, 7))
    ward.threads = cast("dict[int, Thread]", None)
    assert ward.live(lambda pulse: ward.polls(pulse, 33)) == []
    assert "ublk 0: its server was not looked at: TypeError" in caplog.text


def test_the_cause_of_a_stall_that_lasts_is_told_anew() -> None:
    ward = Ward(traffic=Traffic(3, 7))

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 35)
        ward.threads = {100: replace(SLEEPS, state="T"), 101: replace(SLEEPS, state="T")}
        await ward.polls(pulse, 65)

    ward.live(story)
    assert [event.what.split(": ", 1)[1] for event in stalls(ward)] == [
        "its threads sleep in io_cqring_wait",
        *["its process is stopped: SIGSTOP, or a debugger"] * 2,
    ]
    assert {round(event.since) for event in stalls(ward)} == {0}


@pytest.mark.parametrize(
    "traffic",
    [lambda _: Traffic(0, 7), lambda n: Traffic(3, n // 29), lambda _: None],
    ids=["idle", "slow", "no disk"],
)
def test_who_is_idle_or_slow_is_not_told_of(traffic: Callable[[int], Traffic | None]) -> None:
    ward = Ward()

    async def story(pulse: Pulse) -> None:
        for second in range(600):
            ward.traffic = traffic(second)
            await ward.polls(pulse, 1)

    assert ward.live(story) == []


def test_24_hours_of_a_slow_backend_without_a_false_alarm() -> None:
    dice = random.Random(6)  # noqa: S311 - a story is to be the same twice
    ward = Ward()

    async def story(pulse: Pulse) -> None:
        loop, completed, inflight, next_done = asyncio.get_running_loop(), 0, 0, 0.0
        while loop.time() < 24 * 3600:
            now = loop.time()
            if inflight and now >= next_done:
                completed += 1
                inflight -= 1
                next_done = now + dice.choice((0.1, 3, 20, 27))
            if dice.random() < 0.3 and inflight < 64:
                next_done = next_done if inflight else now + dice.choice((0.1, 3, 20, 27))
                inflight += 1
            ward.traffic = Traffic(inflight, completed)
            pulse.look([ward.record], 2 * POLL_S)
            await asyncio.sleep(POLL_S)
        assert completed > 1000

    assert ward.live(story) == []


def test_time_in_which_we_did_not_run_is_no_stall() -> None:
    ward = Ward(traffic=Traffic(3, 7))

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 20)
        cast("virtual.Loop", asyncio.get_running_loop()).jump(3600)
        await ward.polls(pulse, 5)
        assert ward.told == []
        await ward.polls(pulse, 10)

    assert len(ward.live(story)) == 1


def test_a_stall_that_ends_is_told_of_and_one_of_our_former_life_is_not_believed_to() -> None:
    ward = Ward(traffic=Traffic(3, 7))
    ill = Illness(Ailment.STALL, "it sleeps", -50.0)
    ward.record = replace(RECORD, ill=ill)

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 3)
        assert ward.told == []
        ward.traffic = Traffic(3, 8)
        await ward.polls(pulse, 1)
        ward.record = RECORD
        await ward.polls(pulse, 5)

    assert ward.live(story) == [ServerWell(OLD)]


@pytest.mark.parametrize(
    "changes",
    [
        {"phase": Phase.PROBATION},
        {"server": None},
        {"info": replace(INFO, state=DevState.QUIESCED)},
        {"ill": Illness(Ailment.STALL, "", 0.0, condemned=True)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_who_does_not_serve_or_is_ended_already_is_not_looked_at(changes: dict[str, Any]) -> None:
    ward = Ward(replace(RECORD, **changes), traffic=Traffic(3, 7))
    assert ward.live(lambda pulse: ward.polls(pulse, 100)) == []
    assert ward.looks == 0


def test_where_it_is_not_wanted_stalls_are_not_looked_for() -> None:
    ward = Ward(policy_now=Policy(stall_timeout_s=0.0), traffic=Traffic(3, 7))
    assert ward.live(lambda pulse: ward.polls(pulse, 100)) == []


def test_another_server_begins_anew() -> None:
    ward = Ward(traffic=Traffic(3, 7))

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 20)
        pulse.look([replace(RECORD, phase=Phase.DRAINING, server=None)], 2.0)
        await ward.polls(pulse, 20)

    assert ward.live(story) == []


# --- threads -------------------------------------------------------------------------------------


def test_a_declared_thread_that_is_gone_is_a_dead_queue() -> None:
    ward = Ward(declares=(100, 101))

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 3)
        assert ward.watched == {100, 101}
        del ward.threads[101]
        pulse.look([RECORD], 2.0)
        await asyncio.sleep(0.5)
        assert ward.reads == 1, "its state is read before it is told"

    [event] = ward.live(story)
    assert isinstance(event, ServerAils)
    assert (event.kind, event.what) == (Ailment.DEAD_QUEUE, "of process 100: thread 101")


def test_a_thread_that_was_gone_before_it_was_seen_is_missed_too() -> None:
    ward = Ward(declares=(100, 7))
    [event] = [*ward.live(lambda pulse: ward.polls(pulse, 10))][:1]
    assert isinstance(event, ServerAils)
    assert event.what == "of process 100: thread 7"


def test_threads_that_nobody_declared_come_and_go() -> None:
    ward = Ward(declares=(101,))

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 3)
        del ward.threads[100]
        ward.threads[102] = SLEEPS
        await ward.polls(pulse, 100)

    assert ward.live(story) == []


@pytest.mark.parametrize("left", [{}, {100: replace(SLEEPS, exiting=True)}], ids=["gone", "ends"])
def test_a_process_that_ends_thread_by_thread_has_no_dead_queue(left: dict[int, Thread]) -> None:
    ward = Ward(declares=(100, 101))

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 3)
        ward.threads = left
        await ward.polls(pulse, 3)

    assert ward.live(story) == []


def test_what_was_missed_once_is_looked_at_twice() -> None:
    ward = Ward(declares=(100, 101))

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 3)
        del ward.threads[101]
        pulse.look([RECORD], 2.0)
        await asyncio.sleep(0.1)
        ward.threads[100] = replace(SLEEPS, exiting=True)  # it was the end of the whole process
        await asyncio.sleep(1)

    assert ward.live(story) == []


def test_a_dead_queue_that_is_only_said_is_said_now_and_then() -> None:
    ward = Ward(declares=(100, 101))

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 3)
        del ward.threads[101]
        await ward.polls(pulse, 1)
        ward.record = replace(RECORD, ill=Illness(Ailment.DEAD_QUEUE, "", 0.0))
        await ward.polls(pulse, 100)

    assert 2 <= len(ward.live(story)) <= 5


def test_what_is_calm_is_not_asked_about() -> None:
    ward = Ward(declares=(100, 101), tells=True)

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 5)
        ward.traffics = ward.listed = ward.looks = 0
        await ward.polls(pulse, 600)
        assert (ward.traffics, ward.listed, ward.looks) == (0, 0, 0)
        del ward.threads[101]
        await ward.polls(pulse, 3)

    told, *_ = ward.live(story)
    assert isinstance(told, ServerAils)
    assert told.kind is Ailment.DEAD_QUEUE


def test_where_nobody_tells_of_threads_each_poll_looks_for_them() -> None:
    ward = Ward(declares=(100, 101))

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 600)
        assert ward.listed > 590
        del ward.threads[101]
        await ward.polls(pulse, 3)

    told, *_ = ward.live(story)
    assert isinstance(told, ServerAils)
    assert told.kind is Ailment.DEAD_QUEUE


def test_a_server_of_many_devices_has_its_threads_listed_once_with_each_poll() -> None:
    ward = Ward(declares=(100, 101), everywhere=True)

    async def story(pulse: Pulse) -> None:
        records = [replace(RECORD, dev_id=dev_id) for dev_id in range(40)]
        for _ in range(100):
            pulse.look(records, 2 * POLL_S)
            await asyncio.sleep(POLL_S)

    assert ward.live(story) == []
    assert 90 < ward.listed <= 100


@pytest.mark.parametrize("sees_idle", [True, False])
def test_a_stall_after_a_long_calm_counts_from_its_beginning(sees_idle: bool) -> None:  # noqa: FBT001
    ward = Ward(declares=(100, 101), tells=True, traffic=Traffic(0, 7), sees_idle=sees_idle)

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 600)
        ward.traffic = Traffic(3, 7)
        await ward.polls(pulse, 35)

    ward.live(story)
    [(at, event)] = ward.told
    assert isinstance(event, ServerAils)
    assert event.kind is Ailment.STALL
    assert 600 + 29 <= at <= 600 + 33
    assert event.since == pytest.approx(600, abs=1.1)


def test_what_it_declares_is_asked_for_until_it_is_said_but_not_for_ever() -> None:
    ward = Ward()

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 20)
        assert 3 <= ward.asked <= 6
        await ward.polls(pulse, 500)
        assert ward.asked <= 9

    assert ward.live(story) == []


def test_what_waits_behind_a_quiesce_is_a_stall_too_and_said_to_be() -> None:
    flags = INFO.flags | DevFlags.QUIESCE
    ward = Ward(replace(RECORD, info=replace(INFO, flags=flags)), traffic=Traffic(3, 7, parked=3))

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 35)

    ward.live(story)
    [event] = stalls(ward)
    assert event.what.startswith("process 100: a QUIESCE_DEV that has not finished may keep")


def test_the_threads_of_a_stalled_server_that_are_gone_are_named() -> None:
    ward = Ward(traffic=Traffic(3, 7))

    async def story(pulse: Pulse) -> None:
        await ward.polls(pulse, 3)
        del ward.threads[101]
        await ward.polls(pulse, 32)

    ward.live(story)
    [event] = stalls(ward)
    assert event.what == (
        "process 100: 1 of the 2 threads are gone that it had when it was first looked at: "
        "101 (worker)"
    )


# --- in the house --------------------------------------------------------------------------------


class Hung(World):
    """A device whose server hangs until it is ended."""

    def kill(self, server: ServerId) -> None:
        assert self.info is not None
        self.info = replace(self.info, state=DevState.QUIESCED)
        self.traffic = Traffic(0, 8)
        super().kill(server)


def test_a_server_that_hangs_is_told_of_ended_and_replaced() -> None:
    look = Threads(lambda _: {100}, lambda _: {100: SLEEPS}, lambda _: (), lambda _pid, _tids: None)
    world = Hung(traffic=Traffic(3, 7), threads=look)

    async def story() -> None:
        await until(lambda: world.seen.records()[:1], "it is seen")
        await until(lambda: world.seen.records()[0].recoveries == 1, "it is replaced")

    play(world, story, on_stall=Remedy.KILL, stall_timeout_s=0.5)
    [told] = [each for each in world.transitions if each.event == "ServerAils"]
    assert told.before.ill is None
    assert told.after.ill is not None
    assert told.after.ill.condemned
    [lost] = [each for each in world.transitions if each.event == "ServerExited"]
    assert lost.after.detected_by == "stall"


class Two(Hung):
    """Two devices of one process that hangs."""

    def present(self) -> dict[int, int | None]:
        return {0: 1, 1: 2}

    async def get_dev_info(self, dev_id: int) -> DevInfo:
        return replace(await super().get_dev_info(dev_id), dev_id=dev_id)


def test_a_process_is_not_ended_while_another_device_of_its_is_held() -> None:
    look = Threads(lambda _: {100}, lambda _: {100: SLEEPS}, lambda _: (), lambda _pid, _tids: None)
    world = Two(threads=look)

    def ill(dev_id: int) -> Illness | None:
        found = [each.ill for each in world.seen.records() if each.dev_id == dev_id]
        return found[0] if found else None

    def both_watched() -> bool:
        return [each.phase for each in world.seen.records()] == [Phase.WATCHING] * 2

    async def story() -> None:
        await until(both_watched, "both are watched")
        assert await world.seen.order(1, Asked(Order.HOLD)) == ""
        world.traffic = Traffic(3, 7)
        await until(lambda: ill(0), "it is found")
        found = ill(0)
        assert found is not None
        assert (found.spared, found.condemned) == ("ublkb1, which is held", False)
        assert 100 in world.alive
        assert await world.seen.order(1, Asked(Order.RELEASE)) == ""
        await until(lambda: 100 not in world.alive, "and ended when that is over")

    play(world, story, on_stall=Remedy.KILL, stall_timeout_s=0.5)
