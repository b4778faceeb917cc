"""One submission for all devices: on a real ring, with files and pipes in the driver's place."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from notes import Notes
from patience import until

from ublkwatch import uapi
from ublkwatch.async_ring import AsyncRing
from ublkwatch.ctrl import CtrlError, UblkCtrl, unpack_dev_info
from ublkwatch.glance import Glance
from ublkwatch.model import DevInfo
from ublkwatch.uapi import DevState

OP_READ = 22
INFO = uapi.ublksrv_ctrl_dev_info


def answer(dev_id: int, state: DevState = DevState.LIVE, pid: int = 100) -> bytes:
    return INFO.pack(dev_id=dev_id, state=state, ublksrv_pid=pid, nr_hw_queues=1, queue_depth=1)


class Reading(Glance):
    """Asks a file, which has an answer for each device; and who is in ``pipes``, a pipe."""

    def __init__(self, pipes: dict[int, int] | None = None) -> None:
        super().__init__()
        self.pipes = pipes or {}
        self.laid = 0

    def question(self, fd: int, dev_id: int, address: int) -> dict[str, int | bytes]:
        self.laid += 1
        read: dict[str, int | bytes] = {"opcode": OP_READ, "addr": address, "len": INFO.size}
        if dev_id in self.pipes:
            return read | {"fd": self.pipes[dev_id]}
        # cmd_op and __pad1 lie where the offset does: behind the largest one there is nothing.
        return read | {"fd": fd, "cmd_op": dev_id * INFO.size}


class Bench:
    """A control node that is a file, and a client of it."""

    def __init__(self, home: Path, ring: AsyncRing, glance: Glance) -> None:
        self.node, self.notes = home / "control", Notes()
        self.ctrl = UblkCtrl(ring, self.node, self.notes, glance)

    def say(self, *answers: bytes) -> None:
        self.node.write_bytes(b"".join(answers))


def on_bench(
    home: Path, work: Callable[[Bench], Awaitable[None]], glance: Glance | None = None
) -> None:
    async def main() -> None:
        ring = AsyncRing(4)
        bench = Bench(home, ring, glance or Reading())
        try:
            await work(bench)
        finally:
            bench.ctrl.close()
            ring.close()

    asyncio.run(main())


def test_all_are_answered_and_who_is_as_before_is_the_same_object(tmp_path: Path) -> None:
    glance = Reading()

    async def work(bench: Bench) -> None:
        ids, many = range(300), [answer(n) for n in range(300)]
        bench.say(*many)
        first = await bench.ctrl.get_dev_infos(ids)
        assert first == {n: unpack_dev_info(many[n]) for n in ids}
        for _ in range(5):  # round and round the queue, of 512 places
            assert await bench.ctrl.get_dev_infos(ids) is first
        assert glance.laid == 300, "what is asked is laid out once"

        many[7] = answer(7, DevState.QUIESCED)
        bench.say(*many)
        second = await bench.ctrl.get_dev_infos(ids)
        other = [n for n in ids if second[n] is not first[n]]
        assert other == [7]
        found = second[7]
        assert isinstance(found, DevInfo)
        assert found == replace(unpack_dev_info(answer(7)), state=DevState.QUIESCED)
        assert bench.notes.batches[-1] == ("GET_DEV_INFO", 300)

    on_bench(tmp_path, work, glance)


def test_devices_come_and_go(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.say(*(answer(n) for n in range(40)))
        for ids in ({3}, {3, 4, 39}, set(range(40)), {5}, set()):
            found = await bench.ctrl.get_dev_infos(ids)
            assert {n: info.dev_id for n, info in found.items() if isinstance(info, DevInfo)} == {
                n: n for n in ids
            }

    on_bench(tmp_path, work)


def test_who_fails_fails_alone_and_by_name(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # to read where one may only write is EBADF

    async def work(bench: Bench) -> None:
        bench.say(*(answer(n) for n in range(3)))
        for _ in range(2):
            found = await bench.ctrl.get_dev_infos({0, 1, 2})
            failed = found[1]
            assert isinstance(failed, CtrlError)
            assert failed.errno == errno.EBADF
            assert str(failed).startswith("GET_DEV_INFO ublk 1: EBADF")
            assert isinstance(found[0], DevInfo)
            assert isinstance(found[2], DevInfo)

    on_bench(tmp_path, work, Reading({1: writing}))
    os.close(writing)


def test_without_the_node_nobody_can_be_asked(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        with pytest.raises(OSError, match="modprobe ublk_drv"):
            await bench.ctrl.get_dev_infos({0})

    on_bench(tmp_path, work)


def test_a_late_answer_is_waited_for_and_holds_up_nothing_meanwhile(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    async def work(bench: Bench) -> None:
        bench.say(answer(0), answer(1))
        asked = asyncio.create_task(bench.ctrl.get_dev_infos({0, 1}))
        for _ in range(20):  # the loop has its turns
            await asyncio.sleep(0)
        assert not asked.done()
        os.write(writing, answer(1, pid=7))
        found = await asked
        assert found == {0: unpack_dev_info(answer(0)), 1: unpack_dev_info(answer(1, pid=7))}
        assert bench.ctrl.wedged == 0

    on_bench(tmp_path, work, Reading({1: reading}))
    os.close(reading)
    os.close(writing)


def test_who_does_not_answer_is_left_out_and_counted_until_he_does(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    glance = Reading({1: reading})

    async def work(bench: Bench) -> None:
        bench.say(answer(0), answer(1))
        found = await bench.ctrl.get_dev_infos({0, 1})
        assert found == {0: unpack_dev_info(answer(0))}
        assert bench.ctrl.wedged == 1
        glance.pipes.clear()
        assert set(await bench.ctrl.get_dev_infos({0, 1})) == {0, 1}, "on another ring"
        assert bench.ctrl.wedged == 1
        os.write(writing, answer(1))

        for _ in range(1000):
            await bench.ctrl.get_dev_infos({0, 1})
            if bench.ctrl.wedged == 0:
                return
        pytest.fail("the answer was not taken")

    on_bench(tmp_path, work, glance)
    os.close(reading)
    os.close(writing)


def test_rings_that_are_stuck_are_bounded(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    async def work(bench: Bench) -> None:
        bench.say(answer(0))
        glance = Reading({1: reading})
        asked = []
        for _ in range(20):
            asked.append(not glance.begin(0, (1,)).done())
            _, failed = glance.end()
            assert failed == {0: 0}
        assert asked == [True] * 8 + [False] * 12, "nobody is asked any more"
        assert glance.wedged == 8
        os.write(writing, answer(1) * 8)
        with bench.node.open() as file:

            def freed() -> bool:
                glance.begin(file.fileno(), (0,))
                glance.end()
                return glance.wedged == 0

            await until(freed, "all are back")
        glance.close()

    on_bench(tmp_path, work)
    os.close(reading)
    os.close(writing)
