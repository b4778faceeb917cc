"""What a program's I/O meets when the server dies, by the recovery mode of its device."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from conftest import DEADLINE_S, wait_until
from supervisor import Supervisor
from test_reference_server import recover

from ublkwatch.model import Generation, RecoveryMode

if TYPE_CHECKING:
    from conftest import Attaching, Control, Servers

    Watch = Callable[..., Supervisor]

# What the status document says, by what the kernel granted: name, and promise.
PROMISES = {
    RecoveryMode.PLAIN: ("recovery", "in flight: EIO; meanwhile: waits"),
    RecoveryMode.REISSUE: ("reissue", "in flight: sent again; meanwhile: waits"),
    RecoveryMode.FAIL_IO: ("fail_io", "in flight: EIO; meanwhile: EREMOTEIO"),
}
BLOCK = 4096
APART = 1 << 20  # between two reads, so that the kernel never makes one request of them


class Read:
    """One read, in a thread of its own, which the kernel may make wait."""

    def __init__(self, fd: int, offset: int) -> None:
        self._errno = 0
        # A daemon, because one that nobody answers ends only when its device is removed.
        self._thread = threading.Thread(target=self._run, args=(fd, offset), daemon=True)
        self._thread.start()

    def _run(self, fd: int, offset: int) -> None:
        with mmap.mmap(-1, BLOCK) as memory:
            try:
                done = os.preadv(fd, [memory], offset)
            except OSError as error:
                self._errno = error.errno or -1
            else:
                assert done == BLOCK

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def waits(self) -> bool:
        """Tell whether it has reached the kernel and sleeps there."""
        stat = Path(f"/proc/self/task/{self._thread.native_id}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "D"

    def outcome(self) -> int:
        """Wait for its end; return its errno, 0 when all was read."""
        wait_until(lambda: self.done, DEADLINE_S, "the read ends")
        return self._errno


class Disk:
    """A block device to read from. To be closed before its device is removed."""

    def __init__(self, dev_id: int = 0) -> None:
        self._fd = os.open(f"/dev/ublkb{dev_id}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._offsets = itertools.count(0, APART)

    def read(self) -> Read:
        return Read(self._fd, next(self._offsets))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._fd)


@contextlib.contextmanager
def held_back(faults: Path) -> Iterator[None]:
    """Keep every server with this --fault-file from starting: it takes its fault under a lock."""
    with faults.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def live_under_a_server_that_answers_nothing(
    server: Servers, control: Control, *, recovery: str, depth: int
) -> Attaching:
    """Create ublk 0, and bring it back by hand under a server that keeps what it is sent.

    Not the creating server does that: the kernel looks for partitions, and who does not answer
    that blocks everybody's open.
    """
    silent = server.attach("--fault", "hang-after-all-fetches")
    creator = server(recovery=recovery, depth=depth)
    creator.kill()
    recover(control, 0, silent)
    return silent


def received(holder: Attaching) -> int:
    """Return how many requests the kernel has handed to a server that answers none.

    That is how many completions its ring has seen: on its way to the server a request is not yet in
    flight, whatever the block layer's statistics say.
    """
    completions = 0
    for fdinfo in Path(f"/proc/{holder.pid}/fdinfo").iterdir():
        found = re.search(r"^CqTail:\s+(\d+)$", fdinfo.read_text(), re.MULTILINE)
        completions = max(completions, int(found[1]) if found else 0)
    return completions


def held(holder: Attaching, disk: Disk, count: int) -> list[Read]:
    """Return that many reads, all of them with the server."""
    reads = [disk.read() for _ in range(count)]
    wait_until(lambda: received(holder) == count, DEADLINE_S, f"{count} reads in flight")
    return reads


def watched(server: Servers, watch: Watch, faults: Path) -> tuple[Supervisor, dict[str, Any]]:
    """Have ublkwatch watch ublk 0; return it and what it shows."""
    faults.touch()
    command = [*server.target("null"), "--fault-file", str(faults)]
    # How long a server is held back is the test's affair: it must not count as a failure.
    supervisor = watch({0: command}, "ready_timeout_s = 300\ndrain_timeout_s = 300")
    return supervisor, supervisor.watching()


def shown(device: dict[str, Any]) -> tuple[str, str]:
    """Return what the status document says of a device's I/O."""
    return device["recovery_mode"], device["io_while_down"]


@pytest.mark.parametrize("recovery", ["plain", "reissue", "fail_io"])
def test_io_meets_what_the_mode_promises_and_the_device_is_recovered(
    server: Servers,
    watch: Watch,
    control: Control,
    generation: Generation,
    tmp_path: Path,
    *,
    recovery: str,
) -> None:
    faults = tmp_path / "faults"
    silent = live_under_a_server_that_answers_nothing(server, control, recovery=recovery, depth=8)
    granted = RecoveryMode.of(control.info(0).flags)
    asked = {
        "plain": RecoveryMode.PLAIN,
        "reissue": RecoveryMode.REISSUE,
        # Linux 6.12 clears the flag that it does not know, and what is left is a plain device.
        "fail_io": RecoveryMode.FAIL_IO if generation is Generation.G3 else RecoveryMode.PLAIN,
    }
    assert granted is asked[recovery]
    promise = PROMISES[granted]
    again, fails = granted is RecoveryMode.REISSUE, granted is RecoveryMode.FAIL_IO
    with Disk() as disk:
        in_flight = held(silent, disk, 2)
        supervisor, before = watched(server, watch, faults)
        assert shown(before) == promise

        with held_back(faults):
            silent.kill()
            down = supervisor.until("down", state="FAIL_IO" if fails else "QUIESCED")
            assert shown(down) == promise
            if not again:
                assert [read.outcome() for read in in_flight] == [errno.EIO] * 2
            meanwhile = disk.read()
            if fails:  # at once: the server that could answer is still held back
                assert meanwhile.outcome() == errno.EREMOTEIO
            else:
                wait_until(meanwhile.waits, DEADLINE_S, "a read that waits")
            assert [read.done for read in (*in_flight, meanwhile)] == [not again] * 2 + [fails]

        after = supervisor.recovered(before)
        assert shown(after) == promise
        waited = [*(in_flight if again else []), *([] if fails else [meanwhile])]
        assert [read.outcome() for read in (*waited, disk.read())] == [0] * (len(waited) + 1)
        supervisor.watching()


def test_a_server_that_held_every_tag_is_replaced_as_soon_as_the_kernel_lets_go(
    server: Servers, watch: Watch, control: Control, generation: Generation, tmp_path: Path
) -> None:
    depth = 4
    silent = live_under_a_server_that_answers_nothing(
        server, control, recovery="reissue", depth=depth
    )
    with Disk() as disk:
        supervisor, before = watched(server, watch, tmp_path / "faults")
        # Linux 6.12 has no idle command to cancel, and waits for the requests' time-out. The new
        # server is to be ready by then; 30 s are not enough for that everywhere.
        Path("/sys/block/ublkb0/queue/io_timeout").write_text("90000")
        in_flight = held(silent, disk, depth)
        silent.kill()
        if generation is Generation.G2:
            waiting = supervisor.until_true(
                "it says what it waits for",
                lambda now: "waiting for the kernel to let go" in now["explanation"],
            )
            assert waiting["explanation"].startswith("the new server is ready; ")
            assert (waiting["phase"], waiting["state"]) == ("draining", "LIVE")
        supervisor.recovered(before)
        assert [read.outcome() for read in in_flight] == [0] * depth
