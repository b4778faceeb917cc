"""Our own unit, written for the systemd of this host from what the package brings.

For an installation that no distribution's package has made; one that has brought its unit already.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ublkwatch.trust import TrustError, check_executable

NAME = "ublkwatch.service"
OURS = "# Written by `ublkwatch install-systemd`, which `--remove` takes back."
_SOURCE = Path(__file__).with_name(NAME)
_SOURCES = Path(__file__).with_name("drop-ins")
DROP_INS = ("early-boot", "children")  # whoever wants them; their files say when
_NEWER, _NEWER_SINCE = "newer-systemd", 254
_RUN = "/usr/bin/ublkwatch run"  # as the unit has it
_PACKAGED = (Path("/usr/lib/systemd/system"), Path("/lib/systemd/system"))
_SYSTEMCTL_S = 180.0


Step = tuple[str, Callable[[], object]]  # what is done, in words, and the doing


class ServiceError(Exception):
    """It cannot be done; says why, and what to do."""


def own_command() -> list[str]:
    """Return the command that runs this very program, from wherever."""
    script = Path(sys.argv[0])
    if script.name == "ublkwatch":
        return [str(script.absolute())]
    return [sys.executable, "-m", "ublkwatch"]


def systemctl(*words: str) -> str:
    """Run it and return what it says; ServiceError with its own words when it fails."""
    command = ["systemctl", *words]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SYSTEMCTL_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"{shlex.join(command)}: {error}") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise ServiceError(f"{shlex.join(command)}: {said}")
    return done.stdout


def version() -> int:
    """Return the version of this host's systemd; 0 if it cannot be told."""
    with contextlib.suppress(ServiceError):
        if found := re.match(r"systemd (\d+)", systemctl("--version")):
            return int(found[1])
    return 0


@dataclass(frozen=True)
class Service:
    """The unit on this host."""

    directory: Path = Path("/etc/systemd/system")
    packaged: tuple[Path, ...] = _PACKAGED
    systemctl: Callable[..., object] = systemctl
    version: Callable[[], int] = version

    @property
    def path(self) -> Path:
        """Where it is written."""
        return self.directory / NAME

    def install(
        self, command: list[str], config: Path | None, drop_ins: Iterable[str] = (), *, now: bool
    ) -> Iterator[Step]:
        """Yield what is to be done, step by step; ServiceError when it must not be.

        Of DROP_INS those that are named are added to those that are there.
        """
        for each in self.packaged:
            if (each / NAME).exists():
                raise ServiceError(
                    f"{each / NAME} is there, by a package; `systemctl enable --now ublkwatch`"
                )
        self._must_be_ours()
        try:
            check_executable(Path(command[0]))
        except OSError as error:
            kept = "" if isinstance(error, TrustError) else f"{command[0]}: "
            raise ServiceError(f"root would run it at every boot: {kept}{error}") from error
        text = unit([*command, "run", *(["--config", str(config.absolute())] if config else [])])
        yield f"{self.path} is written", partial(_write, self.path, text)
        wanted = {*drop_ins, *(name for name in DROP_INS if self._drop_in(name).exists())}
        if self.version() >= _NEWER_SINCE:
            wanted.add(_NEWER)
        for path in map(self._drop_in, sorted(wanted)):
            text = f"{OURS}\n{(_SOURCES / path.name).read_text()}"
            yield f"{path} is written", partial(_write, path, text)
        yield "systemctl daemon-reload", lambda: self.systemctl("daemon-reload")
        yield f"systemctl enable {NAME}", lambda: self.systemctl("enable", NAME)
        if now:
            yield f"systemctl restart {NAME}", lambda: self.systemctl("restart", NAME)

    def remove(self) -> Iterator[Step]:
        """Yield what is to be done, step by step; servers and what is known of them stay."""
        if not self.path.exists():
            raise ServiceError(f"{self.path} is not there")
        self._must_be_ours()
        yield (
            f"systemctl disable --now {NAME}",
            lambda: self.systemctl("disable", "--now", NAME),
        )
        for path in filter(Path.exists, self._drop_ins()):
            yield f"{path} is removed", partial(_remove, path)
        yield f"{self.path} is removed", self.path.unlink
        yield "systemctl daemon-reload", lambda: self.systemctl("daemon-reload")

    def _drop_in(self, name: str) -> Path:
        return self.path.with_name(f"{NAME}.d") / f"{name}.conf"

    def _drop_ins(self) -> list[Path]:
        return [self._drop_in(name) for name in (*DROP_INS, _NEWER)]

    def _must_be_ours(self) -> None:
        for path in (self.path, *self._drop_ins()):
            if path.exists() and not path.read_text().startswith(OURS):
                raise ServiceError(f"{path} was not written by this verb; it is left alone")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o755, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    fresh.chmod(0o644)
    fresh.rename(path)


def _remove(drop_in: Path) -> None:
    drop_in.unlink()
    with contextlib.suppress(OSError):  # somebody has others there
        drop_in.parent.rmdir()


def unit(command: list[str]) -> str:
    """Return the unit's text, where the daemon is run by this command."""
    quoted = " ".join(_quoted(word) for word in command)
    return f"{OURS}\n{_SOURCE.read_text().replace(_RUN, quoted)}"


def _quoted(word: str) -> str:
    """Write a word as ExecStart has it (systemd.service(5), "Command lines")."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{word}"' if any(letter in word for letter in " '\"\\") else word


def booted() -> bool:
    """Tell whether systemd is the init of this host (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()
