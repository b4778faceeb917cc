"""`ublkwatch run`: composes the monitor with its edges, and starts and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

from ublkwatch import (
    __version__,
    admin,
    chronicle,
    discover,
    fork,
    log,
    memory,
    page,
    server,
    status,
    threads,
    wire,
)
from ublkwatch.apart import Apart
from ublkwatch.armour import Armour
from ublkwatch.bulletin import CONFIRM_S, Bulletin
from ublkwatch.care import Care, Origin
from ublkwatch.config import Config
from ublkwatch.ctrl import UblkCtrl
from ublkwatch.ctrl_worker import Workers
from ublkwatch.desk import Desk
from ublkwatch.diskstats import Idle
from ublkwatch.driver import UnavailableError, ask_features, open_ring
from ublkwatch.events import Transition
from ublkwatch.health import Health
from ublkwatch.host import check_programs, systemd_root
from ublkwatch.identity import Judge, UserError
from ublkwatch.kept import Kept
from ublkwatch.lanes import Lanes
from ublkwatch.launch import Launcher, start_worker
from ublkwatch.library import Library, declared_threads, known_servers
from ublkwatch.metrics import Metrics, Sources
from ublkwatch.model import UNKNOWN, DevInfo, Generation, Policy, Record, ServerId
from ublkwatch.monitor import Monitor
from ublkwatch.news import News
from ublkwatch.notify import Manager
from ublkwatch.perform import Edges, Threads
from ublkwatch.probes import Probes
from ublkwatch.rules import Unmanaged
from ublkwatch.siting import Siting
from ublkwatch.standby import Terms
from ublkwatch.stopping import Stopper
from ublkwatch.store import Store
from ublkwatch.uapi import DevFlags
from ublkwatch.usage import usage

_log = logging.getLogger("ublkwatch")

_TICKS = os.sysconf("SC_CLK_TCK")
_UEVENTS_RETRY_S = 10.0
_DRAIN_S = 10.0


class Daemon:
    """One run of the supervisor."""

    def __init__(
        self,
        settings: Config,
        store: Store,
        load: Callable[[], Config],
        wrap: Callable[[Edges], Edges] = lambda edges: edges,
        manager: Manager | None = None,
    ) -> None:
        """``load`` reads the configuration anew; ``manager`` has started us, and wants to know.

        ``wrap`` may put something between the monitor and its edges, as tests do.
        """
        self._wrap = wrap
        self._manager = manager or Manager({})
        self._load = load
        self._settings = settings
        self._store = store
        self._bulletin = Bulletin(
            self._compose,
            lambda: self._monitor.changes + self._monitor.standbys.begun,
            store,
            self._status_told,
            lambda: time.time() - time.monotonic(),
        )
        self._metrics = Metrics(clock=time.monotonic, wall=time.time)
        self._news = News(settings.runtime_dir, store, self._metrics)
        self._armour = Armour()
        self._judge = Judge()
        self._siting = Siting()
        self._reloads: set[asyncio.Task[None]] = set()
        self._health = Health(lambda: self._monitor.polls, settings.poll_interval_s, time.monotonic)

    async def run(self, stop: asyncio.Event, *, verbose: bool) -> None:
        """Watch until ``stop``; UnavailableError where that is impossible here."""
        self._armour.put_on()  # first: every thread and every child has it by birth
        asyncio.get_running_loop().set_default_executor(Apart())
        ring = open_ring()
        try:
            ctrl = UblkCtrl(ring, meter=self._metrics)
            features = await ask_features(ctrl)
            lines = log.Log(
                logging.DEBUG if verbose else logging.INFO, partial(self._metrics.dropped, "log")
            )
            try:
                await self._watch(ctrl, features, stop)
            finally:
                lines.close()
                ctrl.close()
        finally:
            ring.close()

    async def _watch(self, ctrl: UblkCtrl, features: DevFlags | None, stop: asyncio.Event) -> None:
        boot_id = server.read_boot_id()
        start = partial(start_worker, lock_memory=self._settings.lock_memory)
        servers = server.Servers(boot_id, self._server_exited, self._look, self._manager)
        host = systemd_root(self._settings.launcher)
        launcher = Launcher(
            self._settings.runtime_dir,
            self._ready,
            kind=self._settings.launcher,
            judge=self._judge,
            usual_oom_score_adj=self._armour.usual_oom_score_adj,
            host=host,
        )
        workers = Workers(start, self._metrics, launcher.set_apart)
        self._generation = Generation.of(features)
        settings = self._settings
        check = partial(check_programs, root=host)
        self._library = Library(settings, self._store, known_servers, check, self._generation)
        edges = Edges(
            ctrl=ctrl,
            workers=workers,
            servers=servers,
            launcher=launcher,
            store=self._store,
            threads=Threads(
                threads.alive,
                threads.look,
                declared_threads,
                servers.watch_threads,
                servers.watches,
            ),
            present=discover.present,
            traffic=discover.traffic,
            idle=Idle(),
            instance=partial(discover.instance, boot_id=boot_id),
            files=server.files,
            publish=self._publish,
            clock=time.monotonic,
            wall=time.time,
            chance=random.random,
            origin=server.origin,
            care=self._find_care,
            kept=Kept(settings.runtime_dir),
            lanes=Lanes(settings.starts_at_once),
            standbys=Terms(
                most=lambda: self._library.settings.standby_max,
                least_free=lambda: self._library.settings.standby_free_percent,
                free=memory.free_percent,
                program=launcher.program,
                former=self._store.load_standbys(),
                keep=self._store.save_standby,
                drop=self._store.drop_standby,
                tell=self._tell_standby,
            ),
            meter=self._metrics,
            beat=self._beat,
        )
        self._monitor = Monitor(
            self._wrap(edges),
            replace(settings.policy, generation=self._generation),
            self._store.load_records(),
            self._store.load_specs(),
        )
        probes = Probes(self._metrics, self._health)
        self._metrics.sources = Sources(
            records=self._monitor.records,
            standbys=self._monitor.standbys.counts,
            policy=self._chosen,
            started_at=_started_at,
            generation=self._generation,
            features=features,
            workers_retired=lambda: workers.retired,
            commands_wedged=lambda: workers.wedged + ctrl.wedged,
            scrapes_refused=probes.refused,
            lag_s=self._health.lag_s,
        )
        stopper = Stopper(ctrl, workers, features, usage)
        self._desk = Desk(
            self._monitor, self._library, self._load, stopper, self._remember, self._metrics
        )
        group = admin.group(settings.admin_group)
        self._store.show_records_to(group)
        door = admin.Admin(settings.runtime_dir, self._desk.take, group=group)
        try:
            await _prepare(workers)
            await launcher.prepare()
            await self._lock_memory()
            port = await probes.start(settings.metrics)
            await self._serve_orders(door)
            rules = self._generation.name
            where = f", metrics on port {port}" if port else ""
            _log.info("watching; driver features 0x%x, rules %s%s", features or 0, rules, where)
            self._news.tell("started", f"ublkwatch {__version__} watches, pid {os.getpid()}")
            await self._run_tasks(stop)
        finally:
            door.close()
            probes.close()
            servers.close()
            launcher.close()
            workers.close()

    async def _run_tasks(self, stop: asyncio.Event) -> None:
        works: list[Coroutine[Any, Any, Any]] = [
            self._monitor.run(self._settings.poll_interval_s),
            self._bulletin.publish_for_ever(),
            self._news.write_for_ever(),
            self._follow_uevents_for_ever(),
        ]
        tasks = [asyncio.create_task(work) for work in works]
        attention = self._manager.attend(self._come_up, self._health.progresses)
        told = asyncio.create_task(attention)
        stopping = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
        self._manager.stopping()
        for task in [*tasks, told, stopping]:
            task.cancel()
        await asyncio.gather(*tasks, told, stopping, return_exceptions=True)
        for task in done - {stopping}:
            task.result()  # none of them ends but by a bug: let it be seen
        self._news.tell("stopped", "ublkwatch was told to stop; the servers live on")
        try:
            async with asyncio.timeout(_DRAIN_S):
                await self._news.finish()
        except TimeoutError:
            _log.warning("the end of the history is not written: does its file system hang?")
        _log.info("stopped; the servers live on")

    async def _come_up(self) -> None:
        """Wait until every device was looked at, and `ublkwatch status` has it."""
        await self._health.seen_all.wait()
        await self._bulletin.shown()

    def reload(self) -> None:
        """Read the configuration anew, as SIGHUP asks for; who is starting still does it then."""
        task = asyncio.get_running_loop().create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        await self._manager.up.wait()  # until then it waits for our first READY
        self._manager.reloading()
        try:
            await self._desk.reload()
        finally:
            self._manager.ready()

    async def _find_care(self, info: DevInfo, origin: Origin | None) -> Care | Unmanaged:
        # In a thread: profiles and rules look at files, whose file system may hang.
        return await asyncio.to_thread(self._care_of, info, origin)

    def _care_of(self, info: DevInfo, origin: Origin | None) -> Care | Unmanaged:
        """Find a device's care; look now at what may not answer when its server is lost."""
        care = self._library.find(info, origin)
        if isinstance(care, Care):
            try:
                self._judge.meet(care.run.user)
            except UserError as error:
                _log.warning(
                    "ublk %d: its server cannot be started just now: %s", info.dev_id, error
                )
            self._siting.warn(info.dev_id, care)
        return care

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
        self._bulletin.dirty()
        self._news.take(chronicle.event(transition, logging.getLevelName(level).lower(), text))
        if (outage := chronicle.outage_over(transition)) is not None:
            self._news.take(outage)

    def _tell_standby(self, dev_id: int, text: str, bad: bool) -> None:  # noqa: FBT001 - Terms.tell
        level, line = logging.WARNING if bad else logging.INFO, f"ublk {dev_id}: {text}"
        _log.log(level, "%s", line)
        self._bulletin.dirty()
        self._news.tell("standby", line, logging.getLevelName(level).lower(), dev_id)

    def _remember(self, entry: dict[str, Any]) -> None:
        """Keep an order; what it changed is worth a status document, too."""
        self._bulletin.dirty()
        self._news.take(entry)

    def _chosen(self, dev_id: int) -> Policy | None:
        care = self._monitor.care(dev_id)
        return care.policy if care else None

    def _server_name(self, record: Record) -> str:
        care, origin = self._monitor.care(record.dev_id), self._monitor.origin(record)
        return (care.name if care else "") or (origin.name if origin else "")

    # --- subscribers with a pace of their own ----------------------------------------------------

    def _compose(self) -> tuple[dict[str, Any], bool]:
        """Return the status document of now, and whether time alone changes it."""
        records, policy, now = self._monitor.records(), self._monitor.policy, time.monotonic()
        document = status.document(
            records,
            policy,
            wall=time.time(),
            now=now,
            pid=os.getpid(),
            generation=self._generation,
            interval_s=CONFIRM_S,
            name=self._server_name,
            started_at=_started_at,
            standby=self._monitor.standbys.of,
        )
        reader = page.Reader(wall=document["written_at"], running=True)
        self._manager.says(page.summary(document["devices"], reader))
        return document, any(status.ages(each, policy(each.dev_id), now) for each in records)

    def _status_told(self, trouble: str) -> None:
        if trouble:
            self._metrics.dropped("status")
        self._health.wrote(trouble)

    def _beat(self, late_s: float) -> None:
        """Take it that a poll is over, which began so much too late."""
        self._health.beat(late_s)
        self._bulletin.look()

    async def _follow_uevents_for_ever(self) -> None:
        """Uevents are hints: without them devices are found by the poll."""
        while True:
            try:
                await discover.follow_uevents(self._monitor.look)
            except (OSError, ImportError) as error:
                _log.warning("no uevents (%s); new devices are found by polling", error)
            await asyncio.sleep(_UEVENTS_RETRY_S)

    async def _lock_memory(self) -> None:
        """Lock our memory, once the last that is imported is there."""
        with contextlib.suppress(ImportError):
            await asyncio.to_thread(discover.load_uevents)
        if self._settings.lock_memory:
            kept = await asyncio.to_thread(self._armour.lock)
            if kept:
                _log.info("memory locked, and %.0f MiB of files kept in it", kept / (1 << 20))
        for missing in self._armour.missing:
            _log.warning("%s", missing)

    async def _serve_orders(self, door: admin.Admin) -> None:
        try:
            await door.start()
        except OSError as error:
            path = self._settings.runtime_dir / wire.NAME
            raise UnavailableError(f"{path}: {error}; choose another runtime_dir") from error


def _started_at(process: ServerId) -> float:
    """Return the wall time at which a process of this boot was started."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return round(booted + process.start_ticks / _TICKS, 2)


async def _prepare(workers: Workers) -> None:
    try:
        await workers.prepare()
    except OSError as error:
        raise UnavailableError(f"{error.strerror}; its own words are above, if any") from error
