"""Standbys: who has one, within which bounds, and what becomes of one that is of no use."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import pytest
import virtual

from ublkwatch.care import Care, Job, Origin, Run, Spec, Standby, StandbyShown
from ublkwatch.model import Phase, Policy, QueueConfig, Reason, Record, ServerId
from ublkwatch.standby import Terms
from ublkwatch.standbys import Standbys

POLICY = Policy(stable_s=10.0, ready_timeout_s=5.0)
CARE = Care(("/bin/server", "{dev_id}"), POLICY, standby=True)
QUEUE = QueueConfig(2, 64, 4096, 8, {})


def watched(dev_id: int = 0, since: float = -100.0) -> Record:
    return Record(dev_id, f"boot/{dev_id + 10}", phase=Phase.WATCHING, since=since)


@dataclass
class Host:
    """Launcher, processes, disk and monitor in one, in memory."""

    cares: dict[int, Care] = field(default_factory=lambda: {0: CARE})
    devices: list[Record] = field(default_factory=lambda: [watched()])
    unmet: list[Record] = field(default_factory=list)
    roots: dict[str, str] = field(default_factory=dict)
    disk: dict[str, Standby] = field(default_factory=dict)
    alive: dict[int, ServerId] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    watched: list[ServerId] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    shutting_down: bool = False
    most: int = 64
    free: float = 50.0
    says_ready: bool = True
    version: str = "1"
    look_s: float = 0.0
    asked: int = 0  # for records
    _states: list[object] = field(default_factory=list)

    def begin(self) -> Standbys:
        """Begin a life of ublkwatch."""
        specs = {
            each.dev_id: Spec(each.dev_id, each.instance, QUEUE, Origin("/s", "s", 5, 6))
            for each in self.devices
        }
        self.standbys = Standbys(
            terms=Terms(
                most=lambda: self.most,
                least_free=lambda: 10.0,
                free=lambda: self.free,
                program=self.program,
                former=tuple(self.disk.values()),
                keep=lambda standby: self.disk.update({standby.tag: standby}),
                drop=self.drop,
                tell=self.tell,
            ),
            launcher=self,
            servers=self,
            end=self.end,
            specs=specs,
            clock=asyncio.get_running_loop().time,
            monitor=self,
        )
        return self.standbys

    def drop(self, tag: str) -> None:
        self.disk.pop(tag, None)

    async def polls(self, number: int = 3) -> None:
        for _ in range(number):
            self.standbys.look()
            await asyncio.sleep(1)

    def tell(self, dev_id: int, text: str, bad: bool) -> None:  # noqa: FBT001 - as Terms has it
        (self.warned if bad else self.told).append(f"{dev_id}: {text}")

    async def program(self, job: Job) -> str:
        del job
        await asyncio.sleep(self.look_s)
        if self.version == "forbidden":
            raise PermissionError("others can write it")
        return self.version

    async def start(self, tag: str, job: Job) -> int:
        assert self.disk[tag].server is None  # it is known before it exists
        pid = 100 + len(self.jobs)
        self.jobs[tag] = job
        await asyncio.sleep(0.01)
        if job.command[0] != "/bin/dies":
            self.alive[pid] = ServerId(pid, 1, "boot")
        if self.says_ready:
            asyncio.get_running_loop().call_later(0.1, self.standbys.ready, tag)
        return pid

    async def end(self, tag: str) -> None:
        self.ended.append(tag)
        if (server := self.disk[tag].server) is not None:
            self.alive.pop(server.pid, None)

    def dies(self, pid: int) -> None:
        self.standbys.exited(self.alive.pop(pid), "SIGKILL")

    def join(self, tag: str, root: str) -> None:
        self.roots[tag] = root

    def root(self, tag: str) -> str:
        return self.roots.get(tag, tag)

    def last_words(self, tag: str) -> str:
        return f"words of {tag[:2]}"

    def identify(self, pid: int) -> ServerId | None:
        return self.alive.get(pid)

    def watch(self, server: ServerId) -> None:
        self.watched.append(server)

    def records(self) -> list[Record]:
        self.asked += 1
        return self.devices

    @property
    def changes(self) -> int:
        """Count as the monitor does: the records and rules that there were."""
        now = (list(self.devices), dict(self.cares))
        if not self._states or self._states[-1] != now:
            self._states.append(now)
        return len(self._states)

    def all_records(self) -> list[Record]:
        return [*self.devices, *self.unmet]

    def care(self, dev_id: int) -> Care | None:
        return self.cares.get(dev_id)

    def policy(self, dev_id: int) -> Policy:
        return replace(self.cares[dev_id].policy, shutting_down=self.shutting_down)


def play(story: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await story()

    virtual.run(run())


def states(host: Host) -> dict[str, int]:
    return {state: number for state, number in host.standbys.counts().items() if number}


# --- who has one ---------------------------------------------------------------------------------


def test_where_nobody_wants_one_a_poll_asks_for_nothing_until_something_changes() -> None:
    async def story() -> None:
        host = Host(cares={0: replace(CARE, standby=False)})
        host.begin()
        await host.polls()
        asked = host.asked
        await host.polls()
        assert host.asked == asked
        host.cares[0] = CARE
        await host.polls()
        assert states(host) == {"waiting": 1}

    play(story)


def test_one_is_started_for_a_device_at_rest_and_taken_once() -> None:
    async def story() -> None:
        host = Host()
        host.begin()
        assert states(host) == {"missing": 1}
        await host.polls()
        ((tag, job),) = host.jobs.items()
        assert job == Job("ublkb0", ("/bin/server", "0"), Run(), job.origin, spare=True)
        server = ServerId(100, 1, "boot")
        assert (host.watched, states(host)) == ([server], {"waiting": 1})
        assert host.standbys.of(watched()) == StandbyShown("waiting", 100)
        assert host.standbys.tags() == {tag} == host.disk.keys()
        assert host.standbys.waits("ublkb0")
        assert await host.standbys.take("0-10-1", "ublkb0") == server
        assert host.roots == {"0-10-1": tag}
        assert (host.disk, host.standbys.tags()) == ({}, set())
        assert not host.standbys.waits("ublkb0")
        assert await host.standbys.take("0-10-2", "ublkb0") is None
        assert host.told == [
            f"0: its standby, process 100, {it}" for it in ("is ready", "is taken")
        ]
        assert host.ended == []

    play(story)


UNFIT = {
    "just LIVE": watched(since=-5),
    "held": replace(watched(), held=True),
    "being recovered": replace(watched(), phase=Phase.DRAINING),
    "not ours": replace(watched(), phase=Phase.OBSERVED, reason=Reason.FORGOTTEN),
    "another one of that number": replace(watched(), instance="boot/99"),
}


@pytest.mark.parametrize("record", UNFIT.values(), ids=UNFIT)
def test_none_is_started_for_a_device_that_is(record: Record) -> None:
    async def story() -> None:
        host = Host()
        host.begin()
        host.devices[:] = [record]
        await host.polls(2)
        assert host.jobs == {}

    play(story)


def test_none_is_started_while_the_host_shuts_down_or_another_device_is_recovered() -> None:
    async def story() -> None:
        host = Host(shutting_down=True)
        host.begin()
        await host.polls()
        host.shutting_down = False
        host.devices.append(replace(watched(1), phase=Phase.ATTACHING))
        await host.polls()
        assert host.jobs == {}
        host.devices.pop()
        await host.polls()
        assert len(host.jobs) == 1

    play(story)


def test_a_group_has_one_when_all_of_it_is_at_rest() -> None:
    async def story() -> None:
        care = replace(CARE, command=("/bin/server",), group="g")
        host = Host({0: care, 1: care}, [watched(1, since=0), watched(0)])
        host.begin()
        await host.polls()
        assert host.jobs == {}
        await host.polls(12)
        assert [job.name for job in host.jobs.values()] == ["group-g"]
        assert host.standbys.of(watched(0)) == host.standbys.of(watched(1))

    play(story)


# --- bounds --------------------------------------------------------------------------------------


def test_there_are_no_more_than_so_many_the_most_important_first() -> None:
    async def story() -> None:
        host = Host(
            {n: replace(CARE, priority=n) for n in range(4)}, [watched(n) for n in range(4)]
        )
        host.most = 2
        host.begin()
        await host.polls(9)
        assert [job.name for job in host.jobs.values()] == ["ublkb3", "ublkb2"]
        assert states(host) == {"waiting": 2, "missing": 2}
        host.most = 1
        await host.polls()
        assert states(host) == {"waiting": 1, "missing": 3}
        assert "more than standby_max" in host.told[-1]
        assert host.standbys.of(watched(3)) == StandbyShown("waiting", 100)

    play(story)


def test_none_is_started_where_memory_is_short_and_one_ends_where_it_is_very_short() -> None:
    async def story() -> None:
        host = Host(free=9.9)
        host.begin()
        await host.polls()
        assert host.jobs == {}
        host.free = 10.0
        await host.polls()
        host.free = 6.0
        await host.polls()
        assert states(host) == {"waiting": 1}
        host.free = 4.9
        await host.polls()
        assert states(host) == {"missing": 1}
        assert "standby_free_percent" in host.told[-1]

    play(story)


def test_one_that_fails_again_and_again_is_started_less_and_less_often() -> None:
    async def story() -> None:
        host = Host({0: replace(CARE, command=("/bin/dies",))})
        host.begin()
        await host.polls(3600)
        assert 8 <= len(host.jobs) <= 16
        assert len(host.ended) == len(host.jobs)
        shown = host.standbys.of(watched())
        assert shown == StandbyShown("missing", note="it ended at once: words of s-")
        assert host.warned[0] == f"0: its standby is ended: {shown.note}"

    play(story)


def test_one_that_is_never_ready_is_ended() -> None:
    async def story() -> None:
        host = Host(says_ready=False)
        host.begin()
        await host.polls(4)
        assert states(host) == {"starting": 1}
        await host.polls(3)
        assert "did not say READY=1" in host.warned[0]
        assert len(host.ended) == 1
        assert host.disk == {}

    play(story)


def test_one_that_had_waited_for_long_comes_again_at_once() -> None:
    async def story() -> None:
        host = Host()
        host.begin()
        for pid in (100, 101, 102):
            await host.polls(100)
            host.dies(pid)
        await host.polls(8)
        assert states(host) == {"waiting": 1}
        assert "SIGKILL" in host.warned[-1]

    play(story)


# --- what is of no use any more ------------------------------------------------------------------


def test_one_is_replaced_when_what_would_be_started_changes() -> None:
    async def story() -> None:
        host = Host()
        host.begin()
        await host.polls()
        host.cares[0] = replace(CARE, run=Run(user="other"))
        await host.polls(5)
        assert host.jobs.keys() - set(host.ended) == host.disk.keys()
        host.version = "2"
        await host.polls(5)
        assert len(host.jobs) == 3
        assert "its program has changed" in host.told[-2]
        host.cares[0] = replace(host.cares[0], source="other words for it", policy=replace(POLICY))
        await host.polls(5)
        assert len(host.jobs) == 3

    play(story)


@pytest.mark.parametrize("version", ["2", "forbidden"])
def test_one_whose_program_changed_a_moment_ago_is_not_taken(version: str) -> None:
    async def story() -> None:
        host = Host()
        host.begin()
        await host.polls()
        host.version = version
        assert await host.standbys.take("0-10-1", "ublkb0") is None
        assert host.roots == {}
        await host.polls(1)
        assert len(host.ended) == 1

    play(story)


def test_where_nobody_can_look_at_the_program_the_one_that_waits_is_taken() -> None:
    async def story() -> None:
        for version, look_s in (("", 0.0), ("2", 3600.0)):  # it is missing; its file system hangs
            host = Host()
            host.begin()
            await host.polls()
            host.version, host.look_s = version, look_s
            began = asyncio.get_running_loop().time()
            assert await host.standbys.take("0-10-1", "ublkb0")
            assert asyncio.get_running_loop().time() - began < 1.1

    play(story)


def test_one_that_died_is_not_taken_though_nobody_was_told() -> None:
    async def story() -> None:
        host = Host()
        host.begin()
        await host.polls()
        host.alive.clear()
        assert host.standbys.waits("ublkb0")
        assert await host.standbys.take("0-10-1", "ublkb0") is None

    play(story)


def test_one_that_is_only_being_started_makes_room_for_the_recovery() -> None:
    async def story() -> None:
        host = Host(says_ready=False)
        host.begin()
        await host.polls(1)
        assert states(host) == {"starting": 1}
        assert not host.standbys.waits("ublkb0")
        assert await host.standbys.take("0-10-1", "ublkb0") is None
        await host.polls(2)
        assert len(host.ended) == 1
        assert host.warned == []

    play(story)


def test_one_that_nobody_wants_ends_once_all_devices_are_known() -> None:
    async def story() -> None:
        host = Host()
        host.begin()
        await host.polls()
        host.unmet = host.devices[:]
        host.devices.clear()
        await host.polls()
        assert host.ended == []
        host.unmet.clear()
        await host.polls()
        assert len(host.ended) == 1
        assert states(host) == {}

    play(story)


# --- our own death -------------------------------------------------------------------------------


def test_the_next_life_takes_on_what_waits_and_ends_what_does_not() -> None:
    async def story() -> None:
        host = Host()
        host.begin()
        await host.polls()
        ((tag, kept),) = host.disk.items()
        host.begin()
        await host.polls()
        assert (host.standbys.tags(), len(host.jobs), host.ended) == ({tag}, 1, [])
        assert host.watched == [kept.server] * 2
        for amid in (replace(kept, server=None, ready=False), replace(kept, ready=False)):
            host.disk = {tag: amid}
            host.ended.clear()
            host.begin()
            assert not host.standbys.waits("ublkb0")
            await host.polls()
            assert host.ended == [tag]
        host.disk = {tag: kept}  # whose process is gone
        host.begin()
        assert await host.standbys.take("0-10-1", "ublkb0") is None

    play(story)


def test_the_next_life_does_not_end_what_an_attempt_was_given() -> None:
    async def story() -> None:
        host = Host()
        host.begin()
        await host.polls()
        ((tag, kept),) = host.disk.items()
        host.join("0-10-0", tag)  # and there it died, before it was forgotten as a standby
        host.begin()
        await host.polls()
        assert host.ended == []
        assert tag not in host.disk
        assert kept.server in host.alive.values()

    play(story)
