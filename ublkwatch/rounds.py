"""The rounds of a drill: a kill by pidfd, and the wait for what the daemon's record says of it.

A record has the moments of CLOCK_MONOTONIC, which all processes of a host share.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from ublkwatch import server, store
from ublkwatch.drilling import Drill, Round
from ublkwatch.model import Phase, Record

_LOOK_S = 0.01
_PAUSE_S = 0.5  # between two kills, in which I/O goes on
_LAST_LOOK_S = 60.0  # for the I/O to be verified


class DrillError(Exception):
    """Why a drill cannot go on."""


async def drill(  # noqa: PLR0913 - each by its name
    runtime_dir: Path,
    dev_id: int,
    count: int,
    *,
    timeout_s: float,
    scratch: bool,
    may_fail: bool,
    tell: Callable[[str], None],
) -> Drill:
    """Kill the device's server so many times; what went wrong is in the report.

    ``scratch``: with I/O that is verified, of which none fails unless the device ``may_fail`` it.
    """
    report = Drill(f"ublkb{dev_id}", time.time(), count)
    try:
        load = _load(dev_id, report, may_fail=may_fail) if scratch else contextlib.nullcontext()
        async with load:
            for number in range(1, count + 1):
                if number > 1:
                    await asyncio.sleep(_PAUSE_S)
                report.rounds.append(await _round(runtime_dir, dev_id, number, timeout_s))
                tell(str(report.rounds[-1]))
    except (DrillError, OSError, store.StoreError) as error:
        report.trouble = str(error)
    return report


async def _round(runtime_dir: Path, dev_id: int, number: int, timeout_s: float) -> Round:
    before = store.read_record(runtime_dir, dev_id)
    if before is None or before.server is None or before.phase is not Phase.WATCHING or before.held:
        raise DrillError(f"it is not watched any more: {_shown(before)}")
    killed_at = time.monotonic()
    if not server.end(before.server):
        raise DrillError(f"its server, process {before.server.pid}, has ended by itself")
    now: Record | None = before
    while time.monotonic() < killed_at + timeout_s:
        await asyncio.sleep(_LOOK_S)
        now = store.read_record(runtime_dir, dev_id)
        if now is None or now.phase in (Phase.FAILED, Phase.HELD, Phase.OBSERVED):
            raise DrillError(f"kill {number} was not recovered from: {_shown(now)}")
        if now.phase is Phase.WATCHING and now.server != before.server:
            if now.recoveries == before.recoveries:
                raise DrillError(f"kill {number}: somebody else brought it back")
            return Round.of(number, killed_at, before, now)
    raise DrillError(f"kill {number} was not recovered from in {timeout_s:g} s: {_shown(now)}")


def _shown(record: Record | None) -> str:
    if record is None:
        return "it is gone"
    why = record.reason.value if record.reason else ""
    said = ": ".join(part for part in (record.phase.value, why, record.detail) if part)
    return f"{said}; `ublkwatch explain {record.dev_id}` says more"


@contextlib.asynccontextmanager
async def _load(dev_id: int, report: Drill, *, may_fail: bool) -> AsyncIterator[None]:
    """Have I/O through the kills; what it met is added to the report."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ublkwatch.scratch", f"/dev/ublkb{dev_id}"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        await _hear(process)  # its first write is done
        yield
    finally:
        process.stdin.close()
    report.scratch = await _hear(process)
    await process.wait()
    if report.scratch["corrupt"]:
        raise DrillError(f"{report.scratch['corrupt']} blocks do not hold what was written")
    if report.scratch["errors"] and not may_fail:
        raise DrillError("I/O failed, which the device's recovery mode does not allow")


async def _hear(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_LAST_LOOK_S):
            line = await process.stdout.readline()
    except TimeoutError:  # it waits in the kernel, where nobody can end it
        raise DrillError("its I/O was not answered: it waits still") from None
    content: dict[str, Any] = json.loads(line) if line else {"trouble": "the I/O ended early"}
    if "trouble" in content:
        raise DrillError(content["trouble"])
    return content
