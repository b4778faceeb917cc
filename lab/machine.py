"""The host's side of one guest: QEMU from its start to its end, and the streams that it carries.

Three virtio ports carry the command's standard output, its standard error and the guest's progress
("tick UPTIME", "tock UPTIME", "started", "exit N", "done"), and the host's "go" before "started"; a
serial port carries the kernel's console.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from base import EXIT_LAB, SEARCH_PATH
from initramfs import Job, make_initramfs
from kernels import Kernel

# By how much a guest's clock may be faster than ours, at most. A kernel that calibrates its clock
# while others take the CPU may have one that runs 40 times as fast ever after, and then every
# deadline in there is over at once.
HASTE_MAX: Final = 2.0
# After the command's end: how long the guest may stay silent while it flushes and relays the rest.
DRAIN_SECONDS: Final = 60.0
# How long a shutdown may take: longer than systemd waits for one unit that hangs (90 s).
SHUTDOWN_SECONDS: Final = 300.0
POWERED_OFF: Final = b"reboot: Power down"
CONSOLE_KEPT: Final = 1 << 20


class Channel(enum.IntEnum):
    """The guest's byte streams; the first three are virtio ports of that number."""

    STDOUT = 1
    STDERR = 2
    CONTROL = 3
    CONSOLE = 4


class Stage(enum.Enum):
    """How far a guest has come."""

    BOOTING = enum.auto()
    RUNNING = enum.auto()
    ENDING = enum.auto()


@dataclass(frozen=True)
class Machine:
    """The virtual hardware."""

    accelerator: str
    cpus: int
    memory: str
    possible_cpus: int = 0  # also those that are never brought up; 0: the others alone

    @property
    def sockets(self) -> int:
        """How many CPUs QEMU has; one that is not brought up takes nothing."""
        return max(self.cpus, self.possible_cpus)


@dataclass(frozen=True)
class Plan:
    """All that one boot takes."""

    cache: Path
    kernel: Kernel
    machine: Machine
    job: Job
    root: str = "/"
    disk: str = ""  # an image, or none

    @property
    def home(self) -> Path:
        """Where the kernel is."""
        return self.cache / self.kernel.name


@dataclass
class Outcome:
    """What came of one boot: the command's status, or the stage at which the guest was lost."""

    stage: Stage = Stage.BOOTING
    status: int | None = None
    late: bool = False
    hasty: bool = False  # its clock runs too fast
    console: bytearray = field(default_factory=bytearray)

    @property
    def powered_off(self) -> bool:
        """Tell whether the guest's kernel was asked to end it, and did."""
        return not self.late and POWERED_OFF in self.console


KERNEL_OPTIONS: Final = (
    "console=ttyS0,115200 loglevel=5 printk.time=1 "
    # Boot time: protections and searches that nobody in here needs.
    "mitigations=off nokaslr audit=0 tsc=reliable no_timer_check raid=noautodetect "
    "cryptomgr.notests lsm=capability "
    # A guest that gets no CPU for a while is no guest with a bug.
    "watchdog_thresh=60 workqueue.watchdog_thresh=300 "
    # A guest that is broken must end, and QEMU with it (-no-reboot).
    "oops=panic panic=-1"
)


def qemu_command(plan: Plan, initramfs: int, channels: Mapping[Channel, int]) -> list[str]:
    """Return the command line of QEMU; descriptors are inherited."""
    machine = plan.machine
    # QEMU's cmpxchg16b panics these kernels now and then, hence cx16=off.
    cpu = "max,cx16=off" if machine.accelerator == "tcg" else "host"
    accel = "tcg,thread=multi" if machine.accelerator == "tcg" else machine.accelerator
    model = "passthrough" if os.geteuid() == 0 else "none"
    command = (
        f"qemu-system-x86_64 -machine q35 -accel {accel} -cpu {cpu} "
        f"-smp {machine.sockets} "
        f"-m {machine.memory} -nodefaults -no-user-config -display none -no-reboot"
    ).split()
    command += ["-kernel", str(plan.home / plan.kernel.image), "-initrd", f"/dev/fd/{initramfs}"]
    dormant = f" maxcpus={machine.cpus}" if machine.sockets > machine.cpus else ""
    command += ["-append", KERNEL_OPTIONS + dormant]
    shares = [("root", plan.root), ("modules", str(plan.home / plan.kernel.modules))]
    for tag, path in shares:
        command += share(tag, path, "security_model=none,readonly=on")
    for number, path in enumerate(plan.job.writable):
        command += share(f"rw{number}", path, f"security_model={model}")
    if plan.disk:
        file = plan.disk.replace(",", ",,")
        command += ["-drive", f"file={file},format=raw,if=virtio"]
    for channel, descriptor in channels.items():
        command += ["-chardev", f"socket,id=c{channel},fd={descriptor}"]
    command += ["-serial", f"chardev:c{Channel.CONSOLE}", "-device", "virtio-serial-pci"]
    for port in (Channel.STDOUT, Channel.STDERR, Channel.CONTROL):
        command += ["-device", f"virtserialport,nr={port},chardev=c{port}"]
    return command


def share(tag: str, path: str, options: str) -> list[str]:
    """Return the QEMU options that offer a host directory over 9p."""
    # Commas separate options, so they are doubled. "remap": the tree may span file systems.
    escaped = path.replace(",", ",,")
    return [
        "-fsdev",
        f"local,id={tag},path={escaped},multidevs=remap,{options}",
        "-device",
        f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
    ]


PR_SET_PDEATHSIG: Final = 1
LIBC: Final = ctypes.CDLL(None, use_errno=True)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(EXIT_LAB)  # it ended before we asked


class Guest:
    """One QEMU, from its start to its end, and the streams that it carries."""

    def __init__(
        self,
        boot_seconds: float,
        run_seconds: float,
        console: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare a guest; `console` is a descriptor that gets a copy of the kernel's console."""
        self.clock = clock
        self.outcome = Outcome()
        self.boot_seconds = boot_seconds
        self.run_seconds = run_seconds
        self.console = console
        self.deadline = 0.0
        self.ending_seconds = DRAIN_SECONDS
        self.ticked = 0.0
        self.answer: Callable[[bytes], object] = bytes
        self.control = b""
        self.finished = False

    def run(self, plan: Plan) -> Outcome:
        """Boot, relay, and end the guest."""
        if plan.job.shutdown:
            self.ending_seconds = SHUTDOWN_SECONDS
        with contextlib.ExitStack() as stack:
            pairs = {channel: socket.socketpair() for channel in Channel}
            for ours, theirs in pairs.values():
                stack.enter_context(ours)
                stack.enter_context(theirs)
            initramfs = os.memfd_create("initramfs")
            stack.callback(os.close, initramfs)
            with open(initramfs, "wb", closefd=False) as file:
                file.write(make_initramfs(plan.cache, plan.kernel, plan.job))
            descriptors = {channel: theirs.fileno() for channel, (_, theirs) in pairs.items()}
            qemu = self.spawn(
                qemu_command(plan, initramfs, descriptors),
                (initramfs, *descriptors.values()),
                descriptors[Channel.CONSOLE],
            )
            for _, theirs in pairs.values():
                theirs.close()  # so that QEMU's end is the end of the streams
            try:
                self.relay({channel: ours for channel, (ours, _) in pairs.items()})
            finally:
                qemu.kill()
                qemu.wait()
        return self.outcome

    @staticmethod
    def spawn(command: Sequence[str], keep: Sequence[int], errors: int) -> subprocess.Popen[bytes]:
        """Start QEMU; what it has to complain about joins the console."""
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=tuple(keep),
            env={**os.environ, "PATH": SEARCH_PATH},
            preexec_fn=functools.partial(die_with, os.getpid()),  # noqa: PLW1509 (no threads here)
        )

    def relay(self, streams: Mapping[Channel, socket.socket]) -> None:
        """Pass on what the guest says until it is done, gone or late."""
        self.deadline = self.clock() + self.boot_seconds
        self.answer = streams[Channel.CONTROL].send
        with selectors.DefaultSelector() as selector:
            for channel, stream in streams.items():
                selector.register(stream, selectors.EVENT_READ, channel)
            while selector.get_map() and not self.finished:
                ready = selector.select(max(0.0, self.deadline - self.clock()))
                if not ready and self.clock() >= self.deadline:
                    self.outcome.late = True
                    return
                # Control comes last: "done" must not overtake the output that went before it.
                for key, _ in sorted(ready, key=lambda item: item[0].data == Channel.CONTROL):
                    self.drain(selector, key)
            self.rest(streams)

    def drain(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        """Take what one stream has."""
        stream, channel = key.fileobj, key.data
        assert isinstance(stream, socket.socket)
        data = receive(stream, 0)
        if data:
            self.take(channel, data)
        else:
            selector.unregister(stream)

    def rest(self, streams: Mapping[Channel, socket.socket]) -> None:
        """Take what arrived between the last look at a stream and the guest's "done"."""
        for channel, stream in streams.items():
            while data := receive(stream, socket.MSG_DONTWAIT):
                self.take(channel, data)

    def take(self, channel: Channel, data: bytes) -> None:
        """Handle a piece of a stream."""
        if channel is Channel.CONTROL:
            *lines, self.control = (self.control + data).split(b"\n")
            for line in lines:
                self.obey(line.decode())
        elif channel is Channel.CONSOLE:
            self.outcome.console = (self.outcome.console + data)[-CONSOLE_KEPT:]
            if self.console is not None:
                write_all(self.console, data)
        else:
            write_all(int(channel), data)  # the channel's number is the descriptor's
            if self.outcome.stage is Stage.ENDING:
                self.deadline = self.clock() + self.ending_seconds

    def obey(self, line: str) -> None:
        """Follow the guest's progress."""
        word, _, rest = line.partition(" ")
        if word == "tick":
            self.ticked = float(rest) - HASTE_MAX * self.clock()
        elif word == "tock" and float(rest) - HASTE_MAX * self.clock() > self.ticked:
            self.outcome.hasty = self.finished = True
        elif word == "tock":
            self.answer(b"go\n")
        elif word == "started":
            self.outcome.stage = Stage.RUNNING
            self.deadline = self.clock() + self.run_seconds
        elif word == "exit":
            self.outcome.stage = Stage.ENDING
            self.outcome.status = int(rest)
            self.deadline = self.clock() + self.ending_seconds
        elif word == "done":
            self.finished = True


def receive(stream: socket.socket, flags: int) -> bytes:
    """Read what a stream has; nothing when it has ended or, if asked so, is empty."""
    try:
        return stream.recv(1 << 16, flags)
    except (BlockingIOError, ConnectionResetError):
        return b""


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything, past any buffer of Python's."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
