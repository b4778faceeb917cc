"""What is true at a scrape: metrics made from a snapshot, which any thread may read.

A collector that fails loses its own series and not the page. Beside `metrics`, which has what is
counted, the other home of prometheus_client.
"""

from __future__ import annotations

import logging
from collections import Counter
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

from ublkwatch.measures import (
    AILMENTS,
    COLLECTORS,
    MEASURES,
    PHASES,
    STANDBYS,
    STATES,
    Kind,
    state_of,
)
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
    standbys: Mapping[str, int] | None = None  # how many, by their state


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
                yield from collect(snapshot)
            except Exception as error:  # noqa: BLE001 - a bug harms the what is left of this one only
                if name not in self._failed:
                    _log.error("metrics of %r are missing: %r", name, error, exc_info=error)
                self._failed.add(name)
            else:
                self._failed.discard(name)
            success.add_metric([name], float(name not in self._failed))
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
    family = _family("standbys")
    for state in STANDBYS:
        family.add_metric([state], (snapshot.standbys or {}).get(state, 0))
    yield family


def _devices(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield one metric after the other: all at once would be 20,000 objects for 500 devices."""
    seen = [each for each in snapshot.devices if each.record.info is not None]
    counts = Counter(_state(each) for each in seen)
    family = _family("devices")
    for state in STATES:
        family.add_metric([state], float(counts[state]))
    yield family
    info = _info("device")
    for each in seen:
        info.add_metric([], _what(each))
    yield info
    for name, values, of in _SETS:
        family = _family(name)
        for each in seen:
            device, present = _name(each), of(each)
            for value in values:
                family.add_metric([device, value], float(value == present))
        yield family
    for name, number in _NUMBERS.items():
        family = _family(name)
        for each in seen:
            if (found := number(each)) is not None:
                family.add_metric([_name(each)], float(found))
        yield family


def _name(seen: Seen) -> str:
    return f"ublkb{seen.record.dev_id}"


def _state(seen: Seen) -> str:
    assert seen.record.info is not None
    return state_of(seen.record.info.state)


def _mode(seen: Seen) -> RecoveryMode:
    assert seen.record.info is not None
    return RecoveryMode.of(seen.record.info.flags)


def _what(seen: Seen) -> dict[str, str]:
    return {
        "device": _name(seen),
        "dev_id": str(seen.record.dev_id),
        "recovery_mode": _mode(seen).value,
        "handoff": seen.handoff,
    }


def _ailment(seen: Seen) -> str:
    ill = seen.record.ill
    return ill.kind.value if ill and complaint(seen.record) else ""


# Of each set one value is true of a device, or none.
_SETS: tuple[tuple[str, tuple[str, ...], Callable[[Seen], str]], ...] = (
    ("device_state", STATES, _state),
    ("device_phase", PHASES, lambda seen: seen.record.phase.value),
    ("device_ailing", AILMENTS, _ailment),
)
_NUMBERS: dict[str, Callable[[Seen], float | None]] = {
    "device_managed": lambda seen: bool(seen.handoff),
    "device_recoverable": lambda seen: _mode(seen) is not RecoveryMode.NONE,
    "device_held": lambda seen: seen.record.held,
    "device_attempts_left": lambda seen: seen.attempts_left,
    "server_up": lambda seen: seen.record.server is not None,
    "server_start_time_seconds": lambda seen: seen.server_started_at,
    "device_state_change_timestamp_seconds": lambda seen: seen.changed_at,
    "device_unavailable_seconds": lambda seen: seen.down_s,
    "device_last_held_seconds": lambda seen: seen.record.last_held_s,
}
