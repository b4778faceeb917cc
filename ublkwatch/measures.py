"""Every metric, declared once: its name, type, labels, what it means, how stable it is. Pure.

docs/metrics.md is made from this. Labels are closed sets but for ``device``, which is the disk's
name as node_exporter has it, and for what an info says: never a pid, a path or a text. Histograms
have no device: 500 devices would make 10,000 series of each.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum

from ublkwatch.model import UNKNOWN, Ailment, Phase, RecoveryMode, errno_name
from ublkwatch.uapi import Cmd, DevState

PREFIX = "ublkwatch_"


class Kind(Enum):
    """What Prometheus calls a type; an info is a gauge that is always 1."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"


class Stability(Enum):
    """What may become of a metric in the next minor version."""

    STABLE = "stable"  # name, type and labels stay; a label may have new values
    EXPERIMENTAL = "experimental"  # anything may change, and CHANGELOG.md will say so


@dataclass(frozen=True, slots=True)
class Label:
    """A label; without values it is open."""

    name: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric. ``name`` lacks the prefix, and a counter's has no _total."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[Label, ...] = ()
    stability: Stability = Stability.STABLE
    buckets: tuple[float, ...] = ()

    @property
    def exposed(self) -> str:
        """Return the name in the exposition; a histogram's without its suffixes."""
        tail = {Kind.COUNTER: "_total", Kind.INFO: "_info"}.get(self.kind, "")
        return f"{PREFIX}{self.name}{tail}"

    @property
    def of_devices(self) -> bool:
        """Tell whether each device has series of its own."""
        return DEVICE in self.labels


# --- closed sets ---------------------------------------------------------------------------------

STATES = ("live", "quiesced", "fail_io", "dead", UNKNOWN)  # unknown: a newer kernel's
PHASES = tuple(phase.value for phase in Phase if phase is not Phase.GONE)
# Those that an outage goes through; it may rest in FAILED for ever.
OUTAGE_PHASES = tuple(
    phase.value
    for phase in Phase
    if phase not in (Phase.OBSERVED, Phase.WATCHING, Phase.FAILED, Phase.GONE)
)
AILMENTS = tuple(ailment.value for ailment in Ailment)
SOURCES = ("pidfd", "poll", "startup", *AILMENTS)
CAUSES = ("signal", "exit", "oom_kill", *AILMENTS, UNKNOWN)
RESULTS = ("success", "gave_up", "by_others", "left_alone")
STANDBYS = ("starting", "waiting", "ending", "missing")
STARTS = ("standby", "cold")
PUBLICATIONS = ("record", "spec", "status", "event", "history", "log")
COLLECTORS = ("supervisor", "devices", "process")
GENERATIONS = ("G2", "G3", "UNKNOWN")
OK, OTHER = "ok", "other"
COMMANDS = tuple(
    command.name
    for command in (
        *(Cmd.GET_FEATURES, Cmd.GET_DEV_INFO, Cmd.GET_PARAMS, Cmd.GET_QUEUE_AFFINITY),
        *(Cmd.START_USER_RECOVERY, Cmd.END_USER_RECOVERY, Cmd.STOP_DEV, Cmd.TRY_STOP_DEV),
    )
)
ANSWERS = (
    OK,
    *(
        errno_name(code)
        for code in (
            *(errno.EPERM, errno.ENOENT, errno.EINTR, errno.EIO, errno.EACCES, errno.EBUSY),
            *(errno.ENODEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ETIMEDOUT),
        )
    ),
    OTHER,
)

DEVICE = Label("device")
_RECOVERY_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 120, 300),
)
_FINE_BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30),
)
_POLL_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)

# --- the metrics ---------------------------------------------------------------------------------


def _declared() -> tuple[Measure, ...]:
    counter, gauge, histogram, info = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM, Kind.INFO
    experimental = Stability.EXPERIMENTAL
    modes = tuple(mode.value for mode in RecoveryMode)
    handoffs = ("managed", "delegated", "")
    return (
        Measure("build", info, "This program.", (Label("version"),)),
        Measure(
            "kernel",
            info,
            "The kernel, the rules that its ublk driver follows (docs/kernel.md), and the feature "
            "bits of the driver, in hexadecimal; none where it cannot say.",
            (Label("release"), Label("generation", GENERATIONS), Label("features")),
        ),
        # devices
        Measure(
            "devices", gauge, "Devices, by what the kernel says of them.", (Label("state", STATES),)
        ),
        Measure(
            "device",
            info,
            "What the device is: what its flags promise for I/O when its server dies, and who "
            "sends the recovery commands; empty where nothing says how to start its server.",
            (DEVICE, Label("dev_id"), Label("recovery_mode", modes), Label("handoff", handoffs)),
        ),
        Measure(
            "device_state",
            gauge,
            "1 for the state that the kernel reports, 0 for the others.",
            (DEVICE, Label("state", STATES)),
        ),
        Measure(
            "device_phase",
            gauge,
            "1 for the phase that ublkwatch is in with the device, 0 for the others "
            "(docs/recovery.md).",
            (DEVICE, Label("phase", PHASES)),
        ),
        Measure("device_managed", gauge, "Whether a rule says how to start its server.", (DEVICE,)),
        Measure(
            "device_recoverable",
            gauge,
            "Whether it was created with UBLK_F_USER_RECOVERY.",
            (DEVICE,),
        ),
        Measure(
            "device_held",
            gauge,
            "Whether an operator holds it, so that nothing is begun or ended.",
            (DEVICE,),
        ),
        Measure(
            "device_attempts_left",
            gauge,
            "Failed attempts until it is given up; only of managed devices.",
            (DEVICE,),
        ),
        Measure(
            "device_ailing",
            gauge,
            "Whether I/O hangs in the server of a device that is LIVE, by what ails it.",
            (DEVICE, Label("ailment", AILMENTS)),
            experimental,
        ),
        Measure("server_up", gauge, "Whether the device has a server that is alive.", (DEVICE,)),
        Measure(
            "server_start_time_seconds",
            gauge,
            "When the present server was started, in seconds since the epoch; where there is one.",
            (DEVICE,),
        ),
        Measure(
            "device_state_change_timestamp_seconds",
            gauge,
            "Since when the device is in its phase, in seconds since the epoch.",
            (DEVICE,),
        ),
        Measure(
            "device_unavailable_seconds",
            counter,
            "Time in which nobody served the device, from the detection on; advances while it is "
            "down. Of recoverable devices; one whose server hangs is not down.",
            (DEVICE,),
        ),
        Measure(
            "device_last_held_seconds",
            gauge,
            "How long I/O was held at the last recovery, from the detection to LIVE; once there "
            "was one.",
            (DEVICE,),
        ),
        # outages
        Measure(
            "server_losses",
            counter,
            "Outages, by what showed that the server was lost: its end, the kernel's state, the "
            "first look after our start, or what it was ended for.",
            (DEVICE, Label("source", SOURCES)),
        ),
        Measure(
            "server_loss_causes",
            counter,
            "Outages that are over or were given up, by why the server had been lost.",
            (Label("cause", CAUSES),),
            experimental,
        ),
        Measure(
            "recoveries",
            counter,
            "Outages by how they ended: success, gave_up, brought back by_others, or left_alone: "
            "by order, or as other rules want it.",
            (DEVICE, Label("result", RESULTS)),
        ),
        Measure(
            "recovery_attempt_failures",
            counter,
            "Attempts to start and attach a server that failed.",
            (DEVICE,),
        ),
        Measure(
            "servers_ended",
            counter,
            "Servers that were ended because I/O hung in them, by what ailed them.",
            (DEVICE, Label("ailment", AILMENTS)),
            experimental,
        ),
        Measure(
            "device_stalls",
            counter,
            "How often I/O was found to hang in the server of a device that is LIVE.",
            (DEVICE,),
            experimental,
        ),
        Measure(
            "recovery_duration_seconds",
            histogram,
            "From the detection of a lost server to LIVE under a new one.",
            buckets=_RECOVERY_BUCKETS,
        ),
        Measure(
            "recovery_phase_duration_seconds",
            histogram,
            "Time spent in each phase of an outage, each time that it was left.",
            (Label("phase", OUTAGE_PHASES),),
            experimental,
            _FINE_BUCKETS,
        ),
        Measure(
            "recovery_starts",
            counter,
            "Recoveries that succeeded, by whether the new server had waited as a standby, or was "
            "started when the old one was lost.",
            (Label("start", STARTS),),
            experimental,
        ),
        Measure(
            "standbys",
            gauge,
            "Servers started beforehand, by their state; missing: there shall be one, and is none.",
            (Label("state", STANDBYS),),
            experimental,
        ),
        # the way to the driver
        Measure(
            "control_commands",
            counter,
            "Control commands by their answer: ok, or an errno. START_USER_RECOVERY is one "
            "however often it was sent again while EBUSY; ETIMEDOUT: none came in time.",
            (Label("command", COMMANDS), Label("result", ANSWERS)),
        ),
        Measure(
            "control_command_duration_seconds",
            histogram,
            "Time until a control command was answered, or not waited for any more; a poll asks "
            "GET_DEV_INFO of all devices at once, which is one.",
            (Label("command", COMMANDS),),
            experimental,
            _FINE_BUCKETS,
        ),
        Measure(
            "control_commands_wedged",
            gauge,
            "Control commands that were not answered in time, and are still with the kernel.",
        ),
        Measure(
            "control_workers_retired",
            counter,
            "Control workers given up because a command of theirs was not answered in time.",
        ),
        # the supervisor
        Measure(
            "publications_dropped",
            counter,
            "What could not be written, or came faster than it could be; a record is tried again, "
            "and nothing is done for its device until then.",
            (Label("kind", PUBLICATIONS),),
        ),
        Measure(
            "poll_last_success_timestamp_seconds",
            gauge,
            "When all devices were last looked at with success, in seconds since the epoch; 0: "
            "never yet.",
        ),
        Measure(
            "poll_duration_seconds",
            histogram,
            "Time that a look at all devices took.",
            buckets=_POLL_BUCKETS,
        ),
        Measure(
            "poll_errors",
            counter,
            "Looks at all devices of which some failed; those at unprivileged devices do not "
            "count, which are not readable for us.",
        ),
        Measure(
            "config_last_reload_successful",
            gauge,
            "Whether the configuration could be read when it was last read anew; 1 from the start.",
        ),
        Measure(
            "config_last_reload_success_timestamp_seconds",
            gauge,
            "When the configuration of now was read, in seconds since the epoch.",
        ),
        Measure(
            "event_loop_lag_seconds",
            gauge,
            "By how much a poll was late, at most, in the last minute: the event loop had not run.",
            (),
            experimental,
        ),
        Measure(
            "scrapes_refused",
            counter,
            "Clients of this page that were turned away for the sake of newer ones.",
        ),
        Measure(
            "collector_success",
            gauge,
            "Whether these metrics could be collected; 0: they are missing, and the log says why.",
            (Label("collector", COLLECTORS),),
        ),
    )


MEASURES = {each.name: each for each in _declared()}


def state_of(state: DevState | int) -> str:
    """Return the value of a ``state`` label."""
    name = state.name.lower() if isinstance(state, DevState) else UNKNOWN
    return name if name in STATES else UNKNOWN


def answer_of(error: int) -> str:
    """Return the value of a control command's ``result`` label: 0 or an errno."""
    name = errno_name(error) if error else OK
    return name if name in ANSWERS else OTHER
