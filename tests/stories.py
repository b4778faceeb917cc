"""A device's life, told to the machine fact by fact: what the stories about it share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ublkwatch.events import (
    Asked,
    AttemptOver,
    Effect,
    EndReplied,
    Event,
    InfoRead,
    Ready,
    ServerExited,
    Spawned,
    StartReplied,
    Woken,
)
from ublkwatch.model import (
    DevInfo,
    Generation,
    Order,
    Phase,
    Policy,
    Record,
    ServerId,
)
from ublkwatch.recovery import step
from ublkwatch.uapi import DevFlags, DevState

BOOT = "boot"
OLD, NEW, OTHER = (ServerId(pid, pid * 10, BOOT) for pid in (100, 200, 300))
INFO = DevInfo(
    dev_id=0,
    state=DevState.LIVE,
    flags=DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_REISSUE,
    nr_hw_queues=2,
    queue_depth=32,
    max_io_buf_bytes=1 << 19,
    ublksrv_pid=100,
)


class Story:
    """A device's life: tell it facts, see its phase and what the machine wished for."""

    def __init__(self, generation: Generation = Generation.G3, **policy: Any) -> None:
        self.policy = Policy(generation=generation, **policy)
        self.record = Record(dev_id=0, instance=f"{BOOT}/1")
        self.now = 1000.0
        self.wishes: list[Effect] = []

    def tell(self, *events: Event, after_s: float = 0.0) -> list[Effect]:
        """Return what the last fact made the machine wish for."""
        effects: tuple[Effect, ...] = ()
        for event in events:
            self.now += after_s
            self.record, effects = step(self.record, event, self.now, self.policy)
            self.wishes += effects
        return list(effects)

    def sleep(self) -> list[Effect]:
        """Let the time come that the record asked for."""
        assert self.record.wake is not None
        self.now = max(self.now, self.record.wake)
        return self.tell(Woken())

    def read(
        self, state: DevState | int, server: ServerId | None = None, instance: str = f"{BOOT}/1"
    ) -> InfoRead:
        return InfoRead(replace(INFO, state=state), instance, server)

    def is_in(self, phase: Phase) -> bool:
        return self.record.phase is phase

    def outlast(self, *, limit: int = 400) -> Story:
        """Let time pass until the phase changes."""
        before = self.record.phase
        while self.record.phase is before and limit:
            self.sleep()
            limit -= 1
        assert self.record.phase is not before
        return self

    def over(self) -> list[Effect]:
        """Let the attempt's processes be gone."""
        return self.tell(AttemptOver(self.record.seq))

    def ask(self, order: Order, until: float | None = None) -> list[Effect]:
        return self.tell(Asked(order, "me", until))

    def failed(self) -> Story:
        """Give up at once, by an exit that is permanent."""
        seq = self.draining().record.seq
        self.tell(Spawned(seq, NEW), ServerExited(NEW, "exit status 78", 78))
        self.over()
        return self

    def watching(self) -> Story:
        self.tell(self.read(DevState.LIVE, OLD))
        assert self.record.phase is Phase.WATCHING
        return self

    def draining(self) -> Story:
        self.watching().tell(ServerExited(OLD))
        assert self.record.phase is Phase.DRAINING
        return self

    def starting(self) -> Story:
        seq = self.draining().record.seq
        self.tell(Spawned(seq, NEW), Ready(seq), self.read(DevState.QUIESCED))
        assert self.record.phase is Phase.STARTING
        return self

    def attaching(self) -> Story:
        self.starting().tell(StartReplied(self.record.seq, 0))
        assert self.record.phase is Phase.ATTACHING
        return self

    def probation(self) -> Story:
        self.attaching().tell(EndReplied(self.record.seq, 0))
        assert self.record.phase is Phase.PROBATION
        return self
