"""Which facts change nothing in which phase: the quiet half of a total machine. Pure.

The machine asks this first. A test explores it: whatever is here would change nothing, and whatever
is not here changes something, in some record.
"""

from __future__ import annotations

from ublkwatch.events import (
    Asked,
    AttemptOver,
    AttemptShared,
    Decided,
    EndReplied,
    Event,
    HoldersFound,
    InfoMissing,
    InfoRead,
    Ready,
    Resumed,
    ServerAils,
    ServerExited,
    ServerFound,
    ServerWell,
    ShutdownBegun,
    Spawned,
    SpawnFailed,
    StartReplied,
    StopReplied,
    Woken,
)
from ublkwatch.model import Phase

# Where nothing of ours is under way.
_AT_REST: frozenset[type[Event]] = frozenset(
    {
        AttemptShared,
        Decided,
        HoldersFound,
        ServerAils,
        ServerWell,
        Ready,
        ServerFound,
        ShutdownBegun,
        SpawnFailed,
    }
)

DEAF: dict[Phase, frozenset[type[Event]]] = {
    Phase.OBSERVED: _AT_REST,
    Phase.WATCHING: _AT_REST - {ServerAils, ServerFound, ServerWell},
    Phase.GRACE: _AT_REST - {ShutdownBegun},
    Phase.HELD: _AT_REST,
    Phase.DRAINING: frozenset(
        {Decided, EndReplied, ServerAils, ServerWell, ServerFound, StartReplied, StopReplied}
    ),
    Phase.STARTING: frozenset(
        {
            AttemptShared,
            Decided,
            ServerAils,
            ServerWell,
            Ready,
            ServerFound,
            ShutdownBegun,
            SpawnFailed,
        }
    ),
    Phase.ATTACHING: frozenset(
        {AttemptShared, Decided, HoldersFound, ServerAils, ServerWell, Ready, ShutdownBegun}
    ),
    Phase.PROBATION: frozenset(
        {
            AttemptShared,
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
        {Decided, HoldersFound, ServerAils, ServerWell, Ready, ServerFound, ShutdownBegun}
    ),
    Phase.BACKOFF: frozenset(
        {
            AttemptShared,
            AttemptOver,
            Decided,
            EndReplied,
            HoldersFound,
            ServerAils,
            ServerWell,
            Ready,
            ServerFound,
            SpawnFailed,
            StartReplied,
            StopReplied,
        }
    ),
    Phase.DECIDING: frozenset(
        {
            AttemptShared,
            AttemptOver,
            EndReplied,
            HoldersFound,
            ServerAils,
            ServerWell,
            Ready,
            ServerFound,
            SpawnFailed,
            StartReplied,
            StopReplied,
        }
    ),
    Phase.FAILING: frozenset(
        {Asked, Decided, HoldersFound, ServerAils, ServerWell, Ready, ServerFound, SpawnFailed}
    ),
    Phase.FAILED: _AT_REST,
    Phase.GONE: frozenset(
        {
            AttemptShared,
            Asked,
            AttemptOver,
            Decided,
            EndReplied,
            HoldersFound,
            InfoMissing,
            InfoRead,
            ServerAils,
            ServerWell,
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
