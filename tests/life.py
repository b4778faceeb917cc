"""One life of the supervisor over the twins: the real Monitor, and its edges by Protocol.

A life is killed as by SIGKILL: from that instant none of its edges does anything, its control
worker's commands are interrupted where the kernel lets them, and what the store saved is all that
the next life knows.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cast import Home
from plain import NO_THREADS, PlainLauncher
from twin import PARAMS, Command
from twin_device import CharFile

from ublkwatch.care import Care, Job, Origin, Spec, Standby
from ublkwatch.ctrl import CtrlError, patiently
from ublkwatch.events import Transition
from ublkwatch.lanes import Lanes
from ublkwatch.model import DevInfo, Record, ServerId
from ublkwatch.monitor import Monitor
from ublkwatch.perform import Edges
from ublkwatch.rules import Unmanaged
from ublkwatch.standby import Terms
from ublkwatch.uapi import DevState

if TYPE_CHECKING:
    from world import World

POLL_S = 1.0
_GRACE_S = 1.0


class Life(PlainLauncher):
    """The edges, and when they fail."""

    def __init__(self, world: World) -> None:
        self.world, self.alive = world, True
        self.commands: dict[str, tuple[str, Command | None, asyncio.Event]] = {}
        self._sent: list[Command] = []
        self._watched: set[ServerId] = set()
        self._children: set[int] = set()
        self._listening: set[str] = set()
        clock = world.loop.time
        edges = Edges(
            ctrl=self,
            workers=self,
            servers=self,
            launcher=self,
            store=self,
            present=world.driver.present,
            threads=NO_THREADS,
            traffic=lambda _: None,
            instance=self.instance,
            files=self.files,
            publish=self.publish,
            clock=clock,
            wall=clock,
            chance=world.rng.random,
            origin=lambda _pid: Origin(),
            care=self.care_of,
            kept=self,
            lanes=Lanes(64),
            standbys=Terms(
                former=tuple(world.standbys.values()),
                program=self.program,
                keep=self.save_standby,
                drop=self.drop_standby,
                tell=lambda _, text, __: world.note("supervisor", text),
            ),
        )
        self.monitor = Monitor(edges, world.policy, dict(world.records), dict(world.specs))
        self.task = asyncio.create_task(self.monitor.run(POLL_S), name="supervisor")
        world.note("supervisor", "starts")
        for tag in world.homes:
            world.homes[tag].notify = lambda: None

    def die(self) -> None:
        """SIGKILL."""
        self.alive = False
        self.world.note("supervisor", "is killed")
        self.task.cancel()
        for command in self._sent:
            command.cancel()
        self.world.died()

    def _before(self, what: str) -> None:
        self._check()
        self.world.effect("before", what)
        self._check()

    def _after(self, what: str) -> None:
        self._check()
        self.world.effect("after", what)
        self._check()

    def _check(self) -> None:
        if not self.alive:
            raise asyncio.CancelledError

    # --- Ctrl and Workers ------------------------------------------------------------------------

    async def get_dev_info(self, dev_id: int) -> DevInfo:
        await asyncio.sleep(self.world.rng.uniform(0.00005, 0.001))
        if error := self.world.info_error:
            raise CtrlError(error, "GET_DEV_INFO", dev_id)
        try:
            info = self.world.driver.info(dev_id)
        except OSError:
            self.world.laws.read_dead(dev_id)
            raise
        state = self.world.state_shown
        if info.state is DevState.DEAD and state is None:
            self.world.laws.read_dead(dev_id)
        if self.world.torn and info.state is DevState.LIVE:
            self.world.torn -= 1
            state = DevState.QUIESCED
        return info if state is None else replace(info, state=state)

    async def get_dev_infos(self, dev_ids: Collection[int]) -> dict[int, DevInfo | OSError]:
        reads = [self.get_dev_info(dev_id) for dev_id in dev_ids]
        came = await asyncio.gather(*reads, return_exceptions=True)
        for error in came:
            if isinstance(error, BaseException) and not isinstance(error, OSError):
                raise error
        return dict(zip(dev_ids, came, strict=True))  # type: ignore[arg-type]

    async def call(
        self, command: str, dev_id: int, key: str, *, timeout_s: float, **arguments: float
    ) -> dict[str, Any]:
        """As ctrl_worker.Workers: the worker's own deadline, then the daemon's."""
        self._before(command)
        self.world.laws.sends(command, dev_id, self._sent)
        lost = self.world.lost(command)
        if command == "STOP_DEV":
            self.world.laws.stops(dev_id)
            self.world.stopped = True
        if command.endswith("_RECOVERY") or command == "STOP_DEV":
            self.world.note("supervisor", f"sends {command} ublk {dev_id}")
        cancelled = asyncio.Event()
        self.commands[key] = (command, None, cancelled)
        work = asyncio.create_task(self._work_unless(lost, command, dev_id, key, **arguments))
        try:
            if command == "END_USER_RECOVERY":
                await self._either(work, cancelled)
            error = (
                work.result() if await patiently(work, timeout_s + _GRACE_S) else errno.ETIMEDOUT
            )
        finally:
            work.cancel()
            self.commands.pop(key, None)
        if command == "STOP_DEV" and error == errno.ETIMEDOUT:
            self.world.stops_late = True
        self._after(command)
        if error:
            raise CtrlError(error, command, dev_id)
        return {"params": PARAMS}

    async def _either(self, work: asyncio.Task[int], cancelled: asyncio.Event) -> None:
        cancel = asyncio.create_task(cancelled.wait())
        waited: set[asyncio.Future[Any]] = {work, cancel}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        cancel.cancel()

    async def _work_unless(
        self, lost: str, name: str, dev_id: int, key: str, **arguments: float
    ) -> int:
        error = 0
        if lost != "command":
            error = await self._work(name, dev_id, key, **arguments)
        if lost:
            await asyncio.Event().wait()
        return error

    async def _work(self, name: str, dev_id: int, key: str, **arguments: float) -> int:
        cancelled = self.commands[key][2]
        busy_s, pause = arguments.get("busy_s", 0.0), 0.001
        while True:
            error = await self._send(name, dev_id, key, int(arguments.get("pid", 0)))
            if error != errno.EBUSY or busy_s <= 0 or name != "START_USER_RECOVERY":
                return error
            try:
                async with asyncio.timeout(pause):
                    await cancelled.wait()
            except TimeoutError:
                busy_s, pause = busy_s - pause, min(0.05, pause * 1.25)
            else:
                return errno.EINTR

    async def _send(self, name: str, dev_id: int, key: str, pid: int) -> int:
        command = self.world.driver.send(name, dev_id, pid=pid)
        self._sent.append(command)
        cancelled = self.commands[key][2]
        self.commands[key] = (name, command, cancelled)
        if name == "END_USER_RECOVERY" and cancelled.is_set():
            command.cancel()
        return await asyncio.shield(command.done)

    def cancel(self, key: str) -> None:
        self._before("cancel")
        if key in self.commands:
            name, command, cancelled = self.commands[key]
            cancelled.set()
            if command is not None and name == "END_USER_RECOVERY":
                command.cancel()

    # --- Servers ---------------------------------------------------------------------------------

    def identify(self, pid: int) -> ServerId | None:
        process = self.world.processes.get(pid)
        return process.id if process and process.alive else None

    def watch(self, server: ServerId) -> None:
        if server in self._watched or not self.alive:
            return
        self._watched.add(server)
        process = self.world.processes.get(server.pid)
        if process is not None and process.alive:
            process.on_end.append(lambda: self._pidfd_readable(server))
        else:
            self.world.loop.call_soon(self._report, server)

    def _pidfd_readable(self, server: ServerId) -> None:
        self.world.loop.call_later(self.world.rng.uniform(0.001, 0.01), self._report, server)

    def _report(self, server: ServerId) -> None:
        if self.alive:
            self._watched.discard(server)
            self.monitor.server_exited(server)

    def kill(self, server: ServerId) -> None:
        self._before("kill")
        self.world.laws.kills(server)
        self._kill(server)
        self._after("kill")

    def _kill(self, server: ServerId) -> None:
        self.watch(server)
        process = self.world.processes.get(server.pid)
        if process is not None:
            process.end()

    async def tagged(self, tag: str) -> list[ServerId]:
        return [process.id for process in self.world.processes.alive() if process.tag == tag]

    async def end_tagged(self, tag: str) -> None:
        self._before("end attempt")
        while strays := await self.tagged(tag):
            for server in strays:
                self._kill(server)
            await asyncio.sleep(0.02)
            self._check()
        self._after("end attempt")

    def instance(self, dev_id: int) -> str | None:
        diskseq = self.world.driver.diskseq(dev_id)
        return None if diskseq is None else f"boot/{diskseq}"

    def files(self, pid: int) -> set[str]:
        process = self.world.processes.get(pid)
        files = process.files if process else ()
        return {f"/dev/ublkc{file.device.dev_id}" for file in files if isinstance(file, CharFile)}

    async def holders(self, node: str) -> tuple[bool, str]:
        holding = [who for who in self.world.processes.alive() if node in self.files(who.pid)]
        if not holding:
            return True, f"no holder of {node}"
        return False, f"{node} is held by process {holding[0]}"

    async def care_of(self, info: DevInfo, origin: Origin | None) -> Care | Unmanaged:
        del origin
        await asyncio.sleep(0.001)  # rules look at files, in a thread
        return self.world.cares.get(info.dev_id, Unmanaged())

    # --- Kept ------------------------------------------------------------------------------------

    def keep(self, dev_id: int, paths: tuple[str, ...]) -> None:
        raise AssertionError(f"no files here: {dev_id}, {paths}")

    restore = keep

    def drop(self, dev_id: int) -> None:
        pass

    # --- Launcher --------------------------------------------------------------------------------

    def known(self, tag: str) -> bool:
        return self.root(tag) in self.world.homes

    def root(self, tag: str) -> str:
        return self.world.links.get(tag, tag)

    def join(self, tag: str, root: str) -> None:
        self._before("join")
        self.world.laws.spawns(int(tag.partition("-")[0]), tag, root)
        self.world.links[tag] = root
        self._after("join")

    async def program(self, job: Job) -> str:
        del job
        await asyncio.sleep(self.world.rng.uniform(0.0001, 0.01))
        return self.world.program

    async def start(self, tag: str, job: Job) -> int:
        self._before("spawn")
        dev_id = 0 if job.spare else int(tag.partition("-")[0])
        if not job.spare:
            self.world.laws.spawns(dev_id, tag)
        kind = self.world.next_kind(dev_id)
        await asyncio.sleep(self.world.rng.uniform(0.0005, 0.01))
        if kind == "slow-launch":
            await asyncio.sleep(self.world.rng.uniform(5, 25))
        if kind == "no-start":
            raise OSError(errno.ENOENT, "No such file or directory: '/bin/server'")
        home = self.world.homes[tag] = Home()
        self.listen(tag)
        process = self.world.cast.start(kind, dev_id, tag, home, self.world.story.way)
        process.dies_in_s = self.world.dies_in_s
        self._children.add(process.pid)
        self.world.note("supervisor", f"starts {process}, attempt {tag}")
        await asyncio.sleep(self.world.rng.uniform(0.0005, 0.01))
        self._after("spawn")
        return process.pid

    def listen(self, tag: str) -> None:
        tag = self.root(tag)
        if tag in self.world.homes:
            self.world.homes[tag].notify = lambda: self._ready(tag)

    def _ready(self, tag: str) -> None:
        if self.alive:
            self.world.loop.call_soon(self.monitor.ready, tag)
            for each in [each for each, root in self.world.links.items() if root == tag]:
                self.world.loop.call_soon(self.monitor.ready, each)

    def write_line(self, tag: str, line: str) -> None:
        self._before("line")
        root = self.root(tag)
        if root not in self.world.homes:
            raise OSError(errno.ENOENT, f"No such file or directory: {tag}/stdin")
        self.world.laws.line(int(tag.partition("-")[0]), root)
        self.world.homes[root].write(line)
        self.world.note("supervisor", f"writes the line of attempt {tag}")
        self._after("line")

    def unread(self, tag: str) -> bool:
        home = self.world.homes.get(self.root(tag))
        return home is not None and bool(home.lines) and not home.read

    def how_ended(self, pid: int) -> tuple[str, int | None]:
        process = self.world.processes.get(pid)
        if process is None or pid not in self._children:
            return "unknown", None
        return process.how, process.code

    async def decide(
        self, command: tuple[str, ...], about: dict[str, str], timeout_s: float
    ) -> tuple[str, int | None]:
        del command, about, timeout_s
        self._before("decide")
        self.world.decisions += 1
        await asyncio.sleep(self.world.rng.uniform(0.01, 2))
        self._after("decide")
        return "exit status", self.world.decision

    async def shutting_down(self) -> bool:
        await asyncio.sleep(self.world.rng.uniform(0.01, 0.3))
        return self.world.host_ends

    def last_words(self, tag: str) -> str:
        home = self.world.homes.get(self.root(tag))
        return home.said if home else ""

    def keep_only(self, tags: set[str]) -> None:
        for tag in self.world.homes.keys() - {self.root(tag) for tag in tags}:
            del self.world.homes[tag]
        for tag in self.world.links.keys() - tags:
            del self.world.links[tag]

    def trim(self) -> None: ...

    # --- Store -----------------------------------------------------------------------------------

    def save_record(self, record: Record) -> None:
        self._before("save")
        if self.world.disk_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.world.records[record.dev_id] = replace(record, info=None)
        self._after("save")

    def drop_record(self, dev_id: int) -> None:
        self._before("drop")
        self.world.records.pop(dev_id, None)
        self._after("drop")

    def save_spec(self, spec: Spec) -> None:
        self._before("save spec")
        if self.world.disk_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.world.specs[spec.dev_id] = spec
        self._after("save spec")

    def save_standby(self, standby: Standby) -> None:
        self._before("save standby")
        if self.world.disk_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.world.standbys[standby.tag] = standby
        self._after("save standby")

    def drop_standby(self, tag: str) -> None:
        self._before("drop standby")
        self.world.standbys.pop(tag, None)
        self._after("drop standby")

    def publish(self, transition: Transition) -> None:
        if self.alive:
            self.world.published(transition)
