"""The shell's promises, over a small world in memory: one device, servers that are only names."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import pytest
import virtual
from notes import Notes
from patience import until
from plain import NO_THREADS, PlainLauncher

from ublkwatch.care import Care, Job, Origin, Spec
from ublkwatch.ctrl import CtrlError
from ublkwatch.events import Asked, Transition
from ublkwatch.lanes import Lanes
from ublkwatch.model import (
    DevInfo,
    Generation,
    Order,
    Phase,
    Policy,
    Reason,
    Record,
    ServerId,
    Traffic,
)
from ublkwatch.monitor import Monitor
from ublkwatch.perform import Edges, Threads
from ublkwatch.rules import Unmanaged
from ublkwatch.uapi import DevFlags, DevState

FIRST = ServerId(100, 1, "boot")
FLAGS = DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_REISSUE


ORIGIN = Origin("/bin/server", "server", 5, 6)


@dataclass
class World(PlainLauncher):
    """All edges in one: what the kernel, the processes and the disk would say, and a diary."""

    info: DevInfo | None = field(
        default_factory=lambda: DevInfo(0, DevState.LIVE, FLAGS, 1, 8, 4096, FIRST.pid)
    )
    alive: dict[int, ServerId] = field(default_factory=lambda: {FIRST.pid: FIRST})
    diary: list[str] = field(default_factory=list)
    threads: Threads = NO_THREADS
    traffic: Traffic | None = None
    saved: dict[int, Record] = field(default_factory=dict)
    specs: dict[int, Spec] = field(default_factory=dict)
    disk_full: bool = False
    start_hangs: bool = False
    blind: bool = False
    host_ends: bool = False
    decision: int | None = None
    unread_lines: set[str] = field(default_factory=set)
    transitions: list[Transition] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    pid: int = 200
    instance_error: Exception | None = None
    rules_hang: asyncio.Event | None = None
    dice: Iterator[float] = field(default_factory=lambda: repeat(1.0))
    origin: Origin = ORIGIN
    asked: list[tuple[int, Origin | None]] = field(default_factory=list)
    care: Care | Unmanaged = field(default_factory=Unmanaged)
    notes: Notes = field(default_factory=Notes)
    info_error: int = 0
    disk: int = 1
    instances: int = 0  # how often a device was looked at

    def monitor(self, **policy: Any) -> Monitor:
        clock = asyncio.get_running_loop().time
        policy = {"generation": Generation.G3, "probation_s": 0.01, **policy}
        edges = Edges(
            ctrl=self,
            workers=self,
            servers=self,
            launcher=self,
            store=self,
            present=self.present,
            threads=self.threads,
            traffic=lambda _: self.traffic,
            instance=self.instance,
            files=lambda _pid: {"/dev/ublkc0", "/dev/ublkc1"},
            publish=self.transitions.append,
            clock=clock,
            wall=clock,
            chance=lambda: next(self.dice),
            origin=lambda _pid: self.origin,
            care=self.care_of,
            kept=self,
            lanes=Lanes(),
            meter=self.notes,
        )
        self.care = Care(("/bin/server",), Policy(**policy), decider=("/bin/decide",))
        self.seen = Monitor(edges, Policy(), dict(self.saved), dict(self.specs))
        return self.seen

    def instance(self, _dev_id: int) -> str:
        self.instances += 1
        if self.instance_error is not None:
            raise self.instance_error
        return "boot/1"

    def present(self) -> dict[int, int | None]:
        if self.blind:
            raise PermissionError(errno.EACCES, "/sys/class/ublk-char")
        return {0: self.disk} if self.info else {}

    def crash(self) -> None:
        assert self.info
        server = self.alive.pop(self.info.ublksrv_pid)
        self.info = replace(self.info, state=DevState.QUIESCED)
        self.seen.server_exited(server)

    # --- Ctrl and Workers ------------------------------------------------------------------------

    async def get_dev_info(self, dev_id: int) -> DevInfo:
        if self.info is None or self.info_error:
            raise CtrlError(self.info_error or errno.ENODEV, "GET_DEV_INFO", dev_id)
        return self.info

    async def get_dev_infos(self, dev_ids: Collection[int]) -> dict[int, DevInfo | OSError]:
        found: dict[int, DevInfo | OSError] = {}
        for dev_id in dev_ids:
            try:
                found[dev_id] = await self.get_dev_info(dev_id)
            except OSError as error:
                found[dev_id] = error
        return found

    async def call(
        self, command: str, dev_id: int, key: str, *, timeout_s: float, **arguments: float
    ) -> dict[str, Any]:
        del key, timeout_s
        if command == "GET_PARAMS":
            return {"params": {"basic": {"dev_sectors": 8}}}
        self.diary.append(command)
        if command == "START_USER_RECOVERY":
            await until(lambda: not self.start_hangs, "the kernel answers")
        if command == "END_USER_RECOVERY":
            assert self.info
            assert dev_id == 0
            pid = int(arguments["pid"])
            self.info = replace(self.info, state=DevState.LIVE, ublksrv_pid=pid)
        return {}

    def cancel(self, key: str) -> None:
        self.diary.append(f"cancel {key}")

    # --- Servers and Launcher --------------------------------------------------------------------

    def identify(self, pid: int) -> ServerId | None:
        return self.alive.get(pid)

    def watch(self, server: ServerId) -> None:
        if server not in self.alive.values():
            asyncio.get_running_loop().call_soon(self.seen.server_exited, server)

    def kill(self, server: ServerId) -> None:
        self.alive.pop(server.pid, None)
        self.watch(server)

    async def tagged(self, tag: str) -> list[ServerId]:
        del tag
        return [server for server in self.alive.values() if server != FIRST]

    async def end_tagged(self, tag: str) -> None:
        self.diary.append(f"end {tag}")
        for server in await self.tagged(tag):
            self.kill(server)

    async def holders(self, node: str) -> tuple[bool, str]:
        return True, f"no visible holder of {node}"

    async def care_of(self, info: DevInfo, origin: Origin | None) -> Care | Unmanaged:
        self.asked.append((info.dev_id, origin))
        care = self.care
        await asyncio.sleep(0.001)  # rules look at files, in a thread
        if self.rules_hang is not None:
            await self.rules_hang.wait()
        return care

    def keep(self, dev_id: int, paths: tuple[str, ...]) -> None:
        self.diary.append(f"keep {dev_id} {' '.join(paths)}")

    def restore(self, dev_id: int, paths: tuple[str, ...]) -> None:
        self.diary.append(f"restore {dev_id} {' '.join(paths)}")

    def drop(self, dev_id: int) -> None:
        self.diary.append(f"drop {dev_id}")

    def known(self, tag: str) -> bool:
        return bool(tag)

    async def start(self, tag: str, job: Job) -> int:
        assert job.origin == ORIGIN, "what the lost server was"
        self.diary.append(f"spawn {tag}")
        self.pid += 1
        self.alive[self.pid] = ServerId(self.pid, self.pid, "boot")
        asyncio.get_running_loop().call_later(0.01, self.seen.ready, tag)
        return self.pid

    def write_line(self, tag: str, line: str) -> None:
        self.diary.append(f"line {tag}")
        self.lines.append(json.loads(line))

    def listen(self, tag: str) -> None:
        self.diary.append(f"listen {tag}")

    def unread(self, tag: str) -> bool:
        return tag in self.unread_lines

    def how_ended(self, pid: int) -> tuple[str, int | None]:
        return f"{pid} ended", None

    async def decide(
        self, command: tuple[str, ...], about: dict[str, str], timeout_s: float
    ) -> tuple[str, int | None]:
        self.diary.append(f"decide {command} {about['UBLKWATCH_REASON']} {timeout_s:g}")
        return "exit status", self.decision

    async def shutting_down(self) -> bool:
        return self.host_ends

    def last_words(self, tag: str) -> str:
        return f"words of {tag}"

    def keep_only(self, tags: set[str]) -> None: ...

    def trim(self) -> None: ...

    # --- Store -----------------------------------------------------------------------------------

    def save_record(self, record: Record) -> None:
        if self.disk_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.diary.append(f"save {record.phase.value}")
        self.saved[record.dev_id] = record

    def drop_record(self, dev_id: int) -> None:
        self.diary.append("drop")
        self.saved.pop(dev_id, None)

    def save_spec(self, spec: Spec) -> None:
        self.specs[spec.dev_id] = spec


def play(world: World, story: Callable[[], Awaitable[None]], **policy: Any) -> None:
    """Run the monitor over the world while the story is told."""

    async def run() -> None:
        task = asyncio.create_task(world.monitor(**policy).run(0.05))
        try:
            await story()
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    virtual.run(run())


async def phase(world: World, wanted: Phase) -> Record:
    def reached() -> bool:
        return [record.phase for record in world.seen.records()] == [wanted]

    await until(reached, f"phase {wanted.value}: {world.diary}")
    return world.seen.records()[0]


def test_a_crash_goes_through_every_hand_in_order() -> None:
    world = World()

    async def story() -> None:
        await phase(world, Phase.WATCHING)
        del world.diary[:]
        world.crash()
        await until(lambda: len(world.transitions) > 1, "it noticed")
        record = await phase(world, Phase.WATCHING)
        assert record.recoveries == 1

    play(world, story)
    assert world.diary == [
        *("save draining", "spawn 0-1-1", "save draining"),
        *("save starting", "START_USER_RECOVERY"),
        *("save attaching", "line 0-1-1", "END_USER_RECOVERY"),
        *("save probation", "save watching"),
    ]
    assert world.lines == [
        {
            "dev_id": 0,
            "char_device": "/dev/ublkc0",
            "queues": 1,
            "depth": 8,
            "max_io_buf_bytes": 4096,
            "flags": int(FLAGS),
            "params": {"basic": {"dev_sectors": 8}},
            "attempt": 1,
        }
    ]


def test_nothing_is_done_that_could_not_be_recorded() -> None:
    world = World()

    async def story() -> None:
        await phase(world, Phase.WATCHING)
        world.disk_full = True
        del world.diary[:]
        world.crash()
        looks = world.seen.polls
        await until(lambda: world.seen.polls > looks + 5, "it goes on looking")
        assert world.diary == []
        world.disk_full = False
        await until(lambda: "END_USER_RECOVERY" in world.diary, "it goes on once it can")

    play(world, story)


def test_a_bug_over_one_device_leaves_it_alone_and_says_so() -> None:
    world = World()

    async def story() -> None:
        await phase(world, Phase.WATCHING)
        world.seen.post(0, "no event at all")  # type: ignore[arg-type]
        await until(lambda: len(world.transitions) > 1, "it noticed")
        record = await phase(world, Phase.WATCHING)  # LIVE with a server: adopted again
        assert record.server == FIRST

    play(world, story)
    reasons = [transition.after.reason for transition in world.transitions]
    assert Reason.INTERNAL_ERROR in reasons


def test_a_removed_device_is_forgotten_and_its_attempt_ended() -> None:
    world = World(start_hangs=True)

    async def story() -> None:
        await phase(world, Phase.WATCHING)
        world.crash()
        await phase(world, Phase.STARTING)
        world.info = None
        await until(lambda: "cancel 0-1-1" in world.diary, "the command is cancelled")
        world.start_hangs = False
        await until(lambda: not world.seen.records(), "the device is forgotten")

    play(world, story)
    assert world.saved == {}
    assert "end 0-1-1" in world.diary
    assert "line 0-1-1" not in world.diary


@pytest.mark.parametrize("kept", [True, False], ids=["spec kept", "spec lost"])
def test_a_successor_goes_on_with_the_server_that_it_finds(kept: bool) -> None:  # noqa: FBT001
    world = World(start_hangs=True)

    async def first_life() -> None:
        await phase(world, Phase.WATCHING)
        world.crash()
        await phase(world, Phase.STARTING)

    play(world, first_life)
    world.start_hangs = False
    del world.diary[:]
    if not kept:
        world.specs.clear()

    async def second_life() -> None:
        record = await phase(world, Phase.WATCHING)
        assert record.recoveries == 1

    play(world, second_life)
    assert sorted(entry for entry in world.diary if "save" not in entry) == [
        *("END_USER_RECOVERY", "START_USER_RECOVERY", "line 0-1-1", "listen 0-1-1")
    ]
    assert world.lines[0]["params"] == {"basic": {"dev_sectors": 8}}


def test_a_monitor_that_can_no_longer_look_ends_instead_of_going_blind() -> None:
    world = World()

    async def run() -> None:
        monitor = world.monitor().run(0.05)
        with pytest.raises(ExceptionGroup) as ended:
            await asyncio.wait_for(monitor, 10)
        assert ended.group_contains(PermissionError)

    world.blind = True
    virtual.run(run())


@pytest.mark.parametrize("state", [DevState.DEAD, DevState.QUIESCED])
def test_what_was_never_alive_under_our_eyes_is_not_touched(state: DevState) -> None:
    world = World()
    assert world.info
    world.info = replace(world.info, state=state)

    async def story() -> None:
        await until(lambda: world.seen.polls >= 3, "it has looked")

    play(world, story)
    assert [entry for entry in world.diary if "save" not in entry] == []


def test_who_serves_is_asked_for_once_and_the_rules_only_when_somebody_else_does() -> None:
    world = World()

    async def story() -> None:
        await phase(world, Phase.WATCHING)
        looks = world.seen.polls
        await until(lambda: world.seen.polls > looks + 3, "it looks on")
        assert world.asked == [(0, ORIGIN)]
        world.origin = replace(ORIGIN, uid=7, gid=8, exe="/bin/attach", name="attach")
        world.crash()
        await until(lambda: world.specs[0].origin != ORIGIN, "the new server's user is learnt")
        assert world.specs[0].origin == replace(ORIGIN, uid=7, gid=8)
        assert world.asked == [(0, ORIGIN)]
        world.seen.reconsider()
        await until(lambda: len(world.asked) == 2, "the rules are asked anew")

    play(world, story)


@pytest.mark.parametrize(
    "change",
    [
        lambda world: setattr(world, "disk", 2),
        lambda world: setattr(world, "info", replace(world.info, owner_uid=7)),
        lambda world: setattr(world, "info_error", errno.EIO),
        lambda world: world.seen.reconsider(),
        lambda world: world.seen.ask(0, Asked(Order.HOLD)),
    ],
    ids=["disk", "answer", "error", "rules", "order"],
)
def test_a_device_at_rest_is_left_alone_until_something_is_other(
    change: Callable[[World], object],
) -> None:
    world = World()

    async def story() -> None:
        await phase(world, Phase.WATCHING)
        await polled(world, 5)
        looks, changes = world.instances, world.seen.changes
        await polled(world, 50)
        assert (world.instances, world.seen.changes) == (looks, changes)
        change(world)
        await polled(world, 5)
        world.info_error = 0
        await until(lambda: world.instances > looks, "it is looked at")

    play(world, story)


async def polled(world: World, times: int) -> None:
    over = world.seen.polls + times
    await until(lambda: world.seen.polls >= over, "it looks on")


def test_after_a_restart_the_rules_are_known_before_anything_is_resumed() -> None:
    world = World()

    async def first_life() -> None:
        await phase(world, Phase.WATCHING)
        world.crash()
        await until(lambda: world.seen.records()[0].recoveries == 1, "it is recovered")

    play(world, first_life)
    server = world.seen.records()[0].server
    assert server
    attaching = replace(
        world.saved[0], phase=Phase.ATTACHING, server=None, candidate=server, over=False, lined=True
    )
    world.saved[0] = attaching
    del world.diary[:]

    async def second_life() -> None:
        await phase(world, Phase.WATCHING)
        assert [entry for entry in world.diary if entry.startswith("end ")] == []
        assert world.transitions[-1].after.server == server

    play(world, second_life)


def test_a_bug_over_one_device_does_not_end_the_watch_over_others() -> None:
    world = World()

    async def story() -> None:
        await phase(world, Phase.WATCHING)
        world.instance_error = ValueError("a bug")
        record = await phase(world, Phase.FAILED)
        assert (record.reason, record.detail) == (Reason.INTERNAL_ERROR, "ValueError('a bug')")
        looks = world.seen.polls
        await until(lambda: world.seen.polls > looks + 3, "it looks on")
        world.instance_error = None
        await phase(world, Phase.WATCHING)

    play(world, story)


@pytest.mark.parametrize(
    ("error", "failed"), [(errno.ETIMEDOUT, True), (errno.EINVAL, False), (errno.ENODEV, False)]
)
def test_a_poll_tells_whether_it_failed(error: int, failed: bool) -> None:  # noqa: FBT001
    world = World()

    async def story() -> None:
        await phase(world, Phase.WATCHING)
        assert True not in world.notes.polls
        world.info_error = error
        before = len(world.notes.polls)
        await until(lambda: len(world.notes.polls) > before + 2, "it polls")
        assert world.notes.polls[-1] is failed
        world.info_error = 0
        await until(lambda: not world.notes.polls[-1], "it polls well again")

    play(world, story)


def test_every_record_is_told_as_it_is_and_what_the_disk_does_not_take() -> None:
    world = World()

    async def story() -> None:
        await phase(world, Phase.WATCHING)
        world.disk_full = True
        world.crash()
        await until(lambda: world.notes.lost, "it is told")
        assert world.notes.records[-1].phase is Phase.WATCHING
        world.disk_full = False
        await until(lambda: world.notes.records[-1].phase is not Phase.WATCHING, "it is")
        record = await phase(world, Phase.WATCHING)
        assert world.notes.records[-1] == record
        world.info = None
        await until(lambda: not world.seen.records(), "it is gone")

    play(world, story)
    assert [record.phase for record in world.notes.records[-1:]] == [Phase.GONE]
    assert set(world.notes.lost) == {"record"}
