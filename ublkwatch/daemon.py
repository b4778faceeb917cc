"""`ublkwatch run`: composes the monitor with its edges, and starts and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

from ublkwatch import __version__, admin, chronicle, discover, fork, log, server, status, threads
from ublkwatch.async_ring import AsyncRing
from ublkwatch.care import Care, Origin
from ublkwatch.config import Config
from ublkwatch.ctrl import CtrlError, UblkCtrl
from ublkwatch.ctrl_worker import Workers
from ublkwatch.desk import Desk
from ublkwatch.events import Transition
from ublkwatch.kept import Kept
from ublkwatch.lanes import Lanes
from ublkwatch.launch import Launcher, start_worker
from ublkwatch.library import Library, declared_threads, known_servers
from ublkwatch.metrics import Metrics, Page
from ublkwatch.model import UNKNOWN, DevInfo, Generation, Record, ServerId
from ublkwatch.monitor import Monitor
from ublkwatch.news import News
from ublkwatch.perform import Edges, Threads
from ublkwatch.rules import Unmanaged
from ublkwatch.settings import ConfigError
from ublkwatch.store import Store
from ublkwatch.trust import check_executable
from ublkwatch.uapi import DevFlags

_log = logging.getLogger("ublkwatch")

_RING_ENTRIES = 256
_STATUS_INTERVAL_S = 0.2
_TICKS = os.sysconf("SC_CLK_TCK")
_UEVENTS_RETRY_S = 10.0


class UnavailableError(Exception):
    """Something that the daemon cannot do without is missing; says what, and the way out."""

    def __init__(self, message: str, *, permission: bool = False) -> None:
        """``permission``: it is there, but not for us."""
        super().__init__(message)
        self.permission = permission


class Daemon:
    """One run of the supervisor."""

    def __init__(
        self,
        settings: Config,
        store: Store,
        load: Callable[[], Config],
        wrap: Callable[[Edges], Edges] = lambda edges: edges,
    ) -> None:
        """``load`` reads the configuration anew.

        ``wrap`` may put something between the monitor and its edges, as tests do.
        """
        self._wrap = wrap
        self._load = load
        self._settings = settings
        self._store = store
        self._dirty = asyncio.Event()
        self._news = News(settings.runtime_dir, store)

    async def run(self, stop: asyncio.Event, *, verbose: bool) -> None:
        """Watch until ``stop``; UnavailableError where that is impossible here."""
        ring = _open_ring()
        try:
            ctrl = UblkCtrl(ring)
            features = await _ask_features(ctrl)
            lines = log.Log(logging.DEBUG if verbose else logging.INFO)
            try:
                await self._watch(ctrl, features, stop)
            finally:
                lines.close()
        finally:
            ring.close()

    async def _watch(self, ctrl: UblkCtrl, features: DevFlags | None, stop: asyncio.Event) -> None:
        boot_id = server.read_boot_id()
        workers = Workers(start_worker)
        servers = server.Servers(boot_id, self._server_exited, self._look)
        launcher = Launcher(self._settings.runtime_dir, self._ready, kind=self._settings.launcher)
        self._generation = Generation.of(features)
        settings = self._settings
        self._library = Library(
            settings, self._store, known_servers, check_executable, self._generation
        )
        edges = Edges(
            ctrl=ctrl,
            workers=workers,
            servers=servers,
            launcher=launcher,
            store=self._store,
            threads=Threads(threads.alive, threads.look, declared_threads, servers.watch_threads),
            dev_ids=discover.dev_ids,
            traffic=discover.traffic,
            instance=partial(discover.instance, boot_id=boot_id),
            holds=server.holds,
            publish=self._publish,
            clock=time.monotonic,
            wall=time.time,
            chance=random.random,
            origin=server.origin,
            care=self._find_care,
            kept=Kept(settings.runtime_dir),
            lanes=Lanes(settings.starts_at_once),
        )
        self._monitor = Monitor(
            self._wrap(edges),
            replace(settings.policy, generation=self._generation),
            self._store.load_records(),
            self._store.load_specs(),
        )
        self._metrics = Metrics(self._monitor.records, lambda: workers.retired)
        page = Page(self._metrics)
        desk = Desk(self._monitor, self._library, self.reload, self._remember)
        door = admin.Admin(self._settings.runtime_dir, desk.take)
        try:
            await _prepare(workers)
            await launcher.prepare()
            port = await self._serve_metrics(page)
            await self._serve_orders(door)
            rules = self._generation.name
            where = f", metrics on port {port}" if port else ""
            _log.info("watching; driver features 0x%x, rules %s%s", features or 0, rules, where)
            self._news.tell("started", f"ublkwatch {__version__} watches, pid {os.getpid()}")
            await self._run_tasks(stop)
        finally:
            door.close()
            page.close()
            servers.close()
            launcher.close()
            workers.close()

    async def _run_tasks(self, stop: asyncio.Event) -> None:
        works: list[Coroutine[Any, Any, Any]] = [
            self._monitor.run(self._settings.poll_interval_s),
            self._write_status_for_ever(),
            self._news.write_for_ever(),
            self._follow_uevents_for_ever(),
        ]
        tasks = [asyncio.create_task(work) for work in works]
        stopping = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
        for task in [*tasks, stopping]:
            task.cancel()
        await asyncio.gather(*tasks, stopping, return_exceptions=True)
        for task in done - {stopping}:
            task.result()  # none of them ends but by a bug: let it be seen
        self._news.tell("stopped", "ublkwatch was told to stop; the servers live on")
        await self._news.finish()
        _log.info("stopped; the servers live on")

    def reload(self) -> str:
        """Read the configuration anew; return why it was not taken: then the old one goes on."""
        try:
            settings = self._load()
        except ConfigError as error:
            _log.error("configuration not reloaded, the old one goes on: %s", error)
            return str(error)
        late = self._library.reload(settings)
        self._monitor.reconsider()
        hint = f"; takes effect when ublkwatch is restarted: {', '.join(late)}" if late else ""
        _log.info("configuration reloaded%s", hint)
        return ""

    async def _find_care(self, info: DevInfo, origin: Origin | None) -> Care | Unmanaged:
        # In a thread: profiles look at files, whose file system may be slow.
        return await asyncio.to_thread(self._library.find, info, origin)

    # --- news from the edges ---------------------------------------------------------------------

    def _server_exited(self, process: ServerId, status: int | None) -> None:
        self._monitor.server_exited(process, UNKNOWN if status is None else fork.how(status)[0])

    def _look(self) -> None:
        self._monitor.look()

    def _ready(self, tag: str) -> None:
        self._monitor.ready(tag)

    def _publish(self, transition: Transition) -> None:
        """Tell the subscribers; none of them can delay an effect, so what is too much is lost."""
        level, text = log.line(transition)
        _log.log(level, text)
        self._metrics.publish(transition)
        self._dirty.set()
        self._news.take(chronicle.event(transition, logging.getLevelName(level).lower(), text))
        if (outage := chronicle.outage_over(transition)) is not None:
            self._news.take(outage)

    def _remember(self, entry: dict[str, Any]) -> None:
        """Keep an order; what it changed is worth a status document, too."""
        self._dirty.set()
        self._news.take(entry)

    def _server_name(self, record: Record) -> str:
        care, origin = self._monitor.care(record.dev_id), self._monitor.origin(record)
        return (care.name if care else "") or (origin.name if origin else "")

    # --- subscribers with a pace of their own ----------------------------------------------------

    async def _write_status_for_ever(self) -> None:
        """Write the document when something changed, and at least as often as we poll."""
        while True:
            document = status.document(
                self._monitor.records(),
                self._monitor.policy,
                wall=time.time(),
                now=time.monotonic(),
                pid=os.getpid(),
                generation=self._generation,
                interval_s=max(_STATUS_INTERVAL_S, self._settings.poll_interval_s),
                name=self._server_name,
                started_at=_started_at,
            )
            try:
                await asyncio.to_thread(self._store.write_status, json.dumps(document))
            except OSError as error:
                _log.warning("status not written: %s", error)
            await asyncio.sleep(_STATUS_INTERVAL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.poll_interval_s):
                    await self._dirty.wait()
            self._dirty.clear()

    async def _follow_uevents_for_ever(self) -> None:
        """Uevents are hints: without them devices are found by the poll."""
        while True:
            try:
                await discover.follow_uevents(self._monitor.look)
            except (OSError, ImportError) as error:
                _log.warning("no uevents (%s); new devices are found by polling", error)
            await asyncio.sleep(_UEVENTS_RETRY_S)

    async def _serve_metrics(self, page: Page) -> int | None:
        if not self._settings.metrics["enabled"]:
            return None
        address, port = self._settings.metrics["address"], self._settings.metrics["port"]
        try:
            return await page.start(address, port)
        except OSError as error:
            raise UnavailableError(
                f"metrics: cannot listen on {address} port {port}: {error.strerror}; change "
                "metrics.port, or set metrics.enabled = false"
            ) from error

    async def _serve_orders(self, door: admin.Admin) -> None:
        try:
            await door.start()
        except OSError as error:
            path = self._settings.runtime_dir / admin.NAME
            raise UnavailableError(f"{path}: {error}; choose another runtime_dir") from error


def _started_at(process: ServerId) -> float:
    """Return the wall time at which a process of this boot was started."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + process.start_ticks / _TICKS


def _open_ring() -> AsyncRing:
    try:
        return AsyncRing(_RING_ENTRIES)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise UnavailableError(
                "io_uring is forbidden here; try: sysctl kernel.io_uring_disabled=0, and in a "
                "container a seccomp profile that allows io_uring_setup"
            ) from error
        if error.errno == errno.ENOSYS:
            raise UnavailableError(
                "there is no io_uring here: the kernel lacks it, or the container's seccomp "
                "profile hides it"
            ) from error
        raise UnavailableError(f"io_uring: {error.strerror}") from error


async def _prepare(workers: Workers) -> None:
    try:
        await workers.prepare()
    except OSError as error:
        raise UnavailableError(f"{error.strerror}; its own words are above, if any") from error


async def _ask_features(ctrl: UblkCtrl) -> DevFlags | None:
    try:
        return await ctrl.get_features()
    except CtrlError as error:
        if error.errno == errno.EPERM:
            raise UnavailableError(str(error), permission=True) from error
        return None  # Linux before 6.5
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM)
        raise UnavailableError(str(error.strerror), permission=denied) from error
