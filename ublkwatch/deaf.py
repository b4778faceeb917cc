"""Which facts change nothing in which phase: the quiet half of a total machine. Pure.

The machine asks this first. A test explores it: whatever is here would change nothing, and whatever
is not here changes something, in some record.
"""

from __future__ import annotations

from ublkwatch.events import (
    Asked,
    AttemptOver,
    Decided,
    EndReplied,
    Event,
    HoldersFound,
    InfoMissing,
    InfoRead,
    QueueThreadLost,
    Ready,
    Resumed,
    ServerExited,
    ServerFound,
    ShutdownBegun,
    Spawned,
    SpawnFailed,
    StartReplied,
    StopReplied,
    Woken,
)
from ublkwatch.model import Phase

DEAF: dict[Phase, frozenset[type[Event]]] = {
    Phase.OBSERVED: frozenset(
        {Decided, HoldersFound, QueueThreadLost, Ready, ServerFound, ShutdownBegun, SpawnFailed}
    ),
    Phase.WATCHING: frozenset(
        {Decided, HoldersFound, Ready, ServerFound, ShutdownBegun, SpawnFailed}
    ),
    Phase.GRACE: frozenset(
        {Decided, HoldersFound, QueueThreadLost, Ready, ServerFound, SpawnFailed}
    ),
    Phase.HELD: frozenset(
        {Decided, HoldersFound, QueueThreadLost, Ready, ServerFound, ShutdownBegun, SpawnFailed}
    ),
    Phase.DRAINING: frozenset(
        {Decided, EndReplied, QueueThreadLost, ServerFound, StartReplied, StopReplied}
    ),
    Phase.STARTING: frozenset(
        {Decided, QueueThreadLost, Ready, ServerFound, ShutdownBegun, SpawnFailed}
    ),
    Phase.ATTACHING: frozenset({Decided, HoldersFound, QueueThreadLost, Ready, ShutdownBegun}),
    Phase.PROBATION: frozenset(
        {
            Decided,
            EndReplied,
            HoldersFound,
            Ready,
            ShutdownBegun,
            SpawnFailed,
            StartReplied,
            StopReplied,
        }
    ),
    Phase.STOPPING: frozenset(
        {Decided, HoldersFound, QueueThreadLost, Ready, ServerFound, ShutdownBegun, SpawnFailed}
    ),
    Phase.BACKOFF: frozenset(
        {
            AttemptOver,
            Decided,
            EndReplied,
            HoldersFound,
            QueueThreadLost,
            Ready,
            ServerFound,
            SpawnFailed,
            StartReplied,
            StopReplied,
        }
    ),
    Phase.DECIDING: frozenset(
        {
            AttemptOver,
            EndReplied,
            HoldersFound,
            QueueThreadLost,
            Ready,
            ServerFound,
            SpawnFailed,
            StartReplied,
            StopReplied,
        }
    ),
    Phase.FAILING: frozenset(
        {Asked, Decided, HoldersFound, QueueThreadLost, Ready, ServerFound, SpawnFailed}
    ),
    Phase.FAILED: frozenset(
        {Decided, HoldersFound, QueueThreadLost, Ready, ServerFound, ShutdownBegun, SpawnFailed}
    ),
    Phase.GONE: frozenset(
        {
            Asked,
            AttemptOver,
            Decided,
            EndReplied,
            HoldersFound,
            InfoMissing,
            InfoRead,
            QueueThreadLost,
            Ready,
            Resumed,
            ServerExited,
            ServerFound,
            ShutdownBegun,
            SpawnFailed,
            Spawned,
            StartReplied,
            StopReplied,
            Woken,
        }
    ),
}
