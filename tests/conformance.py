"""What the ublk driver answers, as one table: the Stage, the steps of a row, and check().

The rows are in conformance_rows.py. They run against whatever implements Stage: the model of the
driver that other tests stand on, and the real driver in the lab's guest (tests/kernel). So the
model cannot drift from the drivers, nor docs/kernel.md from either.

A row is a scene on one device: steps that do something, and steps that expect an answer. Where the
generations differ the expected answer is ``By(g2, g3)``, and steps that make sense on one only are
``Only(generation, ...)``: the dialects stand side by side.
"""

from __future__ import annotations

import asyncio
from typing import Literal, NoReturn, Protocol, TypeVar

from conformance_steps import (
    JUDGED,
    Add,
    Attach,
    By,
    Cancel,
    Close,
    Fork,
    How,
    Hush,
    Kill,
    Later,
    Only,
    Read,
    Row,
    Says,
    Serve,
    Shows,
    Step,
    Tell,
)

from ublkwatch.model import DevInfo, Generation
from ublkwatch.uapi import DevFlags, DevState

WAITS = "waits"
POLL_S = 0.01

T = TypeVar("T")

# --- what a row runs on --------------------------------------------------------------------------


class Actor(Protocol):
    """A process: a server, a stranger who has the character device open, a forked child."""

    @property
    def pid(self) -> int: ...

    @property
    def got(self) -> str:
        """Return "0", or where the kernel refused it: "open EBUSY", "mmap EINVAL"."""
        ...


class Sent(Protocol):
    """A command, or a read, that is with the kernel."""

    @property
    def answer(self) -> asyncio.Future[str]:
        """Return what becomes "0" or an errno's name; for GET_FEATURES the word, as hex()."""
        ...

    def cancel(self) -> None:
        """Ask the kernel to interrupt it (ASYNC_CANCEL); the answer then says EINTR."""
        ...


class Stage(Protocol):
    """One device, not added yet, of one driver. Whoever makes a stage also clears it away."""

    @property
    def generation(self) -> Generation: ...

    @property
    def patience_s(self) -> float:
        """Return how long no answer means that there will be none."""
        ...

    @property
    def deadline_s(self) -> float:
        """Return when something that must come has not come."""
        ...

    async def add(self, *, queues: int, depth: int, flags: DevFlags) -> tuple[str, DevFlags]:
        """ADD_DEV; return the answer and the flags granted. After "0" SET_PARAMS makes a disk.

        With UNPRIVILEGED_DEV it comes from a user without CAP_SYS_ADMIN: root's are not.
        """
        ...

    async def serve(self, how: How, *, give_up_s: float) -> Actor:
        """Start a process that attaches that far; return once it did, or the kernel refused.

        open() is retried on EBUSY until ``give_up_s``, since the kernel lets go of a former server
        a while after its end. The server answers every request at once.
        """
        ...

    async def attach(self, actor: Actor, how: How) -> None:
        """Let a server go on to attach further; its ``got`` says how that went."""
        ...

    async def hush(self, actor: Actor) -> None:
        """Let a server keep every request from now on, unanswered."""
        ...

    async def fork(self, actor: Actor) -> Actor:
        """Let it fork a child, which has the character device (not the rings) and does nothing."""
        ...

    async def close(self, actor: Actor, what: Literal["rings", "device"]) -> None:
        """Let it close its rings, or all that it has of the device, and live on."""
        ...

    async def kill(self, actor: Actor) -> None:
        """SIGKILL; return when it is reaped. The kernel may still be letting go of its files."""
        ...

    def send(self, command: str, pid: int = 0) -> Sent:
        """Send a control command for the device: a name of uapi.Cmd; ``pid`` is its data[0]."""
        ...

    def read(self) -> Sent:
        """Read a block of the disk, from a process of its own."""
        ...

    async def info(self) -> DevInfo:
        """GET_DEV_INFO; it never waits. OSError with the errno when there is no device."""
        ...


# --- running a row -------------------------------------------------------------------------------


class DifferenceError(AssertionError):
    """The driver answered something else than the table says."""


async def check(row: Row, stage: Stage) -> str:
    """Run a row; DifferenceError breaks a law. Return what differs in a row that is none."""
    try:
        await _Scene(row, stage).play(row.steps)
    except DifferenceError as difference:
        if row.law:
            raise
        return str(difference)
    return ""


class _Scene:
    def __init__(self, row: Row, stage: Stage) -> None:
        self._row = row
        self._stage = stage
        self._actors: dict[str, Actor] = {}
        self._sent: dict[str, Sent] = {}

    async def play(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            if isinstance(step, Only):
                if step.generation is self._stage.generation:
                    await self.play(step.steps)
            else:
                await self._one(step)

    async def _one(self, step: Step) -> None:
        stage, actors = self._stage, self._actors
        match step:
            case Add():
                answer, granted = await stage.add(
                    queues=step.queues, depth=step.depth, flags=step.flags
                )
                self._compare(step, step.says, answer)
                wanted = self._dialect(step.flags if step.granted is None else step.granted)
                if answer == "0" and granted & JUDGED != wanted & JUDGED:
                    self._differs(step, repr(wanted & JUDGED), repr(granted & JUDGED))
            case Serve():
                refused = self._dialect(step.says) != "0"
                give_up_s = stage.patience_s if refused else stage.deadline_s
                actors[step.name] = await stage.serve(step.how, give_up_s=give_up_s)
                self._compare(step, step.says, actors[step.name].got)
            case Attach():
                await stage.attach(actors[step.name], step.how)
                self._compare(step, step.says, actors[step.name].got)
            case Tell():
                await self._tell(step)
            case Read():
                self._sent[step.label] = stage.read()
                self._compare(step, step.says, await self._answer(step.label, step.says))
            case Later():
                self._compare(step, step.says, await self._answer(step.label, step.says))
            case Shows():
                await self._shows(step)
            case _:
                await self._act(step)

    async def _act(self, step: Step) -> None:
        """Do what no answer comes from."""
        stage, actors = self._stage, self._actors
        match step:
            case Hush():
                await stage.hush(actors[step.name])
            case Fork():
                actors[step.child] = await stage.fork(actors[step.name])
            case Close():
                await stage.close(actors[step.name], step.what)
            case Kill():
                await stage.kill(actors[step.name])
            case Cancel():
                self._sent[step.label].cancel()

    def _dialect(self, either: T | By[T]) -> T:
        if isinstance(either, By):
            return either.g2 if self._stage.generation is Generation.G2 else either.g3
        return either

    def _differs(self, step: Step, wanted: str, got: str) -> NoReturn:
        raise DifferenceError(
            f"{self._row.name} ({self._row.source}): {step}: not {wanted} but {got}"
        )

    def _compare(self, step: Step, says: Says, got: str) -> None:
        if got not in (wanted := self._dialect(says)).split("|"):
            self._differs(step, wanted, got)

    def _pid(self, name: str) -> int:
        if name in ("", "-1", "init"):
            return {"": 0, "-1": -1, "init": 1}[name]
        return self._actors[name].pid

    async def _answer(self, label: str, says: Says) -> str:
        """Return the answer; only who expects one waits longer than patience for it."""
        patient = self._dialect(says) == WAITS
        answer = self._sent[label].answer
        limit = self._stage.patience_s if patient else self._stage.deadline_s
        await asyncio.wait({answer}, timeout=limit)
        return answer.result() if answer.done() else WAITS

    async def _tell(self, step: Tell) -> None:
        clock = asyncio.get_running_loop().time
        label = step.label or step.command
        give_up = clock() + self._stage.deadline_s
        while True:
            self._sent[label] = self._stage.send(step.command, self._pid(step.pid))
            answer = await self._answer(label, step.says)
            letting_go = step.command == "START_USER_RECOVERY" and answer == "EBUSY"
            if (
                not letting_go
                or "EBUSY" in self._dialect(step.says).split("|")
                or clock() > give_up
            ):
                break
            await asyncio.sleep(POLL_S)
        self._compare(step, step.says, answer)

    async def _shows(self, step: Shows) -> None:
        clock = asyncio.get_running_loop().time
        give_up, stay = clock() + self._stage.deadline_s, None
        while True:
            info = await self._stage.info()
            state = info.state.name if isinstance(info.state, DevState) else str(info.state)
            good = state == self._dialect(step.state)
            if step.pid is not None:
                good &= info.ublksrv_pid == self._pid(self._dialect(step.pid))
            if good and stay is None:
                stay = clock() + (self._stage.patience_s if step.stays else 0)
            if (good and stay is not None and clock() >= stay) or (
                not good and (stay is not None or clock() > give_up)
            ):
                break
            await asyncio.sleep(POLL_S)
        if not good:
            who = {actor.pid: name for name, actor in self._actors.items()}
            pid = who.get(info.ublksrv_pid, str(info.ublksrv_pid))
            self._differs(step, f"{self._dialect(step.state)}", f"{state}, pid of {pid}")
