"""Start processes: ublk servers by the fork launcher, and our own control workers.

The only home of process start. A server gets its own session, no descriptor but its three, a clean
environment, and a tag by which it is found again. Its standard input is a FIFO in the runtime
directory that the server itself holds open for writing too, so that our death is no end of file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ublkwatch.model import TAG_VARIABLE

# What a server may inherit from our environment; everything else is ours alone.
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TZ", "HOME")
_OUTPUT_MAX = 1 << 20
_OUTPUT_KEPT = 64 << 10


class Launcher:
    """The fork launcher: servers as our children, which outlive us."""

    def __init__(self, runtime_dir: Path, ready: Callable[[str], None]) -> None:
        """``ready`` is told, from the loop, the tag of an attempt whose server said READY=1."""
        self._attempts = runtime_dir / "attempts"
        self._attempts.mkdir(mode=0o700, exist_ok=True)
        self._ready = ready
        self._loop = asyncio.get_running_loop()
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._sockets: dict[str, socket.socket] = {}

    async def start(self, tag: str, command: tuple[str, ...]) -> int:
        """Start the server of an attempt and return its pid; OSError says why it did not start."""
        self._remove(tag)
        home = self._attempts / tag
        home.mkdir(mode=0o700)
        os.mkfifo(home / "stdin", 0o600)
        self.listen(tag)
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment |= {TAG_VARIABLE: tag, "NOTIFY_SOCKET": str(home / "notify")}
        # In a thread: exec reads the program from a file system that may be slow or hang.
        process = await asyncio.to_thread(_start, home, command, environment)
        self._children[process.pid] = process
        return process.pid

    def listen(self, tag: str) -> None:
        """Hear READY=1 of an attempt's server; after our restart as well."""
        if tag in self._sockets or not (self._attempts / tag).is_dir():
            return
        path = self._attempts / tag / "notify"
        path.unlink(missing_ok=True)
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        notify.bind(str(path))
        self._sockets[tag] = notify
        self._loop.add_reader(notify, self._notified, tag)

    def write_line(self, tag: str, line: str) -> None:
        """Give the server its go. It is written whole or not at all (less than PIPE_BUF)."""
        fifo = os.open(self._attempts / tag / "stdin", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(fifo, line.encode() + b"\n")
        finally:
            os.close(fifo)

    def how_ended(self, pid: int) -> str:
        """Say how a process ended: by exit status where it was our child, never by guessing."""
        process = self._children.pop(pid, None)
        if process is None:
            return "unknown"
        try:
            status = process.wait(timeout=1)  # its pidfd was readable: it has been a zombie already
        except subprocess.TimeoutExpired:
            return "unknown"
        if status < 0:
            with contextlib.suppress(ValueError):
                return signal.Signals(-status).name
        return f"exit status {status}" if status >= 0 else f"signal {-status}"

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

    def _remove(self, tag: str) -> None:
        self._silence(tag)
        shutil.rmtree(self._attempts / tag, ignore_errors=True)


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
