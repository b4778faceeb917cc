"""A model of one ublk device of ublk_drv, in its two dialects, on virtual time.

Sections (3.5, say) are those of the research into the driver that docs/kernel.md sums up; "G2" is
Linux 6.12, "G3" is 7.3. What the control commands do to a device is here, what goes around them
(who is asked, who waits, what is cancelled) in twin.py.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

from processes import Process
from twin_io import DeviceIo, Kernel

from ublkwatch.model import DevInfo, Generation, RecoveryMode
from ublkwatch.uapi import DevState


class KernelOops(AssertionError):  # noqa: N818 - what the kernel calls it
    """The real driver would have crashed here."""


class CharFile:
    """/dev/ublkcN, opened once; a forked child shares it (3.4, 3.7)."""

    def __init__(self, device: Device, opener: Process) -> None:
        self.device, self.opener = device, opener
        self.holders = {opener}
        self.opened_at = asyncio.get_running_loop().time()
        opener.files.append(self)

    def share(self, child: Process) -> None:
        self.holders.add(child)
        child.files.append(self)

    def closed_by(self, process: Process, *, dying: bool) -> None:
        self.holders.discard(process)
        process.files.remove(self)
        self.device.closed(self, process, dying=dying)


class Device(DeviceIo):
    """One device from ADD_DEV to the end of its id."""

    def __init__(self, kernel: Kernel, info: DevInfo) -> None:
        mode = RecoveryMode.of(info.flags)
        super().__init__(kernel, mode, info.nr_hw_queues, info.queue_depth)
        self.generation, self.dev_id, self.flags = kernel.generation, info.dev_id, info.flags
        self.pid = -1
        self.diskseq: int | None = None
        self.removed = False  # deleted; its id may still be held (2.6, DEL_DEV_ASYNC)
        self.mutex = asyncio.Lock()  # ub->mutex: its waiters cannot be killed (6.2)
        self._template, self._note = info, kernel.note
        self.file: CharFile | None = None
        self.open = False  # UB_STATE_OPEN
        self._owner: Process | None = None  # whom G3's ublksrv_pid means
        self._mm: Process | None = None  # whose memory the first mmap pinned
        self.completed = False  # G2's ub->completion: stale until START makes it anew
        self.stopping = False  # G3's flag: STOP_DEV ran, and the server has it open still
        self._stuck = False  # G2: fetched commands that no cancel finds hold the file open (3.5)
        self.letting_go = 0  # closes under way
        self.armed = False  # an oracle's: a START was taken, and no END since
        self.on_abort: Callable[[Process], None] = lambda _: None

    @property
    def g2(self) -> bool:
        return self.generation is Generation.G2

    @property
    def recoverable(self) -> bool:
        return self.mode is not RecoveryMode.NONE

    @property
    def down_state(self) -> DevState:
        return DevState.FAIL_IO if self.mode is RecoveryMode.FAIL_IO else DevState.QUIESCED

    @property
    def is_down(self) -> bool:
        return self.state in (DevState.QUIESCED, DevState.FAIL_IO)

    @property
    def all_ready(self) -> bool:
        return all(queue.ready for queue in self.queues)

    def info(self) -> DevInfo:
        """GET_DEV_INFO: unlocked. On G3 the pid of a process that is gone reads -1 (4)."""
        pid = self.pid
        if not self.g2 and pid > 0 and (self._owner is None or not self._owner.alive):
            pid = -1
        return DevInfo(
            dev_id=self.dev_id,
            state=self.state,
            flags=self.flags,
            nr_hw_queues=self._template.nr_hw_queues,
            queue_depth=self._template.queue_depth,
            max_io_buf_bytes=self._template.max_io_buf_bytes,
            ublksrv_pid=pid,
        )

    # --- the server's side (9.1) -----------------------------------------------------------------

    def opened_by(self, process: Process) -> CharFile:
        """open(2): one opener at a time, EBUSY for all others (3.7)."""
        if self.removed:
            raise OSError(errno.ENOENT, f"/dev/ublkc{self.dev_id}")
        if self.open:
            raise OSError(errno.EBUSY, f"/dev/ublkc{self.dev_id}")
        self.open, self.server = True, process
        self.file = CharFile(self, process)
        return self.file

    def mmap(self, process: Process) -> None:
        """The first mmap pins the memory map, on G2 till START; another's is EINVAL (3.5)."""
        if self._mm is None:
            self._mm = process
        if self._mm is not process:
            raise OSError(errno.EINVAL, "mmap of another memory map")

    async def fetch(self, process: Process, queue_id: int, tag: int) -> None:
        """FETCH_REQ; takes ub->mutex, so a stuck STOP_DEV blocks it too (6.2)."""
        async with self.mutex:
            queue = self.queues[queue_id]
            if not process.alive:
                return
            if self.stopping:
                raise OSError(errno.ENODEV, "FETCH_REQ: stopping")
            if queue.ready:
                raise OSError(errno.EBUSY, "FETCH_REQ: the queue is ready")
            if tag in queue.fetched or not 0 <= tag < queue.depth:
                raise OSError(errno.EINVAL, "FETCH_REQ: tag")
            queue.fetched.add(tag)
            queue.fetcher = process
            if len(queue.fetched) == queue.depth:
                queue.daemon = process
            if self.all_ready:
                self.completed = True
            self.pulse.beat()

    def closed(self, file: CharFile, process: Process, *, dying: bool) -> None:
        """One holder of the file is gone, and with its ring what it had fetched (3.4)."""
        loop = asyncio.get_running_loop()
        delay = self.delay(self.timing.cancel_s) if dying else 0.0
        if process is file.opener:
            delay = self.close_rings(process, delay)
        if not file.holders:
            delay += self.delay(self.timing.release_s)
            self.letting_go += 1
            loop.call_later(delay, self._last_close, file)

    def close_rings(self, process: Process, delay: float = 0.0) -> float:
        """Its rings are closed: G2 cancels, G3 waits for the file's last close. When it is done."""
        if self.g2:
            if any(len(queue.in_server) >= queue.depth for queue in self.queues):
                delay = max(delay, self.timing.block_timeout_s)  # 3.1: nothing to cancel
            self.letting_go += 1
            asyncio.get_running_loop().call_later(delay, self._cancel_ring, process)
        return delay

    def _cancel_ring(self, process: Process) -> None:
        """G2: io_uring cancels the commands of a ring that ends (3.1, 3.5)."""
        served = False
        self.letting_go -= 1
        for queue in self.queues:
            if queue.daemon is process:
                queue.cancelled = served = True
                self._give_back(queue)
            elif queue.fetcher is process and queue.daemon is None:
                # WARN in ublk_uring_cmd_cancel_fn: no daemon yet, so the command stays (3.5).
                self._stuck = True
                self._note("ublk_drv: WARN, commands that cannot be cancelled")
        if served and self.state is DevState.LIVE:
            self._go_down()
        self.pulse.beat()

    def _last_close(self, file: CharFile) -> None:
        self.letting_go -= 1
        self._release(file)

    def _release(self, file: CharFile) -> None:
        """The file's ->release (3.7): G2 clears a bit, G3 resets everything (0.1)."""
        if self.file is not file:
            return
        if self.g2 and self._stuck:
            return  # open, by nobody (3.5)
        if not self.g2:
            for queue in self.queues:
                self._give_back(queue)
                queue.reset()
            self._mm, self.stopping = None, False
            if self.state is DevState.LIVE:
                self._go_down()
        self.open, self.file = False, None
        self.pulse.beat()

    def _go_down(self) -> None:
        """LIVE without a server: QUIESCED, FAIL_IO, or without a recovery flag DEAD (3.1)."""
        if not self.recoverable:
            self.remove_disk()
            return
        self.state = self.down_state
        self._note(f"the kernel: {self.state.name}")
        if self.state is DevState.FAIL_IO:
            self._fail_waiting(errno.EREMOTEIO)

    # --- recovery and stop -----------------------------------------------------------------------

    def start_recovery(self) -> int:
        """START_USER_RECOVERY, under the mutex (2.3)."""
        if not self.recoverable:
            return errno.EINVAL
        if not self.g2:
            self.armed |= not self.open and self.is_down
            return errno.EBUSY if self.open or not self.is_down else 0
        if not any(queue.daemon for queue in self.queues):  # nr_queues_ready is 0
            return errno.EINVAL
        if self.open or not self.is_down:
            return errno.EBUSY
        if not all(queue.daemon for queue in self.queues):
            raise KernelOops("START_USER_RECOVERY: put_task_struct(NULL) (3.5, partialC)")
        for queue in self.queues:
            queue.reset()
        self._mm, self.completed, self.armed = None, False, True
        return 0

    @property
    def attached(self) -> bool:
        """What END_USER_RECOVERY and START_DEV wait for (2.4)."""
        return self.completed if self.g2 else self.all_ready or self.stopping

    def end_recovery(self, pid: int) -> int:
        """END_USER_RECOVERY once it waits no longer (2.4): G3 readiness, pid, flag, state."""
        if not self.g2 and self.stopping:
            return errno.EBUSY
        if not self.g2 and not self._is_opener(pid):
            return errno.EINVAL
        if not self.recoverable:
            return errno.EINVAL
        if not self.is_down:
            return errno.EBUSY
        self._go_live(pid)
        return 0

    def _is_opener(self, pid: int) -> bool:
        """G3 looks the pid up: it must be alive, and who opened the character device (4)."""
        return self.server is not None and self.server.alive and pid == self.server.pid

    def start_dev(self, pid: int, diskseq: int) -> int:
        """START_DEV once it waits no longer (2.5)."""
        if pid <= 0:
            return errno.EINVAL
        if not self.g2 and self.stopping:
            return errno.EBUSY
        if not self.g2 and not self._is_opener(pid):
            return errno.EINVAL
        if self.state is not DevState.DEAD:
            return errno.EEXIST
        self.diskseq = diskseq
        self._go_live(pid)
        return 0

    def _go_live(self, pid: int) -> None:
        self.state, self.pid, self.armed = DevState.LIVE, pid, False
        self._owner = self.server
        self._note(f"the kernel: LIVE, ublksrv_pid {pid}")
        waiting, self.io.waiting = self.io.waiting, []
        for request in waiting:
            self._dispatch(request)
        self.pulse.beat()

    def remove_disk(self) -> None:
        """STOP_DEV once it waits no longer: the disk is gone, what waited has failed (2.6)."""
        if self.state is not DevState.DEAD:
            self._note("the kernel: DEAD, the disk is removed")
        self.state, self.pid, self.diskseq = DevState.DEAD, -1, None
        for queue in self.queues:
            self._give_back(queue)
            queue.fetcher = None  # its commands are cancelled here (3.5, partialA)
        self._fail_waiting()
        self.stopping = self.open and not self.g2
        if self._stuck:  # STOP_DEV cancels by itself what no ring's end could (3.5, partialA)
            self._stuck = False
            if self.file is not None and not self.file.holders:
                self._release(self.file)
        if self.open and self.server is not None and self.server.alive:
            self.on_abort(self.server)
        self.pulse.beat()
