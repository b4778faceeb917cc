"""What Prometheus sees of a crash, of a device that goes, and of the supervisor itself."""

from __future__ import annotations

import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING

from conftest import DEADLINE_S, wait_until
from programs import prometheus as program
from supervisor import Supervisor

if TYPE_CHECKING:
    from conftest import Control, Servers

    Watch = Callable[..., Supervisor]


def asked(supervisor: Supervisor, path: str) -> tuple[int, str]:
    port = supervisor.said().split("metrics on port ")[-1].split()[0]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=DEADLINE_S) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def values(supervisor: Supervisor) -> dict[str, float]:
    """Return the samples of a scrape, each by name and labels as they are written."""
    status, text = asked(supervisor, "/metrics")
    assert status == 200
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def test_a_crash_and_a_device_that_goes_are_seen_by_prometheus(
    server: Servers, watch: Watch, control: Control
) -> None:
    server()
    supervisor = watch({0: "null"})
    supervisor.watching()
    assert asked(supervisor, "/readyz") == (200, "ok\n")
    assert asked(supervisor, "/healthz") == (200, "ok\n")
    of = '{device="ublkb0"'
    before = values(supervisor)
    assert before[f"ublkwatch_device_unavailable_seconds_total{of}}}"] == 0
    assert before[f'ublkwatch_server_losses_total{of},source="pidfd"}}'] == 0

    supervisor.recovered(supervisor.kill_server())
    why = 'ublkwatch_server_loss_causes_total{cause="signal"}'
    wait_until(lambda: values(supervisor)[why] == 1, DEADLINE_S, "its cause is counted")
    after = values(supervisor)
    down_s = after[f"ublkwatch_device_unavailable_seconds_total{of}}}"]
    held_s = after[f"ublkwatch_device_last_held_seconds{of}}}"]
    assert 0 < held_s <= down_s + 0.1
    source = supervisor.until("watching", phase="watching")["detected_by"]
    assert after[f'ublkwatch_server_losses_total{of},source="{source}"}}'] == 1
    assert after[f'ublkwatch_recoveries_total{of},result="success"}}'] == 1
    for command in ("START_USER_RECOVERY", "END_USER_RECOVERY"):
        name = f'ublkwatch_control_commands_total{{command="{command}",result="ok"}}'
        assert (before[name], after[name]) == (0, 1)
    assert after['ublkwatch_recovery_phase_duration_seconds_count{phase="attaching"}'] == 1
    assert after["ublkwatch_poll_last_success_timestamp_seconds"] > 1e9
    assert after["ublkwatch_control_commands_wedged"] == 0
    assert all(value for name, value in after.items() if "collector_success" in name)

    _, text = asked(supervisor, "/metrics")
    linter = [str(program("promtool")), "check", "metrics"]
    linted = subprocess.run(linter, input=text, capture_output=True, text=True, check=False)
    assert (linted.returncode, linted.stderr) == (0, "")

    control.remove(0)
    supervisor.until_gone()
    assert 'device="ublkb0"' not in asked(supervisor, "/metrics")[1]
