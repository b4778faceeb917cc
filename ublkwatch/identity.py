"""As whom a server runs: the user that was asked for, or the one that the lost server had."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ublkwatch import trust
from ublkwatch.care import Job


class UserError(OSError):
    """No such user: names it, and says which forms there are."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A user, a group, and the other groups, by number."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether a process of ours has it already."""
        mine = (os.geteuid(), os.getegid(), frozenset(os.getgroups()) - {os.getegid()})
        return mine == (self.uid, self.gid, frozenset(self.groups) - {self.gid})


def resolve(job: Job, look_up: Callable[[str], Identity] | None = None) -> Identity:
    """Return as whom a job runs; may ask name services, so it belongs into a thread.

    ``user`` is "name", "uid" or "uid:gid". Without it the lost server's user is kept, and so a
    server becomes root's only where root's was lost, or where the operator says so.
    """
    user = job.run.user
    if not user:
        origin = job.origin
        return Identity(origin.uid, origin.gid, origin.groups)
    return (look_up or looked_up)(user)


def looked_up(user: str) -> Identity:
    """Return who a user is, as name services say now; UserError. For a thread."""
    name, colon, group = user.partition(":")
    try:
        if colon:
            return Identity(_uid(name), _gid(group))
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, ValueError, OverflowError) as error:
        hint = "give uid:gid" if name.isdecimal() and not colon else "name, uid or uid:gid is meant"
        raise UserError(f"user {user!r}: {str(error).strip(chr(34))}; {hint}") from None
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return Identity(entry.pw_uid, entry.pw_gid, tuple(sorted(set(groups) - {entry.pw_gid})))


def _uid(name: str) -> int:
    return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid


def _gid(name: str) -> int:
    return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid


class Judge:
    """Says whether a program may be run, and as whom; for threads."""

    def __init__(
        self,
        check: Callable[[Path, Path], None] = trust.check_executable,
        look_up: Callable[[str], Identity] = looked_up,
        program: Callable[[Path, Path], str] = trust.program,
    ) -> None:
        """``check`` raises what is wrong with a program below a root directory.

        ``look_up`` asks the name services; ``program`` names the files that would be executed.
        """
        self.check = check
        self._program = program
        self._look_up = look_up
        self._users: dict[str, Identity] = {}

    def meet(self, user: str) -> None:
        """Look a user up for later starts: then nobody may answer. UserError."""
        if user:
            self._users[user] = self._look_up(user)

    def identity(self, job: Job, root: Path = Path("/")) -> Identity:
        """Say as whom a job runs, after its program was found to be nobody else's work; OSError.

        ``root`` is the root directory of who will start it.
        """
        if not job.command[0].startswith("/"):
            raise UserError(f"{job.command[0]!r}: must be an absolute path")
        self.check(Path(job.command[0]), root)
        return resolve(job, self._known)

    def program(self, job: Job, root: Path = Path("/")) -> str:
        """Name the program of this moment, or "" where its file cannot be looked at; TrustError."""
        try:
            return self._program(Path(job.command[0]), root)
        except trust.TrustError:
            raise
        except OSError:
            return ""

    def _known(self, user: str) -> Identity:
        return self._users.get(user) or self._look_up(user)
