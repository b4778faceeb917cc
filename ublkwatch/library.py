"""The rules of this moment: the configuration's, the registered ones, and what profiles know.

They change while we run: by SIGHUP, by an operator's `register` and `forget`. What is wrong changes
nothing, and says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ublkwatch import profiles, tables
from ublkwatch.care import Care, Origin
from ublkwatch.config import Config
from ublkwatch.model import DevInfo, Generation, Reason
from ublkwatch.rules import Book, Profiles, Rule, Unmanaged, ordered
from ublkwatch.settings import ConfigError
from ublkwatch.trust import TrustError, check_executable, open_trusted

_log = logging.getLogger("ublkwatch")

# What takes effect when ublkwatch is started the next time.
_FIXED = (
    *("runtime_dir", "state_dir", "poll_interval_s", "launcher", "starts_at_once", "metrics"),
    *("lock_memory", "placement"),
)


class Store(Protocol):
    """store.Store, as far as it keeps registrations."""

    def load_registrations(self) -> dict[str, dict[str, Any]]: ...
    def save_registration(self, name: str, table: Mapping[str, Any]) -> None: ...
    def drop_registration(self, name: str) -> None: ...


class Library:
    """All rules, and the ways in which they change."""

    def __init__(
        self,
        settings: Config,
        store: Store,
        known: Callable[[Config], Profiles],
        check: Callable[[Path], None],
        generation: Generation = Generation.UNKNOWN,
    ) -> None:
        """Begin with what was registered in a former life.

        ``known`` is what profiles make of a device, ``check`` raises OSError about what root must
        not run.
        """
        self._store = store
        self._known = known
        self._check = check
        self._generation = generation
        self._tables = store.load_registrations()
        self._install(settings)

    def find(self, info: DevInfo, origin: Origin | None) -> Care | Unmanaged:
        """Return a device's care, or why it has none."""
        found = self._book.find(info, origin)
        if isinstance(found, Unmanaged):
            return found
        try:  # said now, and not when the server is lost; what is missing may come yet
            self._judge(found)
        except TrustError as error:
            return Unmanaged(Reason.UNTRUSTED, str(error))
        except OSError as error:
            _log.warning("ublk %d: its server cannot be started just now: %s", info.dev_id, error)
        return replace(found, policy=replace(found.policy, generation=self._generation))

    def reload(self, settings: Config) -> list[str]:
        """Take a new configuration; return the keys that a restart is needed for."""
        old = self.settings
        self._install(settings)
        return [key for key in _FIXED if getattr(settings, key) != getattr(old, key)]

    def registered(self) -> dict[str, dict[str, Any]]:
        """Return the tables that operators have registered, by name."""
        return dict(self._tables)

    def register(self, name: str, table: Mapping[str, Any]) -> Rule:
        """Add a table, in the place of one of this name, and keep it.

        ConfigError: it is wrong, or would never be asked. OSError: it could not be kept, or what it
        runs is not root's own.
        """
        rule = _rule(name, table, self.settings.shared)
        for other in self.settings.rules:
            if rule.match.dev_id is not None and other.match == rule.match:
                raise ConfigError(
                    f"{other.care.source} names ublkb{rule.match.dev_id} already, and comes first; "
                    "change it there"
                )
        named = self.names_of(rule.match.dev_id) if rule.match.dev_id is not None else []
        if before := [each for each in named if each != name]:
            raise ConfigError(
                f"ublkb{rule.match.dev_id} is registered as {before[0]} already; unregister that"
            )
        self._judge(rule.care)
        self._store.save_registration(name, table)
        self._tables[name] = dict(table)
        self._install(self.settings)
        return rule

    def unregister(self, name: str) -> bool:
        """Remove a registered table; tell whether there was one. OSError: it is still there."""
        if name not in self._tables:
            return False
        self._store.drop_registration(name)
        del self._tables[name]
        self._install(self.settings)
        return True

    def names_of(self, dev_id: int) -> list[str]:
        """Return the registrations that name this device."""
        return [name for name, table in self._tables.items() if table.get("dev_id") == dev_id]

    def _judge(self, care: Care) -> None:
        for words in (care.command, care.hook, care.decider):
            if words:
                self._check(Path(words[0]))

    def _install(self, settings: Config) -> None:
        rules = list(settings.rules)
        for name, table in sorted(self._tables.items()):  # after a restart, too
            try:
                rules.append(_rule(name, table, settings.shared))
            except ConfigError as error:
                _log.error("%s; this registration is not used, `ublkwatch register` it anew", error)
        self.settings = settings
        self._book = Book(ordered(rules), self._known(settings))


def declared_threads(info: DevInfo) -> tuple[int, ...]:
    """Return the threads that a device's server declares to serve its queues; it reads files."""
    return profiles.queue_threads(info, profiles.Host(check_executable, open_trusted))


def known_servers(settings: Config) -> Profiles:
    """Return what profiles make of a device that no rule names; it reads files."""
    host = profiles.Host(check_executable, open_trusted)
    warned: set[str] = set()

    def judge(info: DevInfo, origin: Origin) -> Care | Unmanaged | None:
        if elsewhere := profiles.belongs_elsewhere(origin, settings.ignore):
            return Unmanaged(Reason.FOREIGN, elsewhere)
        found = profiles.recognise(info, origin, host) if settings.profiles else None
        hint = f"`{profiles.suggestion(info, origin)}` would register it"
        if found is None:
            return Unmanaged(Reason.NO_SPEC, hint)
        if found.why:
            return Unmanaged(Reason.NO_SPEC, f"{found.why}; {hint}")
        if found.warning and found.warning not in warned:
            warned.add(found.warning)
            _log.warning("%s", found.warning)
        table = {"profile": found.profile, **found.table}
        try:
            return tables.rule(table, settings.shared, f"profile {found.profile}", "device.").care
        except ConfigError as error:
            return Unmanaged(Reason.NO_SPEC, str(error))

    return judge


def _rule(name: str, table: Mapping[str, Any], shared: Mapping[str, Any]) -> Rule:
    where = "device" if "dev_id" in table else "server"
    return tables.rule(table, shared, f"registration {name}", f"{where}.")
