"""The homes of attempts: what each one has in the runtime directory, kept between our lives.

A home holds the server's standard input (a FIFO), its READY socket, its output, the journal of the
lines written to it, and where its processes are. Devices whose servers are one process share the
home of one of them: the others' are symbolic links to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import socket
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

_OUTPUT_MAX = 1 << 20
_OUTPUT_KEPT = 64 << 10
_LINE_MAX = 200  # characters quoted of a line
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Homes:
    """All homes, by the tags of their attempts."""

    def __init__(self, runtime_dir: Path, ready: Callable[[str], None]) -> None:
        """``ready`` is told, from the loop, the tag of each attempt whose server said READY=1."""
        self._attempts = runtime_dir / "attempts"
        self._attempts.mkdir(mode=0o711, exist_ok=True)
        self._attempts.chmod(0o711)  # a server of another user finds its socket, and nothing else
        self._ready = ready
        self._loop = asyncio.get_running_loop()
        self._sockets: dict[str, socket.socket] = {}  # by root, as the FIFOs are
        self._fifos: dict[str, int] = {}

    def make(self, tag: str, uid: int) -> Path:
        """Make a new home for a server of that user, and listen."""
        self.remove(tag)
        home = self._attempts / tag
        home.mkdir(mode=0o711)
        home.chmod(0o711)
        os.mkfifo(home / "stdin", 0o600)
        (home / "lines").touch(mode=0o600)
        self._open_fifo(tag)
        self._bind(tag, uid)
        return home

    def join(self, tag: str, root: str) -> None:
        """Let an attempt share another one's home; READY is told at once where it was said."""
        self.remove(tag)
        real = self.root(root)
        home = self._attempts / real
        if not home.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"attempt {root}")
        (self._attempts / tag).symlink_to(real)
        if (home / "ready").exists():
            self._loop.call_soon(self._ready, tag)

    def root(self, tag: str) -> str:
        """Return the tag under which the server of an attempt was started."""
        try:
            return str((self._attempts / tag).readlink())
        except OSError:
            return tag

    def path(self, tag: str) -> Path:
        return self._attempts / tag

    def listen(self, tag: str) -> None:
        """Hear READY=1 of an attempt's server after our restart.

        Its FIFO is held open from now on, so that a line which nobody reads can be told from one
        that was read, also when the server is gone.
        """
        root = self.root(tag)
        if root in self._sockets or not (self._attempts / root).is_dir():
            return
        uid = 0
        with contextlib.suppress(OSError):
            self._open_fifo(root)
        with contextlib.suppress(OSError):
            uid = (self._attempts / root / "notify").stat().st_uid  # who may speak is kept there
        self._bind(root, uid)

    # --- the line --------------------------------------------------------------------------------

    def write_line(self, tag: str, line: str) -> None:
        """Write a line to the server, whole or not at all (it is less than PIPE_BUF).

        One that our former life wrote, and that waits there unread, is not written again.
        """
        self.listen(tag)
        fifo = self._fifos.get(self.root(tag))
        if fifo is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"FIFO of {tag}")
        if self.unread(tag):
            return
        # Noted first: should we die in between, more counts as written than was, and the line is
        # not known to be unread.
        data = line.encode() + b"\n"
        with (self._attempts / tag / "lines").open("ab") as journal:
            before = journal.tell()
            journal.write(f"{tag} {len(data)}\n".encode())
            journal.flush()
            try:
                os.write(fifo, data)
            except OSError:
                journal.truncate(before)
                raise

    def unread(self, tag: str) -> bool:
        """Tell whether the line was written and is known not to have been read.

        Lines are read in order: what was written from its start on waits there still, all of it.
        """
        fifo = self._fifos.get(self.root(tag))
        if fifo is None:
            return False
        from_it = 0
        with contextlib.suppress(OSError):
            for word in (self._attempts / tag / "lines").read_text().splitlines():
                whose, _, length = word.partition(" ")
                if from_it or whose == tag:
                    from_it += int(length)
        return 0 < from_it <= _waiting(fifo)

    # --- output ----------------------------------------------------------------------------------

    def last_words(self, tag: str) -> str:
        """Return the last line that the attempt's server printed."""
        with contextlib.suppress(OSError), (self._attempts / tag / "output").open("rb") as output:
            output.seek(max(0, output.seek(0, os.SEEK_END) - 2048))
            return last_lines(output.read())
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

    # --- their end -------------------------------------------------------------------------------

    def others(self, kept: set[str]) -> list[str]:
        """Return the tags whose attempts are over; a home is kept while a kept tag leads to it."""
        kept = kept | {self.root(tag) for tag in kept}
        return [tag for tag in self.all() if tag not in kept]

    def all(self) -> Iterator[str]:
        """Return every tag that has a home, or shares one."""
        return (path.name for path in list(self._attempts.iterdir()))

    def remove(self, tag: str) -> None:
        """Remove what an attempt left behind; of a shared home, its share only."""
        home = self._attempts / tag
        if home.is_symlink():
            home.unlink()
            return
        self._silence(tag)
        shutil.rmtree(home, ignore_errors=True)

    def close(self) -> None:
        """Stop listening; the servers live on, and so do their FIFOs."""
        for tag in list(self._sockets):
            self._silence(tag)

    # --- READY -----------------------------------------------------------------------------------

    def _open_fifo(self, tag: str) -> None:
        path = self._attempts / tag / "stdin"
        self._fifos[tag] = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def _bind(self, tag: str, uid: int) -> None:
        """Listen, as a socket that only that user (and root) can write to."""
        path = self._attempts / tag / "notify"
        fresh = path.with_name("notify.new")
        fresh.unlink(missing_ok=True)
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            notify.bind(str(fresh))
            fresh.chmod(0o600)
            if uid != os.geteuid():
                os.chown(fresh, uid, -1)
            fresh.rename(path)  # so that whose it is survives our death at any point
        except OSError:
            notify.close()
            raise
        self._sockets[tag] = notify
        self._loop.add_reader(notify, self._notified, tag, uid)

    def _notified(self, tag: str, uid: int) -> None:
        with contextlib.suppress(OSError):
            data, ancillary, _, _ = self._sockets[tag].recvmsg(
                4096, socket.CMSG_SPACE(_CREDENTIALS.size)
            )
            if _sender(ancillary) not in (0, uid):
                return
            if "READY=1" not in data.decode(errors="replace").split("\n"):
                return
            (self._attempts / tag / "ready").touch(mode=0o600)
        for each in [tag, *(name for name in self.all() if name != tag and self.root(name) == tag)]:
            self._ready(each)

    def _silence(self, tag: str) -> None:
        if (notify := self._sockets.pop(tag, None)) is not None:
            self._loop.remove_reader(notify)
            notify.close()
        if (fifo := self._fifos.pop(tag, None)) is not None:
            os.close(fifo)


def last_lines(output: bytes) -> str:
    """Return the last three lines that say something, harmless and bounded, as one."""
    lines = output.decode(errors="replace").split("\n")
    words = [line.strip()[:_LINE_MAX] for line in lines if line.strip()]
    return "".join(c if c.isprintable() else "?" for c in " | ".join(words[-3:]))


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    """Return the uid of a datagram's sender, as the kernel says."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            return int(_CREDENTIALS.unpack(data[: _CREDENTIALS.size])[1])
    return None


def _waiting(fifo: int) -> int:
    """Return how many bytes wait in a FIFO."""
    return int.from_bytes(fcntl.ioctl(fifo, termios.FIONREAD, bytes(4)), sys.byteorder)
