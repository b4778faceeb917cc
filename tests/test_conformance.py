"""The conformance table against the twin: the real drivers answer it too, in tests/kernel."""

from __future__ import annotations

import asyncio
import errno
from typing import Literal

import pytest
import virtual
from conformance import Actor, check
from conformance_own_boot import OWN_BOOT
from conformance_rows import ROWS
from conformance_steps import How, Row
from processes import Process, Processes
from twin import FEATURES, Command, Driver
from twin_device import CharFile, Device

from ublkwatch.model import DevInfo, Generation
from ublkwatch.uapi import DevFlags

DEV_ID = 0
STAGES: tuple[How, ...] = ("nothing", "opened", "mapped", "some tags", "one queue", "all")


class TwinActor:
    """A process that attaches as far as it is told."""

    def __init__(self, process: Process) -> None:
        self.process, self.got, self.done = process, "0", 0

    @property
    def pid(self) -> int:
        return self.process.pid


class TwinSent:
    def __init__(self, answer: asyncio.Future[str], command: Command | None = None) -> None:
        self.answer, self._command = answer, command

    def cancel(self) -> None:
        assert self._command is not None
        self._command.cancel()


class TwinStage:
    patience_s = 2.0
    deadline_s = 60.0

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.driver, self._processes = Driver(generation), Processes()
        self._answers: set[asyncio.Task[str]] = set()

    @property
    def _device(self) -> Device:
        return self.driver.devices[DEV_ID]

    async def add(self, *, queues: int, depth: int, flags: DevFlags) -> tuple[str, DevFlags]:
        command = self.driver.send("ADD_DEV", DEV_ID, queues=queues, depth=depth, flags=int(flags))
        error = await command.done
        return name_of(error), command.granted.flags if command.granted else DevFlags(0)

    async def serve(self, how: How, *, give_up_s: float) -> TwinActor:
        actor = TwinActor(self._processes.start("server"))
        await self._attach(actor, how, give_up_s)
        return actor

    async def attach(self, actor: Actor, how: How) -> None:
        await self._attach(_own(actor), how, self.deadline_s)

    async def _attach(self, actor: TwinActor, how: How, give_up_s: float) -> None:
        give_up = asyncio.get_running_loop().time() + give_up_s
        while actor.done < STAGES.index(how):
            step = STAGES[actor.done + 1]
            try:
                await self._advance(actor.process, step)
            except OSError as error:
                opening = step == "opened" and error.errno == errno.EBUSY
                if opening and asyncio.get_running_loop().time() < give_up:
                    await asyncio.sleep(0.01)
                    continue
                what = {"opened": "open", "mapped": "mmap"}.get(step, "fetch")
                actor.got = f"{what} {name_of(error.errno or 0)}"
                return
            actor.done += 1

    async def _advance(self, process: Process, step: How) -> None:
        device = self._device
        queues = list(enumerate(device.queues))
        match step:
            case "opened":
                self.driver.open(DEV_ID, process)
            case "mapped":
                device.mmap(process)
            case "some tags":
                await device.fetch(process, 0, 0)
            case "one queue":
                await self._fetch_rest(process, 0)
            case "all":
                for number, _ in queues[1:]:
                    await self._fetch_rest(process, number)

    async def _fetch_rest(self, process: Process, number: int) -> None:
        queue = self._device.queues[number]
        for tag in range(queue.depth):
            if tag not in queue.fetched:
                await self._device.fetch(process, number, tag)

    async def hush(self, actor: Actor) -> None:
        _own(actor).process.silent = True

    async def fork(self, actor: Actor) -> TwinActor:
        child = TwinActor(self._processes.start("child"))
        for file in _own(actor).process.files:
            assert isinstance(file, CharFile)
            file.share(child.process)
        return child

    async def close(self, actor: Actor, what: Literal["rings", "device"]) -> None:
        process = _own(actor).process
        if what == "rings":
            self._device.close_rings(process)
        else:
            for file in list(process.files):
                file.closed_by(process, dying=False)

    async def kill(self, actor: Actor) -> None:
        _own(actor).process.end()

    def send(self, command: str, pid: int = 0) -> TwinSent:
        sent = self.driver.send(command, DEV_ID, pid=pid)

        async def answer() -> str:
            error = await sent.done
            features = command == "GET_FEATURES" and not error
            return hex(FEATURES[self.generation]) if features else name_of(error)

        return TwinSent(self._later(answer()), sent)

    def read(self) -> TwinSent:
        outcome = self._device.submit()

        async def answer() -> str:
            return name_of(await outcome)

        return TwinSent(self._later(answer()))

    def _later(self, answer: object) -> asyncio.Task[str]:
        assert asyncio.iscoroutine(answer)
        task: asyncio.Task[str] = asyncio.create_task(answer)
        self._answers.add(task)
        return task

    async def info(self) -> DevInfo:
        return self.driver.info(DEV_ID)


def _own(actor: Actor) -> TwinActor:
    assert isinstance(actor, TwinActor)
    return actor


def name_of(error: int) -> str:
    if error == errno.EOPNOTSUPP:
        return "EOPNOTSUPP"
    return errno.errorcode[error] if error else "0"


SCENES = [
    pytest.param(row, generation, id=f"{generation.name}: {row.name}")
    for row in (*ROWS, *OWN_BOOT)
    for generation in row.generations
]


@pytest.mark.parametrize(("row", "generation"), SCENES)
def test_the_twin_answers_as_the_driver_does(row: Row, generation: Generation) -> None:
    async def story() -> str:
        return await check(row, TwinStage(generation))

    assert virtual.run(story()) == ""
