"""Trust: whether a file, and the way to it, can have been written by root (or us) alone.

What root runs, or obeys, must be root's own: the file itself and every directory up to /, since
whoever can write one of these can put another file in its place. All is judged on descriptors that
stay open while the walk goes on, so that nothing can be exchanged behind a judgement.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_LINKS_MAX = 40  # as the kernel's own limit (path_resolution(7))
_INTERPRETERS_MAX = 4  # as the kernel's (execve(2))
_WALK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: what turns out to be a FIFO is refused, and not waited for.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class TrustError(OSError):
    """A path that others could have written: says which, why, and the way out."""

    def __init__(self, path: str, reason: str, way_out: str = "") -> None:
        """``path`` is what has to be changed, which may be a directory on the way."""
        super().__init__(f"{path}: {reason}; try: {way_out}" if way_out else f"{path}: {reason}")


def open_trusted(path: Path) -> int:
    """Open a regular file for reading that only root or we can have written.

    The file belongs to root or to us and is not writable by group or others; so does every
    directory on the way to it, that of each symbolic link included. A sticky directory, such as
    /tmp, may be writable: then what it holds is its owner's to change, who was judged.
    TrustError says what is wrong; any other OSError is the path's own.
    """
    return _open(str(path))[0]


def check_executable(path: Path, root: Path = Path("/")) -> None:
    """Refuse a program that others could have written, or that cannot be executed.

    The interpreter that a script names is a program, too. ``root`` is the root directory of who
    will run it, such as /proc/PID/root: what it is called there, and where absolute links lead.
    Errors as with open_trusted().
    """
    for _ in _programs(path, root):
        pass


def program(path: Path, root: Path = Path("/")) -> str:
    """Name the files that would be executed now: another name, another program.

    Errors as with check_executable().
    """
    return " ".join(
        f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"
        for found in _programs(path, root)
    )


def _programs(path: Path, root: Path) -> Iterator[os.stat_result]:
    """Judge a program, and the interpreters that it names."""
    name = str(path)
    for _ in range(_INTERPRETERS_MAX):
        descriptor, real = _open(name, root)
        try:
            status = os.fstat(descriptor)
            if not status.st_mode & 0o111:
                raise TrustError(real, "is not executable", f"chmod +x {real}")
            head = os.read(descriptor, 256)
        finally:
            os.close(descriptor)
        yield status
        if head.startswith(b"\x7fELF"):
            return
        words = head[2:].split(b"\n")[0].split()
        if not head.startswith(b"#!") or not words or b"\0" in words[0]:
            raise TrustError(real, "is neither a program nor a script that names its interpreter")
        name = os.fsdecode(words[0])
    raise TrustError(str(path), "its interpreter is a script of a script")


def _open(path: str, root: Path = Path("/")) -> tuple[int, str]:
    """Walk to the file; return its descriptor and its name without symbolic links."""
    if not path.startswith("/"):
        path = f"{Path.cwd()}/{path}"
    at, where = _top(root), ""
    try:
        _judge(os.fstat(at), "/")
        parts = _parts(path)
        links = 0
        while parts:
            part = parts.pop()
            found = os.open(part, _WALK, dir_fd=at)
            try:
                status = os.fstat(found)
                name = os.path.normpath(f"{where}/{part}")
                _judge(status, name)
                if stat.S_ISLNK(status.st_mode):
                    links += 1
                    if links > _LINKS_MAX:
                        raise TrustError(path, "too many symbolic links")
                    target = os.readlink("", dir_fd=found)
                    parts += _parts(target)
                    if target.startswith("/"):
                        os.close(at)
                        at, where = _top(root), ""
                elif stat.S_ISDIR(status.st_mode):
                    at, found, where = found, at, name
                elif parts:
                    raise _error(errno.ENOTDIR, name)
                else:
                    _judge_file(status, name)  # before it is opened: that alone can do something
                    return _reopened(part, at, name), name
            finally:
                os.close(found)
        raise _error(errno.EISDIR, where or "/")
    except FileNotFoundError:
        raise _error(errno.ENOENT, path) from None
    finally:
        os.close(at)


def _top(root: Path) -> int:
    return os.open(
        f"{str(root).rstrip('/')}/.", _WALK | os.O_DIRECTORY
    )  # /proc/PID/root itself is a link


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


def _parts(path: str) -> list[str]:
    """Return the components of a path, the first one last."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _reopened(part: str, at: int, name: str) -> int:
    """Open a regular file for reading, which so far could only be looked at, and judge it."""
    descriptor = os.open(part, _READ, dir_fd=at)
    try:
        _judge_file(os.fstat(descriptor), name)
    except TrustError:
        os.close(descriptor)
        raise
    return descriptor


def _judge_file(status: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise TrustError(name, "must be a regular file")
    _judge(status, name)


def _judge(status: os.stat_result, name: str) -> None:
    if status.st_uid not in (0, os.geteuid()):
        option = "-h " if stat.S_ISLNK(status.st_mode) else ""
        raise TrustError(name, f"belongs to uid {status.st_uid}", f"chown {option}root {name}")
    if stat.S_ISLNK(status.st_mode) or not status.st_mode & 0o022:
        return
    if not (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        raise TrustError(name, "others can write it", f"chmod go-w {name}")
