"""Who shall have a standby, and when it may be started: when its device is at rest.

A part of the shell; it asks, and does nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from ublkwatch.care import Care, Job, Spec
from ublkwatch.model import Phase, Policy, Record
from ublkwatch.starts import job_of


class Caller(Protocol):
    """monitor.Monitor, as far as it is asked here."""

    def records(self) -> list[Record]: ...
    def care(self, dev_id: int) -> Care | None: ...
    def policy(self, dev_id: int) -> Policy: ...


@dataclass(frozen=True, slots=True)
class Wish:
    """A standby that there shall be."""

    dev_id: int  # the device that speaks for it: of a group, the first
    job: Job
    instance: str  # of the device; a group outlives its devices
    ready_timeout_s: float
    priority: int = 0
    now: bool = False  # it may be started now

    def fingerprint(self) -> str:
        """Name what would be started: another name, another server."""
        job, origin = self.job, self.job.origin
        whom = (origin.uid, origin.gid, origin.groups)
        what = repr((self.instance, job.name, job.command, job.run, whom))
        return hashlib.sha256(what.encode()).hexdigest()


class Wishes:
    """The wishes of this moment."""

    def __init__(
        self, specs: Mapping[int, Spec], clock: Callable[[], float], monitor: Caller
    ) -> None:
        self._specs, self._clock, self._monitor = specs, clock, monitor

    def all(self) -> dict[str, Wish]:
        """Return them by the name of their job."""
        found: dict[str, Wish] = {}
        for record in sorted(self._monitor.records(), key=lambda record: record.dev_id):
            if (wish := self._of(record)) is None:
                continue
            first = found.setdefault(wish.job.name, wish)
            if first is not wish:  # a group's: when all of its devices are at rest
                found[wish.job.name] = replace(first, now=first.now and wish.now)
        return found

    def anyone(self) -> bool:
        """Tell whether any device may come to want one without a change of records or rules."""
        cares = (self._monitor.care(record.dev_id) for record in self._monitor.records())
        return any(care is not None and care.standby for care in cares)

    def _of(self, record: Record) -> Wish | None:
        care, spec = self._monitor.care(record.dev_id), self._specs.get(record.dev_id)
        if care is None or not care.standby or spec is None or spec.instance != record.instance:
            return None
        if record.phase is Phase.OBSERVED and record.reason is not None:
            return None  # not ours to act on
        return Wish(
            record.dev_id,
            job_of(care, spec),
            "" if care.group else record.instance,
            care.policy.ready_timeout_s,
            care.priority,
            self._rests(record),
        )

    def _rests(self, record: Record) -> bool:
        """Tell whether a device has been LIVE for long enough, and is well."""
        if record.phase is not Phase.WATCHING or record.held or record.ill is not None:
            return False
        policy = self._monitor.policy(record.dev_id)
        return not policy.shutting_down and self._clock() - record.since >= policy.stable_s
