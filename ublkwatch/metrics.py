"""Prometheus metrics: what happens is counted as it happens, what is true is asked at a scrape.

`measures` declares them, `collect` makes those of the latter kind; both are homes of
prometheus_client, and nobody else is. The page is written by a thread, from a snapshot that the
loop has taken: for many devices that takes longer than a recovery may wait.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from ublkwatch import __version__
from ublkwatch.collect import Seen, Snapshot, Snapshots
from ublkwatch.downtime import Downtime, counts
from ublkwatch.events import Transition
from ublkwatch.measures import MEASURES, OUTAGE_PHASES, Kind, answer_of
from ublkwatch.meter import Meter
from ublkwatch.model import Generation, Phase, Policy, Record, ServerId
from ublkwatch.status import attempts_left
from ublkwatch.uapi import DevFlags

CONTENT_TYPE = CONTENT_TYPE_LATEST
_RESTS = (Phase.OBSERVED, Phase.WATCHING, Phase.FAILED)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Whom a scrape asks, on the loop."""

    records: Callable[[], Iterable[Record]] = tuple
    standbys: Callable[[], Mapping[str, int]] = dict  # by their state
    policy: Callable[[int], Policy | None] = lambda _: None  # None: in nobody's care
    started_at: Callable[[ServerId], float | None] = lambda _: None
    generation: Generation = Generation.UNKNOWN
    features: DevFlags | None = None  # None: the driver cannot say
    workers_retired: Callable[[], int] = int
    commands_wedged: Callable[[], int] = int
    scrapes_refused: Callable[[], int] = int
    lag_s: Callable[[], float] = float


class _Registry(CollectorRegistry):
    """Shows no `_created` series, by which a page would be half as long again.

    The library's own switch for that is in newer ones than Debian 12's, and is everybody's.
    """

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            if metric.type in ("counter", "histogram"):
                samples = metric.samples
                metric.samples = [one for one in samples if not one.name.endswith("_created")]
            yield metric


class Metrics(Meter):
    """Everything that a scrape shows."""

    def __init__(self, *, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        """Make the registry, with all series that are known by now at zero."""
        self.sources = Sources()
        self._clock, self._wall = clock, wall
        self.registry = _Registry()
        self._snapshots = Snapshots()
        self.registry.register(self._snapshots)
        self._counters = {name: self._counter(name) for name in _COUNTED}
        self._histograms = {name: self._histogram(name) for name in _MEASURED}
        self._downtime = Downtime()
        self._of_devices = [name for name in _COUNTED if MEASURES[name].of_devices]
        self._devices: set[int] = set()  # that have their counters
        self._writing: asyncio.Task[bytes] | None = None
        self._polled_at = 0.0
        self._reload_good, self._reloaded_at = True, wall()

    def _counter(self, name: str) -> Counter:
        measure = MEASURES[name]
        labels = [label.name for label in measure.labels]
        counter = Counter(measure.exposed, measure.meaning, labels, registry=self.registry)
        if labels and not measure.of_devices:
            for values in product(*(label.values for label in measure.labels)):
                counter.labels(*values)
        return counter

    def _histogram(self, name: str) -> Histogram:
        measure = MEASURES[name]
        labels = [label.name for label in measure.labels]
        histogram = Histogram(
            measure.exposed,
            measure.meaning,
            labels,
            buckets=measure.buckets,
            registry=self.registry,
        )
        for values in product(*(label.values for label in measure.labels)) if labels else ():
            histogram.labels(*values)
        return histogram

    # --- what happens ----------------------------------------------------------------------------

    def command(self, name: str, error: int, took_s: float) -> None:
        """Count a control command."""
        self._counters["control_commands"].labels(name, answer_of(error)).inc()
        self._histograms["control_command_duration_seconds"].labels(name).observe(took_s)

    def answered(self, name: str, count: int, took_s: float) -> None:
        """Count control commands that were sent together, and time them once."""
        if count:
            self._counters["control_commands"].labels(name, answer_of(0)).inc(count)
            self._histograms["control_command_duration_seconds"].labels(name).observe(took_s)

    def stepped(self, record: Record, now: float) -> None:
        """Go on with a device's downtime; one that we act on has its counters from now on."""
        self._downtime.note(record, now)
        new = record.dev_id not in self._devices
        if new and record.phase not in (Phase.OBSERVED, Phase.GONE):
            self._devices.add(record.dev_id)
            for name in self._of_devices:
                for values in _children(name, record.dev_id):
                    self._counters[name].labels(*values)

    def publish(self, transition: Transition) -> None:
        """Count a transition."""
        before, after = transition.before, transition.after
        device, count = f"ublkb{after.dev_id}", self._counters
        if after.marks and after.marks[:1] != before.marks[:1]:
            count["server_losses"].labels(device, after.detected_by).inc()
        if after.ill and after.ill.condemned and not (before.ill and before.ill.condemned):
            count["servers_ended"].labels(device, after.ill.kind.value).inc()
        elif after.failures and after.failures[-1] not in before.failures:
            count["recovery_attempt_failures"].labels(device).inc()
        if after.ill and (before.ill is None or before.ill.kind is not after.ill.kind):
            count["device_stalls"].labels(device).inc()
        if before.phase is not after.phase and before.phase.value in OUTAGE_PHASES:
            phases = self._histograms["recovery_phase_duration_seconds"]
            phases.labels(before.phase.value).observe(transition.now - before.since)
        if result := _result(before, after):
            count["recoveries"].labels(device, result).inc()
        if result == "success":
            held_s = after.last_held_s or 0.0
            self._histograms["recovery_duration_seconds"].observe(held_s)
            count["recovery_starts"].labels("standby" if after.standby else "cold").inc()
        if after.phase is Phase.GONE:
            self._remove(after.dev_id)

    def _remove(self, dev_id: int) -> None:
        if dev_id not in self._devices:
            return  # only observed; older libraries raise KeyError for a series that is not there
        self._devices.discard(dev_id)
        for name in self._of_devices:
            for values in _children(name, dev_id):
                self._counters[name].remove(*values)

    def polled(self, took_s: float, *, failed: bool) -> None:
        """Count a look at all devices."""
        self._histograms["poll_duration_seconds"].observe(took_s)
        if failed:
            self._counters["poll_errors"].inc()
        else:
            self._polled_at = self._wall()

    def dropped(self, kind: str) -> None:
        """Count what could not be written; from any thread."""
        self._counters["publications_dropped"].labels(kind).inc()

    def cause(self, word: str) -> None:
        """Count why a server had been lost; from any thread."""
        self._counters["server_loss_causes"].labels(word).inc()

    def reloaded(self, *, good: bool) -> None:
        """Remember how the last reload went."""
        self._reload_good = good
        if good:
            self._reloaded_at = self._wall()

    # --- the page --------------------------------------------------------------------------------

    async def page(self) -> bytes:
        """Return the page; whoever asks while it is written is given the same one."""
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write())
        return await asyncio.shield(self._writing)

    async def _write(self) -> bytes:
        self._snapshots.snapshot = self._snapshot()
        return await asyncio.to_thread(generate_latest, self.registry)

    def text(self) -> bytes:
        """Return the page of this moment, written here and now."""
        self._snapshots.snapshot = self._snapshot()
        return generate_latest(self.registry)

    def _snapshot(self) -> Snapshot:
        ask, now = self.sources, self._clock()
        offset = self._wall() - now
        return Snapshot(
            tuple(self._seen(record, now, offset) for record in ask.records()),
            {
                "control_workers_retired": ask.workers_retired(),
                "control_commands_wedged": ask.commands_wedged(),
                "poll_last_success_timestamp_seconds": self._polled_at,
                "config_last_reload_successful": self._reload_good,
                "config_last_reload_success_timestamp_seconds": self._reloaded_at,
                "event_loop_lag_seconds": ask.lag_s(),
                "scrapes_refused": ask.scrapes_refused(),
            },
            {
                "build": {"version": __version__},
                "kernel": {
                    "release": os.uname().release,
                    "generation": ask.generation.name,
                    "features": "" if ask.features is None else f"0x{ask.features:x}",
                },
            },
            dict(ask.standbys()),
        )

    def _seen(self, record: Record, now: float, offset: float) -> Seen:
        policy, server = self.sources.policy(record.dev_id), record.server
        return Seen(
            record,
            handoff=policy.handoff.value if policy else "",
            attempts_left=attempts_left(record, policy, now) if policy else None,
            changed_at=round(record.since + offset, 3),
            server_started_at=self.sources.started_at(server) if server else None,
            down_s=self._downtime.seconds(record.dev_id, now) if counts(record) else None,
        )


_COUNTED = (
    *("server_losses", "server_loss_causes", "recoveries", "recovery_attempt_failures"),
    *(
        "servers_ended",
        "device_stalls",
        "recovery_starts",
        "control_commands",
        "publications_dropped",
        "poll_errors",
    ),
)
_MEASURED = tuple(name for name, each in MEASURES.items() if each.kind is Kind.HISTOGRAM)


def _children(name: str, dev_id: int) -> Iterable[tuple[str, ...]]:
    """Return the labels of all series that a counter has of a device."""
    closed = (label.values for label in MEASURES[name].labels if label.values)
    return ((f"ublkb{dev_id}", *values) for values in product(*closed))


def _result(before: Record, after: Record) -> str:
    """Return how an outage ended by this transition; "" where none did."""
    if before.phase is after.phase:
        return ""
    match after.phase:
        case Phase.FAILED:
            return "gave_up"
        case Phase.WATCHING if before.phase is Phase.PROBATION:
            return "success"
        case Phase.WATCHING if before.phase is not Phase.OBSERVED:
            return "by_others"
        case Phase.OBSERVED if before.phase not in _RESTS:
            return "left_alone"
    return ""
