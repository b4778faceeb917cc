"""The status document and its table, from hand-made records."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ublkwatch import status
from ublkwatch.model import (
    Ailment,
    DevInfo,
    Generation,
    Illness,
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

TABLE = """\
4 devices, 2 watched and LIVE

DEVICE   STATE     PHASE     SERVER  QUEUES  I/O ON A CRASH  RECOVERIES  HELD
ublkb7   LIVE      observed  1007    2x128   disk removed    0           -
    not recoverable: created without UBLK_F_USER_RECOVERY
ublkb12  QUIESCED  backoff   -       2x128   EIO, waits      0           -
    the server ended before it was ready (exit status 1: no file)
ublkb0   LIVE      watching  1000    2x128   resent, waits   3           42 ms
ublkb3   ?         watching  -       ?       ?               0           -"""


def document(*records: Record, policy: Policy | None = None) -> dict[str, Any]:
    made = status.document(records, lambda _: policy or Policy(), wall=WALL, now=NOW, pid=42)
    through_json: dict[str, Any] = json.loads(json.dumps(made, allow_nan=False))
    assert through_json == made
    return made


def device(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = document(record)["devices"][0]
    return found


def test_the_table_puts_problems_first_and_says_what_they_are() -> None:
    made = document(HEALTHY, BACKING_OFF, UNMANAGED, UNREAD)
    assert status.table(made, running=True) == TABLE


def test_a_stalled_server_comes_first_and_is_not_well() -> None:
    ill = Illness(Ailment.STALL, "it sleeps", NOW - 45)
    stalled = replace(HEALTHY, dev_id=5, ill=ill)
    made = document(HEALTHY, stalled)
    lines = status.table(made, running=True).splitlines()
    assert lines[0] == "2 devices, 1 watched and LIVE"
    assert lines[3].startswith("ublkb5")
    assert lines[4].strip() == "stalled: its server has requests and completes none (it sleeps)"
    ails = device(stalled)
    assert (ails["ailment"], ails["ailing_since"]) == ("stall", WALL - 45)


def test_the_table_says_when_nobody_keeps_it_fresh() -> None:
    head = status.table(document(HEALTHY), running=False, wall=WALL + 63).splitlines()[0]
    assert head == "1 device, 1 watched and LIVE; ublkwatch is not running, this is 63 s old"


def test_no_devices_are_one_line() -> None:
    assert status.table(document(), running=True) == "0 devices, 0 watched and LIVE"


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


def test_the_next_attempt_is_foretold_in_a_backoff_only() -> None:
    assert device(replace(BACKING_OFF, phase=Phase.DRAINING))["next_at"] is None


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
        "next_at": None,
        "server_pid": 1000,
        "queues": 2,
        "depth": 128,
        "flags": int(FLAGS),
        "recovery_mode": "reissue",
        "io_while_down": "in flight: sent again; meanwhile: waits",
        "recoveries": 3,
        "last_held_s": 0.0421,
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


def test_failures_outside_the_window_do_not_cost_an_attempt() -> None:
    assert device(BACKING_OFF)["attempts_left"] == 3
    few = document(BACKING_OFF, policy=Policy(attempts_max=1))["devices"][0]
    assert few["attempts_left"] == 0


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
