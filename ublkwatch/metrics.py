"""Prometheus metrics: states by a collector over the records, counters at the transitions.

The only home of prometheus_client. Served by a small server of our own under asyncio: the client
library's starts a thread for every connection, and answers every path.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from ublkwatch import __version__
from ublkwatch.events import Transition
from ublkwatch.model import Ailment, Phase, Record, RecoveryMode
from ublkwatch.status import complaint, state_name
from ublkwatch.uapi import DevState

_STATES = tuple(state.name.lower() for state in DevState if state is not DevState.DEAD)
_AILMENTS = tuple(ailment.value for ailment in Ailment)
_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 120, 300),
)
_CONNECTIONS_MAX = 16
_TIMEOUT_S = 5.0
_REQUEST_MAX = 8192


class Metrics:
    """Everything that a scrape shows."""

    def __init__(
        self, records: Callable[[], Iterable[Record]], retired: Callable[[], int] = int
    ) -> None:
        """Make the registry; ``records`` returns the devices as they are known at the moment.

        ``retired`` returns how many control workers were retired so far.
        """
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._records = records
        self.registry = CollectorRegistry()
        self.registry.register(_Devices(records, retired))
        self._recoveries = Counter(
            "ublkwatch_recoveries",
            "Outages by how they ended: recovered by us, or given up.",
            ["device", "result"],
            registry=self.registry,
        )
        self._exits = Counter(
            "ublkwatch_server_losses",
            "Outages by what showed that the server was lost.",
            ["device", "source"],
            registry=self.registry,
        )
        self._failures = Counter(
            "ublkwatch_recovery_attempt_failures",
            "Attempts to start and attach a server that failed.",
            ["device"],
            registry=self.registry,
        )
        self._ended = Counter(
            "ublkwatch_servers_ended",
            "Servers ended because I/O hung in them, by what ailed them.",
            ["device", "ailment"],
            registry=self.registry,
        )
        self._duration = Histogram(
            "ublkwatch_recovery_duration_seconds",
            "From the detection of a lost server to LIVE under a new one.",
            buckets=_BUCKETS,
            registry=self.registry,
        )

    def publish(self, transition: Transition) -> None:
        """Count a transition."""
        before, after = transition.before, transition.after
        device = f"ublkb{after.dev_id}"
        if after.phase is Phase.DRAINING and after.marks[:1] != before.marks[:1]:
            self._exits.labels(device, after.detected_by).inc()
        if after.ill and after.ill.condemned and not (before.ill and before.ill.condemned):
            self._ended.labels(device, after.ill.kind.value).inc()
        elif after.failures and after.failures[-1] not in before.failures:
            self._failures.labels(device).inc()
        if after.phase is Phase.WATCHING and before.phase is Phase.PROBATION:
            self._recoveries.labels(device, "success").inc()
            self._duration.observe(after.last_held_s or 0.0)
        if after.phase is Phase.FAILED and before.phase is not Phase.FAILED:
            self._recoveries.labels(device, "gave_up").inc()
        if after.phase is Phase.GONE:
            self._remove(device)

    def text(self) -> bytes:
        """Return the page; a device that we act on has its counters from its first scrape on."""
        for record in self._records():
            if record.phase is not Phase.OBSERVED:
                self._create(f"ublkb{record.dev_id}")
        return generate_latest(self.registry)

    def _create(self, device: str) -> None:
        for result in ("success", "gave_up"):
            self._recoveries.labels(device, result)
        for source in ("pidfd", "poll", "startup", *_AILMENTS):
            self._exits.labels(device, source)
        for ailment in _AILMENTS:
            self._ended.labels(device, ailment)
        self._failures.labels(device)

    def _remove(self, device: str) -> None:
        for metric in (self._recoveries, self._exits, self._failures, self._ended):
            for child in [s.labels for m in metric.collect() for s in m.samples]:
                if child["device"] == device:
                    metric.remove(*(child[name] for name in metric._labelnames))  # noqa: SLF001


class _Devices(Collector):
    def __init__(self, records: Callable[[], Iterable[Record]], retired: Callable[[], int]) -> None:
        self._records = records
        self._retired = retired

    def describe(self) -> list[Metric]:
        return []  # registering is not scraping

    def collect(self) -> Iterable[Metric]:
        build = InfoMetricFamily("ublkwatch_build", "This program.")
        build.add_metric([], {"version": __version__})
        state = GaugeMetricFamily(
            "ublkwatch_device_state",
            "1 for the state that the kernel reports, 0 for the others.",
            labels=["device", "state"],
        )
        phase = GaugeMetricFamily(
            "ublkwatch_device_phase",
            "1 for the phase that ublkwatch is in with the device, 0 for the others.",
            labels=["device", "phase"],
        )
        up = GaugeMetricFamily(
            "ublkwatch_server_up",
            "Whether the device has a server that is alive.",
            labels=["device"],
        )
        ailing = GaugeMetricFamily(
            "ublkwatch_device_ailing",
            "Whether I/O hangs in the server of a device that is LIVE, by what ails it.",
            labels=["device", "ailment"],
        )
        info = InfoMetricFamily(
            "ublkwatch_device", "What the device is.", labels=["device", "dev_id", "recovery_mode"]
        )
        for record in self._records():
            if record.info is None:
                continue
            device = f"ublkb{record.dev_id}"
            now = state_name(record.info.state).lower()
            for name in (*_STATES, "unknown"):
                known = now if now in _STATES else "unknown"
                state.add_metric([device, name], float(name == known))
            for each in Phase:
                phase.add_metric([device, each.value], float(each is record.phase))
            up.add_metric([device], float(record.server is not None))
            ails = record.ill.kind.value if record.ill and complaint(record) else ""
            for ailment in _AILMENTS:
                ailing.add_metric([device, ailment], float(ailment == ails))
            mode = RecoveryMode.of(record.info.flags).value
            info.add_metric(
                [], {"device": device, "dev_id": str(record.dev_id), "recovery_mode": mode}
            )
        retired = CounterMetricFamily(
            "ublkwatch_control_workers_retired",
            "Control workers given up because a command of theirs was not answered in time.",
            value=self._retired(),
        )
        return [build, info, state, phase, up, ailing, retired]


class Page:
    """Serves /metrics, to a bounded number of clients, each for a bounded time."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._clients = 0
        self._server: asyncio.Server | None = None

    async def start(self, address: str, port: int) -> int:
        """Listen and return the port; OSError when the address cannot be had."""
        self._server = await asyncio.start_server(self._serve, address, port, limit=_REQUEST_MAX)
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            if self._clients <= _CONNECTIONS_MAX:
                async with asyncio.timeout(_TIMEOUT_S):
                    await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # a client that is gone, silent or not speaking HTTP
        finally:
            self._clients -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n")).split()
        with contextlib.suppress(asyncio.LimitOverrunError):
            while (await reader.readuntil(b"\r\n")) != b"\r\n":
                pass
        if len(request) != 3 or request[0] not in (b"GET", b"HEAD"):
            status, kind, body = "405 Method Not Allowed", "text/plain", b"GET /metrics\n"
        elif request[1].split(b"?")[0] != b"/metrics":
            status, kind, body = "404 Not Found", "text/plain", b"there is only /metrics\n"
        else:
            status, kind, body = "200 OK", CONTENT_TYPE_LATEST, self._metrics.text()
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n")
        writer.write(b"" if request[:1] == [b"HEAD"] else body)
        await writer.drain()
