"""What a scrape shows: states from records, counters from transitions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ublkwatch import __version__
from ublkwatch.events import Transition
from ublkwatch.metrics import Metrics
from ublkwatch.model import Ailment, DevInfo, Illness, Phase, Reason, Record, ServerId
from ublkwatch.uapi import DevFlags, DevState

LIVE = DevInfo(0, DevState.LIVE, DevFlags.USER_RECOVERY, 1, 128, 4096, 77)
SEEN = Record(dev_id=0, instance="boot/1", info=LIVE, reason=Reason.NO_VISIBLE_SERVER)
WATCHED = replace(SEEN, phase=Phase.WATCHING, reason=None, server=ServerId(77, 1, "boot"))
LOST = replace(
    WATCHED,
    phase=Phase.DRAINING,
    server=None,
    detected_by="pidfd",
    marks=(("lost", 100.0),),
    info=replace(LIVE, state=DevState.QUIESCED),
)
BACKING_OFF = replace(LOST, phase=Phase.BACKOFF)
PROBATION = replace(WATCHED, phase=Phase.PROBATION)
RECOVERED = replace(WATCHED, recoveries=1, last_held_s=0.03)


class Scraped:
    """Metrics over records that the test sets, as the monitor would."""

    def __init__(self, *records: Record) -> None:
        self.records = list(records)
        self.metrics = Metrics(lambda: self.records)

    def move(self, before: Record, after: Record) -> None:
        self.records = [after] if after.phase is not Phase.GONE else []
        self.metrics.publish(Transition(1.0, 2.0, before, after, "Test"))

    def value(self, name: str, **labels: str) -> float | None:
        self.metrics.text()  # a scrape
        return self.metrics.registry.get_sample_value(f"ublkwatch_{name}", labels)

    def total(self, name: str, **labels: str) -> float | None:
        return self.value(f"{name}_total", device="ublkb0", **labels)


ADOPTED: tuple[tuple[str, dict[str, str]], ...] = (
    ("recoveries", {"result": "success"}),
    ("recoveries", {"result": "gave_up"}),
    ("server_losses", {"source": "pidfd"}),
    ("server_losses", {"source": "poll"}),
    ("server_losses", {"source": "startup"}),
    ("recovery_attempt_failures", {}),
    ("servers_ended", {"ailment": "stall"}),
)


@pytest.mark.parametrize(("name", "labels"), ADOPTED)
def test_an_adopted_devices_series_exist_at_zero(name: str, labels: dict[str, str]) -> None:
    scraped = Scraped(SEEN)
    assert scraped.total(name, **labels) is None
    scraped.move(SEEN, WATCHED)
    assert scraped.total(name, **labels) == 0


@pytest.mark.parametrize(("name", "labels"), ADOPTED)
def test_so_do_those_of_a_device_that_was_adopted_before_a_restart(
    name: str, labels: dict[str, str]
) -> None:
    assert Scraped(WATCHED).total(name, **labels) == 0


@pytest.mark.parametrize(("name", "labels"), ADOPTED)
def test_a_device_that_is_gone_leaves_no_series(name: str, labels: dict[str, str]) -> None:
    scraped = Scraped(SEEN)
    scraped.move(SEEN, WATCHED)
    assert scraped.total(name, **labels) == 0
    other = Transition(1, 2, replace(SEEN, dev_id=1), replace(WATCHED, dev_id=1), "Test")
    scraped.metrics.publish(other)
    scraped.move(WATCHED, replace(WATCHED, phase=Phase.GONE))
    scraped.records = [replace(WATCHED, dev_id=1)]
    assert scraped.total(name, **labels) is None
    assert scraped.value("device_state", device="ublkb0", state="live") is None
    assert b'"ublkb0"' not in scraped.metrics.text()
    assert scraped.value(f"{name}_total", device="ublkb1", **labels) == 0


@pytest.mark.parametrize("source", ["pidfd", "poll", "startup"])
def test_a_lost_server_counts_once_by_what_showed_it(source: str) -> None:
    scraped = Scraped(WATCHED)
    lost = replace(LOST, detected_by=source)
    scraped.move(WATCHED, lost)
    assert scraped.total("server_losses", source=source) == 1
    scraped.move(replace(lost, phase=Phase.BACKOFF), replace(lost, seq=2))
    assert scraped.total("server_losses", source=source) == 1


def test_the_next_attempt_of_an_outage_is_no_further_loss() -> None:
    scraped = Scraped(LOST)
    scraped.move(LOST, replace(LOST, seq=2))  # after a restart of ublkwatch
    assert scraped.total("server_losses", source="pidfd") == 0


def test_a_recovery_counts_as_success_with_its_duration() -> None:
    scraped = Scraped(PROBATION)
    scraped.move(PROBATION, RECOVERED)
    assert scraped.total("recoveries", result="success") == 1
    assert scraped.total("recoveries", result="gave_up") == 0
    assert scraped.value("recovery_duration_seconds_sum") == 0.03
    assert scraped.value("recovery_duration_seconds_bucket", le="0.025") == 0
    assert scraped.value("recovery_duration_seconds_bucket", le="0.05") == 1


def test_giving_up_counts_once_and_is_no_success() -> None:
    scraped = Scraped(BACKING_OFF)
    failed = replace(BACKING_OFF, phase=Phase.FAILED, reason=Reason.NOT_READY)
    scraped.move(BACKING_OFF, failed)
    scraped.move(failed, replace(failed, reason=Reason.NOT_QUIESCED))
    assert scraped.total("recoveries", result="gave_up") == 1
    assert scraped.total("recoveries", result="success") == 0


def test_every_failed_attempt_counts_also_when_an_older_one_is_forgotten() -> None:
    scraped = Scraped(LOST)
    once = replace(LOST, failures=(1.0,))
    scraped.move(LOST, once)
    assert scraped.total("recovery_attempt_failures") == 1
    pruned = replace(LOST, failures=(90.0,))
    scraped.move(once, pruned)
    assert scraped.total("recovery_attempt_failures") == 2
    scraped.move(pruned, BACKING_OFF)
    assert scraped.total("recovery_attempt_failures") == 2


def test_state_and_phase_are_one_for_the_present_one_and_zero_for_the_others() -> None:
    scraped = Scraped(LOST)
    states = {s: scraped.value("device_state", device="ublkb0", state=s) for s in STATES}
    assert states == dict.fromkeys(STATES, 0.0) | {"quiesced": 1.0}
    for phase in Phase:
        expected = float(phase is Phase.DRAINING)
        assert scraped.value("device_phase", device="ublkb0", phase=phase.value) == expected


STATES = ("live", "quiesced", "fail_io", "unknown")


def test_a_new_kernels_state_is_unknown() -> None:
    scraped = Scraped(replace(WATCHED, info=replace(LIVE, state=9)))
    assert scraped.value("device_state", device="ublkb0", state="unknown") == 1
    assert scraped.value("device_state", device="ublkb0", state="live") == 0


def test_a_server_is_up_while_the_device_has_one() -> None:
    assert Scraped(WATCHED).value("server_up", device="ublkb0") == 1
    assert Scraped(LOST).value("server_up", device="ublkb0") == 0


def test_device_and_program_are_described() -> None:
    scraped = Scraped(WATCHED)
    labels = {"device": "ublkb0", "dev_id": "0", "recovery_mode": "recovery"}
    assert scraped.value("device_info", **labels) == 1
    assert scraped.value("build_info", version=__version__) == 1


def test_a_device_that_was_not_read_yet_has_no_state_and_breaks_no_page() -> None:
    scraped = Scraped(replace(WATCHED, info=None))
    assert scraped.value("device_state", device="ublkb0", state="live") is None
    assert b"ublkwatch_build_info" in scraped.metrics.text()


STALLED = replace(WATCHED, ill=Illness(Ailment.STALL, "it sleeps", 50.0))


def test_what_ails_a_server_shows_while_it_serves() -> None:
    scraped = Scraped(STALLED)
    labels = {"device": "ublkb0"}
    assert scraped.value("device_ailing", ailment="stall", **labels) == 1
    assert scraped.value("device_ailing", ailment="dead_queue", **labels) == 0
    scraped.records = [replace(STALLED, phase=Phase.HELD)]
    assert scraped.value("device_ailing", ailment="stall", **labels) == 0


def test_a_server_that_is_ended_counts_once_and_is_no_failed_attempt() -> None:
    scraped = Scraped(STALLED)
    assert STALLED.ill is not None
    ended = replace(STALLED, ill=replace(STALLED.ill, condemned=True), failures=(80.0,))
    scraped.move(STALLED, ended)
    scraped.move(ended, replace(LOST, detected_by="stall", failures=(80.0,), ill=ended.ill))
    assert scraped.total("servers_ended", ailment="stall") == 1
    assert scraped.total("servers_ended", ailment="dead_queue") == 0
    assert scraped.total("server_losses", source="stall") == 1
    assert scraped.total("recovery_attempt_failures") == 0
