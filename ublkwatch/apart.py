"""Threads for work that may hang: one for each, and nobody waits for it, not even our end.

A pool has so many threads and no more. When a file system hangs, whoever looks at it takes one of
them for ever, and then a server is not started that had nothing to do with it.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Apart(ThreadPoolExecutor):
    """A default executor for asyncio, which takes none but a ThreadPoolExecutor."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call a function in a new thread; OSError where there is none to be had."""
        done: Future[T] = Future()

        def work() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - raised where it was asked for
                done.set_exception(error)
            else:
                done.set_result(result)

        try:
            threading.Thread(target=work, daemon=True).start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, str(error)) from error
        return done

    def shutdown(self, *_: Any, **__: Any) -> None:
        """Wait for nobody."""
