"""An event loop on virtual time: when nothing is ready, the clock jumps to the next timer.

A story of hours is told in milliseconds, and the same story twice is the same story. There is no
I/O here, and no thread: work for an executor is done at once, in the loop's own.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

MAX_VIRTUAL_S = 100_000.0
MAX_TURNS = 2_000_000
_TURN_S = 1e-9  # even a turn takes time: else whoever is early by a rounding error is so for ever
_GRACE_TURNS = 10_000  # in which what is left can end, once the story itself was stopped


class RunAwayError(AssertionError):
    """A story that does not end: it waits for nothing that will come, or never rests."""


class _Selector:
    """What the loop asks when nothing is ready: nothing can happen but that time passes."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        self._loop.pass_time(timeout)
        return []


class Loop(asyncio.BaseEventLoop):
    """The loop; ``jump`` is a stall: time passes, and nothing of ours runs meanwhile."""

    def __init__(self, max_virtual_s: float = MAX_VIRTUAL_S, max_turns: int = MAX_TURNS) -> None:
        super().__init__()
        self._selector = _Selector(self)
        self._now = 0.0
        self._max_virtual_s = max_virtual_s
        self._turns_left = max_turns
        self._tasks_made: list[asyncio.Task[Any]] = []
        self.set_task_factory(self._make_task)
        self.complaints: list[str] = []
        self.set_exception_handler(self._complain)

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds

    def pass_time(self, timeout: float | None) -> None:
        self._turns_left -= 1
        if self._turns_left < 0:
            self._turns_left = _GRACE_TURNS
            raise RunAwayError(f"still busy after all its turns, at {self._now:.3f} s")
        if timeout is None:
            raise RunAwayError(f"nothing is ready and nothing is due, at {self._now:.3f} s")
        self._now += timeout + _TURN_S
        if self._now > self._max_virtual_s:
            self._max_virtual_s = float("inf")
            raise RunAwayError(f"still not over at {self._now:.0f} s")

    def run_in_executor(  # type: ignore[override]
        self, _executor: object, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - the waiter's, as with a real executor
            done.set_exception(error)
        return done

    def leaks(self) -> list[str]:
        """Return the errors that ended a task and that nobody ever took."""
        lost = [
            f"{task.get_name()}: {task.exception()!r}"
            for task in self._tasks_made
            if task.done() and getattr(task, "_log_traceback", False)
        ]
        return lost + self.complaints

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        work: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, context=context)
        self._tasks_made.append(task)
        return task

    def _complain(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.complaints.append(f"{context.get('message')}: {context.get('exception')!r}")

    def _process_events(self, _events: list[Any]) -> None: ...

    def _write_to_self(self) -> None: ...


def run(coro: Coroutine[Any, Any, T], loop: Loop | None = None) -> T:
    """Run it to its end, on a loop of its own; an error that a task lost is an error of the run."""
    loop = loop or Loop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        result = runner.run(coro)
        assert not (leaks := loop.leaks()), f"errors that nobody took: {leaks}"
    return result
