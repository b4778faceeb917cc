"""Looking at the devices: what it costs where there are many of one server."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import virtual
from stories import INFO, OLD

from ublkwatch.events import Event, InfoRead
from ublkwatch.lookout import Lookout
from ublkwatch.model import DevInfo, Policy, Record
from ublkwatch.rules import Unmanaged
from ublkwatch.uapi import DevState
from ublkwatch.unsaved import Unsaved
from ublkwatch.who import Who

MANY = 40


class Crowd:
    """Many devices of one server, which are in nobody's care; all that a Lookout speaks to."""

    def __init__(self) -> None:
        self.infos = {n: replace(INFO, dev_id=n, state=DevState.LIVE) for n in range(MANY)}
        self.open_nodes = {f"/dev/ublkc{dev_id}" for dev_id in self.infos}
        self.records: dict[int, Record] = {}
        self.facts: list[InfoRead] = []
        self.listed: Counter[int] = Counter()  # by process
        self.checked = 0  # whether we were kept from running

    def look_at_all(self, polls: int) -> None:
        async def run() -> None:
            edges = cast("Any", self._edges())
            who = Who(edges, Policy(), {}, self.records.get)
            lookout = Lookout(edges, self, cast("Any", None), who, Unsaved(), self.records, {})
            for _ in range(polls):
                await lookout.all()

        virtual.run(run(), virtual.Loop(max_turns=1_000_000))

    def _edges(self) -> SimpleNamespace:
        async def care(_info: object, _origin: object) -> Unmanaged:
            return Unmanaged()

        return SimpleNamespace(
            ctrl=self,
            clock=asyncio.get_running_loop().time,
            present=lambda: dict.fromkeys(self.infos, 1),
            instance=lambda _: "boot/1",
            servers=SimpleNamespace(identify=lambda _: OLD),
            files=self._files,
            origin=lambda _: None,
            care=care,
        )

    def _files(self, pid: int) -> set[str]:
        self.listed[pid] += 1
        return self.open_nodes

    async def get_dev_info(self, dev_id: int) -> DevInfo:
        return self.infos[dev_id]

    async def get_dev_infos(self, _: object) -> dict[int, DevInfo]:
        return self.infos

    def post(self, dev_id: int, event: Event) -> None:
        assert isinstance(event, InfoRead)
        self.facts.append(event)
        # As if the machine had something new to note with each fact, so that none ever rests.
        self.records[dev_id] = replace(self.records[dev_id], since=len(self.facts))

    def met(self, record: Record) -> None:
        self.records[record.dev_id] = record

    def quarantine(self, _dev_id: int, error: BaseException) -> None:
        raise error

    def notice_stall(self) -> None:
        self.checked += 1


def test_the_files_of_a_server_are_listed_once_with_each_poll_however_many_devices_it_has() -> None:
    crowd = Crowd()
    crowd.look_at_all(polls=5)
    assert len(crowd.facts) == 5 * MANY
    assert {fact.server for fact in crowd.facts} == {OLD}
    assert crowd.listed == {OLD.pid: 5}


def test_a_process_without_the_device_is_not_its_server() -> None:
    crowd = Crowd()
    crowd.open_nodes = {"/dev/ublkc3"}
    crowd.look_at_all(polls=1)
    assert [fact.info.dev_id for fact in crowd.facts if fact.server] == [3]


def test_looking_at_many_devices_is_no_stall_however_long_it_takes() -> None:
    crowd = Crowd()
    crowd.look_at_all(polls=2)
    assert crowd.checked == 2 * MANY, "we are seen to run between any two of them"
