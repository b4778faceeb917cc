"""What a doctor looks at: everything that is asked of the world, asked once."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ublkwatch import checking, config, discover, server, siting
from ublkwatch.async_ring import AsyncRing
from ublkwatch.client import Client
from ublkwatch.config import Config
from ublkwatch.ctrl import UblkCtrl
from ublkwatch.finding import Finding
from ublkwatch.model import DevInfo
from ublkwatch.settings import ConfigError
from ublkwatch.uapi import DevFlags
from ublkwatch.units import UnitStarter
from ublkwatch.wire import Question

_CLIENT_S = 2.0


@dataclass(frozen=True)
class Facts:
    """What was seen. Files that are read by one check only are read there, below ``root``."""

    root: Path = Path("/")
    release: str = ""  # of the kernel
    settings: Config | None = None  # None: they cannot be used
    config: tuple[Finding, ...] = ()
    ring_error: OSError | None = None
    driver_error: str = ""
    features: DevFlags | None = None
    devices: Mapping[int, DevInfo | OSError] = field(default_factory=dict)
    systemd: str | OSError = ""  # its version
    running: bool = False  # a daemon holds the lock
    document: Mapping[str, Any] = field(default_factory=dict)  # its status, or its last one
    version: str = ""  # the daemon's; "" where it did not say
    age: str = ""  # the daemon's, for people
    tagged: Mapping[str, set[int]] = field(default_factory=dict)  # processes, by attempt
    serving: frozenset[int] = frozenset()  # who has a character device open
    sited: tuple[str, ...] = ()  # what of ours lies on ublk devices, in words
    blind: bool = False  # others' processes cannot be looked into
    wall: float = 0.0

    @property
    def pid(self) -> int:
        """Return the daemon's process, as its status has it; 0: unknown."""
        return int(self.document.get("supervisor_pid", 0))


async def look(path: Path | None, document: Mapping[str, Any], *, running: bool) -> Facts:
    """Look at this machine; what cannot be seen is said, and nothing raised."""
    settings = None
    with contextlib.suppress(ConfigError):  # it is among the findings
        settings = config.load(path)
    ring_error, driver_error, features, devices = await _ask_driver()
    boot_id = server.read_boot_id()
    tagged = server.tagged(boot_id)
    return Facts(
        release=os.uname().release,
        settings=settings,
        config=tuple(checking.check(path)),
        ring_error=ring_error,
        driver_error=driver_error,
        features=features,
        devices=devices,
        systemd=await _ask_systemd(),
        running=running,
        document=document,
        version=_version(settings) if running and settings else "",
        age=_age(int(document.get("supervisor_pid", 0))),
        tagged={tag: {each.pid for each in found} for tag, found in tagged.items()},
        serving=frozenset(pid for pids in server.open_nodes().values() for pid in pids),
        sited=tuple(map(str, siting.own(settings, path or config.DEFAULT_PATH)))
        if settings
        else (),
        blind=os.geteuid() != 0,
        wall=time.time(),
    )


async def _ask_driver() -> tuple[
    OSError | None, str, DevFlags | None, dict[int, DevInfo | OSError]
]:
    try:
        ring = AsyncRing()
    except OSError as error:
        return error, "", None, {}
    devices: dict[int, DevInfo | OSError] = {}
    features = None
    try:
        ctrl = UblkCtrl(ring)
        features = await ctrl.get_features()
        for dev_id in sorted(discover.dev_ids()):
            try:
                devices[dev_id] = await ctrl.get_dev_info(dev_id)
            except OSError as error:
                devices[dev_id] = error
    except OSError as error:
        return None, str(error), features, devices
    finally:
        ring.close()
    return None, "", features, devices


async def _ask_systemd() -> str | OSError:
    starter = UnitStarter({})
    try:
        return await starter.version()
    except OSError as error:
        return error
    finally:
        starter.close()


def _version(settings: Config) -> str:
    try:
        answer = Client(settings.runtime_dir).ask(Question(), _CLIENT_S)
    except OSError:
        return ""
    return answer.said[0].rpartition(" ")[2] if answer.said else ""


def _age(pid: int) -> str:
    """Say since when a process runs."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError):
        return "an unknown time"
    since = time.time() - up_s + ticks / os.sysconf("SC_CLK_TCK")
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
