"""What is to be measured: decided where the command line is, obeyed where the driver is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from bench.lot import HANDOFFS, TARGETS, Kind

SHAPES = ("single", "group")


@dataclass(frozen=True, slots=True)
class Options:
    """The defaults are what is published."""

    only: tuple[str, ...] = ()  # scenarios; none: all
    contestants: tuple[str, ...] = ()  # none: all
    handoffs: tuple[str, ...] = HANDOFFS
    targets: tuple[str, ...] = TARGETS
    queues: tuple[int, ...] = (1, 4, 16)
    kills: int = 200  # of each contestant, for each kind of device
    devices: tuple[int, ...] = (1, 16, 64, 128)  # killed at once
    shapes: tuple[str, ...] = SHAPES  # a server for each of them, or one for all
    rounds: int = 5  # of mass crashes
    accelerator: str = "real"  # or what the guest runs on: kvm, tcg
    programs: str = ""  # the directory of those in C

    def kinds(self) -> Iterator[tuple[Kind, bool]]:
        """Yield each kind of device, and whether it is the first one of its hand-off."""
        for handoff in self.handoffs:
            first = True
            for target in self.targets:
                for queues in self.queues:
                    yield Kind(handoff, target, queues), first
                    first = False

    def dumped(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loaded(cls, text: str) -> Options:
        values: dict[str, Any] = json.loads(text)
        lists = {key: tuple(each) for key, each in values.items() if isinstance(each, list)}
        assert values.keys() == {field.name for field in fields(cls)}
        return cls(**{**values, **lists})


# Does it work at all, and is it not far out of line? One boot, well within 90 s.
SMOKE = Options(
    only=("recovery",),
    contestants=("ublkwatch", "oracle", "oracle-c"),
    handoffs=("managed",),
    targets=("null",),
    queues=(1,),
    kills=3,
)
