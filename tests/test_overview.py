"""The pages of `ublkwatch status`, word by word, from hand-made records.

`python tests/test_overview.py` writes tests/golden anew: read the difference before you keep it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schema
from hypothesis import given, settings
from test_explain import policies, records
from test_status import BACKING_OFF, HEALTHY, NOW, UNMANAGED, UNREAD, WALL, info

from ublkwatch import page, sheet, status
from ublkwatch.model import Ailment, Illness, Loss, Phase, Policy, Reason, Record, ServerId
from ublkwatch.page import Reader
from ublkwatch.uapi import DevState

GOLDEN = Path(__file__).parent / "golden"
READER = Reader(WALL + 0.2, running=True, clock=lambda wall: f"T{wall - WALL:+.0f}")

SECOND = replace(HEALTHY, dev_id=11, recoveries=0, last_held_s=None)
LOST = replace(
    BACKING_OFF,
    loss=Loss(ServerId(1012, 4, "boot"), "SIGKILL"),
    candidate=ServerId(2042, 9, "boot"),
    reason=None,
    detail="",
    spawned_at=NOW - 1,
    ready=True,
    wake=None,
)
ATTACHING = replace(LOST, phase=Phase.ATTACHING)
ME = "uid 0 (root), pid 9: new disk"
HELD = replace(
    BACKING_OFF,
    dev_id=4,
    phase=Phase.HELD,
    reason=Reason.HELD,
    detail=ME,
    held=True,
    held_by=ME,
    wake=None,
)
HELD_FOR = replace(HELD, dev_id=5, held_until=NOW + 1800)
HELD_LIVE = replace(HEALTHY, dev_id=6, held=True, held_by=ME)
UNKEPT = replace(HEALTHY, dev_id=10, phase=Phase.OBSERVED, reason=Reason.NO_SPEC)
EXHAUSTED = replace(
    BACKING_OFF,
    dev_id=9,
    phase=Phase.FAILED,
    wake=None,
    failures=(NOW - 4, NOW - 3, NOW - 2, NOW - 1, NOW - 0.5),
    attempts=5,
    recoveries=12,
    last_held_s=1.3,
)
STALLED = replace(HEALTHY, dev_id=8, ill=Illness(Ailment.STALL, "7 requests wait", NOW - 45))
RECOVERED = replace(
    HEALTHY,
    since=NOW - 60,
    attempts=1,
    detected_by="pidfd",
    asked_by="uid 0 (root), pid 9",
    loss=Loss(ServerId(900, 3, "boot"), "SIGKILL"),
    marks=(
        *(("lost", NOW - 61.0421), ("draining", NOW - 61.0421), ("starting", NOW - 61.021)),
        *(("attaching", NOW - 61.0118), ("probation", NOW - 61), ("watching", NOW - 60)),
    ),
)
WIDEST = replace(
    ATTACHING,
    dev_id=1048575,
    info=info(1048575, DevState.QUIESCED),
    server=ServerId(4194303, 5, "boot"),
    candidate=None,
    recoveries=123,
    last_held_s=12.0,
)


def document(*records: Record, name: str = "vm-disk", **policy: Any) -> dict[str, Any]:
    made = status.document(
        records,
        lambda _: Policy(**policy),
        wall=WALL,
        now=NOW,
        pid=42,
        interval_s=1.0,
        name=lambda record: name if record.server else "",
        started_at=lambda server: WALL - 3600 * server.start_ticks,
    )
    assert schema.complaints(made, schema.of("status")) == []
    return made


def overview(*records: Record, reader: Reader = READER, **how: Any) -> str:
    unhealthy_only = how.pop("unhealthy_only", False)
    return page.overview(document(*records, **how), reader, unhealthy_only=unhealthy_only)


def details(record: Record, reader: Reader = READER, **policy: Any) -> str:
    made = document(record, **policy)
    return sheet.details(made["devices"][0], made, reader)


WIDE = replace(READER, width=None)
DOWN = replace(READER, running=False, wall=WALL + 4000)
ALL = (HEALTHY, BACKING_OFF, UNMANAGED, UNREAD, HELD, HELD_FOR, HELD_LIVE, STALLED)
PAGES: dict[str, Callable[[], str]] = {
    "healthy": lambda: overview(HEALTHY, SECOND),
    "recovering": lambda: overview(HEALTHY, ATTACHING),
    "backing-off": lambda: overview(HEALTHY, BACKING_OFF),
    "exhausted": lambda: overview(HEALTHY, EXHAUSTED),
    "held": lambda: overview(HELD, HELD_FOR, HELD_LIVE),
    "stalled": lambda: overview(HEALTHY, STALLED, stall_timeout_s=30),
    "not-in-care": lambda: overview(UNKEPT, UNMANAGED, has_spec=False),
    "daemon-down": lambda: overview(HEALTHY, BACKING_OFF, EXHAUSTED, reader=DOWN),
    "daemon-silent": lambda: overview(HEALTHY, reader=replace(READER, wall=WALL + 63)),
    "no-devices": overview,
    "everything": lambda: overview(*ALL),
    "wide": lambda: overview(*ALL, reader=WIDE),
    "narrow": lambda: overview(*ALL, WIDEST, name="a-name-that-is-longer-than-any-column"),
    "unhealthy-only": lambda: overview(*ALL, unhealthy_only=True),
    "all-is-well": lambda: overview(HEALTHY, UNMANAGED, unhealthy_only=True),
    "in-colour": lambda: overview(HEALTHY, EXHAUSTED, reader=replace(READER, colour=True)),
    "details-recovered": lambda: details(RECOVERED, grace_s=2.0),
    "details-recovering": lambda: details(ATTACHING),
    "details-exhausted": lambda: details(EXHAUSTED),
    "details-held": lambda: details(HELD_FOR),
    "details-stalled": lambda: details(STALLED, stall_timeout_s=45.0),
    "details-down": lambda: details(EXHAUSTED, reader=DOWN),
    "details-unread": lambda: details(UNREAD),
}


def readable(name: str) -> str:
    """Return a page as its golden file has it, with escapes that an editor shows."""
    return PAGES[name]().replace("\x1b", "<ESC>") + "\n"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_it_was(name: str) -> None:
    assert readable(name) == (GOLDEN / f"{name}.txt").read_text()


def test_no_golden_page_is_left_over() -> None:
    pages = {path.stem for path in GOLDEN.glob("*.txt")}
    assert {name for name in pages if not name.startswith("history")} == PAGES.keys()


@pytest.mark.parametrize("name", PAGES.keys() - {"wide", "in-colour"})
def test_a_page_fits_eighty_columns(name: str) -> None:
    assert max(map(len, readable(name).splitlines())) <= 80


@settings(max_examples=300, deadline=None)
@given(records, policies)
def test_pages_keep_their_laws(record: Record, policy: Policy) -> None:
    made = status.document([record], lambda _: policy, wall=WALL, now=NOW, pid=1)
    (device,) = made["devices"]
    amiss = schema.complaints(made, schema.of("status"))
    assert [each for each in amiss if "detected_by" not in each] == []
    for text in (page.overview(made, READER), sheet.details(device, made, READER)):
        assert max(map(len, text.splitlines())) <= 80
        assert all(line.isprintable() for line in text.split("\n"))
        assert "{@" not in text, "every time is counted down"
    alone = page.overview(made, READER, unhealthy_only=True)
    assert (f"ublkb{record.dev_id}" in alone) is not page.is_healthy(device)
    assert alone.startswith("all is well: ") is page.is_healthy(device)
    if page.fares(device) == page.DOWN and device["remedy"] and device["phase"] != "observed":
        assert "do:" in page.overview(made, READER)


def test_a_terminal_obeys_nothing_that_a_server_said() -> None:
    evil = replace(EXHAUSTED, detail="\x1b]0;owned\x07\x1b[2Jno file\r\n")
    text = overview(evil, name="\x1b[31m") + details(evil, name="\x1b[31m")
    assert "\x1b" not in text
    assert "owned" in text
    assert "no file" in text


def test_a_document_of_an_older_version_is_shown_as_far_as_it_goes() -> None:
    made = document(EXHAUSTED, STALLED, RECOVERED)
    new = {
        *("next_action", "next_by", "outlook", "remedy", "cause", "cause_detail", "asked_by"),
        *("server_name", "server_started_at", "candidate_pid"),
    }
    for device in made["devices"]:
        for key in new:
            del device[key]
    del made["written_every_s"]
    assert "no file" in page.overview(made, READER)
    assert "ublkb8" in page.overview(made, WIDE)
    for device in made["devices"]:
        assert sheet.details(device, made, READER)


def test_a_device_tells_of_its_standby() -> None:
    made = document(HEALTHY)
    (device,) = made["devices"]
    assert "Standby" not in sheet.details(device, made, READER)
    device |= {"standby": "waiting", "standby_pid": 77}
    assert "Standby waiting, pid 77" in sheet.details(device, made, READER)
    device |= {"standby": "missing", "standby_pid": None, "standby_note": "it ended: SIGKILL"}
    assert "Standby missing; the last one: it ended: SIGKILL" in sheet.details(device, made, READER)


if __name__ == "__main__":
    for each in PAGES:
        (GOLDEN / f"{each}.txt").write_text(readable(each))
