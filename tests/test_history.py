"""The history of recoveries, in a real sqlite."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from ublkwatch.store import Store

HISTORY_MAX = 10_000


def test_history_is_kept_in_order_over_restarts(tmp_path: Path) -> None:
    entries = [{"dev_id": n, "timeline": [["lost", 0.0]]} for n in (5, 1, 3)]
    with contextlib.closing(Store(tmp_path / "run", tmp_path / "lib")) as store:
        assert store.load_history() == []
        for entry in entries:
            store.add_history(entry)
    with contextlib.closing(Store(tmp_path / "run", tmp_path / "lib")) as store:
        assert store.load_history() == entries


def test_history_forgets_its_oldest(tmp_path: Path) -> None:
    with contextlib.closing(Store(tmp_path / "run", tmp_path / "lib")) as store:
        store.add_history({"dev_id": 0})
        with contextlib.closing(sqlite3.connect(tmp_path / "lib/history.sqlite")) as db, db:
            entries = ((n, json.dumps({"dev_id": n})) for n in range(1, HISTORY_MAX))
            db.executemany("INSERT INTO recoveries (dev_id, entry) VALUES (?, ?)", entries)
        assert len(store.load_history()) == HISTORY_MAX
        store.add_history({"dev_id": -1})
        history = store.load_history()
        assert len(history) == HISTORY_MAX
        assert (history[0], history[-1]) == ({"dev_id": 1}, {"dev_id": -1})


def test_orders_are_kept_beside_the_recoveries_and_disturb_nobody_who_reads_those(
    tmp_path: Path,
) -> None:
    entries: list[dict[str, Any]] = [
        {"dev_id": 0},
        {"kind": "order", "dev_id": 1},
        {"kind": "recovery", "dev_id": 2},
    ]
    with contextlib.closing(Store(tmp_path / "run", tmp_path / "lib")) as store:
        for entry in entries:
            store.add_history(entry)
        assert [entry["dev_id"] for entry in store.load_history()] == [0, 2]
        assert store.load_history("order") == entries[1:2]
