"""The rules of this moment: the configuration's, the registered ones, and what profiles know.

They change while we run: by SIGHUP, by an operator's `register` and `forget`. What is wrong changes
nothing, and says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ublkwatch import profiles, prospect, tables
from ublkwatch.care import Care, Origin
from ublkwatch.config import Config
from ublkwatch.host import OURS, systemd_root
from ublkwatch.model import DevInfo, Generation, Reason
from ublkwatch.rules import Book, Match, Profiles, Rule, Unmanaged, ordered
from ublkwatch.settings import ConfigError
from ublkwatch.trust import TrustError, check_executable, open_trusted

_log = logging.getLogger("ublkwatch")

# What takes effect when ublkwatch is started the next time.
_FIXED = frozenset(
    {"runtime_dir", "state_dir", "poll_interval_s", "launcher", "starts_at_once", "metrics"}
    | {"admin_group", "lock_memory", "placement"}
)
_AT_ONCE = ("profiles", "ignore", "standby_max", "standby_free_percent")
# A device that is known, and what its server is or was.
Known = tuple[DevInfo, Origin | None]


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
        check: Callable[[Care], None],
        generation: Generation = Generation.UNKNOWN,
    ) -> None:
        """Begin with what was registered in a former life.

        ``known`` is what profiles make of a device, ``check`` raises OSError about what root must
        not run (host.check_programs).
        """
        self._store = store
        self._known = known
        self._check = check
        self._generation = generation
        self._tables = store.load_registrations()
        self._install(settings)

    def find(
        self, info: DevInfo, origin: Origin | None, book: Book | None = None
    ) -> Care | Unmanaged:
        """Return a device's care, or why it has none; ``book`` is for who only wonders."""
        found = (book or self._book).find(info, origin)
        if isinstance(found, Unmanaged):
            return found
        try:  # said now, and not when the server is lost; what is missing may come yet
            self._check(found)
        except TrustError as error:
            return Unmanaged(Reason.UNTRUSTED, str(error))
        except OSError as error:
            _log.warning("ublk %d: its server cannot be started just now: %s", info.dev_id, error)
        return replace(found, policy=replace(found.policy, generation=self._generation))

    def reload(self, settings: Config) -> None:
        """Take a new configuration."""
        self._install(settings)

    def changes(
        self, settings: Config, tables: Mapping[str, Any], known: Iterable[Known]
    ) -> Iterator[str]:
        """Say what another configuration, and other registrations, would change; it looks only."""
        old = self.settings
        for key in (*sorted(_FIXED), *_AT_ONCE):
            was, is_now = getattr(old, key), getattr(settings, key)
            if was != is_now:
                late = ", when ublkwatch is restarted" if key in _FIXED else ""
                yield f"{key}: {was} -> {is_now}{late}"
        shared = prospect.of_policy(old.policy, settings.policy)
        yield from (f"recovery.{text}" for text in shared.values())
        rules, book = _by_match(self._book.rules), self._bind(settings, tables)
        others = _by_match(book.rules)
        for match in dict.fromkeys((*rules, *others)):
            if match not in others:
                yield f"{match}: no rule any more ({rules[match].source})"
            elif match not in rules:
                yield f"{match}: a new rule ({others[match].source})"
            else:
                for text in prospect.of_care(rules[match], others[match], set(shared)):
                    yield f"{match}: {text}"
        for info, origin in known:
            before, after = self.find(info, origin), self.find(info, origin, book)
            if before != after and _whose(before) != _whose(after):
                yield f"ublkb{info.dev_id}: its care: {_whose(before)} -> {_whose(after)}"

    def registered(self) -> dict[str, dict[str, Any]]:
        """Return the tables that operators have registered, by name."""
        return dict(self._tables)

    def judge(self, name: str, table: Mapping[str, Any]) -> Rule:
        """Return the rule that a table would be, registered under this name.

        ConfigError: it is wrong, or would never be asked. OSError: what it runs is not root's own.
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
        self._check(rule.care)
        return rule

    def register(self, name: str, table: Mapping[str, Any]) -> Rule:
        """Add a table, in the place of one of this name, and keep it.

        Errors as of judge(); OSError, too, where it could not be kept.
        """
        rule = self.judge(name, table)
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

    def _install(self, settings: Config) -> None:
        self._book = self._bind(settings, self._tables)
        self.settings = settings

    def _bind(self, settings: Config, tables: Mapping[str, Any]) -> Book:
        rules = list(settings.rules)
        for name, table in sorted(tables.items()):  # after a restart, too
            try:
                rules.append(_rule(name, table, settings.shared))
            except ConfigError as error:
                _log.error("%s; this registration is not used, `ublkwatch register` it anew", error)
        return Book(ordered(rules), self._known(settings))


def declared_threads(info: DevInfo) -> tuple[int, ...]:
    """Return the threads that a device's server declares to serve its queues; it reads files."""
    return profiles.queue_threads(info, _host(OURS))


def known_servers(settings: Config) -> Profiles:
    """Return what profiles make of a device that no rule names; it reads files."""
    host = _host(systemd_root(settings.launcher))
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


def _host(root: Path) -> profiles.Host:
    """Judge programs below ``root``; run files are ours to read, in a container as well."""
    return profiles.Host(partial(check_executable, root=root), open_trusted)


def _by_match(rules: Iterable[Rule]) -> dict[Match, Care]:
    """Return the cares by what they are for; of two for the same devices the first one counts."""
    found: dict[Match, Care] = {}
    for rule in rules:
        found.setdefault(rule.match, rule.care)
    return found


def _whose(care: Care | Unmanaged) -> str:
    return "nobody" if isinstance(care, Unmanaged) else care.source


def _rule(name: str, table: Mapping[str, Any], shared: Mapping[str, Any]) -> Rule:
    where = "device" if "dev_id" in table else "server"
    return tables.rule(table, shared, f"registration {name}", f"{where}.")
