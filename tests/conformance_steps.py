"""What a row of the conformance table is made of: conformance.py has the stage it runs on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from ublkwatch.model import Generation
from ublkwatch.uapi import DevFlags

# How far a server attaches. Each includes those before it.
How = Literal[
    "nothing",  # it runs, and has nothing of the device
    "opened",  # /dev/ublkcN is open
    "mapped",  # ... and the descriptors of every queue are mapped
    "some tags",  # ... and queue 0's first tag is fetched, of at least two
    "one queue",  # ... and all of queue 0's tags are, of at least two queues
    "all",  # ... and every tag of every queue
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class By(Generic[T]):
    """What each generation answers."""

    g2: T
    g3: T


# "0", an errno's name, "waits" (no answer within patience); "A|B" where both are right.
Says = str | By[str]
REISSUE = DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_REISSUE
# What Add.granted is about; the driver also grants what nobody asked for.
JUDGED = REISSUE | DevFlags.USER_RECOVERY_FAIL_IO | DevFlags.UNPRIVILEGED_DEV


@dataclass(frozen=True, slots=True)
class Add:
    """ADD_DEV with these flags and, if it says "0", parameters for a small disk."""

    flags: DevFlags = REISSUE
    queues: int = 1
    depth: int = 2
    says: Says = "0"
    granted: DevFlags | By[DevFlags] | None = None  # those of JUDGED; None: as asked for


@dataclass(frozen=True, slots=True)
class Serve:
    """A server of that name starts and attaches so far; or: another process opens (and holds)."""

    name: str
    how: How = "all"
    says: Says = "0"


@dataclass(frozen=True, slots=True)
class Attach:
    """A server goes on to attach."""

    name: str
    how: How = "all"
    says: Says = "0"


@dataclass(frozen=True, slots=True)
class Hush:
    """A server keeps its requests from now on."""

    name: str


@dataclass(frozen=True, slots=True)
class Fork:
    """A process forks a child that inherits the character device."""

    name: str
    child: str


@dataclass(frozen=True, slots=True)
class Close:
    """A process lets go, and lives on."""

    name: str
    what: Literal["rings", "device"] = "device"


@dataclass(frozen=True, slots=True)
class Kill:
    """A process is killed and reaped."""

    name: str


@dataclass(frozen=True, slots=True)
class Tell:
    """A control command is sent, and answered so.

    Unless EBUSY is what is expected, START_USER_RECOVERY is sent again while it says so: the kernel
    is then still letting go of a process that has ended.
    """

    command: str
    says: Says = "0"
    pid: str = ""  # data[0]: the pid of a process of that name; "init" is 1
    label: str = ""  # what Later and Cancel call it, if not by its command


@dataclass(frozen=True, slots=True)
class Read:
    """A block is read from the disk, with that outcome."""

    label: str
    says: Says = "0"


@dataclass(frozen=True, slots=True)
class Later:
    """What was waiting is now answered so, or waits on."""

    label: str
    says: Says


@dataclass(frozen=True, slots=True)
class Cancel:
    """What waits is cancelled."""

    label: str


@dataclass(frozen=True, slots=True)
class Shows:
    """GET_DEV_INFO comes to show this state and pid (a name, "-1"); ``stays``: and keeps to it."""

    state: Says
    pid: Says | None = None
    stays: bool = False


@dataclass(frozen=True, slots=True)
class Only:
    """Steps for one generation alone."""

    generation: Generation
    steps: tuple[Step, ...]


Step = (
    Add | Serve | Attach | Hush | Fork | Close | Kill | Tell | Read | Later | Cancel | Shows | Only
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One scene. ``law`` is what the recovery machine relies on; the rest is worth knowing."""

    name: str
    source: str  # the section of the driver research, or of docs/kernel.md, that says so
    steps: tuple[Step, ...]
    generations: tuple[Generation, ...] = (Generation.G2, Generation.G3)
    law: bool = True
    own_boot: bool = False  # it wedges the kernel or takes very long: not in an ordinary run
    complains: str = ""  # a pattern: what the kernel may log meanwhile
    note: str = ""

    def uses(self, kind: type) -> bool:
        """Return whether a step of that kind is in it."""
        return any(isinstance(step, kind) for step in _flat(self.steps))


def _flat(steps: tuple[Step, ...]) -> Iterator[Step]:
    for step in steps:
        if isinstance(step, Only):
            yield from _flat(step.steps)
        else:
            yield step


# --- what rows begin and end with -------------------------------------------------------------

G2, G3 = Generation.G2, Generation.G3
PLAIN = DevFlags.USER_RECOVERY
FAIL_IO = DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_FAIL_IO
START, END, STOP, DELETE = "START_USER_RECOVERY", "END_USER_RECOVERY", "STOP_DEV", "DEL_DEV"
# What Linux 6.12's ublk_uring_cmd_cancel_fn(), mostly inlined, says of a queue fetched in part.
PARTIAL = r"WARNING:.* ublk_(ch_uring_cmd|uring_cmd_cancel_fn)\b"

# What Linux 6.12's ublk_queue_reinit(), inlined, says once a boot when START finds that the former
# server has let go of the device and lives; START is accepted all the same.
ALIVE = r"WARNING:.* ublk_ctrl_uring_cmd\b"


def live(flags: DevFlags = REISSUE, queues: int = 1) -> tuple[Step, ...]:
    """Return the steps to a device that is LIVE under the server "old"."""
    return (
        Add(flags, queues, granted=By(flags & ~DevFlags.USER_RECOVERY_FAIL_IO, flags)),
        Serve("old"),
        Tell("START_DEV", pid="old"),
        Shows("LIVE", "old"),
    )


def crashed(flags: DevFlags = REISSUE, queues: int = 1) -> tuple[Step, ...]:
    """Return the steps to a device whose server "old" was killed."""
    state = By("QUIESCED", "FAIL_IO") if flags == FAIL_IO else "QUIESCED"
    return (*live(flags, queues), Kill("old"), Shows(state, By("old", "-1")))


def back(server: str) -> tuple[Step, ...]:
    """Return the steps by which a new server, once START has been accepted, makes it LIVE."""
    return (Serve(server), Tell(END, pid=server), Shows("LIVE", server))
