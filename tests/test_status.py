"""The status document and its table, from hand-made records."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import schema

from ublkwatch import status
from ublkwatch.model import (
    Ailment,
    DevInfo,
    Generation,
    Illness,
    Loss,
    Phase,
    Policy,
    Reason,
    Record,
    RecoveryMode,
    ServerId,
)
from ublkwatch.uapi import DevFlags, DevState

NOW, WALL = 5000.0, 1_700_000_000.0
FLAGS = DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_REISSUE


def info(dev_id: int, state: DevState | int, flags: DevFlags = FLAGS) -> DevInfo:
    return DevInfo(dev_id, state, flags, 2, 128, 524288, 1000 + dev_id)


HEALTHY = Record(
    dev_id=0,
    instance="boot/1",
    phase=Phase.WATCHING,
    since=NOW - 100,
    info=info(0, DevState.LIVE),
    server=ServerId(1000, 5, "boot"),
    recoveries=3,
    last_held_s=0.0421,
)
BACKING_OFF = Record(
    dev_id=12,
    instance="boot/2",
    phase=Phase.BACKOFF,
    reason=Reason.DIED_BEFORE_READY,
    detail="exit status 1: no file",
    since=NOW - 0.5,
    wake=NOW + 0.5,
    info=info(12, DevState.QUIESCED, DevFlags.USER_RECOVERY),
    failures=(NOW - 100, NOW - 2, NOW - 0.5),
    attempts=2,
    detected_by="pidfd",
    marks=(("lost", NOW - 3), ("draining", NOW - 3), ("stopping", NOW - 1)),
)
UNMANAGED = Record(
    dev_id=7,
    instance="boot/3",
    phase=Phase.OBSERVED,
    reason=Reason.NO_RECOVERY_FLAG,
    since=NOW - 10,
    info=info(7, DevState.LIVE, DevFlags(0)),
    server=ServerId(1007, 6, "boot"),
)
UNREAD = Record(dev_id=3, instance="boot/4", phase=Phase.WATCHING, since=NOW)


def document(*records: Record, policy: Policy | None = None) -> dict[str, Any]:
    made = status.document(records, lambda _: policy or Policy(), wall=WALL, now=NOW, pid=42)
    through_json: dict[str, Any] = json.loads(json.dumps(made, allow_nan=False))
    assert through_json == made
    assert schema.complaints(made, schema.of("status")) == []
    return made


def device(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = document(record)["devices"][0]
    return found


def test_what_ails_a_server_is_told() -> None:
    ails = device(replace(HEALTHY, ill=Illness(Ailment.STALL, "it sleeps", NOW - 45)))
    assert (ails["ailment"], ails["ailing_since"]) == ("stall", WALL - 45)
    says = "stalled: its server has requests and completes none (it sleeps)"
    assert ails["explanation"] == says


def test_the_document_says_who_wrote_it_when_and_how_to_understand_it() -> None:
    made = document(BACKING_OFF, HEALTHY)
    assert (made["schema_version"], made["written_at"], made["supervisor_pid"]) == (1, WALL, 42)
    assert [each["dev_id"] for each in made["devices"]] == [0, 12]
    assert made["generation"] == "UNKNOWN"
    known = status.document([], lambda _: Policy(), wall=0, now=0, pid=1, generation=Generation.G2)
    assert known["generation"] == "G2"


def test_times_in_the_document_are_wall_times() -> None:
    backing_off = device(BACKING_OFF)
    assert backing_off["since"] == WALL - 0.5
    assert backing_off["next_at"] == WALL + 0.5
    assert backing_off["detected_at"] == WALL - 3
    assert backing_off["timeline"] == [["lost", 0.0], ["draining", 0.0], ["stopping", 2.0]]


def test_what_comes_next_is_foretold_with_its_time() -> None:
    backing_off = device(BACKING_OFF)
    assert (backing_off["next_action"], backing_off["next_by"]) == ("attempt", None)
    says = f"the next attempt {{@{WALL + 0.5:.3f}}}; failed so far: 3 of 5"
    assert (backing_off["outlook"], backing_off["remedy"]) == ([says], None)
    draining = device(replace(BACKING_OFF, phase=Phase.DRAINING))
    assert (draining["next_action"], draining["next_at"]) == ("START", None)
    assert draining["next_by"] == WALL - 0.5 + Policy().drain_timeout_s


def test_what_a_person_can_do_is_told_where_it_waits_for_that() -> None:
    failed = device(replace(BACKING_OFF, phase=Phase.FAILED, wake=None))
    assert failed["remedy"] == "`ublkwatch retry 12`"
    assert failed["outlook"] == ["nothing by itself: it waits for `ublkwatch retry 12`"]
    assert failed["next_action"] is None


def test_why_a_server_was_lost_is_told() -> None:
    for by, how, cause in (
        ("pidfd", "SIGKILL", ("signal", "SIGKILL")),
        ("pidfd", "exit status 3", ("exit", "exit status 3")),
        ("poll", "unknown", ("unknown", None)),
        ("stall", "it sleeps", ("stall", "it sleeps")),
    ):
        lost = device(replace(BACKING_OFF, detected_by=by, loss=Loss(None, how), asked_by="me"))
        assert (lost["cause"], lost["cause_detail"]) == cause
        assert lost["asked_by"] == "me"


def test_what_is_told_ages_while_failures_are_about_to_be_forgotten() -> None:
    policy = Policy(stable_s=30)
    recent = replace(HEALTHY, since=NOW - 10, failures=(NOW - 20,))
    assert status.ages(recent, policy, NOW)
    assert not status.ages(recent, policy, NOW + 20), "they are"
    assert not status.ages(replace(recent, failures=()), policy, NOW)
    assert not status.ages(replace(BACKING_OFF, failures=(NOW,)), policy, NOW), "they all count"


def test_who_serves_and_since_when_is_told() -> None:
    made = status.document(
        [HEALTHY, replace(BACKING_OFF, candidate=ServerId(7, 8, "boot"))],
        lambda _: Policy(),
        wall=WALL,
        now=NOW,
        pid=42,
        interval_s=1.0,
        name=lambda record: f"server-{record.dev_id}",
        started_at=lambda server: WALL - server.start_ticks,
    )
    assert schema.complaints(made, schema.of("status")) == []
    assert made["written_every_s"] == 1.0
    healthy, other = made["devices"]
    assert (healthy["server_name"], healthy["server_started_at"]) == ("server-0", WALL - 5)
    assert (healthy["candidate_pid"], other["candidate_pid"]) == (None, 7)


def test_a_watched_device_is_told_in_full() -> None:
    assert device(HEALTHY) == {
        "dev_id": 0,
        "device": "ublkb0",
        "state": "LIVE",
        "phase": "watching",
        "reason": None,
        "detail": None,
        "explanation": "",
        "since": WALL - 100,
        "next_action": None,
        "next_at": None,
        "next_by": None,
        "outlook": ["should its server be lost, it is recovered at once"],
        "remedy": None,
        "server_pid": 1000,
        "server_name": None,
        "server_started_at": None,
        "candidate_pid": None,
        "standby": None,
        "standby_pid": None,
        "standby_note": None,
        "queues": 2,
        "depth": 128,
        "flags": int(FLAGS),
        "recovery_mode": "reissue",
        "io_while_down": "in flight: sent again; meanwhile: waits",
        "recoveries": 3,
        "last_held_s": 0.0421,
        "cause": None,
        "cause_detail": None,
        "asked_by": None,
        "detected_by": None,
        "detected_at": None,
        "timeline": [],
        "attempts": 0,
        "attempts_left": 5,
        "held": False,
        "held_until": None,
        "held_by": None,
        "give_up_at": None,
        "stopped": False,
        "ailment": None,
        "ailing_since": None,
        "care": {},
    }


def test_in_an_outage_each_failure_costs_an_attempt_and_afterwards_recent_ones_do() -> None:
    """The machine counts so: however long a device waits that was given up, nothing is left."""
    assert device(BACKING_OFF)["attempts_left"] == 5 - len(BACKING_OFF.failures) == 2
    few = document(BACKING_OFF, policy=Policy(attempts_max=1))["devices"][0]
    assert few["attempts_left"] == 0
    back = replace(BACKING_OFF, phase=Phase.WATCHING, wake=None)
    assert device(back)["attempts_left"] == 3, "one was long ago"
    assert device(replace(back, since=NOW - 60))["attempts_left"] == 5, "it is well for long"


def test_what_was_not_read_yet_is_null_and_never_guessed() -> None:
    unread = device(UNREAD)
    for key in ("state", "queues", "depth", "flags", "recovery_mode", "io_while_down"):
        assert unread[key] is None, key


def test_a_new_kernels_state_is_told_by_its_number() -> None:
    assert device(replace(HEALTHY, info=info(0, 9)))["state"] == "state 9"


@pytest.mark.parametrize("mode", RecoveryMode)
def test_every_recovery_mode_has_its_promise(mode: RecoveryMode) -> None:
    assert status.PROMISE[mode]


@pytest.mark.parametrize("phase", Phase)
def test_only_a_watched_device_needs_no_explanation_of_its_reason(phase: Phase) -> None:
    told = status.explanation(replace(BACKING_OFF, phase=phase))
    assert bool(told) is (phase is not Phase.WATCHING)


def test_waiting_for_the_old_server_to_go_is_told_as_such() -> None:
    waiting = replace(BACKING_OFF, phase=Phase.DRAINING, ready=True)
    assert status.explanation(waiting) == (
        "the new server is ready; waiting for the kernel to let go of the old one"
    )


# --- held, given up -------------------------------------------------------------------------------


def test_who_holds_a_device_and_until_when_is_told() -> None:
    held = replace(HEALTHY, held=True, held_by="uid 0 (root), pid 9: new disk", held_until=NOW + 60)
    told = device(held)
    assert (told["held"], told["held_until"]) == (True, WALL + 60)
    assert told["held_by"] == "uid 0 (root), pid 9: new disk"
    assert told["explanation"] == (
        "held by uid 0 (root), pid 9: new disk: a crash is not recovered"
    )
    assert device(replace(held, held_until=None))["held_until"] is None


def test_when_io_will_have_waited_long_enough_is_told() -> None:
    assert device(replace(BACKING_OFF, give_up_at=NOW + 5))["give_up_at"] == WALL + 5


@pytest.mark.parametrize(
    ("phase", "says"),
    [
        (Phase.DECIDING, "given up, on_exhausted_command decides: the server ended"),
        (Phase.FAILING, "given up, STOP_DEV ends the I/O that waits: the server ended"),
    ],
)
def test_what_giving_up_means_is_told_beside_its_reason(phase: Phase, says: str) -> None:
    assert status.explanation(replace(BACKING_OFF, phase=phase)).startswith(says)


def test_a_device_that_was_stopped_is_not_told_as_one_whose_io_waits() -> None:
    stopped = replace(BACKING_OFF, phase=Phase.FAILED, stopped=True)
    assert status.explanation(stopped) == (
        "given up and stopped, what waited ended in errors: "
        "the server ended before it was ready (exit status 1: no file)"
    )
    assert device(stopped)["stopped"] is True


def test_a_hold_that_is_the_reason_is_told_once() -> None:
    held = replace(BACKING_OFF, phase=Phase.HELD, reason=Reason.HELD, detail="me", held=True)
    assert status.explanation(held) == "held: nothing is done until it is released (me)"


@pytest.mark.parametrize("state", [*DevState, 9])
def test_the_kernels_answer_comes_back_out_of_the_document(state: DevState | int) -> None:
    there = info(0, state)
    back = status.info_from(device(replace(HEALTHY, info=there)))
    assert back is not None
    assert replace(back, max_io_buf_bytes=there.max_io_buf_bytes) == there
    assert status.info_from(device(UNREAD)) is None
