"""The status document on its way to its file: written when it says something new, else confirmed.

A file that nobody has confirmed for a while has no writer any more. To confirm one is to set its
modification time: the document of 500 devices is half a MiB, and at rest it says the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

CONFIRM_S = 5.0
_PAUSE_S = 0.2  # between two writes
_SHARE = 10  # and this often what it took to compose one: a mass crash changes something all along
_SHOWN_S = 10.0  # for which anybody waits until something is written
_STEP_S = 0.5  # by which the day's clock may go wrong until what is written of it is
_log = logging.getLogger("ublkwatch")


class Store(Protocol):
    """store.Store."""

    def write_status(self, document: str) -> None: ...
    def confirm_status(self) -> None: ...


class Bulletin:
    """Publishes the document, for ever."""

    def __init__(
        self,
        compose: Callable[[], tuple[dict[str, Any], bool]],
        changes: Callable[[], int],
        store: Store,
        told: Callable[[str], None],
        offset: Callable[[], float],
    ) -> None:
        """``compose`` returns the document of now, and whether time alone changes it.

        ``changes`` counts what it is made from; ``told`` takes why nothing could be written, "" for
        nothing; ``offset`` is what the day's clock is ahead of the monotonic one.
        """
        self._compose, self._changes, self._store = compose, changes, store
        self._told, self._offset = told, offset
        self._due = asyncio.Event()
        self._readers: list[asyncio.Event] = []  # set with the next document
        self._written: tuple[int, float] | None = None  # changes and offset, as of the document
        self._ages = True
        self._took_s = 0.0

    def dirty(self) -> None:
        """Take it that something is new."""
        self._due.set()

    def look(self) -> None:
        """Look whether something is; to be called with every poll."""
        changes, offset = self._written or (-1, 0.0)
        stepped = abs(offset - self._offset()) > _STEP_S
        if self._ages or stepped or changes != self._changes():
            self._due.set()

    async def shown(self) -> None:
        """Wait until what there is to say now was written, or could not be; in bounded time."""
        written = asyncio.Event()
        self._readers.append(written)
        self._due.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SHOWN_S):
                await written.wait()

    async def publish_for_ever(self) -> None:
        """Write it when something is new, and confirm it else."""
        while True:
            if self._due.is_set() or self._written is None:
                await self._write()
                await asyncio.sleep(min(CONFIRM_S, max(_PAUSE_S, _SHARE * self._took_s)))
            else:
                await self._confirm()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONFIRM_S):
                    await self._due.wait()

    async def _write(self) -> None:
        self._due.clear()
        readers, self._readers = self._readers, []
        written = (self._changes(), self._offset())
        began = time.monotonic()
        document, self._ages = self._compose()
        self._took_s = time.monotonic() - began
        try:
            await asyncio.to_thread(self._store.write_status, json.dumps(document))
        except OSError as error:
            _log.warning("status not written: %s", error)
            self._written = None
            self._told(error.strerror or str(error))
        else:
            self._written = written
            self._told("")
        for reader in readers:
            reader.set()

    async def _confirm(self) -> None:
        try:
            await asyncio.to_thread(self._store.confirm_status)
        except OSError:  # somebody has removed it, or there is no writing
            self._written = None
            self._due.set()
        else:
            self._told("")
