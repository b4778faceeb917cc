"""A finding: what somebody who looked has seen, and the way out. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

SCHEMA_VERSION = 1


class Level(Enum):
    """How much a finding matters; the worst comes first."""

    BAD = "bad"  # it does not work, or would not when it is needed
    WARN = "warn"  # it works, and could be better
    UNSEEN = "unseen"  # it could not be looked at
    OK = "ok"


@dataclass(frozen=True, slots=True)
class Finding:
    """One of them, in words."""

    level: Level
    about: str  # a part of the machine, or a file
    what: str
    fix: str = ""
    key: str = ""  # of a file

    def document(self) -> dict[str, Any]:
        """Return it for programs."""
        key = {"key": self.key} if self.key else {}
        about = {"about": self.about, **key, "what": self.what, "fix": self.fix or None}
        return {"level": self.level.value, **about}


def healthy(findings: Iterable[Finding]) -> bool:
    """Tell whether nothing is bad."""
    return all(each.level is not Level.BAD for each in findings)


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return all of them for programs."""
    return {
        "schema_version": SCHEMA_VERSION,
        "healthy": healthy(findings),
        "findings": [each.document() for each in ranked(findings)],
    }


def text(findings: Sequence[Finding]) -> str:
    """Return all of them for people: a summary, then the worst first."""
    counts = {level: sum(each.level is level for each in findings) for level in Level}
    words = {Level.BAD: "bad", Level.WARN: "to be looked at", Level.UNSEEN: "not to be seen"}
    said = [f"{counts[level]} {word}" for level, word in words.items() if counts[level]]
    lines = [", ".join([*said, f"{counts[Level.OK]} well"]), ""]
    for each in ranked(findings):
        about = f"{each.about}: {each.key}" if each.key else each.about
        lines.append(f"{each.level.value:6}  {about}: {each.what}")
        if each.fix:
            lines.append(f"        try: {each.fix}")
    return "\n".join(lines)


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Put the worst first, and else leave the order."""
    ranks = list(Level)
    return sorted(findings, key=lambda each: ranks.index(each.level))
