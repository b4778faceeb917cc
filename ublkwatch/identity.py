"""As whom a server runs: the user that was asked for, or the one that the lost server had."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass

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


def resolve(job: Job) -> Identity:
    """Return as whom a job runs; may ask name services, so it belongs into a thread.

    ``user`` is "name", "uid" or "uid:gid". Without it the lost server's user is kept, and so a
    server becomes root's only where root's was lost, or where the operator says so.
    """
    user = job.run.user
    if not user:
        origin = job.origin
        return Identity(origin.uid, origin.gid, origin.groups)
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
