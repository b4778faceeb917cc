"""Facts and effects: what goes into the machine, and what comes out of it. Pure data."""

from __future__ import annotations

from dataclasses import dataclass

from ublkwatch.model import Ailment, DevInfo, Order, Record, ServerId, SpawnVerdict

# --- facts: past tense, the machine's only input -------------------------------------------------


@dataclass(frozen=True, slots=True)
class InfoRead:
    """GET_DEV_INFO answered. ``server`` is who ublksrv_pid is, if that process lives."""

    info: DevInfo
    instance: str
    server: ServerId | None


@dataclass(frozen=True, slots=True)
class InfoMissing:
    """There is no such device any more."""


@dataclass(frozen=True, slots=True)
class ServerExited:
    """A process that we watched has ended; ``how`` is for people ("unknown": not our child)."""

    server: ServerId
    how: str = "unknown"
    code: int | None = None  # its exit code, where it was our child and exited by itself


@dataclass(frozen=True, slots=True)
class ServerAils:
    """A server lives, and I/O hangs in it, since then."""

    server: ServerId
    kind: Ailment
    what: str  # for people
    since: float


@dataclass(frozen=True, slots=True)
class ServerWell:
    """Requests of a server that was stalled are completed again, or none is left."""

    server: ServerId


@dataclass(frozen=True, slots=True)
class Spawned:
    """The process of attempt ``seq`` exists, or a standby was taken for it."""

    seq: int
    server: ServerId
    standby: bool = False  # it had been started beforehand


@dataclass(frozen=True, slots=True)
class Ready:
    """The server of attempt ``seq`` said READY=1 and waits for its line."""

    seq: int


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    """No process of attempt ``seq`` was started; or one was (``ran``), and has ended already."""

    seq: int
    why: str
    verdict: SpawnVerdict = SpawnVerdict.FAILED
    ran: bool = False
    code: int | None = None  # of one that ran: its exit code, where that is known


@dataclass(frozen=True, slots=True)
class StartReplied:
    """START_USER_RECOVERY came back: 0, an errno, or ETIMEDOUT for no answer."""

    seq: int
    error: int


@dataclass(frozen=True, slots=True)
class EndReplied:
    """END_USER_RECOVERY came back: 0, an errno, or ETIMEDOUT for no answer."""

    seq: int
    error: int


@dataclass(frozen=True, slots=True)
class AttemptOver:
    """No process of attempt ``seq`` is left; ``unread``: its line was written and never read."""

    seq: int
    unread: bool = False


@dataclass(frozen=True, slots=True)
class AttemptShared:
    """The process of attempt ``seq`` (or of Kill) lives: it serves ``others``, which are fine."""

    seq: int
    server: ServerId
    others: str  # for people: "ublkb1, ublkb2"


@dataclass(frozen=True, slots=True)
class ServerFound:
    """Somebody looked which process of attempt ``seq`` has the character device open."""

    seq: int
    server: ServerId | None


@dataclass(frozen=True, slots=True)
class StopReplied:
    """STOP_DEV came back: 0, an errno, or ETIMEDOUT for no answer."""

    seq: int
    error: int


@dataclass(frozen=True, slots=True)
class Decided:
    """The operator's command ended; ``code`` is None where it was killed or could not be run."""

    seq: int
    code: int | None
    how: str = ""


@dataclass(frozen=True, slots=True)
class HoldersFound:
    """Somebody looked who has the character device open; ``who`` is for people."""

    seq: int
    who: str
    free: bool = False  # nobody has, as far as can be seen
    began: float = 0.0  # when the look began: CLOCK_MONOTONIC


@dataclass(frozen=True, slots=True)
class Woken:
    """The time that the record asked for has come."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """We were restarted; the record is from our former life, ``candidate`` found by its tag."""

    candidate: ServerId | None


@dataclass(frozen=True, slots=True)
class Asked:
    """An operator asks; ``until`` ends a HOLD, ``by`` says who asks, and why."""

    order: Order
    by: str = ""
    until: float | None = None


@dataclass(frozen=True, slots=True)
class ShutdownBegun:
    """The host shuts down."""


Event = (
    InfoRead
    | InfoMissing
    | ServerExited
    | ServerAils
    | ServerWell
    | Spawned
    | Ready
    | SpawnFailed
    | StartReplied
    | EndReplied
    | AttemptOver
    | AttemptShared
    | HoldersFound
    | ServerFound
    | StopReplied
    | Decided
    | Woken
    | Resumed
    | Asked
    | ShutdownBegun
)


# --- effects: wishes, imperative, performed by the monitor ---------------------------------------


@dataclass(frozen=True, slots=True)
class ReadInfo:
    """Send GET_DEV_INFO now."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Report this process's end, also when it has ended already."""

    server: ServerId


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start the server of attempt ``seq``."""

    seq: int


@dataclass(frozen=True, slots=True)
class SendStart:
    """Send START_USER_RECOVERY; EBUSY is retried within a bound and answered once."""

    seq: int


@dataclass(frozen=True, slots=True)
class WriteLine:
    """Give the server of attempt ``seq`` its line: the go."""

    seq: int


@dataclass(frozen=True, slots=True)
class SendEnd:
    """Send END_USER_RECOVERY for that server."""

    seq: int
    pid: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Interrupt this attempt's command that is with the kernel; its reply still comes."""

    seq: int


@dataclass(frozen=True, slots=True)
class EndAttempt:
    """SIGKILL every process of attempt ``seq``; AttemptOver when none is left.

    None is killed that serves other devices, which are fine: AttemptShared says so.
    """

    seq: int


@dataclass(frozen=True, slots=True)
class FindHolders:
    """Look who has the character device open; on G2 a delegate waits until nobody has."""

    seq: int


@dataclass(frozen=True, slots=True)
class FindServer:
    """Look which process of attempt ``seq`` has the character device open."""

    seq: int


@dataclass(frozen=True, slots=True)
class SendStop:
    """Send STOP_DEV: whatever I/O waits ends in errors, and the disk is removed."""

    seq: int


@dataclass(frozen=True, slots=True)
class Decide:
    """Run the operator's command that decides about a device that was given up."""

    seq: int


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL this process; its ServerExited follows.

    With ``sparing``, an attempt's number, one that serves other devices, which are fine, is left
    alone: AttemptShared of that number says so.
    """

    server: ServerId
    sparing: int | None = None


Effect = (
    ReadInfo
    | Watch
    | Spawn
    | SendStart
    | WriteLine
    | SendEnd
    | Cancel
    | EndAttempt
    | FindHolders
    | FindServer
    | SendStop
    | Decide
    | Kill
)


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of phase: the one fact that log, metrics, history and status are made from."""

    wall: float  # seconds since the epoch
    now: float
    before: Record
    after: Record
    event: str
    effects: tuple[Effect, ...] = ()
