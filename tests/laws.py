"""What must hold in every story: along the way, and at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cast import holder
from twin import Command

from ublkwatch.events import Transition
from ublkwatch.model import (
    Exhausted,
    Generation,
    Handoff,
    Phase,
    Reason,
    Record,
    RecoveryMode,
    ServerId,
)
from ublkwatch.uapi import DevState
from ublkwatch.verdict import PERMANENT, SAYS_FAIL

if TYPE_CHECKING:
    from world import World

_MAY_FAIL = frozenset(Reason) - PERMANENT
_LOOKED_S = 15.0  # a delegate starts so long after the look, where GET_PARAMS is waited for
_FLIGHT_S = 0.1  # what was already on its way when the truth was read


class Laws:
    """Keeps watch; ``broken`` says what was broken, in order."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.broken: list[str] = []
        self._dead: dict[int, float] = {}  # when DEAD was read
        self._spawns: dict[int, list[float]] = {}
        self._lost_at: float | None = None

    def _break(self, what: str) -> None:
        self._world.note("LAW BROKEN", what)
        self.broken.append(what)

    # --- along the way ---------------------------------------------------------------------------

    def read_dead(self, dev_id: int) -> None:
        """The supervisor was told that the device is DEAD, or gone."""
        if self._world.driver.diskseq(dev_id) is None:  # else only what is shown of it is DEAD
            self._dead.setdefault(dev_id, self._world.loop.time())

    def created(self, dev_id: int) -> None:
        """The next device of an id is another."""
        self._dead.pop(dev_id, None)

    def _acts(self, what: str, dev_id: int) -> None:
        """Nothing is resurrected after DEAD."""
        at = self._dead.get(dev_id)
        if at is not None and self._world.loop.time() > at + _FLIGHT_S:
            self._break(f"{what} for a device that was read as DEAD at {at:.3f}")

    def sends(self, command: str, dev_id: int, sent: list[Command]) -> None:
        """One START or END at a time; END only in a round that a START began."""
        if command not in ("START_USER_RECOVERY", "END_USER_RECOVERY"):
            return
        delegated = self._world.policy.handoff is Handoff.DELEGATED
        probe = command.startswith("START") and self._world.story.generation is Generation.G3
        if delegated and not probe:  # on G3 START costs nothing, and tells whether all is free
            self._break(f"{command}, where the server's own command does that")
        self._acts(command, dev_id)
        self._committed(command, dev_id, Phase.STARTING if "START" in command else Phase.ATTACHING)
        pending = [
            one.name
            for one in sent
            if one.dev_id == dev_id and not one.done.done() and "RECOVERY" in one.name
        ]
        vouched = self._world.budgets + self._world.decisions > 1  # a person or his command said so
        if pending and not (vouched and command.startswith("START")):
            self._break(f"{command} while {pending[0]} is with the kernel")
        device = self._world.driver.devices.get(dev_id)
        if command == "START_USER_RECOVERY" or "rival" in self._world.story.faults:
            return  # a rival's END ends our round, and its START began it
        if device is not None and not device.armed and device.state is not DevState.LIVE:
            self._break("END behind no accepted START")

    def _committed(self, what: str, dev_id: int, phase: Phase) -> None:
        """The record was committed before its effects run; it may have moved on since."""
        record = self._world.records.get(dev_id)
        if record is None or phase.value not in [name for name, _ in record.marks]:
            self._break(f"{what}, and the store knows nothing of {phase.value}: {record}")

    def spawns(self, dev_id: int, tag: str, root: str = "") -> None:
        """Attempts are within the policy's budget: one more for each life that was lost.

        ``root`` is the standby that is taken for one.
        """
        if not self._world.disk_full:  # then that it is DEAD could not be saved, nor acted upon
            self._acts("a new server", dev_id)
        record = self._world.records.get(dev_id)
        if record is None or record.seq < int(tag.rpartition("-")[2]):
            self._break(f"server {tag}, and the store knows nothing of it: {record}")
        others = [
            str(process)
            for process in self._world.processes.alive()
            if process.tag not in (tag, root) and self._belongs(process.tag, dev_id)
        ]
        if others and not any("leaked" in other for other in others):
            self._break(f"attempt {tag} begins while there is {', '.join(others)}")
        now, policy = self._world.loop.time(), self._world.policy
        device = self._world.driver.devices.get(dev_id)
        if policy.handoff is Handoff.DELEGATED and device is not None and device.file is not None:
            held_s = now - device.file.opened_at
            if (who := holder(device)) is not None and held_s > _LOOKED_S:
                self._break(f"a delegate is started, and {who} holds the device for {held_s:.1f} s")
        recent = [at for at in self._spawns.get(dev_id, []) if now - at < policy.window_s]
        self._spawns[dev_id] = [*recent, now]
        # What brings another budget: an operator, or the command that decides for him.
        budgets = self._world.budgets + self._world.decisions
        most = policy.attempts_max * budgets + self._world.lives + self._world.recovered
        if len(recent) >= most:
            self._break(f"attempt {len(recent) + 1} within {policy.window_s:g} s")

    def _belongs(self, tag: str, dev_id: int) -> bool:
        """Tell whether a process is an attempt's, and no standby that waits."""
        return tag.startswith(f"{dev_id}-") or tag in self._world.links.values()

    def stops(self, dev_id: int) -> None:
        """STOP_DEV is the operator's choice, and only a device without a server is stopped."""
        policy, now = self._world.policy, self._world.loop.time()
        late = policy.hold_timeout_s and self._lost_at is not None
        late = late and now >= (self._lost_at or now) + policy.hold_timeout_s
        said = policy.on_exhausted is Exhausted.EXEC and self._world.decision == SAYS_FAIL
        if not (late or said or policy.on_exhausted is Exhausted.FAIL):
            self._break("STOP_DEV, and nobody asked for it")
        device = self._world.driver.devices.get(dev_id)
        serves = holder(device) if device is not None else None
        if serves is not None and device is not None and device.state is DevState.LIVE:
            self._break(f"STOP_DEV while {serves} serves")

    def kills(self, server: ServerId) -> None:
        """No server that serves is killed: but for what an attempt that failed left."""
        for device in self._world.driver.devices.values():
            serves = holder(device)
            if serves is not None and serves.id == server and device.state is DevState.LIVE:
                self._break(f"{serves} is killed, and it serves")

    def line(self, dev_id: int, tag: str) -> None:
        """Never two servers: nobody else has the line, and the old one is gone."""
        self._acts("a line", dev_id)
        self._committed("a line", dev_id, Phase.ATTACHING)
        others = [
            str(process)
            for process in self._world.cast.lined.get(dev_id, ())
            if process.alive and process.tag not in (tag, "")
        ]
        device = self._world.driver.devices.get(dev_id)
        if device is not None and (serves := holder(device)) and "creator" in serves.name:
            others.append(str(serves))
        if others:
            self._break(f"the line for {tag} while there is {', '.join(others)}")

    def transition(self, transition: Transition) -> None:
        if transition.before.phase in (Phase.WATCHING, Phase.OBSERVED):
            self._lost_at = transition.now
        if transition.after.reason is Reason.INTERNAL_ERROR:
            self._break(f"a bug: {transition.after.detail}")

    # --- at the end ------------------------------------------------------------------------------

    def verdict(self, record: Record | None, *, settled: bool) -> list[str]:
        """Judge the end; return what was broken in the whole story."""
        world = self._world
        if not settled:
            self._break(f"it never came to rest: {record.phase.value if record else 'no record'}")
        # How far a tool came only its operator can tell, and no rival asks.
        vouched = world.policy.handoff is Handoff.DELEGATED and (
            world.budgets > 1 or "rival" in world.story.faults
        )
        for oops in () if vouched else world.driver.oopses:
            self._break(f"the kernel: {oops}")
        for leak in world.loop.leaks():
            self._break(f"an error that nobody took: {leak}")
        kept = {*world.standbys, *world.links.values()}
        for stray in world.processes.alive():
            if settled and stray.tag.startswith("s-") and stray.tag not in kept:
                self._break(f"{stray}, {stray.tag}, waits for nobody")
        if len(world.standbys) > 1 and settled:
            self._break(f"one device, and {len(world.standbys)} standbys")
        if settled:
            self._end(record)
        self._io()
        return self.broken

    def _end(self, record: Record | None) -> None:
        story, device = self._world.story, self._world.driver.devices.get(0)
        live = device is not None and device.state is DevState.LIVE
        if record is None:
            if device is not None and device.state is not DevState.DEAD:
                self._break(f"the device is {device.state.name}, and forgotten")
            elif not (self._world.forgiven or story.mode is RecoveryMode.NONE):
                self._break("the device is gone, and nobody stopped it")
            return
        if record.phase is Phase.WATCHING:
            assert device is not None
            serves = holder(device)
            if not live or serves is None or record.server != serves.id:
                state, where = device.state.name, f"held by {serves}"
                self._break(f"WATCHING {record.server}, but the device is {state}, {where}")
            return
        if record.phase is Phase.OBSERVED:
            if record.reason not in story.observes:
                self._break(f"OBSERVED: {record.reason}")
            return
        self._gave_up(record)

    def _gave_up(self, record: Record) -> None:
        story = self._world.story
        if record.phase is not Phase.FAILED or record.reason is None:
            self._break(f"it rests in {record.phase}")
        elif record.reason in (Reason.HOLD_TIMEOUT, Reason.SHUTDOWN, Reason.HELD):
            if not record.stopped:
                self._break(f"FAILED: {record.reason.name}")
        elif record.reason in _MAY_FAIL:
            half = story.generation is Generation.G2 and story.way == "delegated"
            early = record.stopped and self._world.policy.hold_timeout_s
            if len(record.failures) < self._world.policy.attempts_max and not (half or early):
                self._break(f"FAILED after {len(record.failures)} failures: {record.reason}")
        elif record.reason not in story.reasons:
            self._break(f"FAILED: {record.reason.name} ({record.detail})")

    def _io(self) -> None:
        """With REISSUE no request is lost; nor ever one that was never in a dead server's hands."""
        world, device = self._world, self._world.device
        io = device.io
        in_server = sum(len(queue.in_server) for queue in device.queues)
        if io.issued != io.completed + io.failed + len(io.waiting) + in_server:
            self._break(f"requests were lost from sight: {io}")
        if io.failed and world.story.mode is RecoveryMode.REISSUE and not world.stopped:
            self._break(f"{io.failed} requests failed on a REISSUE device that nobody stopped")
        good = device.state is DevState.LIVE and (serves := holder(device)) is not None
        if good and serves is not None and not serves.silent and (io.waiting or in_server):
            self._break(f"LIVE, but {len(io.waiting)} wait and {in_server} are unanswered")
