"""The run file: what a server leaves so that ublkwatch can start it again, with no configuration.

docs/servers.md says what it holds and when it is believed. It is written before the device is LIVE,
removed when the device has ended in good order, and left behind by a crash: that is its purpose.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ublkwatch.demo.targets import TargetSpec

DIRECTORY: Final = Path("/run/ublk-servers")
VERSION: Final = 1


class RunFiles:
    """The run files of this process's devices, or none: "" as the directory writes nothing."""

    def __init__(self, directory: str | None, command: list[str], group: str = "") -> None:
        """``directory`` None: the default one, where root can write it, else none.

        ``command`` starts a server for these devices again; what stands in braces in it is
        ublkwatch's to fill. ``group`` names the devices that one process serves.
        """
        self._command, self._group = command, group
        self._home: Path | None = None
        if directory is None:
            with contextlib.suppress(OSError):
                if os.geteuid() == 0:
                    DIRECTORY.mkdir(mode=0o755, exist_ok=True)
                    self._home = DIRECTORY
        elif directory:
            self._home = Path(directory)

    def write(self, dev_id: int, queue_threads: Sequence[int] = ()) -> None:
        """Say that this process serves the device, and by which threads once they run.

        One that cannot be written harms nobody now.
        """
        if self._home is None:
            return
        content: dict[str, object] = {
            "version": VERSION,
            "dev_id": dev_id,
            "pid": os.getpid(),
            "handoff": "managed",
            "attach": "line",
            "command": self._command,
        }
        if queue_threads:
            content["queue_threads"] = list(queue_threads)
        if self._group:
            content["group"] = self._group
        path = self._home / f"{dev_id}.json"
        new = path.with_name(f".{dev_id}.{os.getpid()}")
        try:
            # Whole or not at all, and for root alone to write, whatever the umask says.
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                os.fchmod(descriptor, 0o644)
                json.dump(content, file)
            new.rename(path)
        except OSError as error:
            print(f"server: run file {path}: {error.strerror}", file=sys.stderr, flush=True)

    def remove(self, dev_id: int) -> None:
        """Take it back: the device has ended in good order. Another server's is left alone."""
        if self._home is None:
            return
        path = self._home / f"{dev_id}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(path.read_bytes())["pid"] == os.getpid():
                path.unlink()


def command(spec: TargetSpec, group: str, directory: str | None) -> list[str]:
    """Return the argv of a server that attaches to the devices that this one serves."""
    argv = [sys.executable, "-m", "ublkwatch.demo.server", "--target", spec.kind]
    if spec.file:
        argv += ["--file", os.path.abspath(spec.file)]  # noqa: PTH100 - {dev_id} is no path yet
    if group:
        argv += ["--group", group]
    if directory is not None:
        argv += ["--run-dir", directory and os.path.abspath(directory)]  # noqa: PTH100
    # A brace of ours would be a placeholder of ublkwatch's.
    return [word.replace("{", "{{").replace("}", "}}") for word in argv]
