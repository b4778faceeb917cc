"""Copies of files that a server's own recover command needs, and loses when it fails.

ublksrv's erases its run file, without which no later one knows the device. A copy is taken while
the file is there, and brought back when it is not.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

_MAX = 1 << 20  # bytes of one file: they are small, and the runtime directory is memory
_log = logging.getLogger("ublkwatch")


class Kept:
    """The copies, by device, in the runtime directory."""

    def __init__(self, runtime_dir: Path) -> None:
        """Go on with what a former life left."""
        self._home = runtime_dir / "kept"
        self._home.mkdir(mode=0o700, exist_ok=True)

    def keep(self, dev_id: int, paths: tuple[str, ...]) -> None:
        """Take a copy of each that is there. Errors are logged: no recovery may fail by them."""
        for path in map(Path, paths):
            try:
                with _opened(path) as file:
                    content, status = file.read(_MAX + 1), os.fstat(file.fileno())
                if len(content) > _MAX:
                    raise OSError(f"it is larger than {_MAX} bytes")  # noqa: TRY301
                copy = self._copy(dev_id, path)
                copy.parent.mkdir(mode=0o700, exist_ok=True)
                _write(copy, content, status)
            except FileNotFoundError:
                pass
            except OSError as error:
                _log.warning("ublk %d: %s is not kept: %s", dev_id, path, error)

    def restore(self, dev_id: int, paths: tuple[str, ...]) -> None:
        """Bring back each that was kept, and is missing or somebody else's work now."""
        for path in map(Path, paths):
            try:
                with self._copy(dev_id, path).open("rb") as file:
                    content, status = file.read(), os.fstat(file.fileno())
            except OSError:
                continue  # it was never there
            try:
                with _opened(path):
                    continue
            except OSError as error:
                trouble = str(error)
            try:
                _write(path, content, status)
                _log.warning("ublk %d: %s is restored; it was: %s", dev_id, path, trouble)
            except OSError as error:
                _log.error("ublk %d: %s is not restored: %s", dev_id, path, error)

    def drop(self, dev_id: int) -> None:
        """Forget a device that is gone."""
        shutil.rmtree(self._home / str(dev_id), ignore_errors=True)

    def _copy(self, dev_id: int, path: Path) -> Path:
        return self._home / str(dev_id) / str(path).replace("/", "%")


def _opened(path: Path) -> BinaryIO:
    """Open a plain file that is root's alone to write, judged on the descriptor; else OSError.

    Some servers make their directory writable for everybody, who can put there what they like.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    ours = status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and ours:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise PermissionError(errno.EPERM, "is no plain file that root alone can write", str(path))


def _write(target: Path, content: bytes, like: os.stat_result) -> None:
    """Write a file with that mode and owner so that a reader sees all of it or nothing.

    The draft is new, has a name that nobody can foresee, and is written through its descriptor.
    """
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
        try:
            file.write(content)
            os.fchown(file.fileno(), like.st_uid, like.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(like.st_mode))
            file.flush()
            draft.replace(target)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise
