"""What is measured where it happens: the words for it. Pure; this one keeps nothing.

Who does something tells a Meter, by a call that takes no time and never fails; `metrics` has one
that keeps it all, and who is given none measures for nobody.
"""

from __future__ import annotations

from ublkwatch.model import Record


class Meter:
    """Takes what happened, and forgets it. All lengths of time are in seconds."""

    def command(self, name: str, error: int, took_s: float) -> None:
        """Take it that a control command was answered: 0, or an errno."""

    def answered(self, name: str, count: int, took_s: float) -> None:
        """Take it that so many control commands, sent together, were answered 0, the last then."""

    def stepped(self, record: Record, now: float) -> None:
        """Take it that a fact was stepped over a device, of which this is the record now."""

    def polled(self, took_s: float, *, failed: bool) -> None:
        """Take it that all devices were looked at; ``failed``: some of them in vain."""

    def dropped(self, kind: str) -> None:
        """Take it that something could not be written, of a kind in measures.PUBLICATIONS."""

    def cause(self, word: str) -> None:
        """Take it that an outage is over, and why its server had been lost: measures.CAUSES."""

    def reloaded(self, *, good: bool) -> None:
        """Take it that the configuration was read anew, or could not be."""
