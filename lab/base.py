"""What every other module stands on: the lab's one error, its voice, helpers run, and the cache.

It imports none of the others.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

EXIT_TIMEOUT: Final = 124
EXIT_LAB: Final = 125

SEARCH_PATH: Final = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"


class LabError(Exception):
    """The lab itself cannot go on; the text says why, and what to do."""


def say(text: str) -> None:
    """Tell the person at the terminal; standard output belongs to the command."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def me() -> str:
    """How this script was called, for messages that tell what to type."""
    return shlex.quote(os.path.relpath(Path(__file__).with_name("lab.py")))


def again() -> str:
    """Return the command line that was typed, for messages that tell to repeat it."""
    return f"{me()} {shlex.join(sys.argv[1:])}"


def find_tool(name: str) -> str | None:
    """Find a program, also where a plain user's PATH does not look."""
    return shutil.which(name, path=SEARCH_PATH)


def output_of(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """Run a helper and return what it printed; the line that says most becomes the error."""
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C", "PATH": SEARCH_PATH},
        check=False,
    )
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        # apt names the cause in its first error, and only consequences after it.
        cause = next((line for line in lines if line.startswith("E: ")), lines[-1])
        words = [str(word) for word in command if not str(word).startswith("-o")]
        raise LabError(f"{shlex.join(words[:2])} failed: {cause.removeprefix('E: ')}")
    return done.stdout


def cache_directory() -> Path:
    """Where everything that was fetched lives."""
    if own := os.environ.get("UBLKWATCH_LAB_CACHE"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "ublkwatch-lab"


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Let one setup at a time change the cache."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        handle = (cache / "lock").open("w")
    except OSError as error:
        raise LabError(f"cannot write the cache: {error}; set UBLKWATCH_LAB_CACHE") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def staging(cache: Path) -> Iterator[Path]:
    """Give a directory on the cache's file system whose content can be renamed into place."""
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=cache) as name:
        yield Path(name)


def sweep(cache: Path) -> None:
    """Remove what an interrupted setup left; only under the lock."""
    for leftover in cache.glob(".staging-*"):
        shutil.rmtree(leftover, ignore_errors=True)
