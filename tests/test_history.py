"""The history of recoveries, in a real sqlite."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import pytest

from ublkwatch.store import Store, StoreError, read_history

HISTORY_MAX = 10_000


def test_history_is_kept_in_order_over_restarts(tmp_path: Path) -> None:
    entries = [{"dev_id": n, "timeline": [["lost", 0.0]]} for n in (5, 1, 3)]
    with contextlib.closing(Store(tmp_path / "run", tmp_path / "lib")) as store:
        assert read_history(tmp_path / "lib") == []
        for entry in entries:
            store.add_history(entry)
    with contextlib.closing(Store(tmp_path / "run", tmp_path / "lib")):
        read = [{"id": n, "kind": "recovery"} | entry for n, entry in enumerate(entries, 1)]
        assert read_history(tmp_path / "lib") == read
    assert read_history(tmp_path / "lib") == read, "with the daemon down"


def test_history_forgets_its_oldest(tmp_path: Path) -> None:
    with contextlib.closing(Store(tmp_path / "run", tmp_path / "lib")) as store:
        store.add_history({"dev_id": 0})
        with contextlib.closing(sqlite3.connect(tmp_path / "lib/history.sqlite")) as db, db:
            entries = ((n, json.dumps({"dev_id": n})) for n in range(1, HISTORY_MAX))
            db.executemany("INSERT INTO recoveries (dev_id, entry) VALUES (?, ?)", entries)
        assert len(read_history(tmp_path / "lib")) == HISTORY_MAX
        store.add_history({"dev_id": -1})
        history = read_history(tmp_path / "lib")
        assert len(history) == HISTORY_MAX
        assert (history[0]["dev_id"], history[-1]["dev_id"]) == (1, -1)


def test_a_history_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "history.sqlite").write_text("this is no database, whatever its name says" * 99)
    with pytest.raises(StoreError, match=r"history\.sqlite cannot be read: file is not a database"):
        read_history(tmp_path)
