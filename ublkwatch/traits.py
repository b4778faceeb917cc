"""What holds of a kind of server, whichever device it has. Pure.

docs/servers.md has a page for each, and what was seen of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

UBLKSRV_RUN: Final = "/run/ublksrvd"  # the run files of ublksrv and of rublk


@dataclass(frozen=True, slots=True)
class Traits:
    """What holds of a kind of server, whichever device it has."""

    settings: Mapping[str, Any]  # keys of a [[device]], where that says nothing itself
    deletes_on_failure: str = ""  # what does: the device is removed when that command fails
    sigterm: str = "unknown"  # what becomes of the device when its server gets one
    experimental: str = ""  # why nobody should rely on it yet


def _traits(**values: Any) -> Traits:
    settings = values.pop("settings", {"handoff": "delegated"})
    return Traits(MappingProxyType(settings), **values)


PROFILES: Final[Mapping[str, Traits]] = MappingProxyType(
    {
        "contract": _traits(
            settings={"handoff": "managed", "attach": "line"}, sigterm="up to the server"
        ),
        "ublksrv": _traits(
            settings={"handoff": "delegated", "keep": [f"{UBLKSRV_RUN}/{{dev_id}}.pid"]},
            sigterm="stays: its daemon blocks the signal",
        ),
        "rublk": _traits(sigterm="stays: its daemon dies of it, as of SIGKILL"),
        "kublk": _traits(deletes_on_failure="kublk recover"),
        "spdk": _traits(
            deletes_on_failure="ublk_recover_disk",
            experimental="SPDK was never run under ublkwatch by its authors",
        ),
    }
)
