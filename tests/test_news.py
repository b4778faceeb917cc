"""What happened reaches the trail and the history, and never waits for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from notes import Notes
from patience import until
from test_overview import ATTACHING, EXHAUSTED, RECOVERED
from test_status import HEALTHY, NOW, WALL
from test_trail import everything

from ublkwatch import chronicle
from ublkwatch.events import Transition
from ublkwatch.model import Phase, Reason, Record
from ublkwatch.news import News
from ublkwatch.store import Store, read_history

PENDING_MAX = 1000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with contextlib.closing(Store(tmp_path / "run", tmp_path / "lib")) as opened:
        yield opened


def moved(before: Record, after: Record) -> Transition:
    return Transition(WALL, NOW, before, after, "InfoRead")


RECOVERY = moved(replace(RECOVERED, phase=Phase.PROBATION), RECOVERED)
GIVEN_UP = moved(replace(EXHAUSTED, phase=Phase.STOPPING), EXHAUSTED)


def outage(transition: Transition) -> dict[str, Any]:
    found = chronicle.outage_over(transition)
    assert found is not None
    return found


def test_a_recovery_is_remembered_with_its_cause_and_who_asked() -> None:
    told = outage(RECOVERY)
    assert (told["result"], told["reason"], told["held_s"]) == ("success", None, 0.0421)
    assert (told["cause"], told["cause_detail"], told["lost_pid"]) == ("signal", "SIGKILL", 900)
    assert (told["asked_by"], told["attempts"]) == ("uid 0 (root), pid 9", 1)
    assert told["timeline"][-1] == ["watching", pytest.approx(1.0421)]


def test_a_device_that_was_given_up_is_remembered_with_the_reason() -> None:
    told = outage(GIVEN_UP)
    assert (told["result"], told["held_s"]) == ("gave_up", None)
    assert (told["reason"], told["detail"]) == ("DIED_BEFORE_READY", "exit status 1: no file")
    assert (told["cause"], told["lost_pid"]) == ("unknown", None)


def test_what_a_delegate_deleted_was_given_up() -> None:
    gone = replace(ATTACHING, phase=Phase.GONE, reason=Reason.DELEGATE_DELETED)
    assert outage(moved(ATTACHING, gone))["result"] == "gave_up"


@pytest.mark.parametrize(
    ("before", "after"),
    [(HEALTHY, ATTACHING), (EXHAUSTED, EXHAUSTED), (ATTACHING, HEALTHY)],
    ids=["begins", "stays given up", "somebody else's recovery"],
)
def test_no_other_transition_ends_an_outage_by_us(before: Record, after: Record) -> None:
    assert chronicle.outage_over(moved(before, after)) is None


def test_news_go_where_they_belong(store: Store, tmp_path: Path) -> None:
    async def story() -> None:
        news = News(tmp_path / "run", store)
        writing = asyncio.create_task(news.write_for_ever())
        news.tell("started", "ublkwatch watches")
        news.take(chronicle.event(RECOVERY, "info", "ublk 0: recovered"))
        news.take(outage(RECOVERY))
        await until(lambda: read_history(tmp_path / "lib"), "it is written")
        writing.cancel()
        news.take({"kind": "order", "at": WALL, "dev_id": 0, "text": "ublk 0: hold"})
        await news.finish()

    asyncio.run(story())
    assert [(it["kind"], it["text"]) for it in everything(tmp_path / "run")] == [
        ("started", "ublkwatch watches"),
        ("transition", "ublk 0: recovered"),
        ("order", "ublk 0: hold"),
    ]
    recovery, order = read_history(tmp_path / "lib")
    assert recovery == {"id": 1} | outage(RECOVERY)
    assert (order["id"], order["kind"]) == (2, "order")


def test_what_comes_too_fast_is_lost_and_that_is_said(store: Store, tmp_path: Path) -> None:
    async def story() -> None:
        news = News(tmp_path / "run", store, notes)
        for number in range(PENDING_MAX + 5):
            news.tell("started", f"{number}")
        assert notes.lost == ["event"] * 5
        news.take(outage(RECOVERY))
        assert notes.lost[5:] == ["history"]
        await news.finish()
        await news.finish()

    notes = Notes()
    asyncio.run(story())
    *_, last, dropped = everything(tmp_path / "run")
    assert last["text"] == f"{PENDING_MAX - 1}"
    assert (dropped["kind"], dropped["level"]) == ("dropped", "warning")
    assert dropped["text"] == "6 events came too fast and are lost"


def test_a_disk_that_takes_nothing_harms_nobody(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run/events.jsonl").mkdir()
    (tmp_path / "lib/history.sqlite").mkdir()

    async def story() -> None:
        news = News(tmp_path / "run", store, notes)
        news.take(chronicle.event(RECOVERY, "info", "ublk 0: recovered"))
        news.take(outage(RECOVERY))
        await news.finish()

    notes = Notes()
    asyncio.run(story())
    assert "events not written: " in caplog.text
    assert "history not written: " in caplog.text
    assert notes.lost == ["event", "history"]
    assert notes.causes == ["signal"]  # it was lost all the same
