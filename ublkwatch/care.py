"""Care: what starts a device's server, as whom, under which limits, and whose choice that was.

Pure data; nothing here acts. What the kernel and /proc know (the queue config, the origin) is read
and kept, never typed; what an operator or a profile says is a Care, found anew for each device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter

from ublkwatch.model import Policy, QueueConfig, ServerId


@dataclass(frozen=True, slots=True)
class Origin:
    """What the server of a device was when the device was last LIVE; read from /proc."""

    exe: str = ""  # /proc/PID/exe; "" where it could not be read
    name: str = ""  # /proc/PID/comm
    uid: int = 0  # effective
    gid: int = 0
    groups: tuple[int, ...] = ()
    cgroup: str = ""  # its path in the unified hierarchy; "" where there is none
    foreign_ns: bool = False  # its pid or mount namespace is not ours: a container's


@dataclass(frozen=True, slots=True)
class Spec:
    """What was learnt of a device while it was LIVE, and a new server needs: kept for its life."""

    dev_id: int
    instance: str
    queue: QueueConfig
    origin: Origin | None = None  # None: not seen yet


@dataclass(frozen=True, slots=True)
class Run:
    """How a server's process is started. What is empty is left as it is."""

    user: str = ""  # "": the user (and groups) that the lost server had
    cwd: str = "/"
    env: tuple[tuple[str, str], ...] = ()
    limits: tuple[tuple[str, str], ...] = ()  # ("nofile", "1024:4096"), names as in setrlimit(2)
    oom_score_adj: int | None = -900  # whose server is lost, waits; None: as it is
    cpus: tuple[int, ...] = ()  # CPU affinity
    unit: str = ""  # systemd owns the command: this unit is started


@dataclass(frozen=True, slots=True)
class Care:
    """How one device is kept alive."""

    command: tuple[str, ...]  # starts its server, or recovers it by itself (delegated)
    policy: Policy = field(default_factory=Policy)
    decider: tuple[str, ...] = ()  # the command of Exhausted.EXEC
    hook: tuple[str, ...] = ()  # pre_recover: exit 0 go, 75 later, 78 park
    hook_timeout_s: float = 10.0
    run: Run = Run()
    name: str = ""  # of the server, for people and for units
    group: str = ""  # devices of one group are served by one process
    priority: int = 0  # of several lost at once, the highest is started first
    keep: tuple[str, ...] = ()  # files that a failed recover command loses: kept, and restored
    standby: bool = False  # the next server is started beforehand, and waits for its line
    # Who says so: the configuration, a registration, a profile.
    source: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Job:
    """One process to start: a Care with its placeholders filled, for one device or a group."""

    name: str
    command: tuple[str, ...]
    run: Run = Run()
    origin: Origin = Origin()  # whom it runs as, where ``run.user`` says nothing
    spare: bool = False  # started to wait, beside one of the same name that serves


@dataclass(frozen=True, slots=True)
class Standby:
    """A server that was started beforehand: what our successor has to know of it."""

    tag: str  # names its home, and its processes
    name: str  # of its job: whose it is, a device's or a group's
    dev_id: int  # the device, or the first of the group
    job: str  # what was started: a fingerprint
    program: str = ""  # which file was executed: likewise
    server: ServerId | None = None  # None: nobody knows yet whether there is one
    ready: bool = False  # it waits for its line


@dataclass(frozen=True, slots=True)
class StandbyShown:
    """What is shown of a device's standby."""

    state: str  # one of measures.STANDBYS
    pid: int | None = None
    note: str = ""  # why there is none, where that is known


ALWAYS = ("dev_id", "char_dev", "name")  # others are known once the device was seen LIVE
PLACEHOLDERS = (*ALWAYS, "queues", "depth", "max_io_buf_bytes")


def unknown_placeholder(word: str, known: tuple[str, ...] = PLACEHOLDERS) -> str | None:
    """Return what is wrong with a word of an argv, or None."""
    try:
        fields = list(Formatter().parse(word))
    except ValueError as error:
        return f"{word!r}: {error}; a brace that is meant is written twice"
    for _, name, spec, conversion in fields:
        if name is not None and (name not in known or spec or conversion):
            names = ", ".join(f"{{{each}}}" for each in known)
            return f"{word!r}: {{{name}}} is none of {names}"
    return None


def filled(argv: tuple[str, ...], values: Mapping[str, str | int]) -> tuple[str, ...]:
    """Fill the placeholders of an argv that was checked."""
    return tuple(word.format_map(values) for word in argv)
