"""What is true at a scrape: metrics made from a snapshot, which any thread may read.

A collector that fails loses its own series and not the page. Beside `metrics`, which has what is
counted, the other home of prometheus_client.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ublkwatch.measures import AILMENTS, COLLECTORS, MEASURES, PHASES, STATES, Kind, state_of
from ublkwatch.model import Record, RecoveryMode
from ublkwatch.status import complaint

_log = logging.getLogger("ublkwatch")


@dataclass(frozen=True, slots=True)
class Seen:
    """One device at the moment of a scrape; times are in seconds since the epoch."""

    record: Record
    handoff: str  # "" where nobody's care
    attempts_left: int | None
    changed_at: float
    server_started_at: float | None
    down_s: float | None  # None: it cannot be down, but only gone


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that is true at the moment of a scrape, and nothing that changes behind it."""

    devices: tuple[Seen, ...] = ()
    numbers: Mapping[str, float] | None = None  # by the name of a measure without labels
    infos: Mapping[str, Mapping[str, str]] | None = None


class Snapshots(Collector):
    """Shows the snapshot that it was given last."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self._process = ProcessCollector(registry=None)
        self._failed: set[str] = set()  # those about which it is said in the log
        self._collectors: dict[str, Callable[[Snapshot], Iterable[Metric]]] = {
            "supervisor": _supervisor,
            "devices": _devices,
            "process": lambda _: self._process.collect(),
        }
        assert tuple(self._collectors) == COLLECTORS

    def describe(self) -> list[Metric]:
        """Return nothing: registering is not scraping."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield what the collectors have, and which of them had something."""
        snapshot = self.snapshot
        success = _family("collector_success")
        for name, collect in self._collectors.items():
            try:
                found = list(collect(snapshot))
            except Exception as error:  # noqa: BLE001 - a bug harms the series of this one only
                if name not in self._failed:
                    _log.error("metrics of %r are missing: %r", name, error, exc_info=error)
                self._failed.add(name)
                found = []
            else:
                self._failed.discard(name)
            success.add_metric([name], float(name not in self._failed))
            yield from found
        yield success


def _family(name: str) -> GaugeMetricFamily | CounterMetricFamily:
    measure = MEASURES[name]
    labels = [label.name for label in measure.labels]
    if measure.kind is Kind.COUNTER:
        return CounterMetricFamily(measure.exposed, measure.meaning, labels=labels)
    return GaugeMetricFamily(measure.exposed, measure.meaning, labels=labels)


def _info(name: str) -> InfoMetricFamily:
    measure = MEASURES[name]
    return InfoMetricFamily(measure.exposed.removesuffix("_info"), measure.meaning)


def _supervisor(snapshot: Snapshot) -> Iterator[Metric]:
    for name, values in (snapshot.infos or {}).items():
        info = _info(name)
        info.add_metric([], dict(values))
        yield info
    for name, number in (snapshot.numbers or {}).items():
        family = _family(name)
        family.add_metric([], number)
        yield family


def _devices(snapshot: Snapshot) -> Iterable[Metric]:
    counts = dict.fromkeys(STATES, 0)
    info = _info("device")
    names = (
        *("devices", "device_state", "device_phase", "device_managed", "device_recoverable"),
        *("device_held", "device_attempts_left", "device_ailing", "server_up"),
        *("server_start_time_seconds", "device_state_change_timestamp_seconds"),
        *("device_unavailable_seconds", "device_last_held_seconds"),
    )
    families = {name: _family(name) for name in names}
    for seen in snapshot.devices:
        record = seen.record
        if record.info is None:
            continue  # it was not read yet
        device, mode = f"ublkb{record.dev_id}", RecoveryMode.of(record.info.flags)
        state = state_of(record.info.state)
        counts[state] += 1
        labels = {"device": device, "dev_id": str(record.dev_id)}
        info.add_metric([], labels | {"recovery_mode": mode.value, "handoff": seen.handoff})
        for name in STATES:
            families["device_state"].add_metric([device, name], float(name == state))
        for name in PHASES:
            families["device_phase"].add_metric([device, name], float(name == record.phase.value))
        ails = record.ill.kind.value if record.ill and complaint(record) else ""
        for name in AILMENTS:
            families["device_ailing"].add_metric([device, name], float(name == ails))
        for name, value in (
            ("device_managed", bool(seen.handoff)),
            ("device_recoverable", mode is not RecoveryMode.NONE),
            ("device_held", record.held),
            ("device_attempts_left", seen.attempts_left),
            ("server_up", record.server is not None),
            ("server_start_time_seconds", seen.server_started_at),
            ("device_state_change_timestamp_seconds", seen.changed_at),
            ("device_unavailable_seconds", seen.down_s),
            ("device_last_held_seconds", record.last_held_s),
        ):
            if value is not None:
                families[name].add_metric([device], float(value))
    for name, count in counts.items():
        families["devices"].add_metric([name], float(count))
    return [info, *families.values()]
