"""The nouns: device, server, phase, record, policy. Pure data; nothing here acts.

Kernel words keep the kernel's spelling and meaning (device, server, state, queue, depth); phase,
record, policy, spec and attempt are ours (ARCHITECTURE.md has the list). All times called ``now``,
``since``, ``deadline`` or ``wake`` are seconds of CLOCK_MONOTONIC; wall times are called so.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, fields
from enum import Enum, IntEnum

from ublkwatch.uapi import DevFlags, DevState

# The environment variable by which the processes of an attempt are found again.
TAG_VARIABLE = "UBLKWATCH_ATTEMPT"
# How the tags of standbys begin; an attempt's begins with its device's number.
STANDBY_TAG = "s-"
# How a process ended, where nobody can tell.
UNKNOWN = "unknown"

# --- what there is -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DevInfo:
    """What GET_DEV_INFO says of a device (``struct ublksrv_ctrl_dev_info``)."""

    dev_id: int
    state: DevState | int  # a bare int is a state that this version does not know
    flags: DevFlags
    nr_hw_queues: int
    queue_depth: int
    max_io_buf_bytes: int
    ublksrv_pid: int
    ublksrv_flags: int = 0
    owner_uid: int = 0
    owner_gid: int = 0


@dataclass(frozen=True, slots=True, order=True)
class ServerId:
    """A process, not just a number: a pid means nothing without its start time and its boot."""

    pid: int
    start_ticks: int  # /proc/PID/stat, field 22: clock ticks since boot
    boot_id: str


class Generation(IntEnum):
    """Which rules the driver follows (docs/kernel.md). Told apart by feature bits, never uname."""

    UNKNOWN = 0  # no GET_FEATURES: ublkwatch observes and does not act
    G2 = 2  # Linux 6.7-6.14: START is one-shot; a server that dies half attached wedges the device
    G3 = 3  # Linux 6.15 on: START is idempotent, the character device's release resets everything

    @classmethod
    def of(cls, features: DevFlags | None) -> Generation:
        """Judge GET_FEATURES: G2 masks ZERO_COPY out (6.12: ublk_drv.c:2914), G3 reports it."""
        if features is None:
            return cls.UNKNOWN
        return cls.G3 if features & DevFlags.SUPPORT_ZERO_COPY else cls.G2


class RecoveryMode(Enum):
    """What the device's flags promise for I/O when its server dies (docs/kernel.md)."""

    NONE = "none"  # the disk is removed
    PLAIN = "recovery"  # in flight: EIO; issued meanwhile: waits
    REISSUE = "reissue"  # in flight: sent again; issued meanwhile: waits
    FAIL_IO = "fail_io"  # in flight: EIO; issued meanwhile: EREMOTEIO at once

    @classmethod
    def of(cls, flags: DevFlags) -> RecoveryMode:
        """Read it from the flags that the kernel granted, never from those that were asked for."""
        if not flags & DevFlags.USER_RECOVERY or flags & DevFlags.UNPRIVILEGED_DEV:
            return cls.NONE  # the driver strips recovery from unprivileged devices
        if flags & DevFlags.USER_RECOVERY_FAIL_IO:
            return cls.FAIL_IO
        return cls.REISSUE if flags & DevFlags.USER_RECOVERY_REISSUE else cls.PLAIN


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """What a new server must serve: fixed for the device's life, read from the kernel."""

    nr_hw_queues: int
    queue_depth: int
    max_io_buf_bytes: int
    flags: int
    params: dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the block layer counts of a disk: /sys/block/*/inflight and stat (its documentation)."""

    inflight: int  # requests that were begun and wait for their end
    completed: int  # requests ever, however they ended
    parked: int = 0  # of those in flight, the ones that the driver does not count among its own


# --- what we make of it --------------------------------------------------------------------------


class Phase(Enum):
    """Where a device stands in our machine; recovery.py has the rules."""

    OBSERVED = "observed"  # not ours to act on; the reason says why
    WATCHING = "watching"  # LIVE under a server that we watch
    GRACE = "grace"  # server lost: others may bring it back, for a while
    HELD = "held"  # server lost, and nothing is done until somebody releases the device
    DRAINING = "draining"  # server lost: the kernel lets go of it while the new one starts
    STARTING = "starting"  # START_USER_RECOVERY is with the kernel
    ATTACHING = "attaching"  # the new server has its line, END_USER_RECOVERY waits for it
    PROBATION = "probation"  # LIVE again; believed after a second look
    STOPPING = "stopping"  # an attempt is being ended: its processes, its END
    BACKOFF = "backoff"  # waiting before the next attempt
    DECIDING = "deciding"  # gave up; the operator's command says what to make of it
    FAILING = "failing"  # gave up; STOP_DEV ends the I/O that waits
    FAILED = "failed"  # gave up; the reason says why, docs/recovery.md what to do
    GONE = "gone"  # stopped or deleted: the record is forgotten


class Reason(Enum):
    """Why a device is not simply watched. Each has a section in docs/recovery.md."""

    NO_RECOVERY_FLAG = "not recoverable: created without UBLK_F_USER_RECOVERY"
    NO_SPEC = "unmanaged: nothing says how to start its server; `ublkwatch register` does"
    FOREIGN = "its server is in a container or under a unit that somebody else restarts"
    UNTRUSTED = "what would be run for it is not safe to run as root"
    NO_FEATURES = "the driver has no GET_FEATURES (before Linux 6.5): observing only"
    NEVER_SEEN_LIVE = "it had lost its server before ublkwatch first saw it"
    NO_VISIBLE_SERVER = "LIVE, but no process that we can see serves it (another pid namespace?)"
    UNKNOWN_STATE = "the kernel reports a state that this version does not know"
    FORGOTTEN = "ublkwatch was told to forget this device"
    GRACE = "its server is lost; others may bring it back before ublkwatch does"
    HELD = "held: nothing is done until it is released"
    SHUTDOWN = "the host shuts down: nothing is recovered"
    SPAWN_FAILED = "the server could not be started"
    HOOK_LATER = "the pre_recover command says: later"
    HOOK_FAILED = "the pre_recover command failed"
    HOOK_PARKED = "the pre_recover command says that it must not be recovered"
    STANDBY_LOST = "the standby ended before it was given its line; a new server is started"
    DIED_BEFORE_READY = "the server ended before it was ready"
    PERMANENT_EXIT = "the server's exit code says that another attempt cannot help"
    NOT_READY = "the server was not ready in time"
    NOT_QUIESCED = "the kernel did not let go of the old server in time"
    CHAR_DEVICE_BUSY = "START_USER_RECOVERY: EBUSY, somebody holds the character device open"
    START_REFUSED = "START_USER_RECOVERY was refused"
    START_INTERRUPTED = "START_USER_RECOVERY was interrupted"
    NO_ANSWER = "a control command was not answered in time"
    DIED_ATTACHING = "the server died while it attached"
    ATTACH_TIMEOUT = "the server did not attach in time"
    END_REFUSED = "END_USER_RECOVERY was refused"
    DELEGATE_FAILED = "the server's own recover command did not bring the device back"
    DELEGATE_DELETED = "the device was deleted while its own recover command ran"
    DIED_IN_PROBATION = "the server died right after the device was LIVE"
    SHARED_SERVER = "its server serves other devices too, and was not ended for this one's sake"
    HALF_ATTACHED = "a server died half attached: on this kernel only STOP_DEV frees the device"
    LIVE_WITHOUT_SERVER = "LIVE, but its server is dead: on this kernel only STOP_DEV frees it"
    HOLD_TIMEOUT = "I/O had waited as long as it may: hold_timeout_s"
    INTERNAL_ERROR = "a bug in ublkwatch; the log has the details"


class Armed(Enum):
    """What we know of START_USER_RECOVERY, which G2 takes once: saved before and after it."""

    NO = "no"
    SENT = "sent"  # it is with the kernel
    UNSURE = "unsure"  # it was sent, and no answer will come: we died, or the kernel is stuck
    YES = "yes"  # it returned 0


class Ailment(Enum):
    """What is wrong with a server whose process lives, which the kernel does not see."""

    DEAD_QUEUE = "dead_queue"  # a thread that it declared to serve a queue is gone
    STALL = "stall"  # it has requests and completes none


@dataclass(frozen=True, slots=True)
class Illness:
    """What ails the server of a device, and what was done about it."""

    kind: Ailment
    what: str  # for people
    since: float
    spared: str = ""  # which other device it serves that must not lose it now
    condemned: bool = False  # it was sent SIGKILL for that, or is about to be


@dataclass(frozen=True, slots=True)
class Loss:
    """How a server was lost, as far as that is known."""

    server: ServerId | None = None
    how: str = UNKNOWN  # for people: "SIGKILL", "exit status 1"; or what ailed it


class SpawnVerdict(Enum):
    """Why no server was started: what the launcher, or the pre_recover command, made of it."""

    FAILED = "failed"  # it could not be started
    HOOK_FAILED = "hook failed"  # pre_recover ended with an error, or was not done in time
    LATER = "later"  # pre_recover says: not now, and not anybody's fault
    PARK = "park"  # pre_recover says: not at all, until a person says otherwise


class Order(Enum):
    """What an operator may ask for; orders.py says when it is refused."""

    HOLD = "hold"  # keep the hands off, for a time or until RELEASE
    RELEASE = "release"  # end HOLD; what waits for us is taken up
    RETRY = "retry"  # a new budget for a device that was given up
    RECOVER = "recover"  # now: whatever we wait for, and also if we never saw it LIVE
    FORGET = "forget"  # not ours any more, until RECOVER or the device's next life


@dataclass(frozen=True, slots=True)
class Record:
    """All that the machine knows of one device; replaced whole, saved before its effects run."""

    dev_id: int
    instance: str  # names this life of the device: boot id and disk sequence number
    phase: Phase = Phase.OBSERVED
    reason: Reason | None = None
    detail: str = ""  # the reason's particulars, for people
    since: float = 0.0  # when the phase was entered
    wake: float | None = None  # when the machine wants to be asked again
    info: DevInfo | None = None  # the last answer of GET_DEV_INFO
    server: ServerId | None = None  # who serves, while somebody does
    candidate: ServerId | None = None  # the new server of this attempt
    seq: int = 0  # names an attempt; never used twice for a device
    spawned_at: float | None = None  # when its process was seen to exist; queued until then
    ready: bool = False  # the candidate said READY=1
    standby: bool = False  # the candidate, or who serves since, had been started beforehand
    holders: str = ""  # who has the character device open, where that is what we wait for
    agreed: int = 0  # reads in a row that said QUIESCED or FAIL_IO
    quiet_since: float | None = None  # the kernel has let go: since then holders are looked for
    free_since: float | None = None  # and none was found
    armed: Armed = Armed.NO
    lined: bool = False  # a server was let go at the device since START: on G2 half attached
    pending: bool = False  # this attempt's START or END is with the kernel
    over: bool = True  # no process of the attempt is left
    shared: bool = False  # its server lives for other devices' sake: nothing until that has ended
    ends: int = 0  # how often END was sent for this candidate
    then: Phase | None = None  # where STOPPING leads, if not to another attempt
    failures: tuple[float, ...] = ()  # when attempts failed: this recovery's, and recent ones
    attempts: int = 0  # of this recovery
    decisions: int = 0  # how often the operator's command was asked in this recovery
    held: bool = False  # an operator holds it
    held_until: float | None = None  # None: until RELEASE
    held_by: str = ""  # who holds it, and why
    give_up_at: float | None = None  # when its I/O will have waited as long as it may
    overdue: bool = False  # that time has passed
    ended: ServerId | None = None  # the last process that we saw end: who still names it is late
    refused: str = ""  # END's EBUSY, until the state has told what it means
    stopped: bool = False  # we sent STOP_DEV, and it was done
    ill: Illness | None = None  # what ails the server
    loss: Loss | None = None  # of the last server that was lost
    asked_by: str = ""  # which operator had this recovery begin
    detected_by: str = ""  # "pidfd", "poll", "startup"; or for what ailment we ended it
    marks: tuple[tuple[str, float], ...] = ()  # (phase entered, when) since the server was lost
    recoveries: int = 0
    last_held_s: float | None = None  # of the last recovery, from detection to LIVE

    def next_wake(self) -> float | None:
        """Return the earliest time at which the machine wants to be asked again."""
        times = [t for t in (self.wake, self.held_until, self.give_up_at) if t is not None]
        return min(times, default=None)


# --- what the machine is told besides facts ------------------------------------------------------


class Handoff(Enum):
    """Who speaks the recovery commands."""

    MANAGED = "managed"  # we send START and END, the server only attaches
    DELEGATED = "delegated"  # the server's own recover command sends both


class Attach(Enum):
    """When a managed server attaches."""

    LINE = "line"  # when it is given its line: it starts while the kernel still drains
    START = "start"  # as soon as it starts: it is started when START was accepted


class Exhausted(Enum):
    """What becomes of a device that was given up, whose I/O waits."""

    HOLD = "hold"  # it goes on waiting, and ublkwatch goes on saying so
    FAIL = "fail"  # STOP_DEV, once the server is known to be dead: I/O ends in errors
    EXEC = "exec"  # a command of the operator's decides


class Remedy(Enum):
    """What is done about a server that ails."""

    ALERT = "alert"  # it is said, and left to the operator
    KILL = "kill"  # SIGKILL, and the ordinary recovery


@dataclass(frozen=True, slots=True)
class Policy:
    """The operator's choices, the kernel's kind and the dice, for one device. Times in seconds."""

    generation: Generation = Generation.G3
    has_spec: bool = True  # somebody says how to start its server
    hands_off: Reason | None = None  # why not, without a spec: NO_SPEC, if nothing else is said
    hands_off_why: str = ""  # that reason's particulars, for people
    seen_live: bool = True  # this very device was LIVE under our eyes, now or in a former life
    shutting_down: bool = False  # the host is
    bystander: str = ""  # another device of an ailing server that must not lose it now
    chance: float = 1.0  # from 0 to 1, drawn anew for every attempt: the machine has no dice
    # What operators choose begins here.
    handoff: Handoff = Handoff.MANAGED
    attach: Attach = Attach.LINE
    stall_timeout_s: float = 30.0  # without any request completed while some wait; 0: not watched
    on_stall: Remedy = Remedy.ALERT
    on_dead_queue: Remedy = Remedy.KILL  # which nothing else can cure
    grace_s: float = 0.0  # before we act, for sites where others restart servers
    attempts_max: int = 5  # failed attempts in a recovery or within the window, then given up
    window_s: float = 60.0
    stable_s: float = 30.0  # LIVE for so long, and earlier failures are forgotten
    backoff_base_s: float = 0.2
    backoff_max_s: float = 10.0
    permanent_exits: frozenset[int] = frozenset({78})  # EX_CONFIG
    retry_exits: frozenset[int] = frozenset()  # of a delegate that sent nothing to the kernel
    on_exhausted: Exhausted = Exhausted.HOLD
    hold_timeout_s: float = 0.0  # how long I/O may wait before STOP_DEV; 0: for ever
    exec_timeout_s: float = 60.0  # for the operator's command
    decisions_max: int = 3  # how often that may ask for another try in one recovery
    hook_pause_s: float = 5.0  # until pre_recover is asked again that said: later
    queue_timeout_s: float = 600.0  # for a server to be started, while many are
    ready_timeout_s: float = 30.0  # from its start
    # Linux 6.12 needs its block layer's 30 s when the dead server held every tag of a queue.
    drain_timeout_s: float = 90.0
    start_timeout_s: float = 60.0  # for the character device to be free
    settle_s: float = 0.2  # from nobody being seen to have it open to a delegate's start on G2
    attach_timeout_s: float = 15.0
    stop_timeout_s: float = 30.0
    probation_s: float = 1.0
    drain_poll_s: float = 0.002
    drain_poll_max_s: float = 0.25
    holders_after_s: float = 2.0  # when waiting for the character device begins to need a reason


_FIELDS = tuple(field.name for field in fields(Policy))
CHOICES = _FIELDS[_FIELDS.index("handoff") :]


def errno_name(code: int) -> str:
    """Return an errno's name, or the number where it has none."""
    # Python calls number 95 ENOTSUP; the driver's source and everybody else EOPNOTSUPP.
    return "EOPNOTSUPP" if code == errno.EOPNOTSUPP else errno.errorcode.get(code, str(code))
