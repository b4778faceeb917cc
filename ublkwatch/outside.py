"""Run other people's programs, operators' commands and the system's tools, outside of our armour.

In a thread: exec reads the program from a file system that may hang.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Mapping
from pathlib import Path

from ublkwatch import armour


async def run(
    command: tuple[str, ...],
    *,
    environment: Mapping[str, str] | None = None,
    output: bool = False,
) -> tuple[int, bytes]:
    """Run a program; return its status, as Popen has it, and what it printed if ``output``.

    Else than with ``output``, its standard error is ours. OSError: it cannot run. The caller bounds
    the wait; a program that is not waited for any more is killed, as soon as it runs.
    """
    program = _Program(command, environment, output=output)
    try:
        return await asyncio.to_thread(program.run)
    finally:
        program.end()


class _Program:
    def __init__(
        self, command: tuple[str, ...], environment: Mapping[str, str] | None, *, output: bool
    ) -> None:
        self._command = command
        self._environment = environment
        self._output = output
        self._over = False
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> tuple[int, bytes]:
        with armour.taken_off():
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self._output else subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if self._output else None,
                env=self._environment,
                cwd="/",
                start_new_session=True,
            )
        self._process = process
        if self._over:
            process.kill()
        with contextlib.suppress(OSError):  # it has ended
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("0")
        printed, _ = process.communicate()
        return process.returncode, printed or b""

    def end(self) -> None:
        """Kill it, whether it runs already or not yet; in whatever thread."""
        self._over = True
        if self._process is not None:
            self._process.kill()
