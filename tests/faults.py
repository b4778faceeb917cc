"""What the world does to a recovery: each fault, and the reasons for which it excuses giving up.

To add a fault: a coroutine over the world, and a line in FAULTS. It begins when the server of
device 0 is killed, or at the start of the story where it is ``early``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cast import close_all
from processes import Process
from twin import Command
from twin_device import Device

from ublkwatch.model import Order, Reason
from ublkwatch.uapi import DevState

if TYPE_CHECKING:
    from world import World

Act = Callable[["World"], Coroutine[Any, Any, None]]
HALF = frozenset({Reason.HALF_ATTACHED, Reason.LIVE_WITHOUT_SERVER})
_NOBODY = frozenset[Reason]()


@dataclass(frozen=True)
class Fault:
    act: Act
    reasons: frozenset[Reason] = _NOBODY  # for which the supervisor may give up
    on_g2: frozenset[Reason] = _NOBODY  # and these on G2
    observes: frozenset[Reason] = _NOBODY  # for which it may keep its hands off
    stops: bool = False  # the device may be gone
    early: bool = False


async def stranger(world: World) -> None:
    """Somebody opens the character device as soon as it is free, and holds it for a while."""
    await _hold(world, mmap=False)


async def mapping_stranger(world: World) -> None:
    """... and maps it: that pins its memory map on G2."""
    await _hold(world, mmap=True)


async def _hold(world: World, *, mmap: bool) -> None:
    process = world.processes.start("stranger")
    give_up = world.loop.time() + 5
    while (device := _try_open(world, process)) is None:
        if world.loop.time() > give_up:
            return
        await world.pause(0.001, 0.05)
    world.note("stranger", "opens /dev/ublkc0")
    if mmap:
        with contextlib.suppress(OSError):
            device.mmap(process)
    await world.pause(0.05, world.rng.choice([1, 5, 20, 100]))
    world.note("stranger", "closes /dev/ublkc0")
    close_all(process)


def _try_open(world: World, process: Process) -> Device | None:
    try:
        return world.driver.open(0, process)
    except OSError:
        return None


async def rival(world: World) -> None:
    """Somebody else recovers the device, by hand."""
    await world.pause(0, 0.3)
    end: Command | None = None
    try:
        await _until_down(world)
        if len({bool(queue.daemon) for queue in world.device.queues}) > 1:
            return  # half attached: a START would crash G2 (3.5, partialC), and prove nothing
        world.note("rival", "sends START")
        await world.driver.call("START_USER_RECOVERY", 0)
        process = world.rival_server()
        end = world.driver.send("END_USER_RECOVERY", 0, pid=process.pid)
        world.note("rival", "sends END")
        await asyncio.wait({end.done}, timeout=10)
        if not end.done.done() or end.done.result():
            world.note("rival", "gives up")
            end.cancel()
            process.end()
    except OSError as error:
        world.note("rival", f"gives up: {error}")


async def _until_down(world: World) -> None:
    for _ in range(200):
        if world.driver.info(0).state in (DevState.QUIESCED, DevState.FAIL_IO):
            return
        await asyncio.sleep(0.005)


async def stop(world: World) -> None:
    """An operator sends STOP_DEV some time into the recovery."""
    await world.pause(0, world.rng.choice([0.05, 0.5, 3]))
    await world.operator("STOP_DEV")


async def delete(world: World) -> None:
    await world.pause(0, world.rng.choice([0.05, 0.5, 3]))
    await world.operator("DEL_DEV")


async def stop_and_readd(world: World) -> None:
    """The device is deleted, and another one gets its id, with a server of its own."""
    await world.pause(0, world.rng.choice([0.05, 0.5, 3]))
    await world.operator("DEL_DEV")
    await world.pause(0, 3)
    if 0 not in world.driver.devices:
        await world.create()


async def wedge(world: World) -> None:
    """A command that somebody sent sits on the device's mutex."""
    await world.pause(0, world.rng.choice([0.1, 1]))
    device = world.device
    async with device.mutex:
        world.note("somebody", "holds the device's mutex")
        await world.pause(0.1, world.rng.choice([2, 20, 150]))
        world.note("somebody", "lets go of it")


def lose(command: str, what: str) -> Act:
    """The next such command never reaches the driver, or its answer never comes back."""

    async def act(world: World) -> None:
        world.losing[command] = what

    return act


async def blind(world: World) -> None:
    """GET_DEV_INFO fails for a while."""
    await world.pause(0, 0.5)
    world.info_error = world.rng.choice([errno.EIO, errno.ETIMEDOUT, errno.EPERM])
    await world.pause(0.05, 20)
    world.info_error = 0


async def strange_state(world: World) -> None:
    """The kernel reports a state that nobody knows, for a while."""
    await world.pause(0, 0.5)
    world.state_shown = 7
    await world.pause(0.05, 5)
    world.state_shown = None


async def torn_read(world: World) -> None:
    """GET_DEV_INFO takes no lock: one answer is half old and half new (6.2)."""
    await world.pause(0, 0.4)
    world.torn = 1


async def undying(world: World) -> None:
    """Servers sleep uninterruptibly for a while before they take their SIGKILL."""
    world.dies_in_s = world.rng.choice([0.1, 1, 10, 100])


async def disk_full(world: World) -> None:
    await world.pause(0, 0.5)
    world.disk_full = True
    world.note("the disk", "is full")
    await world.pause(0.5, 30)
    world.disk_full = False
    world.note("the disk", "has room again")


async def stall(world: World) -> None:
    """Nothing of ours runs for a while, and then everything is late."""
    await world.pause(0, 0.5)
    seconds = world.rng.choice([0.5, 3, 20, 200, 4000])
    world.note("the machine", f"stalls for {seconds} s")
    world.loop.jump(seconds)


async def death(world: World) -> None:
    """The supervisor is killed, and started again after a while."""
    await world.pause(0, world.rng.choice([0.02, 0.2, 2, 20]))
    world.kill_supervisor()


async def saturated(world: World) -> None:
    """The server answers nothing any more and has every tag in its hands, before it is killed."""
    server = world.serving()
    if server is not None:
        server.silent = True
    for _ in range(64):
        world.submit()


async def stop_a_silent_server(world: World) -> None:
    """STOP_DEV waits, with the mutex, for a server that answers nothing and is then killed."""
    await saturated(world)
    command = world.driver.send("STOP_DEV", 0)
    world.stopped = True
    await world.pause(0.5, 30)
    if server := world.serving():
        server.end()
    await asyncio.shield(command.done)


async def kill_silent_servers(world: World) -> None:
    """An operator kills what does not answer; what a forked child holds is freed at last."""
    await world.pause(20, 150)
    for process in world.processes.alive():
        if process.silent or process.name == "leaked":
            process.end()


async def hold(world: World) -> None:
    """An operator holds the device, and releases it after a while."""
    await world.pause(0, world.rng.choice([0.05, 0.5, 5]))
    until = world.loop.time() + 30 if world.rng.random() < 0.3 else None
    world.order(Order.HOLD, until)
    await world.pause(0.1, world.rng.choice([0.5, 5, 50]))
    world.order(Order.RELEASE)
    await asyncio.sleep(35)
    world.order(Order.RELEASE)  # in our next life too, should we have died between


async def forget(world: World) -> None:
    """An operator has the device forgotten, and takes that back."""
    await world.pause(0, world.rng.choice([0.05, 0.5, 5]))
    world.order(Order.FORGET)
    await world.pause(0.1, 5)
    for _ in range(200):  # refused while nothing was read, or an attempt is being ended
        world.order(Order.RECOVER)
        await asyncio.sleep(1)


async def impatience(world: World) -> None:
    """An operator asks for everything, again and again."""
    for _ in range(30):
        await world.pause(0, 0.5)
        world.order(world.rng.choice([Order.RECOVER, Order.RETRY]))


FAULTS: dict[str, Fault] = {
    "stranger": Fault(stranger, frozenset({Reason.CHAR_DEVICE_BUSY}), HALF),
    "mapping stranger": Fault(mapping_stranger, frozenset({Reason.CHAR_DEVICE_BUSY}), HALF),
    "rival": Fault(rival, frozenset({Reason.CHAR_DEVICE_BUSY}), HALF | {Reason.START_REFUSED}),
    "stop": Fault(stop, stops=True),
    "delete": Fault(delete, stops=True),
    "delete and add again": Fault(stop_and_readd, stops=True),
    "wedge": Fault(wedge, frozenset({Reason.NO_ANSWER}), HALF),
    "START lost": Fault(
        lose("START_USER_RECOVERY", "command"), frozenset({Reason.NO_ANSWER}), HALF
    ),
    "START's reply lost": Fault(
        lose("START_USER_RECOVERY", "reply"), frozenset({Reason.NO_ANSWER}), HALF
    ),
    "END lost": Fault(lose("END_USER_RECOVERY", "command"), frozenset({Reason.NO_ANSWER}), HALF),
    "END's reply lost": Fault(
        lose("END_USER_RECOVERY", "reply"), frozenset({Reason.NO_ANSWER}), HALF
    ),
    "params lost": Fault(lose("GET_PARAMS", "reply"), early=True),
    "blind": Fault(blind),
    "strange state": Fault(strange_state),
    "torn read": Fault(torn_read, early=True),
    "undying": Fault(undying, frozenset({Reason.NO_ANSWER}), early=True),
    "disk full": Fault(disk_full),
    "stall": Fault(stall),
    "death": Fault(death, frozenset(), HALF),
    "saturated": Fault(saturated),
    "hold": Fault(hold),
    "forget": Fault(forget, on_g2=HALF, observes=frozenset({Reason.FORGOTTEN})),
    "impatience": Fault(impatience),
    "stop a silent server": Fault(
        stop_a_silent_server, frozenset({Reason.NO_ANSWER}), stops=True
    ),
}  # fmt: skip

# Kinds of servers, bad enough that on G2 the device may be lost with them.
HALF_ATTACHING = (
    *("after-ready", "after-line", "after-open", "after-mmap", "after-some-tags"),
    *("after-one-queue", "after-all"),
)


def excuses(kind: str) -> frozenset[Reason]:
    """Return for what a server of that kind excuses giving up, on G2."""
    half = kind.partition("-")[2] in HALF_ATTACHING or kind in ("fork-away", "slow-attach")
    return HALF if half or kind in ("exit-after-live", "leak") else _NOBODY
