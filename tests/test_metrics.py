"""What a scrape shows: states from records, counters from what happens."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace

import pytest

from ublkwatch import __version__
from ublkwatch.events import Transition
from ublkwatch.measures import ANSWERS, COMMANDS, PHASES, PUBLICATIONS, STATES
from ublkwatch.metrics import Metrics, Sources
from ublkwatch.model import (
    Ailment,
    DevInfo,
    Generation,
    Illness,
    Phase,
    Policy,
    Reason,
    Record,
    ServerId,
)
from ublkwatch.uapi import Cmd, DevFlags, DevState

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
PLAIN = Policy()
BACKING_OFF = replace(LOST, phase=Phase.BACKOFF)
PROBATION = replace(WATCHED, phase=Phase.PROBATION)
RECOVERED = replace(WATCHED, recoveries=1, last_held_s=0.03)


class Scraped:
    """Metrics over records that the test sets, as the monitor would; the test has the clock."""

    def __init__(self, *records: Record, policy: Policy | None = PLAIN) -> None:
        self.records = list(records)
        self.now, self.epoch = 1000.0, 1e9
        self.metrics = Metrics(clock=lambda: self.now, wall=lambda: self.epoch + self.now)
        self.metrics.sources = Sources(
            records=lambda: self.records,
            policy=lambda _: policy,
            started_at=lambda server: self.epoch + server.start_ticks,
            generation=Generation.G3,
            features=DevFlags(0x5F),
            workers_retired=lambda: 3,
            commands_wedged=lambda: 2,
            scrapes_refused=lambda: 4,
            lag_s=lambda: 0.25,
        )
        for record in records:
            self.metrics.stepped(record, self.now)

    def step(self, after: Record) -> None:
        self.records = [after] if after.phase is not Phase.GONE else []
        self.metrics.stepped(after, self.now)

    def move(self, before: Record, after: Record, *, now: float = 2.0) -> None:
        self.step(after)
        self.metrics.publish(Transition(1.0, now, before, after, "Test"))

    def value(self, name: str, **labels: str) -> float | None:
        self.metrics.text()  # a scrape
        return self.metrics.registry.get_sample_value(f"ublkwatch_{name}", labels)

    def total(self, name: str, **labels: str) -> float | None:
        return self.value(f"{name}_total", device="ublkb0", **labels)


ADOPTED: tuple[tuple[str, dict[str, str]], ...] = (
    ("recoveries", {"result": "success"}),
    ("recoveries", {"result": "gave_up"}),
    ("recoveries", {"result": "by_others"}),
    ("recoveries", {"result": "left_alone"}),
    ("server_losses", {"source": "pidfd"}),
    ("server_losses", {"source": "poll"}),
    ("server_losses", {"source": "startup"}),
    ("recovery_attempt_failures", {}),
    ("servers_ended", {"ailment": "stall"}),
    ("device_stalls", {}),
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
    scraped.step(replace(WATCHED, dev_id=1))
    scraped.move(WATCHED, replace(WATCHED, phase=Phase.GONE))
    scraped.records = [replace(WATCHED, dev_id=1)]
    assert scraped.total(name, **labels) is None
    assert scraped.value("device_state", device="ublkb0", state="live") is None
    assert b'"ublkb0"' not in scraped.metrics.text()
    assert scraped.value(f"{name}_total", device="ublkb1", **labels) == 0


def test_a_device_that_was_only_observed_may_go() -> None:
    observed = replace(SEEN, phase=Phase.OBSERVED)
    scraped = Scraped(observed)
    assert scraped.total("recovery_attempt_failures") is None
    scraped.move(observed, replace(observed, phase=Phase.GONE))
    assert b'"ublkb0"' not in scraped.metrics.text()


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
    for phase in PHASES:
        expected = float(phase == "draining")
        assert scraped.value("device_phase", device="ublkb0", phase=phase) == expected


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
    assert scraped.value("device_info", **labels, handoff="managed") == 1
    assert scraped.value("build_info", version=__version__) == 1
    assert b'generation="G3"' in scraped.metrics.text()
    assert b'features="0x5f"' in scraped.metrics.text()


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
    assert scraped.total("device_stalls") == 0  # it was found before
    assert scraped.total("servers_ended", ailment="stall") == 1
    assert scraped.total("servers_ended", ailment="dead_queue") == 0
    assert scraped.total("server_losses", source="stall") == 1
    assert scraped.total("recovery_attempt_failures") == 0


def test_an_ailment_counts_when_it_is_found_and_again_when_it_comes_back() -> None:
    scraped = Scraped(WATCHED)
    scraped.move(WATCHED, STALLED)
    scraped.move(STALLED, STALLED)
    assert scraped.total("device_stalls") == 1
    scraped.move(STALLED, WATCHED)
    scraped.move(WATCHED, STALLED)
    assert scraped.total("device_stalls") == 2


@pytest.mark.parametrize("phase", [Phase.GRACE, Phase.HELD])
def test_an_outage_counts_also_where_it_begins_with_waiting(phase: Phase) -> None:
    scraped = Scraped(WATCHED)
    waits = replace(LOST, phase=phase)
    scraped.move(WATCHED, waits)
    scraped.move(waits, LOST)
    assert scraped.total("server_losses", source="pidfd") == 1


@pytest.mark.parametrize(
    ("before", "after", "result"),
    [
        (replace(LOST, phase=Phase.GRACE), WATCHED, "by_others"),
        (replace(LOST, phase=Phase.STOPPING), SEEN, "left_alone"),
        (WATCHED, SEEN, ""),
        (SEEN, WATCHED, ""),
        (replace(LOST, phase=Phase.FAILED), SEEN, ""),
    ],
)
def test_an_outage_may_end_otherwise(before: Record, after: Record, result: str) -> None:
    scraped = Scraped(WATCHED)
    scraped.move(before, after)
    for each in ("success", "gave_up", "by_others", "left_alone"):
        assert scraped.total("recoveries", result=each) == float(each == result), each


def test_each_phase_of_an_outage_is_measured_when_it_is_left() -> None:
    scraped = Scraped(WATCHED)
    scraped.move(WATCHED, replace(LOST, since=100.0), now=100.0)
    scraped.move(replace(LOST, since=100.0), PROBATION, now=100.02)
    name = "recovery_phase_duration_seconds"
    assert scraped.value(f"{name}_sum", phase="draining") == pytest.approx(0.02)
    assert scraped.value(f"{name}_bucket", phase="draining", le="0.01") == 0
    assert scraped.value(f"{name}_bucket", phase="draining", le="0.025") == 1
    assert scraped.value(f"{name}_count", phase="probation") == 0


# --- time that a device was down -----------------------------------------------------------------


def test_downtime_advances_while_a_device_is_down_and_stays_when_it_is_back() -> None:
    scraped = Scraped(WATCHED)
    assert scraped.total("device_unavailable_seconds") == 0
    scraped.now += 10
    assert scraped.total("device_unavailable_seconds") == 0
    scraped.step(LOST)
    scraped.now += 3
    assert scraped.total("device_unavailable_seconds") == 3
    scraped.step(BACKING_OFF)
    scraped.now += 2
    assert scraped.total("device_unavailable_seconds") == 5
    scraped.step(PROBATION)
    scraped.now += 60
    assert scraped.total("device_unavailable_seconds") == 5
    scraped.step(replace(LOST, phase=Phase.FAILED))
    scraped.now += 7
    assert scraped.total("device_unavailable_seconds") == 12


def test_an_unmanaged_device_is_down_while_the_kernel_says_so() -> None:
    scraped = Scraped(SEEN)
    scraped.now += 5
    assert scraped.total("device_unavailable_seconds") == 0  # LIVE, under whom we cannot see
    scraped.step(replace(SEEN, info=replace(LIVE, state=DevState.FAIL_IO)))
    scraped.now += 4
    assert scraped.total("device_unavailable_seconds") == 4
    scraped.step(SEEN)
    scraped.now += 5
    assert scraped.total("device_unavailable_seconds") == 4


def test_a_device_that_cannot_be_recovered_has_no_downtime() -> None:
    scraped = Scraped(replace(SEEN, info=replace(LIVE, flags=DevFlags(0))))
    assert scraped.total("device_unavailable_seconds") is None
    assert scraped.value("device_recoverable", device="ublkb0") == 0


def test_the_next_device_of_a_number_begins_without_downtime() -> None:
    scraped = Scraped(LOST)
    scraped.now += 4
    scraped.move(LOST, replace(LOST, phase=Phase.GONE))
    scraped.step(WATCHED)
    assert scraped.total("device_unavailable_seconds") == 0


# --- states --------------------------------------------------------------------------------------


def test_devices_are_counted_by_state_zeros_included() -> None:
    scraped = Scraped(WATCHED, replace(LOST, dev_id=1), replace(WATCHED, dev_id=2))
    found = {state: scraped.value("devices", state=state) for state in STATES}
    assert found == dict.fromkeys(STATES, 0.0) | {"live": 2.0, "quiesced": 1.0}
    scraped.records = []
    assert scraped.value("devices", state="live") == 0


def test_a_managed_device_says_how_many_attempts_are_left() -> None:
    labels = {"device": "ublkb0"}
    scraped = Scraped(replace(LOST, failures=(999.0, 998.0)), policy=Policy(attempts_max=5))
    assert scraped.value("device_managed", **labels) == 1
    assert scraped.value("device_attempts_left", **labels) == 3
    scraped = Scraped(SEEN, policy=None)
    assert scraped.value("device_managed", **labels) == 0
    assert scraped.value("device_attempts_left", **labels) is None


def test_times_are_of_the_epoch() -> None:
    labels = {"device": "ublkb0"}
    scraped = Scraped(replace(WATCHED, since=40.0))
    assert scraped.value("device_state_change_timestamp_seconds", **labels) == 1e9 + 40
    assert scraped.value("server_start_time_seconds", **labels) == 1e9 + 1
    scraped.records = [LOST]
    assert scraped.value("server_start_time_seconds", **labels) is None


def test_a_device_that_is_held_says_so() -> None:
    labels = {"device": "ublkb0"}
    assert Scraped(WATCHED).value("device_held", **labels) == 0
    assert Scraped(replace(WATCHED, held=True)).value("device_held", **labels) == 1


def test_how_long_io_was_held_last_is_there_once_it_was() -> None:
    labels = {"device": "ublkb0"}
    assert Scraped(WATCHED).value("device_last_held_seconds", **labels) is None
    assert Scraped(RECOVERED).value("device_last_held_seconds", **labels) == 0.03


# --- the supervisor ------------------------------------------------------------------------------


def test_commands_count_by_their_answer_and_all_that_are_sent_are_there_at_zero() -> None:
    scraped = Scraped()
    assert set(COMMANDS) <= {command.name for command in Cmd}
    for command in COMMANDS:
        for answer in ANSWERS:
            assert scraped.value("control_commands_total", command=command, result=answer) == 0
    scraped.metrics.command("STOP_DEV", 0, 0.002)
    scraped.metrics.command("STOP_DEV", errno.EOPNOTSUPP, 0.002)
    scraped.metrics.command("STOP_DEV", errno.EDOM, 0.002)
    for answer in ("ok", "EOPNOTSUPP", "other"):
        assert scraped.value("control_commands_total", command="STOP_DEV", result=answer) == 1
    name = "control_command_duration_seconds_bucket"
    assert scraped.value(name, command="STOP_DEV", le="0.001") == 0
    assert scraped.value(name, command="STOP_DEV", le="0.0025") == 3


def test_commands_that_were_sent_together_all_count_and_took_one_time() -> None:
    scraped = Scraped()
    scraped.metrics.answered("GET_DEV_INFO", 500, 0.002)
    scraped.metrics.answered("GET_DEV_INFO", 0, 5.0)
    total = scraped.value("control_commands_total", command="GET_DEV_INFO", result="ok")
    assert total == 500
    name = "control_command_duration_seconds_count"
    assert scraped.value(name, command="GET_DEV_INFO") == 1


def test_a_poll_that_failed_is_no_success() -> None:
    scraped = Scraped()
    last = "poll_last_success_timestamp_seconds"
    assert scraped.value(last) == 0
    scraped.metrics.polled(0.004, failed=False)
    assert scraped.value(last) == 1e9 + 1000
    scraped.now += 5
    scraped.metrics.polled(0.004, failed=True)
    assert scraped.value(last) == 1e9 + 1000
    assert scraped.value("poll_errors_total") == 1
    assert scraped.value("poll_duration_seconds_count") == 2


def test_a_bad_reload_leaves_the_time_of_the_last_good_one() -> None:
    scraped = Scraped()
    last = "config_last_reload_success_timestamp_seconds"
    assert (scraped.value("config_last_reload_successful"), scraped.value(last)) == (1, 1e9 + 1000)
    scraped.now += 5
    scraped.metrics.reloaded(good=False)
    assert (scraped.value("config_last_reload_successful"), scraped.value(last)) == (0, 1e9 + 1000)
    scraped.metrics.reloaded(good=True)
    assert (scraped.value("config_last_reload_successful"), scraped.value(last)) == (1, 1e9 + 1005)


def test_what_is_lost_and_why_servers_were_is_counted() -> None:
    scraped = Scraped()
    assert [scraped.value("publications_dropped_total", kind=kind) for kind in PUBLICATIONS] == [
        0
    ] * len(PUBLICATIONS)
    scraped.metrics.dropped("history")
    scraped.metrics.cause("oom_kill")
    assert scraped.value("publications_dropped_total", kind="history") == 1
    assert scraped.value("server_loss_causes_total", cause="oom_kill") == 1
    assert scraped.value("server_loss_causes_total", cause="signal") == 0


def test_what_others_count_is_shown() -> None:
    scraped = Scraped()
    assert scraped.value("control_workers_retired_total") == 3
    assert scraped.value("control_commands_wedged") == 2
    assert scraped.value("scrapes_refused_total") == 4
    assert scraped.value("event_loop_lag_seconds") == 0.25
    assert b"process_resident_memory_bytes" in scraped.metrics.text()


def test_a_collector_that_fails_loses_its_own_series_and_no_others() -> None:
    scraped = Scraped(WATCHED)
    assert scraped.value("collector_success", collector="devices") == 1
    broken = replace(WATCHED, phase=None)  # type: ignore[arg-type]
    scraped.records = [broken]
    assert scraped.value("collector_success", collector="devices") == 0
    assert scraped.value("collector_success", collector="process") == 1
    assert scraped.value("server_up", device="ublkb0") is None
    assert scraped.total("recoveries", result="success") == 0
    assert b"process_resident_memory_bytes" in scraped.metrics.text()
    scraped.records = [WATCHED]
    assert scraped.value("collector_success", collector="devices") == 1


def test_all_who_ask_while_the_page_is_written_are_given_the_same() -> None:
    async def work() -> None:
        metrics = Scraped(WATCHED).metrics
        first, second = await asyncio.gather(metrics.page(), metrics.page())
        assert first is second
        assert b'ublkwatch_server_up{device="ublkb0"} 1.0\n' in first
        assert await metrics.page() is not first

    asyncio.run(work())


def test_who_goes_while_the_page_is_written_takes_it_from_nobody() -> None:
    async def work() -> None:
        metrics = Scraped(WATCHED).metrics
        first, second = (asyncio.create_task(metrics.page()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert b"ublkwatch_build_info" in await second

    asyncio.run(work())


@pytest.mark.parametrize(("standby", "start"), [(True, "standby"), (False, "cold")])
def test_a_recovery_is_counted_by_how_its_server_began(standby: bool, start: str) -> None:  # noqa: FBT001
    scraped = Scraped(PROBATION)
    assert scraped.value("recovery_starts_total", start=start) == 0
    scraped.move(PROBATION, replace(RECOVERED, standby=standby))
    assert scraped.value("recovery_starts_total", start=start) == 1


def test_standbys_are_counted_by_their_state() -> None:
    scraped = Scraped()
    assert scraped.value("standbys", state="waiting") == 0
    scraped.metrics.sources = replace(scraped.metrics.sources, standbys=lambda: {"waiting": 2})
    assert [scraped.value("standbys", state=each) for each in ("waiting", "missing")] == [2, 0]
