"""From the wish for a server to its process: asked first, so many at once, one for a group."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import pytest
import virtual

from ublkwatch.care import Care, Job, Origin, Run, Spec
from ublkwatch.events import Event, Ready, Spawned, SpawnFailed
from ublkwatch.lanes import Lanes
from ublkwatch.model import Phase, QueueConfig, Reason, Record, ServerId, SpawnVerdict
from ublkwatch.starts import Starts, tag_of

QUEUE = QueueConfig(2, 64, 4096, 8, {})
ORIGIN = Origin("/bin/server", "server", 5, 6)


@dataclass
class Host:
    """Launcher, kept files and monitor in one, in memory."""

    cares: dict[int, Care] = field(default_factory=dict)
    answers: dict[str, tuple[str, int | None]] = field(default_factory=dict)
    posted: list[tuple[int, Event]] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    alive: dict[int, ServerId] = field(default_factory=dict)
    asked: list[tuple[str, ...]] = field(default_factory=list)
    restored: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    known_records: list[Record] = field(default_factory=list)
    standby: ServerId | None = None  # one that waits
    taken: list[tuple[str, str]] = field(default_factory=list)
    at_birth: Callable[[], None] = lambda: None
    at_once: int = 64
    starting: int = 0
    most: int = 0

    def __post_init__(self) -> None:
        self.starts = Starts(
            launcher=self,
            identify=self.alive.get,
            autopsy=self.autopsy,
            kept=self,
            lanes=Lanes(self.at_once),
            monitor=self,
            standbys=self,
        )

    async def start(self, tag: str, job: Job) -> int:
        self.starting += 1
        self.most = max(self.most, self.starting)
        pid = 1000 + len(self.jobs)
        self.jobs[tag] = job
        await asyncio.sleep(0.01)
        self.starting -= 1
        self.roots[tag] = tag
        if job.command != ("/bin/dies",):
            self.alive[pid] = ServerId(pid, 1, "boot")
        self.at_birth()
        return pid

    def join(self, tag: str, root: str) -> None:
        self.roots[tag] = root

    def waits(self, name: str) -> bool:
        return self.standby is not None and bool(name)

    async def take(self, tag: str, name: str) -> ServerId | None:
        self.taken.append((tag, name))
        if self.standby is not None and self.standby in self.alive.values():
            self.join(tag, "s-1")
            return self.standby
        return None

    def root(self, tag: str) -> str:
        return self.roots.get(tag, tag)

    def known(self, tag: str) -> bool:
        return tag in self.roots

    async def autopsy(self, tag: str, pid: int) -> tuple[str, int | None, str]:
        return "exit status 3", 3, f"words of {tag}, {pid}"

    async def decide(
        self, command: tuple[str, ...], about: dict[str, str], timeout_s: float
    ) -> tuple[str, int | None]:
        self.asked.append((*command, about["UBLKWATCH_DEVICE"], str(timeout_s)))
        return self.answers[command[0]]

    def keep(self, dev_id: int, paths: tuple[str, ...]) -> None:
        raise AssertionError(f"not here: {dev_id}, {paths}")

    def restore(self, dev_id: int, paths: tuple[str, ...]) -> None:
        self.restored.append((dev_id, paths))

    def drop(self, dev_id: int) -> None:
        raise AssertionError(f"not here: {dev_id}")

    def post(self, dev_id: int, event: Event) -> None:
        self.posted.append((dev_id, event))

    def all_records(self) -> list[Record]:
        return self.known_records

    def care(self, dev_id: int) -> Care | None:
        return self.cares.get(dev_id)

    async def wish(self, record: Record) -> None:
        self.starts.expect(record.dev_id, tag_of(record))
        spec = Spec(record.dev_id, record.instance, QUEUE, ORIGIN)
        await self.starts.start(record, tag_of(record), spec)

    def of(self, dev_id: int) -> list[Event]:
        return [event for device, event in self.posted if device == dev_id]


def lost(dev_id: int, seq: int = 1, attempts: int = 1) -> Record:
    instance = f"boot/{dev_id + 10}"
    return Record(dev_id, instance, phase=Phase.DRAINING, seq=seq, attempts=attempts)


def play(story: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await story()

    virtual.run(run())


# --- what is started -----------------------------------------------------------------------------


def test_the_placeholders_are_filled_from_what_the_kernel_said() -> None:
    host = Host()
    host.cares[3] = Care(
        (
            "/s",
            "{dev_id}",
            "{char_dev}",
            "{queues}x{depth}",
            "{max_io_buf_bytes}",
            "{name}",
            "{{}}",
        ),
        run=Run(env=(("DISK", "{dev_id}"),), unit="x@{dev_id}.service", user="u"),
        keep=("/run/{dev_id}.pid",),
    )
    play(lambda: host.wish(lost(3)))
    command = ("/s", "3", "/dev/ublkc3", "2x64", "4096", "ublkb3", "{}")
    run = Run(env=(("DISK", "3"),), unit="x@3.service", user="u")
    assert host.jobs == {"3-13-1": Job("ublkb3", command, run, ORIGIN)}
    assert host.restored == [(3, ("/run/3.pid",))]
    assert host.of(3) == [Spawned(1, ServerId(1000, 1, "boot"))]


def test_a_server_that_ended_at_once_says_how() -> None:
    host = Host({3: Care(("/bin/dies",))})
    play(lambda: host.wish(lost(3)))
    why = "exit status 3: words of 3-13-1, 1000"
    assert host.of(3) == [SpawnFailed(1, why, ran=True, code=3)]


def test_nothing_is_started_for_a_device_in_nobodys_care() -> None:
    host = Host()

    async def story() -> None:
        with pytest.raises(OSError, match="nothing says any more how to start its server"):
            await host.wish(lost(3))

    play(story)


def test_nothing_is_started_for_an_attempt_that_ended_while_it_waited() -> None:
    host = Host({3: Care(("/s",)), 4: Care(("/s",))}, at_once=1)

    async def story() -> None:
        first = asyncio.create_task(host.wish(lost(3)))
        second = asyncio.create_task(host.wish(lost(4)))
        await asyncio.sleep(0.005)
        host.starts.forbid(4)
        await first
        host.starts.up("3-13-1")
        await second

    play(story)
    assert list(host.jobs) == ["3-13-1"]
    assert host.of(4) == []


# --- a standby -----------------------------------------------------------------------------------

WAITS = ServerId(77, 1, "boot")


def test_a_standby_is_taken_and_needs_no_turn() -> None:
    host = Host({3: Care(("/s",)), 4: Care(("/s",), standby=True)}, at_once=1)
    host.standby = host.alive[77] = WAITS

    async def story() -> None:
        await host.wish(lost(3))  # and has the only turn
        await host.wish(lost(4))

    play(story)
    assert (host.taken, list(host.jobs)) == ([("4-14-1", "ublkb4")], ["3-13-1"])
    assert host.of(4) == [Spawned(1, WAITS, standby=True), Ready(1)]


def test_where_the_standby_is_of_no_use_a_server_is_started_and_the_hook_asked_once() -> None:
    host = Host({4: Care(("/s",), standby=True, hook=("/hook",))}, {"/hook": ("exit status 0", 0)})
    host.standby = WAITS  # which is dead
    play(lambda: host.wish(lost(4)))
    assert (len(host.taken), len(host.asked), list(host.jobs)) == (1, 1, ["4-14-1"])
    assert host.of(4) == [Spawned(1, ServerId(1000, 1, "boot"))]


def test_the_hook_may_keep_a_standby_waiting() -> None:
    host = Host({4: Care(("/s",), standby=True, hook=("/hook",))}, {"/hook": ("later", 75)})
    host.standby = host.alive[77] = WAITS
    play(lambda: host.wish(lost(4)))
    assert host.of(4) == [SpawnFailed(1, "pre_recover: later", SpawnVerdict.LATER)]
    assert (host.taken, host.jobs) == ([], {})


def test_a_group_takes_its_standby_once() -> None:
    care = Care(("/s",), standby=True, group="g")
    host = Host({3: care, 4: care})
    host.standby = host.alive[77] = WAITS

    async def story() -> None:
        await asyncio.gather(host.wish(lost(3)), host.wish(lost(4)))

    play(story)
    assert (host.taken, host.jobs) == ([("3-13-1", "group-g")], {})
    assert host.of(3) == host.of(4) == [Spawned(1, WAITS, standby=True), Ready(1)]
    assert host.roots == {"3-13-1": "s-1", "4-14-1": "s-1"}


def test_who_lost_a_standby_does_not_wait_with_those_who_failed() -> None:
    again = replace(lost(4, 2, attempts=2), reason=Reason.STANDBY_LOST)
    host = Host({n: Care(("/s",)) for n in range(5)}, at_once=4)

    async def story() -> None:
        await host.wish(lost(3, 2, attempts=2))  # and has the only turn of those
        await host.wish(again)

    play(story)
    assert list(host.jobs) == ["3-13-2", "4-14-2"]


# --- pre_recover ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (("exit status 75", 75), SpawnVerdict.LATER),
        (("exit status 78", 78), SpawnVerdict.PARK),
        (("exit status 1", 1), SpawnVerdict.HOOK_FAILED),
        (("killed after 10 s", None), SpawnVerdict.HOOK_FAILED),
        (("SIGKILL", None), SpawnVerdict.HOOK_FAILED),
    ],
)
def test_what_the_hook_says_is_done(answer: tuple[str, int | None], verdict: SpawnVerdict) -> None:
    host = Host({3: Care(("/s",), hook=("/hook", "{dev_id}"))}, {"/hook": answer}, at_once=1)
    play(lambda: host.wish(lost(3)))
    assert host.asked == [("/hook", "3", "ublkb3", "10.0")]
    assert host.of(3) == [SpawnFailed(1, f"pre_recover: {answer[0]}", verdict)]
    assert host.jobs == {}
    host.answers["/hook"] = ("exit status 0", 0)
    play(lambda: host.wish(lost(3, seq=2)))  # the only slot is free again
    assert list(host.jobs) == ["3-13-2"]


# --- many at once --------------------------------------------------------------------------------


def test_so_many_at_once_and_each_turn_ends_when_its_server_is_up() -> None:
    host = Host({n: Care(("/s",), priority=n) for n in range(20)}, at_once=4)

    async def story() -> None:
        tasks = [asyncio.create_task(host.wish(lost(n))) for n in range(20)]
        await asyncio.sleep(0.1)
        assert len(host.jobs) == 4, "none is up yet"
        for _ in range(20):
            for tag in list(host.jobs):
                host.starts.ready(tag)
            await asyncio.sleep(0.02)
        await asyncio.gather(*tasks)

    play(story)
    assert len(host.jobs) == 20
    assert host.most <= 4
    assert list(host.jobs)[:6] == ["0-10-1", "1-11-1", "2-12-1", "3-13-1", "19-29-1", "18-28-1"]


def test_a_server_that_never_comes_up_does_not_keep_its_turn_for_ever() -> None:
    host = Host({3: Care(("/s",)), 4: Care(("/s",))}, at_once=1)

    async def story() -> None:
        await asyncio.gather(host.wish(lost(3)), host.wish(lost(4)))

    play(story)
    assert list(host.jobs) == ["3-13-1", "4-14-1"]


# --- groups --------------------------------------------------------------------------------------


def group(*dev_ids: int) -> Host:
    return Host({n: Care(("/s",), group="all") for n in dev_ids}, at_once=2)


def test_the_devices_of_a_group_share_one_process() -> None:
    host = group(*range(16))

    async def story() -> None:
        await asyncio.gather(*(host.wish(lost(n)) for n in range(16)))

    play(story)
    assert [job.name for job in host.jobs.values()] == ["group-all"]
    assert set(host.roots.values()) == {"0-10-1"}
    assert all(host.of(n) == [Spawned(1, ServerId(1000, 1, "boot"))] for n in range(16))


def test_who_comes_late_is_taken_by_the_process_that_is_ready() -> None:
    host = group(3, 4)

    async def story() -> None:
        await host.wish(lost(3))
        host.starts.ready("3-13-1")
        await host.wish(lost(4))

    play(story)
    assert host.of(4) == [Spawned(1, ServerId(1000, 1, "boot")), Ready(1)]


def test_a_groups_process_that_died_is_not_joined() -> None:
    host = group(3, 4)

    async def story() -> None:
        await host.wish(lost(3))
        host.alive.clear()
        await host.wish(lost(4))

    play(story)
    assert list(host.jobs) == ["3-13-1", "4-14-1"]


def test_after_our_restart_the_groups_process_is_found_by_its_devices() -> None:
    host = group(3, 4, 5)
    server = ServerId(77, 1, "boot")
    host.alive[77] = server
    host.roots |= {"3-13-1": "3-13-1", "5-15-1": "3-13-1"}
    host.known_records = [
        replace(lost(5), phase=Phase.WATCHING, server=server),
        replace(lost(3), phase=Phase.WATCHING, server=server),
    ]
    play(lambda: host.wish(lost(4)))
    assert host.jobs == {}
    assert host.roots["4-14-1"] == "3-13-1"
    assert host.of(4) == [Spawned(1, server), Ready(1)]


def test_a_server_that_we_did_not_start_is_given_no_line() -> None:
    host = group(3, 4)
    server = ServerId(77, 1, "boot")
    host.alive[77] = server
    host.known_records = [replace(lost(3), phase=Phase.WATCHING, server=server)]
    play(lambda: host.wish(lost(4)))
    assert list(host.jobs) == ["4-14-1"]
