"""The host's files, for who may be in a container: those that systemd itself sees.

systemd runs what lies in its own root, as process 1 has it. Ours is another one in a container, and
in a sandbox, so there a program of that name is another file, or none; and a control group's
path, as systemd tells it, begins at the top of its own hierarchy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ublkwatch.care import Care
from ublkwatch.trust import check_executable

OURS = Path("/")


def systemd_root(launcher: str, root: Path = OURS) -> Path:
    """Return where systemd's files are seen from here: OURS, unless it has others.

    OURS as well where systemd starts no servers: it is not the init, ``launcher`` is "fork", or we
    are not root. It is never guessed: who may not look (no CAP_SYS_PTRACE) gets systemd's root, and
    the error when it is used. ``root`` is for tests.
    """
    if launcher == "fork" or os.geteuid() != 0 or not (root / "run/systemd/system").exists():
        return OURS
    try:
        theirs, ours = ((root / f"proc/{who}/ns/mnt").readlink() for who in ("1", "self"))
    except OSError:
        pass
    else:
        if theirs == ours:
            return OURS
    return root / "proc/1/root"


def programs(care: Care, root: Path = OURS) -> Iterator[tuple[Path, Path]]:
    """Return what root would run for a device, each with the root directory that it is below.

    Servers are started from ``root``; the operators' commands are run by ourselves.
    """
    for argv, where in ((care.command, root), (care.hook, OURS), (care.decider, OURS)):
        if argv:
            yield Path(argv[0]), where


def check_programs(care: Care, root: Path = OURS) -> None:
    """Refuse what root must not run for a device; errors as of trust.check_executable()."""
    for program, where in programs(care, root):
        check_executable(program, where)
