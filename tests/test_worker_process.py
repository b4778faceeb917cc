"""A real control worker, on a machine that may have no driver."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from pathlib import Path

import pytest
from patience import PATIENCE_S, until

from ublkwatch.ctrl import CtrlError
from ublkwatch.ctrl_worker import Workers
from ublkwatch.launch import start_worker

NO_SUCH_DEVICE = (1 << 20) - 1
WITHOUT_DRIVER_OR_DEVICE = (errno.ENOENT, errno.ENODEV, errno.EACCES, errno.EPERM)


def worker_pids() -> set[int]:
    """Return our children that are workers; a zombie has no command line, and is none."""
    found = set()
    for home in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((home / "stat").read_text().rpartition(")")[2].split()[1])
            if (
                parent == os.getpid()
                and b"ublkwatch.ctrl_worker" in (home / "cmdline").read_bytes()
            ):
                found.add(int(home.name))
    return found


def test_a_worker_answers_every_command_and_ends_when_its_line_is_closed() -> None:
    async def main() -> None:
        before = worker_pids()
        workers = Workers(start_worker)
        with pytest.raises(CtrlError, match="GET_PARAMS ublk 1048575: E") as caught:
            await workers.call("GET_PARAMS", NO_SUCH_DEVICE, "key", timeout_s=PATIENCE_S)
        assert caught.value.errno in WITHOUT_DRIVER_OR_DEVICE
        with pytest.raises(CtrlError, match="UNHEARD_OF ublk 0: EOPNOTSUPP"):
            await workers.call("UNHEARD_OF", 0, "key", timeout_s=PATIENCE_S)
        (pid,) = worker_pids() - before
        assert workers.retired == 0
        workers.close()
        await until(lambda: pid not in worker_pids(), "the worker has ended")
        await asyncio.to_thread(os.waitpid, pid, 0)

    asyncio.run(main())


def test_a_worker_that_is_not_to_lock_its_memory_does_not() -> None:
    async def main() -> None:
        before = worker_pids()
        workers = Workers(start_worker)
        await workers.prepare()
        (pid,) = worker_pids() - before
        status = await asyncio.to_thread(Path(f"/proc/{pid}/status").read_text)
        assert "VmLck:\t       0 kB" in status
        workers.close()
        await asyncio.to_thread(os.waitpid, pid, 0)

    asyncio.run(main())


def test_a_worker_that_was_killed_fails_its_command_and_the_next_call_has_another() -> None:
    async def main() -> None:
        before = worker_pids()
        workers = Workers(start_worker)
        await workers.prepare()
        await until(lambda: worker_pids() - before, "the worker runs")
        (pid,) = worker_pids() - before
        call = asyncio.create_task(
            workers.call("END_USER_RECOVERY", NO_SUCH_DEVICE, "key", timeout_s=PATIENCE_S, pid=1)
        )
        os.kill(pid, 9)
        with pytest.raises(CtrlError, match="END_USER_RECOVERY ublk 1048575: EIO"):
            await call
        with pytest.raises(CtrlError, match="UNHEARD_OF ublk 0: EOPNOTSUPP"):
            await workers.call("UNHEARD_OF", 0, "key", timeout_s=PATIENCE_S)
        (another,) = worker_pids() - before
        workers.close()
        for each in (pid, another):
            await asyncio.to_thread(os.waitpid, each, 0)

    asyncio.run(main())
