"""Whose care a device is in: rules, and the first one that fits. Pure.

First those that name the device, the configuration's before the registered ones; then those that
describe its server, likewise, each in the order in which they were written; then the profiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ublkwatch.care import Care, Origin
from ublkwatch.model import DevInfo, Reason

_ALL = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Match:
    """Which devices a rule is about: all that is given must be true."""

    dev_id: int | None = None
    exe: str = ""  # the server's executable; * stands for any part of a name
    process: str = ""  # the name of its process (/proc/PID/comm), likewise
    tag: int | None = None  # what the server put into ublksrv_flags, in the bits of the mask
    tag_mask: int = _ALL

    def fits(self, info: DevInfo, origin: Origin | None) -> bool:
        """Tell whether a device is one of them; ``origin`` is its server's, where that was seen."""
        if self.dev_id is not None and self.dev_id != info.dev_id:
            return False
        if self.tag is not None and self.tag != info.ublksrv_flags & self.tag_mask:
            return False
        if not (self.exe or self.process):
            return True
        if origin is None:
            return False
        exe = origin.exe.removesuffix(" (deleted)")  # replaced by an upgrade
        same_exe = not self.exe or fnmatchcase(exe, self.exe)
        return same_exe and (not self.process or fnmatchcase(origin.name, self.process))

    def __str__(self) -> str:
        """Say it for people."""
        mask = f"/{self.tag_mask:#x}" if self.tag_mask != _ALL else ""
        parts = (
            f"ublkb{self.dev_id}" if self.dev_id is not None else "",
            f"exe {self.exe}" if self.exe else "",
            f"process {self.process}" if self.process else "",
            f"tag {self.tag:#x}{mask}" if self.tag is not None else "",
        )
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Rule:
    """A care, and the devices that it is for."""

    match: Match
    care: Care


@dataclass(frozen=True, slots=True)
class Unmanaged:
    """Why a device is in nobody's care; ``detail`` is for people."""

    reason: Reason = Reason.NO_SPEC
    detail: str = ""


# What profiles know of a server, if anything.
Profiles = Callable[[DevInfo, Origin], Care | Unmanaged | None]


@dataclass(frozen=True, slots=True)
class Book:
    """All rules of this moment."""

    rules: tuple[Rule, ...]
    profiles: Profiles = lambda _info, _origin: None

    def find(self, info: DevInfo, origin: Origin | None) -> Care | Unmanaged:
        """Return a device's care, or why it has none."""
        for rule in self.rules:
            if rule.match.fits(info, origin):
                return rule.care
        known = self.profiles(info, origin) if origin else None
        return known or Unmanaged()


def ordered(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Put those that name a device before those that describe a server."""
    return tuple(sorted(rules, key=lambda rule: rule.match.dev_id is None))


def under(care: Care | Unmanaged, **truths: object) -> Care | Unmanaged:
    """Let a device's policy know what is true of this host, such as the driver's generation."""
    if isinstance(care, Unmanaged):
        return care
    return replace(care, policy=replace(care.policy, **truths))  # type: ignore[arg-type]
