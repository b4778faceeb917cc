"""Start processes: ublk servers by the fork launcher, and our own control workers.

The only home of process start. A server gets its own session, no descriptor but its three, a clean
environment, and a tag by which it is found again. Its standard input is a FIFO in the runtime
directory that the server itself holds open for writing too, so that our death is no end of file.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

from ublkwatch.care import Job
from ublkwatch.model import TAG_VARIABLE

# What a server may inherit from our environment; everything else is ours alone.
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TZ", "HOME")
_OUTPUT_MAX = 1 << 20
_SHUTDOWN_ANSWER_S = 5.0
_OUTPUT_KEPT = 64 << 10


class Launcher:
    """The fork launcher: servers as our children, which outlive us."""

    def __init__(
        self,
        runtime_dir: Path,
        ready: Callable[[str], None],
        systemd: Path = Path("/run/systemd/system"),
    ) -> None:
        """``ready`` is told, from the loop, the tag of an attempt whose server said READY=1.

        ``systemd`` is there where systemd is the host's init (sd_booted(3)).
        """
        self._systemd = systemd
        self._asking = asyncio.Lock()
        self._asked = 0  # questions about the host's end, ever
        self._ending = False  # the last answer
        self._attempts = runtime_dir / "attempts"
        self._attempts.mkdir(mode=0o700, exist_ok=True)
        self._ready = ready
        self._loop = asyncio.get_running_loop()
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._sockets: dict[str, socket.socket] = {}
        self._fifos: dict[str, int] = {}
        self._certain: set[str] = set()  # attempts of whose line we know whether it was read

    async def start(self, tag: str, job: Job) -> int:
        """Start the server of an attempt and return its pid; OSError says why it did not start."""
        self._remove(tag)
        home = self._attempts / tag
        home.mkdir(mode=0o700)
        os.mkfifo(home / "stdin", 0o600)
        self.listen(tag)
        self._certain.add(tag)
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment |= {TAG_VARIABLE: tag, "NOTIFY_SOCKET": str(home / "notify")}
        # In a thread: exec reads the program from a file system that may be slow or hang.
        process = await asyncio.to_thread(_start, home, job.command, environment)
        self._children[process.pid] = process
        return process.pid

    def listen(self, tag: str) -> None:
        """Hear READY=1 of an attempt's server; after our restart as well.

        Its FIFO is held open from now on, so that a line which nobody reads can be told from one
        that was read, also when the server is gone.
        """
        if tag in self._sockets or not (self._attempts / tag).is_dir():
            return
        with contextlib.suppress(OSError):
            stdin = self._attempts / tag / "stdin"
            self._fifos[tag] = os.open(stdin, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        path = self._attempts / tag / "notify"
        path.unlink(missing_ok=True)
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        notify.bind(str(path))
        self._sockets[tag] = notify
        self._loop.add_reader(notify, self._notified, tag)

    def write_line(self, tag: str, line: str) -> None:
        """Give the server its go. It is written whole or not at all (less than PIPE_BUF)."""
        self.listen(tag)
        fifo = self._fifos.get(tag)
        if fifo is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"FIFO of {tag}")
        if _waiting(fifo):  # of our former life, and still there
            self._certain.add(tag)
        else:
            os.write(fifo, line.encode() + b"\n")

    def unread(self, tag: str) -> bool:
        """Tell whether the line was written and is known not to have been read."""
        fifo = self._fifos.get(tag)
        return fifo is not None and tag in self._certain and _waiting(fifo) > 0

    def how_ended(self, pid: int) -> tuple[str, int | None]:
        """Say how a process ended, and its exit code: where it was our child, never by guessing."""
        process = self._children.pop(pid, None)
        if process is None:
            return "unknown", None
        try:
            status = process.wait(timeout=1)  # its pidfd was readable: it has been a zombie already
        except subprocess.TimeoutExpired:
            return "unknown", None
        return _how(status)

    def last_words(self, tag: str) -> str:
        """Return the last line that the attempt's server printed."""
        with contextlib.suppress(OSError), (self._attempts / tag / "output").open("rb") as output:
            output.seek(max(0, output.seek(0, os.SEEK_END) - 2048))
            lines = output.read().decode(errors="replace").split("\n")
            words = [line.strip() for line in lines if line.strip()]
            return "".join(c if c.isprintable() else "?" for c in words[-1])[:300] if words else ""
        return ""

    def trim(self) -> None:
        """Keep the outputs bounded: a server's descriptor is O_APPEND, so a cut one goes on."""
        for output in self._attempts.glob("*/output"):
            with contextlib.suppress(OSError):
                if output.stat().st_size > _OUTPUT_MAX:
                    with output.open("rb") as file:  # it may be far larger than our memory
                        file.seek(-_OUTPUT_KEPT, os.SEEK_END)
                        output.with_name("output.old").write_bytes(file.read(_OUTPUT_KEPT))
                    os.truncate(output, 0)

    def keep_only(self, tags: set[str]) -> None:
        """Remove what attempts that are over left behind."""
        for home in self._attempts.iterdir():
            if home.name not in tags:
                self._remove(home.name)

    async def decide(
        self, command: tuple[str, ...], about: dict[str, str], timeout_s: float
    ) -> tuple[str, int | None]:
        """Run the operator's command about a device, and return how it ended, and its exit code."""
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment | about,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            return str(error), None
        try:
            async with asyncio.timeout(timeout_s):
                return _how(await process.wait())
        except TimeoutError:
            process.kill()
            await process.wait()
            return f"killed after {timeout_s:g} s", None

    async def shutting_down(self) -> bool:
        """Tell whether the host shuts down, as systemd says; where it does not run, nobody does.

        Many devices may be lost at once: whoever comes while a question is open shares the next one
        with all others, since the open one may have been answered before what he saw.
        """
        came = self._asked
        async with self._asking:
            if self._asked == came:
                self._asked += 1
                self._ending = await self._ask_systemd()
            return self._ending

    async def _ask_systemd(self) -> bool:
        try:
            await asyncio.to_thread(os.stat, self._systemd)
            process = await asyncio.create_subprocess_exec(
                "systemctl",
                "is-system-running",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError:
            return False
        try:
            async with asyncio.timeout(_SHUTDOWN_ANSWER_S):
                output, _ = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            return False
        return output.strip() == b"stopping"

    def close(self) -> None:
        """Stop listening; the servers live on, and so do their FIFOs."""
        for tag in list(self._sockets):
            self._silence(tag)
        for process in self._children.values():
            process.returncode = 0  # not ours to wait for any more; init inherits it

    def _notified(self, tag: str) -> None:
        with contextlib.suppress(OSError):
            if "READY=1" in self._sockets[tag].recv(4096).decode(errors="replace").split("\n"):
                self._ready(tag)

    def _silence(self, tag: str) -> None:
        if (notify := self._sockets.pop(tag, None)) is not None:
            self._loop.remove_reader(notify)
            notify.close()
        if (fifo := self._fifos.pop(tag, None)) is not None:
            os.close(fifo)
        self._certain.discard(tag)

    def _remove(self, tag: str) -> None:
        self._silence(tag)
        shutil.rmtree(self._attempts / tag, ignore_errors=True)


def _how(status: int) -> tuple[str, int | None]:
    if status >= 0:
        return f"exit status {status}", status
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name, None
    return f"signal {-status}", None


def _waiting(fifo: int) -> int:
    """Return how many bytes wait in a FIFO."""
    return int.from_bytes(fcntl.ioctl(fifo, termios.FIONREAD, bytes(4)), sys.byteorder)


def _start(
    home: Path, command: tuple[str, ...], environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    # For reading and writing: then no end of file comes when the last other writer is gone.
    stdin = os.open(home / "stdin", os.O_RDWR | os.O_CLOEXEC)
    output = os.open(home / "output", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=output,
            stderr=output,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    finally:
        os.close(stdin)
        os.close(output)


def start_worker() -> socket.socket:
    """Start a control worker and return our end of its line; it ends when that is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "ublkwatch.ctrl_worker"],
            stdin=theirs.fileno(),
            start_new_session=True,
        )
    # Nobody waits for a worker: it may be in uninterruptible sleep long after we are gone. Leaving
    # it a zombie until we end costs one process table entry for each retired worker.
    process.returncode = 0
    ours.setblocking(False)
    return ours
