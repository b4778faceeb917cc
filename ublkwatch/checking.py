"""`ublkwatch check-config`: reads configuration and registrations as the daemon would.

It goes on where the daemon stops, and says all that is wrong, not only the first of it.
"""

from __future__ import annotations

import grp
import re
from collections.abc import Iterator
from pathlib import Path

from ublkwatch import config, tables
from ublkwatch.care import Care, Job
from ublkwatch.config import Config
from ublkwatch.finding import Finding, Level
from ublkwatch.host import OURS, programs, systemd_root
from ublkwatch.identity import UserError, resolve
from ublkwatch.settings import ConfigError
from ublkwatch.store import read_registrations
from ublkwatch.trust import TrustError, check_executable

_KEY = re.compile(r"[a-z]+(?:\[\d+\])?(?:\.[\w.]+)?|[a-z_]+")


def check(path: Path | None) -> list[Finding]:
    """Return what is to be said of a configuration, and of what is registered beside it."""
    name = str(path or config.DEFAULT_PATH)
    found = []
    try:
        content = config.read(path)
    except ConfigError as error:  # who has written it is no reason not to look what it says
        found.append(bad(error))
        try:
            content = Path(name).read_bytes()
        except OSError:
            return found
    if errors := config.problems(content, name):
        return found + [bad(error) for error in errors]
    settings = config.parse(content, name)
    found += _group(settings, name)
    root = systemd_root(settings.launcher)
    for rule in settings.rules:
        found += _care(rule.care, root)
    found += _registered(settings, root)
    if not found:
        devices = f"{len(settings.rules)} rule{'s' * (len(settings.rules) != 1)} for devices"
        found.append(Finding(Level.OK, name, f"can be used as it is; {devices}"))
    return found


def bad(error: ConfigError) -> Finding:
    """Take an error apart: "FILE: KEY: WHY; WAY OUT", of which the key and the way may miss."""
    about, _, rest = str(error).partition(": ")
    key, colon, what = rest.partition(": ")
    if not (colon and _KEY.fullmatch(key)):
        key, what = "", rest
    what, semicolon, fix = what.partition("; ")
    return Finding(Level.BAD, about, what, fix.removeprefix("try: ") if semicolon else "", key)


def _group(settings: Config, name: str) -> Iterator[Finding]:
    try:
        if settings.admin_group:
            grp.getgrnam(settings.admin_group)
    except KeyError:
        what = f"there is no group {settings.admin_group!r} on this machine"
        fix = f"groupadd --system {settings.admin_group}"
        yield Finding(Level.BAD, name, what, fix, "admin_group")


def _care(care: Care, root: Path) -> Iterator[Finding]:
    """Say what would keep a server from being started; as the daemon finds it when it looks."""
    for program, where in programs(care, root):
        try:
            check_executable(program, where)
        except TrustError as error:
            what, _, fix = str(error).partition("; try: ")
            yield Finding(Level.BAD, care.source, f"is not safe to run as root: {what}", fix)
        except OSError as error:
            name = program if where == OURS else f"{program}, on the host"
            fix = "install it, or mend the path"
            yield Finding(Level.WARN, care.source, f"{name}: {error.strerror}", fix)
    if care.run.user:
        try:
            resolve(Job(care.name, care.command, care.run))
        except UserError as error:
            yield Finding(Level.BAD, care.source, str(error), "create the user, or mend the name")


def _registered(settings: Config, root: Path) -> Iterator[Finding]:
    broken: list[Finding] = []

    def damaged(path: Path, error: Exception) -> None:
        what, fix = f"cannot be understood ({error!r})", f"rm {path}; then register it anew"
        broken.append(Finding(Level.BAD, str(path), what, fix))

    try:
        registered = read_registrations(settings.state_dir, damaged)
    except PermissionError as error:
        yield Finding(
            Level.UNSEEN, "registrations", f"{error.filename}: not for us", "run this as root"
        )
        return
    yield from broken
    named = {rule.match.dev_id: rule.care.source for rule in settings.rules}
    for name, table in sorted(registered.items()):
        about = f"registration {name}"
        where = "device." if "dev_id" in table else "server."
        try:
            rule = tables.rule(table, settings.shared, about, where)
        except ConfigError as error:
            yield bad(error)
            continue
        if rule.match.dev_id is not None and (first := named.get(rule.match.dev_id)):
            what = f"is never asked: {first} names ublkb{rule.match.dev_id}, and comes first"
            yield Finding(Level.WARN, about, what, f"ublkwatch unregister {name}")
        yield from _care(rule.care, root)
