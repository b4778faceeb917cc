"""What of ours lies on ublk devices: refused at the start, warned of when a device is taken up."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
from pathlib import Path

from ublkwatch.care import Care
from ublkwatch.config import Config
from ublkwatch.placement import Finding, findings

_log = logging.getLogger("ublkwatch")


class PlacementError(Exception):
    """Files of ours lie on ublk devices: says which, and the way out."""


def check_own(settings: Config, file: Path, root: Path = Path("/")) -> None:
    """Refuse, or only warn, where what a running ublkwatch needs lies on a ublk device.

    PlacementError. To be called before any of it is touched; ``root`` as findings() has it.
    """
    found = own(settings, file, root, log=2)
    if found and settings.placement == "refuse":
        raise PlacementError(
            f"{'; '.join(map(str, found))}: when that device's server is lost, ublkwatch would "
            "wait for the disk that it has to bring back; try: move it to another disk (state_dir, "
            'runtime_dir, --config), or, if that risk is meant, set placement = "warn"'
        )
    for each in found:
        _log.warning("%s: should that device's server be lost, ublkwatch may hang with it", each)


def own(
    settings: Config, file: Path, root: Path = Path("/"), *, log: int | None = None
) -> list[Finding]:
    """Return what of our own lies on ublk devices, swap included; ``log`` is a descriptor."""
    files: dict[str, str | int] = {
        "the state directory": str(settings.state_dir),
        "the runtime directory": str(settings.runtime_dir),
        "the configuration": os.path.abspath(file),  # noqa: PTH100 - resolve() would look
        "the interpreter": sys.executable,
        "the interpreter's library": str(Path(os.__file__).parent),
        "the packages": sysconfig.get_path("purelib"),
        "the program": str(Path(__file__).parent),
    }
    if log is not None:
        files["the log"] = log
    return findings(files, root, swap=True)


class Siting:
    """What was warned of already."""

    def __init__(self, root: Path = Path("/")) -> None:
        """``root`` as findings() has it."""
        self._root = root
        self._warned: set[str] = set()

    def warn(self, dev_id: int, care: Care) -> None:
        """Warn, once, of programs that could not be run while a ublk device is lost."""
        words = {
            "its server's program": care.command,
            "pre_recover": care.hook,
            "on_exhausted_command": care.decider,
        }
        programs = {what: argv[0] for what, argv in words.items() if argv}
        for found in findings(programs, self._root, swap=False):
            itself = ", this very device" if found.device == f"ublkb{dev_id}" else ""
            text = f"ublk {dev_id}: {found}{itself}: while that is lost, it cannot be run"
            if text not in self._warned:
                _log.warning("%s; try: keep it on another disk, or on a tmpfs", text)
            self._warned.add(text)
