"""What systemd is asked to make: a server's service, and a control worker's scope.

Nothing here is stopped when the host goes down: file systems are unmounted through their servers,
which end with all that is left, in systemd's last round. A slice of our own would not do: unless
there is a file that describes it, systemd stops it with the host, and first all that is in it.
"""

from __future__ import annotations

import signal
from typing import Any

from ublkwatch.care import Job, Run
from ublkwatch.identity import Identity

Properties = list[tuple[str, tuple[str, Any]]]

SLICE = "system.slice"  # is never stopped
_SCOPE_STOP_US = 1_000_000
_INFINITY = (1 << 64) - 1
_STAYS: tuple[str, tuple[str, Any]] = ("DefaultDependencies", ("b", False))


def scope(pid: int) -> Properties:
    """Return the scope of a control worker."""
    return [
        ("PIDs", ("au", [pid])),
        ("Description", ("s", "control worker of ublkwatch")),
        ("Slice", ("s", SLICE)),
        _STAYS,
        ("CollectMode", ("s", "inactive-or-failed")),
        # It ends with us; one in uninterruptible sleep does not by any signal.
        ("TimeoutStopUSec", ("t", _SCOPE_STOP_US)),
    ]


def service(
    job: Job, identity: Identity, environment: dict[str, str], stdin: int, start_s: float
) -> Properties:
    """Return a server's service; ``start_s`` is the time for exec."""
    run = job.run
    properties: dict[str, tuple[str, Any]] = {
        "Description": ("s", f"ublk server {job.name}"),
        "Type": ("s", "exec"),
        # A recover command may exit 0 and leave the server behind: that is no end of the unit.
        "RemainAfterExit": ("b", True),
        "ExecStart": ("a(sasb)", [(job.command[0], list(job.command), False)]),
        "Slice": ("s", SLICE),
        "KillMode": ("s", "control-group"),
        "KillSignal": ("i", int(signal.SIGKILL)),  # SIGTERM makes most servers remove the disk
        "SendSIGHUP": ("b", False),
        "IgnoreSIGPIPE": ("b", False),
        "TimeoutStartUSec": ("t", int(start_s * 1e6)),
        "WorkingDirectory": ("s", run.cwd),
        "Environment": ("as", [f"{name}={value}" for name, value in environment.items()]),
        "StandardInputFileDescriptor": ("h", stdin),
        "StandardOutput": ("s", "journal"),
        "StandardError": ("s", "journal"),
        "SyslogIdentifier": ("s", job.name),
        "CollectMode": ("s", "inactive"),
        "AddRef": ("b", True),  # what exited 0 is not forgotten before it was asked for
    }
    if (identity.uid, identity.gid, identity.groups) != (0, 0, ()):
        properties["User"] = ("s", str(identity.uid))
        properties["Group"] = ("s", str(identity.gid))
        properties["SupplementaryGroups"] = ("as", [str(group) for group in identity.groups])
    return [*(properties | _limits(run)).items(), _STAYS]


def _limits(run: Run) -> dict[str, tuple[str, Any]]:
    properties: dict[str, tuple[str, Any]] = {}
    for name, value in run.limits:
        soft, _, hard = value.partition(":")
        properties[f"Limit{name.upper()}"] = ("t", _number(hard or soft))
        properties[f"Limit{name.upper()}Soft"] = ("t", _number(soft))
    if run.oom_score_adj is not None:
        properties["OOMScoreAdjust"] = ("i", run.oom_score_adj)
    if run.cpus:
        mask = sum(1 << cpu for cpu in set(run.cpus))
        properties["CPUAffinity"] = ("ay", mask.to_bytes(max(run.cpus) // 8 + 1, "little"))
    return properties


def _number(value: str) -> int:
    return _INFINITY if value in ("infinity", "unlimited") else int(value)
