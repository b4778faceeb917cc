"""Looking at the devices: GET_DEV_INFO, and what we make of one that is new to us.

A part of the shell: one look at all devices for each poll, and at one of them when it is asked for.
"""

from __future__ import annotations

import asyncio
import errno
import functools
from collections.abc import Mapping
from typing import Protocol

from ublkwatch.atrest import AtRest, Sight
from ublkwatch.attempt import ATTEMPTING
from ublkwatch.events import Event, InfoMissing, InfoRead, Resumed
from ublkwatch.model import DevInfo, Record
from ublkwatch.perform import Edges, Performer
from ublkwatch.starts import tag_of
from ublkwatch.uapi import DevState
from ublkwatch.unreadable import Unreadable
from ublkwatch.unsaved import Unsaved
from ublkwatch.who import Files, Who


class Caller(Protocol):
    """monitor.Monitor, as far as it is spoken to from here."""

    def post(self, dev_id: int, event: Event) -> None: ...
    def met(self, record: Record) -> None: ...
    def quarantine(self, dev_id: int, error: BaseException) -> None: ...
    def notice_stall(self) -> None: ...


class Lookout:
    """Looks, and posts what it sees."""

    def __init__(  # noqa: PLR0913, PLR0917 - it is a part of the monitor, and sees what that has
        self,
        edges: Edges,
        monitor: Caller,
        performer: Performer,
        who: Who,
        unsaved: Unsaved,
        records: Mapping[int, Record],
        former: dict[int, Record],
    ) -> None:
        """``former`` has the records of our former life, until their devices are met."""
        self._edges, self._monitor, self._performer = edges, monitor, performer
        self._who, self._unsaved = who, unsaved
        self._records, self._former = records, former
        self._unreadable = Unreadable()
        self._rest = AtRest()
        self.looks = 0  # at one device each

    async def all(self) -> bool:
        """Look at all devices but those that are at rest; tell whether some could not be read."""
        present = self._edges.present()
        ids = present.keys() | self._records.keys() | self._former.keys()
        infos = await self._glance(ids)
        sights = ((each, self._sight(each, infos, present)) for each in ids)
        restless = list(self._rest.restless(sights))
        files = functools.cache(self._edges.files)  # one server may have all of the devices
        reads = (self._look(each, infos.get(each), files) for each in restless)
        came = await asyncio.gather(*reads, return_exceptions=True)
        bugs = [
            (n, bug) for n, bug in zip(restless, came, strict=True) if isinstance(bug, Exception)
        ]
        for dev_id, bug in bugs:
            self._monitor.quarantine(dev_id, bug)
        return bool(bugs) or self._unreadable.among(ids)

    async def _glance(self, ids: set[int]) -> Mapping[int, DevInfo | OSError]:
        try:
            return await self._edges.ctrl.get_dev_infos(ids)
        except OSError:
            return {}  # each is asked alone, then, and says why that is in vain

    def _sight(
        self, dev_id: int, infos: Mapping[int, DevInfo | OSError], present: Mapping[int, int | None]
    ) -> Sight:
        rules = None if dev_id in self._unsaved else self._who.settled(dev_id)
        return Sight(infos.get(dev_id), present.get(dev_id), self._records.get(dev_id), rules)

    async def read(self, dev_id: int) -> None:
        """Look at one device."""
        await self._look(dev_id, None)

    async def _look(
        self, dev_id: int, answer: DevInfo | OSError | None, files: Files | None = None
    ) -> None:
        self.looks += 1
        self._monitor.notice_stall()  # to look at many takes long, and is none
        if (fact := await self.ask(dev_id, answer, files)) is not None:
            self._monitor.post(dev_id, fact)

    async def ask(
        self, dev_id: int, answer: DevInfo | OSError | None = None, files: Files | None = None
    ) -> Event | None:
        """Return what is true of a device.

        ``answer`` is GET_DEV_INFO's, where it was asked for, and ``files`` what processes have had
        open since.
        """
        files = files if answer else None
        try:
            info = answer or await self._edges.ctrl.get_dev_info(dev_id)
            if isinstance(info, OSError):
                raise info
        except OSError as error:
            if error.errno == errno.ENODEV:
                self._unreadable.drop(dev_id)
                self._abandon_former(dev_id)
                return InfoMissing()
            self._unreadable.add(dev_id, error)
            return None
        self._unreadable.drop(dev_id)
        instance = self._edges.instance(dev_id)
        record = self._records.get(dev_id)
        if instance is None and info.state is not DevState.DEAD:
            return None  # its disk comes or goes just now; the next read sees which
        if record is None:
            former = self._former.get(dev_id)
            if info.state is DevState.DEAD and former is not None and former.stopped:
                instance = former.instance  # by ourselves: that and why is still worth knowing
            elif info.state is DevState.DEAD or instance is None:
                self._abandon_former(dev_id)
                return None  # added and not started yet, or stopped: no disk, nothing to keep alive
            record = await self._meet(info, instance)
            if record is None:
                return None  # nobody can tell yet in whose care it is
        server = await self._who.serves(info, record, files)
        return InfoRead(info, instance or record.instance, server)

    async def _meet(self, info: DevInfo, instance: str) -> Record | None:
        dev_id = info.dev_id
        former = self._former.get(dev_id)
        if former is None or former.instance != instance:
            self._abandon_former(dev_id)
            record = Record(dev_id=dev_id, instance=instance, since=self._edges.clock())
            self._monitor.met(record)
            return record
        found = await self._performer.ends.find(tag_of(former))
        await self._who.serves(info, former)
        if not self._who.cared_for(dev_id):
            return None  # to go on without knowing would mean to give it up
        node = f"/dev/ublkc{dev_id}"
        candidates = [server for server in found if server != former.server]
        candidates.sort(key=lambda server: node not in self._edges.files(server.pid))
        self._edges.launcher.listen(tag_of(former))
        del self._former[dev_id]
        self._monitor.met(former)
        self._monitor.post(dev_id, Resumed(candidates[0] if candidates else None))
        return former

    def _abandon_former(self, dev_id: int) -> None:
        """End what an attempt of our former life left of a device that is gone."""
        former = self._former.pop(dev_id, None)
        if former is not None:
            self._edges.store.drop_record(dev_id)
            if former.phase in ATTEMPTING:
                self._performer.spawn(dev_id, self._performer.ends.abandon(former))
