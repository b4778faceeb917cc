"""`ublkwatch drill`: when a device is fit for it, and what its rounds have shown. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ublkwatch.model import Phase, Policy, Record

SCHEMA_VERSION = 1
PERCENTILES = (50, 90, 99, 100)


def objection(record: Record, policy: Policy) -> str:
    """Return why its server must not be killed for a drill, or ""."""
    if record.phase is Phase.OBSERVED or not policy.has_spec:
        why = record.reason.value if record.reason else "unmanaged"
        return f"it is in nobody's care, so nobody would bring it back: {why}"
    if record.held:
        return f"it is held by {record.held_by or 'an operator'}; release it first"
    if record.phase is not Phase.WATCHING:
        return f"it is {record.phase.value}, not watched and LIVE"
    if record.ill:
        return f"its server ails: {record.ill.what}"
    if policy.shutting_down:
        return "the host shuts down"
    return ""


@dataclass(frozen=True, slots=True)
class Round:
    """One kill, and the recovery from it; seconds."""

    number: int
    killed_pid: int
    new_pid: int
    detected_by: str
    detection_s: float  # from SIGKILL to its being seen
    held_s: float  # from then to LIVE
    recovery_s: float  # from SIGKILL to LIVE
    attempts: int
    timeline: tuple[tuple[str, float], ...]  # phases entered, from the detection on

    @classmethod
    def of(cls, number: int, killed_at: float, before: Record, after: Record) -> Round:
        """Read it off the record of a device that is watched again."""
        lost = after.marks[0][1] if after.marks else killed_at
        held = after.last_held_s or 0.0
        return cls(
            number,
            before.server.pid if before.server else 0,
            after.server.pid if after.server else 0,
            after.detected_by,
            lost - killed_at,
            held,
            lost - killed_at + held,
            after.attempts,
            tuple((name, at - lost) for name, at in after.marks),
        )

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"kill {self.number}: process {self.killed_pid}; "
            f"detected after {self.detection_s * 1000:.0f} ms ({self.detected_by}), "
            f"held for {self.held_s * 1000:.0f} ms, "
            f"LIVE after {self.recovery_s * 1000:.0f} ms under process {self.new_pid}"
        )


@dataclass
class Drill:
    """What a drill has shown."""

    device: str
    began_at: float  # wall time
    wanted: int
    rounds: list[Round] = field(default_factory=list)
    scratch: Mapping[str, Any] | None = None  # what the I/O through the kills met
    trouble: str = ""  # why it ended before its end, or what was wrong with the I/O

    def figures(self) -> dict[str, dict[str, float]]:
        """Return the percentiles of each time."""
        times = {
            "detection_s": [each.detection_s for each in self.rounds],
            "held_s": [each.held_s for each in self.rounds],
            "recovery_s": [each.recovery_s for each in self.rounds],
        }
        return {
            name: {f"p{share}": percentile(values, share) for share in PERCENTILES}
            for name, values in times.items()
            if values
        }

    def document(self) -> dict[str, Any]:
        """Return the report, for programs."""
        return {
            "schema_version": SCHEMA_VERSION,
            "device": self.device,
            "began_at": self.began_at,
            "rounds_wanted": self.wanted,
            "ok": not self.trouble,
            "trouble": self.trouble or None,
            "percentiles": self.figures(),
            "scratch": dict(self.scratch) if self.scratch is not None else None,
            "rounds": [asdict(each) for each in self.rounds],
        }

    def summary(self) -> str:
        """Return the report, for people."""
        lines = []
        for name, values in self.figures().items():
            shown = ", ".join(f"{key} {value * 1000:.0f} ms" for key, value in values.items())
            lines.append(f"{name.removesuffix('_s'):10} {shown}")
        if (met := self.scratch) is not None:
            errors = ", ".join(f"{count} x {name}" for name, count in met["errors"].items())
            lines.append(
                f"{'I/O':10} {met['written']} blocks written, {met['verified']} verified, "
                f"{met['corrupt']} corrupt, errors: {errors or 'none'}, "
                f"longest {met['longest_s'] * 1000:.0f} ms"
            )
        done = f"{len(self.rounds)} of {self.wanted} kills recovered"
        lines.append(f"{done}: {self.trouble}" if self.trouble else done)
        return "\n".join(lines)


def percentile(values: Iterable[float], share: int) -> float:
    """Return the smallest value that so many per cent are not above (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)]
