"""What every test against the real driver shares. They run as root, in the lab's guest.

A machine without root or without ublk_drv fails these tests: skipped, they would look passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from headers import include_directory
from stack import Stack
from supervisor import SERVER, Supervisor

from ublkwatch.async_ring import AsyncRing
from ublkwatch.ctrl import CtrlError, UblkCtrl
from ublkwatch.model import TAG_VARIABLE, DevInfo, Generation
from ublkwatch.uapi import DevState

T = TypeVar("T")

HERE = Path(__file__).parent
CHAR_DEVICES = Path("/sys/class/ublk-char")
TRACING = Path("/sys/kernel/tracing")
# Emulated, and with the other tests' guests beside it, a machine is slow: this bounds only hangs.
DEADLINE_S = 300.0
TEST_S = 1200.0  # so many waits can be late in one test; of those that do not say themselves
POLL_S = 0.05  # each look takes an emulated guest longer than it seems


# What the driver answers otherwise than the conformance table says, where that breaks no law.
DIFFERENCES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[DIFFERENCES] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("kernel")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TEST_S))
    if config.option.markexpr in ("", "not full"):  # they take all behind them along, or minutes
        marks = ("own_boot", "long")
        apart = [item for item in items if any(map(item.get_closest_marker, marks))]
        config.hook.pytest_deselected(items=apart)
        items[:] = [item for item in items if item not in apart]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for difference in config.stash[DIFFERENCES]:
        terminalreporter.write_line(f"DIFFERENCE: {difference}", yellow=True)


def wait_until(predicate: Callable[[], bool], timeout: float, what: str) -> None:
    """Poll until it is true; fail with ``what`` when the time is over."""
    deadline = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout:g} s: {what}")
        time.sleep(POLL_S)


# --- the driver ----------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def driver() -> None:
    if os.geteuid() != 0:
        pytest.fail("these tests need root: lab/lab.py run -- .venv/bin/python -m pytest ...")
    subprocess.run(["modprobe", "ublk_drv"], check=False)
    if not Path("/dev/ublk-control").exists():
        pytest.fail("this kernel has no ublk_drv: lab/lab.py run brings one that has")


def unload_driver() -> None:
    """Unload it, as soon as all have let go of it: who has ended does so a moment later."""

    def unloaded() -> bool:
        command = ["modprobe", "-r", "ublk_drv"]
        return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0

    wait_until(unloaded, DEADLINE_S, "nobody uses the driver any more")


class Control:
    """The control commands, from code that is not asynchronous."""

    def run(self, action: Callable[[UblkCtrl], Awaitable[T]]) -> T:
        async def once() -> T:
            ring = AsyncRing()
            try:
                return await action(UblkCtrl(ring))
            finally:
                ring.close()

        return asyncio.run(once())

    def info(self, dev_id: int) -> DevInfo:
        return self.run(lambda ctrl: ctrl.get_dev_info(dev_id, timeout_s=DEADLINE_S))

    def exists(self, dev_id: int) -> bool:
        return (CHAR_DEVICES / f"ublkc{dev_id}").exists()

    def wait_state(self, dev_id: int, state: DevState) -> None:
        wait_until(
            lambda: self.info(dev_id).state == state, DEADLINE_S, f"ublk {dev_id} {state.name}"
        )

    def remove(self, dev_id: int) -> None:
        """Stop and delete it; its server must be dead. A device that is gone is gone."""

        async def both(ctrl: UblkCtrl) -> None:
            await ctrl.stop_dev(dev_id, timeout_s=DEADLINE_S)
            await ctrl.del_dev(dev_id, timeout_s=DEADLINE_S)

        try:
            self.run(both)
        except CtrlError as error:
            if error.errno != errno.ENODEV:
                raise

    def line(self, dev_id: int, attempt: int = 1) -> dict[str, Any]:
        """Return the line of the attach contract for this device."""
        info = self.info(dev_id)
        return {
            "dev_id": dev_id,
            "char_device": f"/dev/ublkc{dev_id}",
            "queues": info.nr_hw_queues,
            "depth": info.queue_depth,
            "max_io_buf_bytes": info.max_io_buf_bytes,
            "flags": int(info.flags),
            "params": self.run(lambda ctrl: ctrl.get_params(dev_id)),
            "attempt": attempt,
        }

    def start_user_recovery(self, dev_id: int) -> None:
        """Send START, again while the kernel still lets go of the old server."""

        def accepted() -> bool:
            try:
                self.run(lambda ctrl: ctrl.start_user_recovery(dev_id))
            except CtrlError as error:
                if error.errno != errno.EBUSY:
                    raise
                return False
            return True

        wait_until(accepted, DEADLINE_S, f"START_USER_RECOVERY of ublk {dev_id} accepted")

    def end_user_recovery(self, dev_id: int, pid: int) -> None:
        self.run(lambda ctrl: ctrl.end_user_recovery(dev_id, pid, timeout_s=DEADLINE_S))


@pytest.fixture
def control() -> Control:
    return Control()


@pytest.fixture
def generation(control: Control) -> Generation:
    return Generation.of(control.run(lambda ctrl: ctrl.get_features()))


# --- servers -------------------------------------------------------------------------------------


class Process:
    """A reference server: what it was told, what it says, how it ended."""

    def __init__(
        self,
        directory: Path,
        arguments: list[str],
        env: Mapping[str, str],
        program: tuple[str, ...] = SERVER,
    ) -> None:
        self._stdout, self._stderr = directory / "stdout", directory / "stderr"
        with self._stdout.open("wb") as out, self._stderr.open("wb") as err:
            self.proc = subprocess.Popen(
                [*program, *arguments],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env={**os.environ, **env},
            )
        self.pid = self.proc.pid

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def wait(self) -> int:
        """Return its exit status; negative when a signal ended it."""
        return self.proc.wait(DEADLINE_S)

    def kill(self) -> None:
        """SIGKILL, if it still runs, and reap it."""
        self.proc.kill()
        self.proc.wait(DEADLINE_S)
        if self.proc.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.proc.stdin.close()

    def threads(self) -> int:
        """Return how many threads it has."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/task").iterdir())

    def char_devices(self) -> set[str]:
        """Return the ublk character devices that it has open."""
        links = set()
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.add(str(fd.readlink()))
        return {link for link in links if link.startswith("/dev/ublkc")}


class Reference(Process):
    """A server that created its devices."""

    def __init__(
        self, directory: Path, arguments: list[str], dev_ids: tuple[int, ...], control: Control
    ) -> None:
        super().__init__(directory, ["--create", ",".join(map(str, dev_ids)), *arguments], {})
        self._dev_ids, self._control = dev_ids, control

    def wait_live(self) -> Reference:
        def decided() -> bool:
            return len(self.live()) == len(self._dev_ids) or self.proc.poll() is not None

        wait_until(decided, DEADLINE_S, f"LIVE from {self.proc.args!r}")
        assert self.live().keys() == set(self._dev_ids), self.stderr
        return self

    def live(self) -> dict[int, dict[str, int]]:
        """Return what its LIVE lines say, by device."""
        found = {}
        for line in self.stdout.splitlines(keepends=True):
            if match := re.fullmatch(r"LIVE (\d+) queues=(\d+) depth=(\d+) flags=(0x\w+)\n", line):
                dev_id, queues, depth = map(int, match.group(1, 2, 3))
                found[dev_id] = {"queues": queues, "depth": depth, "flags": int(match[4], 16)}
        return found

    def info(self, dev_id: int = 0) -> DevInfo:
        return self._control.info(dev_id)


class Attaching(Process):
    """A server that attaches: started, READY in time, given its line by us."""

    def __init__(
        self, directory: Path, arguments: list[str], program: tuple[str, ...] = SERVER
    ) -> None:
        path = directory / "notify"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(path))
        self._notify.setblocking(False)
        self._ready = False
        super().__init__(directory, arguments, {"NOTIFY_SOCKET": str(path)}, program)

    def ready(self) -> bool:
        """Return whether it has said READY=1."""
        with contextlib.suppress(BlockingIOError):
            self._ready |= self._notify.recv(4096) == b"READY=1"
        return self._ready

    def wait_ready(self) -> Attaching:
        wait_until(
            lambda: self.ready() or self.proc.poll() is not None, DEADLINE_S, "a server ready"
        )
        assert self.ready(), self.stderr
        return self

    def send(self, line: Mapping[str, Any]) -> None:
        """Give it a line that need not be the last one."""
        assert self.proc.stdin is not None
        self.proc.stdin.write(json.dumps(line).encode() + b"\n")
        self.proc.stdin.flush()

    def write_line(self, line: Mapping[str, Any] | None) -> None:
        """Give it its only line, or the end of file that means it is not needed."""
        assert self.proc.stdin is not None
        if line is not None:
            self.send(line)
        self.proc.stdin.close()

    def kill(self) -> None:
        super().kill()
        self._notify.close()


class Servers:
    """Starts reference servers; at the end none of them and none of their devices is left."""

    def __init__(self, directory: Path, control: Control) -> None:
        self._directory, self._control = directory, control
        self._started: list[Process] = []

    def __call__(
        self,
        dev_id: int | tuple[int, ...] = 0,
        *,
        target: str = "null",
        recovery: str = "reissue",
        queues: int = 1,
        depth: int = 16,
        size: str = "32M",
        more: tuple[str, ...] = (),
    ) -> Reference:
        """Start a server that creates these devices; return once they are LIVE."""
        reference = self.start(
            dev_id,
            target=target,
            recovery=recovery,
            more=("--queues", str(queues), "--depth", str(depth), "--size", size, *more),
        ).wait_live()
        if "--fault" not in more:
            for one in dev_id if isinstance(dev_id, tuple) else (dev_id,):
                wait_scanned(one)
        return reference

    def start(
        self,
        dev_id: int | tuple[int, ...] = 0,
        *,
        target: str = "null",
        recovery: str = "reissue",
        more: tuple[str, ...] = (),
    ) -> Reference:
        """Start a server that creates these devices; return at once."""
        dev_ids = dev_id if isinstance(dev_id, tuple) else (dev_id,)
        arguments = [*self.target(target), "--recovery", recovery, *more]
        process = Reference(self._home(), arguments, dev_ids, self._control)
        self._started.append(process)
        return process

    def attach(self, *more: str, target: str = "null") -> Attaching:
        """Start a server that waits for its line; return at once."""
        process = Attaching(self._home(), [*self.target(target), *more])
        self._started.append(process)
        return process

    def attach_program(self, program: Path, *arguments: str) -> Attaching:
        """Start another server than ours that waits for its line; return at once."""
        process = Attaching(self._home(), [*arguments], (str(program),))
        self._started.append(process)
        return process

    def target(self, kind: str) -> list[str]:
        """Return the arguments of a target whose data outlives its server, not the test.

        It leaves no run file unless asked to: most tests are about what a configuration says.
        """
        file = str(self._directory / f"{kind}-{{dev_id}}")
        return ["--target", kind, "--file", file, "--run-dir="]

    def end(self) -> None:
        """Kill the servers, then remove every device that is there."""
        for process in self._started:
            process.kill()
        for dev_id in device_ids():
            self._control.remove(dev_id)
        assert not device_ids(), "devices are left over"

    def _home(self) -> Path:
        home = self._directory / str(len(self._started))
        home.mkdir()
        return home


def wait_scanned(dev_id: int) -> None:
    """Wait until the kernel has looked for partitions.

    Newer kernels do it after START_DEV, in the background. A server killed before would leave the
    scan to the next one; if that answers nothing, everybody's open waits for it.
    """
    stat = Path(f"/sys/block/ublkb{dev_id}/stat")
    wait_until(lambda: int(stat.read_text().split()[0]) > 0, DEADLINE_S, "the scan begins")
    os.close(os.open(f"/dev/ublkb{dev_id}", os.O_RDONLY))  # waits for the scan's end


def device_ids() -> list[int]:
    if not CHAR_DEVICES.exists():
        return []
    return sorted(int(entry.name.removeprefix("ublkc")) for entry in CHAR_DEVICES.iterdir())


@pytest.fixture
def server(
    tmp_path_factory: pytest.TempPathFactory, control: Control, fio: Load
) -> Iterator[Servers]:
    assert not device_ids(), "another test's devices are left over"
    servers = Servers(tmp_path_factory.mktemp("ublk"), control)
    yield servers
    fio.kill()  # before the devices go, or it would report their end as errors ...
    servers.end()
    fio.reap()  # ... and after, since even a killed one waits for its requests


@pytest.fixture
def stack(tmp_path: Path, server: Servers, control: Control) -> Iterator[Stack]:
    del server  # its devices go behind what is on them
    made = Stack(tmp_path)
    yield made
    for dev_id in device_ids():  # nothing is unmounted from a dead device; a stopped one fails I/O
        if control.info(dev_id).state is not DevState.LIVE:
            control.run(lambda ctrl, n=dev_id: ctrl.stop_dev(n, timeout_s=DEADLINE_S))  # type: ignore[misc]
    made.down()


EXAMPLE = Path(__file__).parents[2] / "examples/attach.c"


@pytest.fixture(scope="session")
def attach(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the program of the attach contract's example in C."""
    program = tmp_path_factory.mktemp("example") / "attach"
    # Static: there are tests in which no library can be read any more.
    options = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-pthread", "-static"]
    headers = ["-I", str(include_directory())]
    subprocess.run(["cc", *options, *headers, "-o", program, EXAMPLE], check=True)
    return program


# --- load ----------------------------------------------------------------------------------------


class Fio:
    """A running fio, whose report counts: every error, every block that does not verify."""

    def __init__(self, directory: Path, dev_id: int, /, **options: str | int) -> None:
        self._report = directory / f"fio-{time.monotonic_ns()}.json"
        self._stat = Path(f"/sys/block/ublkb{dev_id}/stat")
        settings = {
            "name": "test",
            "thread": 1,  # one process, to be killed as one
            "filename": f"/dev/ublkb{dev_id}",
            "direct": 1,
            "ioengine": "libaio",
            "rw": "randwrite",
            "bs": "4k",
            "iodepth": 8,
            "size": "4m",
            "verify": "crc32c",
            "verify_fatal": 1,
            "output": str(self._report),
            "output-format": "json",
        } | options
        self.proc = subprocess.Popen(
            ["fio", *(f"--{name}={value}" for name, value in settings.items())]
        )

    def completed(self) -> int:
        """Return how many requests the device has completed."""
        fields = self._stat.read_text().split()
        return int(fields[0]) + int(fields[4])

    def wait_progress(self, requests: int = 50) -> None:
        """Wait until that many more requests were completed."""
        goal = self.completed() + requests
        wait_until(lambda: self.completed() >= goal, DEADLINE_S, "I/O makes progress")

    def interrupt(self) -> None:
        """Let it finish what it has begun, and end."""
        self.proc.send_signal(2)

    def report(self) -> dict[str, Any]:
        """Wait for its end; assert that there was no error, return the job's part."""
        self.proc.wait(DEADLINE_S)
        text = self._report.read_text()
        job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
        assert job["error"] == 0, text
        return job


class Load:
    """Starts fio on a device."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[Fio] = []

    def __call__(self, dev_id: int = 0, /, **options: str | int) -> Fio:
        fio = Fio(self._directory, dev_id, **options)
        self._started.append(fio)
        return fio

    def kill(self) -> None:
        for fio in self._started:
            fio.proc.kill()

    def reap(self) -> None:
        for fio in self._started:
            fio.proc.wait(DEADLINE_S)


@pytest.fixture
def fio(tmp_path: Path) -> Load:
    return Load(tmp_path)


# --- what the kernel says ------------------------------------------------------------------------


@pytest.fixture
def no_block_errors() -> Iterator[None]:
    """Fail the test if any block device failed a request while it ran."""
    # Else each event that is enabled patches the scheduler's hottest path, which QEMU's TCG seldom,
    # but now and then gets wrong: "Oops: int3" in ttwu_do_activate().
    (TRACING / "options/record-cmd").write_text("0")
    instance = TRACING / "instances" / "ublkwatch"
    instance.mkdir()
    try:
        (instance / "events/block/block_rq_error/enable").write_text("1")
        yield
        (instance / "events/block/block_rq_error/enable").write_text("0")
        lines = (instance / "trace").read_text().splitlines()
        assert [line for line in lines if not line.startswith("#")] == []
    finally:
        instance.rmdir()


class KernelLog:
    """What the kernel has logged since this was made."""

    _BAD = re.compile(r"BUG:|Oops|WARNING:.*ublk")

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)
        self._expected: list[str] = []

    def expect(self, pattern: str) -> None:
        """Let complaints that match pass: this test provokes them."""
        self._expected.append(pattern)

    def complaints(self) -> list[str]:
        found = []
        while (record := self._read()) is not None:
            if self._BAD.search(record) and not any(re.search(p, record) for p in self._expected):
                found.append(record)
        os.close(self._fd)
        return found

    def _read(self) -> str | None:
        try:
            return os.read(self._fd, 8192).decode(errors="replace").partition(";")[2]
        except BlockingIOError:
            return None
        except BrokenPipeError:  # overwritten before it was read; the next one is there
            return "BUG: the kernel's log overflowed"


@pytest.fixture(autouse=True)
def kernel_log(driver: None) -> Iterator[KernelLog]:  # noqa: ARG001 - ordered behind it
    """Fail the test in which the driver complained."""
    log = KernelLog()
    yield log
    assert log.complaints() == []


# --- ublkwatch -----------------------------------------------------------------------------------


@pytest.fixture
def watch(tmp_path: Path, server: Servers) -> Iterator[Callable[..., Supervisor]]:
    """Start ublkwatch over servers of these targets by device; it and they are ended again."""
    started: list[Supervisor] = []

    def start(
        targets: dict[int, str | list[str]],
        recovery: str = "",
        command: tuple[str, ...] = (),
        top: str = "",
    ) -> Supervisor:
        home = tmp_path / f"ublkwatch-{len(started)}"
        home.mkdir()
        commands = {
            dev_id: [*SERVER, *(server.target(kind) if isinstance(kind, str) else kind)]
            for dev_id, kind in targets.items()
        }
        started.append(Supervisor(home, commands, recovery, command, top))
        return started[-1].start()

    yield start
    for supervisor in started:
        supervisor.kill()
    end_tagged()


def end_tagged() -> None:
    """End every server that ublkwatch started: their devices are removed next."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if TAG_VARIABLE in process.environ():
                process.kill()
                process.wait(DEADLINE_S)
