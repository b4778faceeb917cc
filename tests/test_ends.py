"""Ending the processes of attempts: all of them, and none that serves others well."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import pytest
from plain import PlainLauncher

from ublkwatch.care import Care
from ublkwatch.ends import Ends
from ublkwatch.events import AttemptOver, AttemptShared, Event, Kill, ServerExited, ServerFound
from ublkwatch.model import Generation, Phase, Policy, Record, ServerId
from ublkwatch.starts import tag_of

P = ServerId(77, 1, "boot")
OTHER = ServerId(88, 1, "boot")


@dataclass
class Host(PlainLauncher):
    """Launcher, servers, kept files and monitor in one, in memory."""

    records: list[Record] = field(default_factory=list)
    care_of: Care | None = None
    generation: Generation = Generation.G3
    roots: dict[str, str] = field(default_factory=dict)
    alive: dict[int, ServerId] = field(default_factory=lambda: {77: P, 88: OTHER})
    tags: dict[str, list[ServerId]] = field(default_factory=dict)
    grouped: set[int] = field(default_factory=set)
    posted: list[Event] = field(default_factory=list)
    killed: list[ServerId] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    restored: list[tuple[str, ...]] = field(default_factory=list)
    trouble: OSError | None = None
    hangs: bool = False

    def __post_init__(self) -> None:
        self.lock = asyncio.Lock()
        self.ends = Ends(
            launcher=self,
            servers=self,
            kept=self,
            files=lambda pid: {"/dev/ublkc0"} if pid == 88 else set(),
            fork=lambda _dev_id: self.lock,
            monitor=self,
        )

    def root(self, tag: str) -> str:
        return self.roots.get(tag, tag)

    def unread(self, tag: str) -> bool:
        return tag == "0-10-1"

    def how_ended(self, pid: int) -> tuple[str, int | None]:
        return f"{pid} ended", 3

    def last_words(self, tag: str) -> str:
        return f"words of {tag}"

    def pids(self, tag: str) -> set[int]:
        del tag
        return self.grouped

    async def end(self, tag: str) -> None:
        if self.trouble is not None:
            raise self.trouble
        if self.hangs:
            await asyncio.get_running_loop().create_future()
        self.ended.append(f"group {tag}")

    def identify(self, pid: int) -> ServerId | None:
        return self.alive.get(pid)

    def watch(self, server: ServerId) -> None:
        raise AssertionError(f"not here: {server}")

    def kill(self, server: ServerId) -> None:
        self.killed.append(server)

    async def tagged(self, tag: str) -> list[ServerId]:
        return self.tags.get(tag, [])

    async def holders(self, node: str) -> tuple[bool, str]:
        raise AssertionError(f"not here: {node}")

    async def end_tagged(self, tag: str) -> None:
        self.ended.append(f"tag {tag}")

    def keep(self, dev_id: int, paths: tuple[str, ...]) -> None:
        raise AssertionError(f"not here: {dev_id}, {paths}")

    def restore(self, dev_id: int, paths: tuple[str, ...]) -> None:
        assert dev_id == 0
        self.restored.append(paths)

    def drop(self, dev_id: int) -> None:
        raise AssertionError(f"not here: {dev_id}")

    def post(self, dev_id: int, event: Event) -> None:
        assert dev_id == 0
        self.posted.append(event)

    def all_records(self) -> list[Record]:
        return self.records

    def care(self, dev_id: int) -> Care | None:
        assert dev_id == 0
        return self.care_of

    def policy(self, dev_id: int) -> Policy:
        assert dev_id == 0
        return Policy(generation=self.generation, stop_timeout_s=0.2)


def device(dev_id: int, phase: Phase, server: ServerId | None = None) -> Record:
    attaching = phase is Phase.ATTACHING
    return Record(
        dev_id,
        f"boot/{dev_id + 10}",
        phase=phase,
        seq=1,
        server=None if attaching else server,
        candidate=server if attaching else None,
    )


ENDING = device(0, Phase.STOPPING)


def group(*others: Record) -> Host:
    """Return a host where the others' attempts share the process of device 0's."""
    return Host([ENDING, *others], roots={tag_of(other): "0-10-1" for other in others})


def play(story: Callable[[], Awaitable[object]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(story(), 30)

    asyncio.run(run())


def test_an_attempt_is_over_when_its_group_is_empty_and_no_tag_is_left() -> None:
    host = Host(care_of=Care(("/s",), keep=("/run/{dev_id}.pid",)))
    play(lambda: host.ends.end_attempt(ENDING))
    assert host.ended == ["group 0-10-1", "tag 0-10-1"]
    assert host.posted == [AttemptOver(1, unread=True)]
    assert host.restored == [("/run/0.pid",)]


@pytest.mark.parametrize(
    ("phase", "generation", "spared"),
    [
        (Phase.WATCHING, Generation.G3, True),
        (Phase.PROBATION, Generation.G2, True),
        (Phase.ATTACHING, Generation.G2, True),  # to end it would wedge that one for good
        (Phase.ATTACHING, Generation.G3, False),
        (Phase.DRAINING, Generation.G2, False),
        (Phase.FAILED, Generation.G3, False),
    ],
)
def test_a_process_that_serves_others_well_is_not_ended(
    phase: Phase, generation: Generation, *, spared: bool
) -> None:
    host = group(device(1, phase, P), device(2, Phase.FAILED, P))
    host.generation = generation
    play(lambda: host.ends.end_attempt(ENDING))
    shared = [AttemptShared(1, P, "ublkb1")]
    assert host.posted == (shared if spared else [AttemptOver(1, unread=True)])
    assert bool(host.ended) is not spared


def test_a_process_that_is_gone_serves_nobody() -> None:
    host = group(device(1, Phase.WATCHING, P))
    host.alive.clear()
    play(lambda: host.ends.end_attempt(ENDING))
    assert host.posted == [AttemptOver(1, unread=True)]


def test_others_of_another_process_are_nobodys_concern() -> None:
    host = Host([ENDING, device(1, Phase.WATCHING, OTHER)])
    play(lambda: host.ends.end_attempt(ENDING))
    assert host.posted == [AttemptOver(1, unread=True)]


def test_what_is_left_of_a_device_that_is_gone_is_ended_unless_others_are_served() -> None:
    host = group(device(1, Phase.WATCHING, P))
    play(lambda: host.ends.abandon(ENDING))
    assert host.ended == []
    host.records.clear()
    play(lambda: host.ends.abandon(ENDING))
    assert host.ended == ["group 0-10-1", "tag 0-10-1"]
    assert host.posted == [], "nobody waits for it"


@pytest.mark.parametrize("how", ["bus", "hangs"])
def test_what_cannot_be_ended_is_asked_for_again_and_not_called_over(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "ublkwatch")
    host = Host()
    if how == "bus":
        host.trouble = OSError("system bus: no answer")
    host.hangs = how == "hangs"
    play(lambda: host.ends.end_attempt(ENDING))
    assert host.posted == []
    assert ("system bus: no answer" in caplog.text) is (how == "bus")
    play(lambda: host.ends.abandon(ENDING))
    assert "attempt 0-10-1 of a device that is gone may have processes still" in caplog.text
    host.trouble, host.hangs = None, False
    play(lambda: host.ends.end_attempt(ENDING))
    assert host.posted == [AttemptOver(1, unread=True)]


def test_a_kill_that_spares_asks_who_else_is_served() -> None:
    host = group(device(1, Phase.WATCHING, P))
    host.ends.kill(ENDING, Kill(P, sparing=4))
    assert (host.killed, host.posted) == ([], [AttemptShared(4, P, "ublkb1")])
    host.ends.kill(ENDING, Kill(OTHER, sparing=4))
    host.ends.kill(ENDING, Kill(P))
    assert host.killed == [OTHER, P]


def test_who_serves_is_looked_for_by_tag_and_in_the_group_by_what_it_has_open() -> None:
    host = Host(tags={"0-10-1": [P]}, grouped={77, 88, 99})

    async def story() -> None:
        assert await host.ends.find("0-10-1") == [P, OTHER]
        await host.ends.find_server(ENDING)

    play(story)
    assert host.posted == [ServerFound(1, OTHER)]


def test_how_a_candidate_ended_is_told_with_its_last_words() -> None:
    host = Host()
    play(lambda: host.ends.tell_end(ENDING, P))
    assert host.posted == [ServerExited(P, "77 ended: words of 0-10-1", 3)]


def test_an_attempt_of_another_number_is_another() -> None:
    host = Host()
    play(lambda: host.ends.end_attempt(replace(ENDING, seq=2)))
    assert host.posted == [AttemptOver(2, unread=False)]
