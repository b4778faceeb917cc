"""What ublkwatch answers over HTTP: its metrics, and whether it is well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ublkwatch.driver import UnavailableError
from ublkwatch.health import Health
from ublkwatch.metrics import CONTENT_TYPE, Metrics
from ublkwatch.scrape import Reply, Scrapes


class Probes:
    """The pages /metrics, /healthz and /readyz."""

    def __init__(self, metrics: Metrics, health: Health) -> None:
        self._metrics, self._health = metrics, health
        pages = {"/metrics": self._show, "/healthz": self._well, "/readyz": self._ready}
        self._scrapes = Scrapes(pages)

    def refused(self) -> int:
        """Return how many clients were turned away, ever."""
        return self._scrapes.refused

    async def start(self, settings: Mapping[str, Any]) -> int | None:
        """Serve them as [metrics] has it, and return the port; UnavailableError."""
        if not settings["enabled"]:
            return None
        address, port = settings["address"], settings["port"]
        try:
            return await self._scrapes.start(address, port)
        except OSError as error:
            raise UnavailableError(
                f"metrics: cannot listen on {address} port {port}: {error.strerror}; change "
                "metrics.port, or set metrics.enabled = false"
            ) from error

    def close(self) -> None:
        """Serve nobody any more."""
        self._scrapes.close()

    async def _show(self) -> Reply:
        try:
            return Reply(200, await self._metrics.page(), CONTENT_TYPE)
        except OSError as error:  # no thread is to be had
            return Reply.line(503, f"the metrics cannot be written: {error.strerror}")

    async def _well(self) -> Reply:
        complaint = self._health.complaint()
        return Reply.line(503, complaint) if complaint else Reply.line(200, "ok")

    async def _ready(self) -> Reply:
        if self._health.ready():
            return Reply.line(200, "ok")
        return Reply.line(503, "the first look at all devices is not over")
