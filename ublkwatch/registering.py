"""The verbs about rules: register, registered, unregister, reload.

What an operator types becomes a table such as the configuration has, and goes to the daemon that
runs; where none does, it is kept for the one that will.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ublkwatch import tables
from ublkwatch.config import Config
from ublkwatch.host import check_programs, systemd_root
from ublkwatch.library import Library
from ublkwatch.settings import CARE, MATCHES, OPTIONS, RECOVERY, ConfigError
from ublkwatch.store import Store, read_registrations
from ublkwatch.wire import Answer, Change, RequestError, parse


def change_of(arguments: Any) -> Change:
    """Return what `register` asks for; ConfigError names the option that is wrong."""
    table = _table(arguments)
    name = arguments.name or (f"ublkb{arguments.dev_id}" if "dev_id" in table else "")
    if not name:
        raise ConfigError("--name: is missing; a rule for many devices needs one")
    return Change("register", name, table, arguments.reason, arguments.dry_run)


def _table(arguments: Any) -> dict[str, Any]:
    options = vars(arguments)
    found: dict[str, Any] = {}
    for key in ("dev_id", *MATCHES, *OPTIONS):
        if (value := options[key]) is not None:
            found[key] = _typed(key, value)
    if "dev_id" in found and (extra := found.keys() & set(MATCHES)):
        raise ConfigError(f"--{min(extra)}: says nothing beside a device; leave one of them out")
    if arguments.accept_delete_on_failure:
        found["accept_delete_on_failure"] = True
    found |= _pairs(arguments.policy, "policy", RECOVERY.keys())
    found |= _pairs(arguments.more, "set", CARE.keys())
    for option, key in (("env", "env"), ("limit", "limits")):
        if pairs := dict(_split(text, option) for text in options[option]):
            found[key] = pairs
    if arguments.command:
        found["command"] = list(arguments.command)
    return found


def _typed(key: str, value: Any) -> Any:
    if key == "tag":
        try:
            return int(value, 0)
        except ValueError:
            raise ConfigError(f"--tag: {value!r} is no number") from None
    return value


def _pairs(texts: Iterable[str], option: str, keys: Iterable[str]) -> dict[str, Any]:
    """Understand KEY=VALUE, the value as TOML has it, or a plain word."""
    found = {}
    for text in texts:
        key, value = _split(text, option)
        if key not in keys:
            raise ConfigError(f"--{option} {key}: unknown key; known are {', '.join(sorted(keys))}")
        try:
            found[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = value
    return found


def _split(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ConfigError(f"--{option}: {text!r} is not KEY=VALUE")
    return key, value


class _Glimpse:
    """What is registered, for who only wonders: it is read, and nothing is kept."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    def load_registrations(self) -> dict[str, dict[str, Any]]:
        return read_registrations(self._state_dir)

    def save_registration(self, name: str, table: Mapping[str, Any]) -> None:
        """Keep nothing."""

    def drop_registration(self, name: str) -> None:
        """Keep nothing."""


def offline(settings: Config, change: Change) -> Answer:
    """Change what is kept while no daemon runs; return what became of it.

    StoreError: the directories cannot be used. ConfigError, OSError: as Library.register() says.
    """
    try:
        parse(change.line())  # as if it were asked over the socket
    except RequestError as error:
        return Answer(str(error))
    if change.dry_run:
        return _apply(_library(settings, _Glimpse(settings.state_dir)), change)
    store = Store(settings.runtime_dir, settings.state_dir)
    try:
        return _apply(_library(settings, store), change)
    finally:
        store.close()


def _library(settings: Config, store: Store | _Glimpse) -> Library:
    check = partial(check_programs, root=systemd_root(settings.launcher))
    return Library(settings, store, lambda _: lambda _info, _origin: None, check)


def _apply(library: Library, change: Change) -> Answer:
    tables = library.registered()
    if change.verb == "register":
        library.judge(change.name, change.table)
        tables[change.name] = dict(change.table)
    elif tables.pop(change.name, None) is None:
        return Answer(f"{change.name}: nothing is registered by this name")
    said = tuple(library.changes(library.settings, tables, ()))
    if change.verb == "register":
        library.register(change.name, change.table)
    else:
        library.unregister(change.name)
    return Answer("", said)


def listing(registered: Mapping[str, Mapping[str, Any]], *, as_json: bool) -> str:
    """Return the registrations, for people or for programs."""
    if as_json:
        return json.dumps(registered, indent=2, sort_keys=True)
    lines = []
    for name, each in sorted(registered.items()):
        where = "device." if "dev_id" in each else "server."
        try:
            rule = tables.rule(each, {}, f"registration {name}", where)
        except ConfigError as error:
            lines.append(f"{name}: not used: {error}")
            continue
        command = " ".join(rule.care.command) or f"unit {rule.care.run.unit}"
        lines.append(f"{name}: {rule.match}: {rule.care.policy.handoff.value}: {command}")
    return "\n".join(lines) or "nothing is registered"
