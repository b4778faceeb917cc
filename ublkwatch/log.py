"""One line per transition, on standard error, never delaying the one who logs."""

from __future__ import annotations

import logging
import logging.handlers
import queue
import traceback
from collections.abc import Callable
from typing import Any

from ublkwatch.events import Effect, Transition
from ublkwatch.model import Phase
from ublkwatch.status import complaint

_LINES_MAX = 10_000
_EXPLAINED = (
    *(Phase.OBSERVED, Phase.HELD, Phase.STOPPING, Phase.BACKOFF),
    *(Phase.DECIDING, Phase.FAILING, Phase.FAILED, Phase.GONE),
)


class Log:
    """Logging that a slow or stuck standard error does not stop: it drops, and counts."""

    def __init__(
        self, level: int = logging.INFO, dropped: Callable[[], None] = lambda: None
    ) -> None:
        """Take over the root logger until close(); ``dropped`` is told of each lost line."""
        self._queue: queue.Queue[logging.LogRecord] = queue.Queue(_LINES_MAX)
        self._handler = _Dropping(self._queue, dropped)
        self._handler.setFormatter(_Formatter("%(message)s"))
        writer = logging.StreamHandler()
        writer.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        self._listener = logging.handlers.QueueListener(self._queue, writer)
        self._listener.start()
        logging.basicConfig(level=level, handlers=[self._handler], force=True)

    @property
    def dropped(self) -> int:
        """How many lines were lost so far."""
        return self._handler.dropped

    def close(self) -> None:
        """Write what is left."""
        self._listener.stop()


class _Formatter(logging.Formatter):
    """Traces without the lines of the source, which would have to be read where we log."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        _, error, trace = ei
        lines = [
            f"  {frame.f_code.co_filename}, line {number}, in {frame.f_code.co_name}"
            for frame, number in traceback.walk_tb(trace)
        ]
        return "\n".join([*lines, *traceback.format_exception_only(error)]).rstrip()


class _Dropping(logging.handlers.QueueHandler):
    def __init__(self, lines: queue.Queue[logging.LogRecord], tell: Callable[[], None]) -> None:
        super().__init__(lines)
        self.dropped, self._tell = 0, tell

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1
            self._tell()


def line(transition: Transition) -> tuple[int, str]:
    """Return the level and the text of a transition."""
    before, after = transition.before, transition.after
    text = f"ublk {after.dev_id}: {before.phase.value} -> {after.phase.value} ({transition.event}"
    text += f" after {transition.now - before.since:.3f} s)"
    if after.phase is Phase.WATCHING and before.phase is Phase.PROBATION:
        text += f", recovered: I/O was held for {(after.last_held_s or 0) * 1000:.0f} ms"
        text += f", detected by {after.detected_by}, attempt {after.attempts}"
    elif after.reason is not None and after.phase in _EXPLAINED:
        text += f": {after.reason.value}" + (f" ({after.detail})" if after.detail else "")
    ails = complaint(after) if after.ill != before.ill else ""
    if ails:
        text += f": {ails}"
    elif before.ill and not after.ill and after.phase is before.phase:
        text += ": its server is well again"
    if transition.effects:
        text += f"; next: {', '.join(_words(effect) for effect in transition.effects)}"
    if after.phase is Phase.FAILED:
        return logging.ERROR, text
    return logging.WARNING if ails else logging.INFO, text


def _words(effect: Effect) -> str:
    return type(effect).__name__
