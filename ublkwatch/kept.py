"""Copies of files that a server's own recover command needs, and loses when it fails.

ublksrv's erases its run file, without which no later one knows the device. A copy is taken while
the file is there, and brought back when it is not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
from pathlib import Path

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
            copy = self._copy(dev_id, path)
            try:
                if not path.exists():
                    continue
                if trouble := _trouble(path):
                    _log.warning("ublk %d: %s %s, and is not kept", dev_id, path, trouble)
                    continue
                if path.stat().st_size > _MAX:
                    _log.warning("ublk %d: %s is too large to be kept", dev_id, path)
                    continue
                copy.parent.mkdir(mode=0o700, exist_ok=True)
                _replace(path, copy)
            except OSError as error:
                _log.warning("ublk %d: %s is not kept: %s", dev_id, path, error)

    def restore(self, dev_id: int, paths: tuple[str, ...]) -> None:
        """Bring back each that was kept, and is missing or somebody else's work now."""
        for path in map(Path, paths):
            copy = self._copy(dev_id, path)
            try:
                if copy.exists() and (trouble := _trouble(path)):
                    _replace(copy, path)
                    _log.warning("ublk %d: %s %s, and is restored", dev_id, path, trouble)
            except OSError as error:
                _log.error("ublk %d: %s is not restored: %s", dev_id, path, error)

    def drop(self, dev_id: int) -> None:
        """Forget a device that is gone."""
        shutil.rmtree(self._home / str(dev_id), ignore_errors=True)

    def _copy(self, dev_id: int, path: Path) -> Path:
        return self._home / str(dev_id) / str(path).replace("/", "%")


def _trouble(path: Path) -> str:
    """Say why a file is not what root's command may read, or "".

    Some servers make their directory writable for everybody, who can put there what they like.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return "was missing"
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        return "was no plain file"
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        return "was not root's alone to write"
    return ""


def _replace(source: Path, target: Path) -> None:
    """Copy content, mode and owner so that a reader sees all of it or nothing."""
    draft = target.with_name(f".{target.name}.ublkwatch")
    try:
        shutil.copy2(source, draft)
        status = source.stat()
        os.chown(draft, status.st_uid, status.st_gid)
        draft.replace(target)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
