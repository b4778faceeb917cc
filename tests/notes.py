"""A meter that notes what it is told, for the tests of those who tell it."""

from __future__ import annotations

from ublkwatch.meter import Meter
from ublkwatch.model import Record


class Notes(Meter):
    """Keeps every word."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, int]] = []
        self.batches: list[tuple[str, int]] = []
        self.took_s: list[float] = []
        self.records: list[Record] = []
        self.polls: list[bool] = []  # whether they failed
        self.lost: list[str] = []
        self.causes: list[str] = []
        self.reloads: list[bool] = []

    def command(self, name: str, error: int, took_s: float) -> None:
        self.commands.append((name, error))
        self.took_s.append(took_s)

    def answered(self, name: str, count: int, took_s: float) -> None:
        self.batches.append((name, count))
        self.took_s.append(took_s)

    def stepped(self, record: Record, now: float) -> None:
        del now
        self.records.append(record)

    def polled(self, took_s: float, *, failed: bool) -> None:
        self.took_s.append(took_s)
        self.polls.append(failed)

    def dropped(self, kind: str) -> None:
        self.lost.append(kind)

    def cause(self, word: str) -> None:
        self.causes.append(word)

    def reloaded(self, *, good: bool) -> None:
        self.reloads.append(good)
