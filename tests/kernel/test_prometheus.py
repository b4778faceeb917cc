"""A real Prometheus, with our rules and the dashboard's queries, while servers crash."""

from __future__ import annotations

import http
import json
import math
import re
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deployed
import pytest
import yaml
from programs import prometheus as program

if TYPE_CHECKING:
    from conftest import Servers
    from supervisor import Supervisor

    Watch = Callable[..., Supervisor]

# Emulated, it needs some 20 s to start, and the first scrapes are slow.
DEADLINE_S = 240.0
CRASHES = 3
RECOVERIES = 'ublkwatch_recoveries_total{job="ublkwatch", result="success"}'
RULES = [
    rule
    for group in yaml.safe_load(deployed.RULES.read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((deployed.DEPLOY / "grafana/ublkwatch.json").read_text())
# What Grafana puts in their place; the longer names first.
VARIABLES = {
    "$__rate_interval": "5m",
    "$__range_s": "600",
    "$__range": "10m",
    "$job": "ublkwatch",
    "$instance": ".*",
    "$device": ".*",
}


class Prometheus:
    """Scrapes one page every few seconds, within which it answers, and evaluates the rules."""

    def __init__(self, home: Path, target: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._api = f"http://127.0.0.1:{port}"
        self._log = home / "prometheus.log"
        scrape = {"job_name": "ublkwatch", "static_configs": [{"targets": [target]}]}
        config = home / "prometheus.yaml"
        config.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "5s", "evaluation_interval": "2s"},
                    "rule_files": [str(deployed.RULES)],
                    "scrape_configs": [scrape],
                }
            )
        )
        with self._log.open("wb") as log:
            self._proc = subprocess.Popen(
                [
                    program("prometheus"),
                    f"--config.file={config}",
                    f"--storage.tsdb.path={home}/data",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stderr=log,
            )

    def get(self, path: str, **parameters: str) -> Any:
        """Return what its API answers."""
        url = f"{self._api}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
                document = json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.SERVICE_UNAVAILABLE:  # it starts
                raise
            pytest.fail(f"{parameters}: {error.read().decode()}")
        assert document["status"] == "success", document
        assert "warnings" not in document, document
        return document["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Return the series that an expression has now, but those that are no number.

        Behind a scrape that failed there are none: on a busy machine one takes longer than 5 s.
        """
        found: list[dict[str, Any]] = self.get("query", query=expr)["result"]
        return [each for each in found if not math.isnan(float(each["value"][1]))]

    def until(self, expr: str) -> list[dict[str, Any]]:
        """Wait until an expression has a series that is a number."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                if found := self.query(expr):
                    return found
            except OSError:  # it does not listen yet, or is not ready
                pass
            if self._proc.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no data: {expr}\n{self._log.read_text()[-4000:]}")
            time.sleep(0.5)

    def end(self) -> None:
        """SIGTERM, so that all it has is on the disk."""
        self._proc.terminate()
        self._proc.wait(DEADLINE_S)


@pytest.fixture
def processes() -> Iterator[list[Prometheus]]:
    started: list[Prometheus] = []
    yield started
    for each in started:
        each.end()


def started(supervisor: Supervisor, home: Path, processes: list[Prometheus]) -> Prometheus:
    """Return a Prometheus that scrapes this supervisor, and is ended with the test."""
    port = supervisor.said().split("metrics on port ")[-1].split()[0]
    processes.append(Prometheus(home, f"127.0.0.1:{port}"))
    return processes[-1]


def substituted(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    assert "$" not in expr
    return expr


def test_prometheus_counts_each_crash_and_every_rule_and_panel_has_data(
    server: Servers, watch: Watch, processes: list[Prometheus], tmp_path: Path
) -> None:
    server()
    supervisor = watch({0: "null"})
    supervisor.watching()
    prometheus = started(supervisor, tmp_path, processes)
    prometheus.until(f"{RECOVERIES} == 0")
    for _ in range(CRASHES):
        supervisor.recovered(supervisor.kill_server())
    prometheus.until(f"{RECOVERIES} == {CRASHES}")

    # Nothing was lost between the scrapes, whether one saw the device without a server or not.
    for counted in (
        f"max_over_time({RECOVERIES}[1h]) - min_over_time({RECOVERIES}[1h])",
        f"sum({RECOVERIES})",
        "sum(ublkwatch_server_losses_total)",
        "sum(ublkwatch_recovery_duration_seconds_count)",
    ):
        (series,) = prometheus.until(counted)
        assert float(series["value"][1]) == CRASHES, counted
    (unavailable,) = prometheus.until("ublkwatch_device_unavailable_seconds_total")
    (held,) = prometheus.until("ublkwatch_recovery_duration_seconds_sum")
    assert 0 < float(held["value"][1]) <= float(unavailable["value"][1]) + 0.01 * CRASHES

    (resets,) = prometheus.until("sum(resets(ublkwatch_device_unavailable_seconds_total[1h]))")
    assert float(resets["value"][1]) == 0

    for rule in RULES:
        if "record" in rule:
            prometheus.until(rule["record"])
    prometheus.until('ALERTS{alertname="UblkServerCrashLooping", alertstate="firing"}')
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            prometheus.until(substituted(target["expr"]))
    for variable in DASHBOARD["templating"]["list"][1:]:
        match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert match
        assert prometheus.get(f"label/{match[2]}/values", **{"match[]": substituted(match[1])})

    groups = prometheus.get("rules")["groups"]
    evaluated = [rule for group in groups for rule in group["rules"]]
    assert len(evaluated) == len(RULES)
    assert {rule["health"] for rule in evaluated} == {"ok"}, evaluated
    firing = {rule["name"] for rule in evaluated if rule.get("state") == "firing"}
    assert firing <= {"UblkServerCrashLooping", "UblkRecoverySlow", "UblkBudgetBurnsFast"}


@pytest.mark.long
def test_a_minute_of_crashes_of_three_devices_is_counted(
    server: Servers, watch: Watch, processes: list[Prometheus], tmp_path: Path
) -> None:
    """`make docs-pictures` draws what this one leaves."""
    for dev_id in range(3):
        server(dev_id)
    supervisor = watch(dict.fromkeys(range(3), "null"))
    for dev_id in range(3):
        supervisor.watching(dev_id)
    prometheus = started(supervisor, tmp_path, processes)
    prometheus.until(f"count({RECOVERIES} == 0) == 3")
    crashes = 0
    end = time.monotonic() + 60
    while time.monotonic() < end:
        supervisor.recovered(supervisor.kill_server((0, 1, 0, 2)[crashes % 4]))
        crashes += 1
        time.sleep(3)
    prometheus.until(f"sum({RECOVERIES}) == {crashes}")
