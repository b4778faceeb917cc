"""The configuration: TOML to a frozen Config.

The file says what root will run, so it must be root's own.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ublkwatch import tables, trust
from ublkwatch.model import Policy
from ublkwatch.rules import Rule
from ublkwatch.settings import (
    DEVICE,
    METRICS,
    RECOVERY,
    SERVER,
    TOP,
    ConfigError,
    check,
    complaints,
)
from ublkwatch.tables import policy_of

DEFAULT_PATH = Path("/etc/ublkwatch/ublkwatch.toml")


_DEFAULT = Policy()
_TABLES = {"metrics": dict, "recovery": dict, "device": list, "server": list}


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration that was checked."""

    runtime_dir: Path
    state_dir: Path
    poll_interval_s: float
    launcher: str
    profiles: bool
    ignore: tuple[str, ...]
    starts_at_once: int
    standby_max: int = 64
    standby_free_percent: int = 10
    lock_memory: bool = True
    placement: str = "refuse"
    admin_group: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    policy: Policy = _DEFAULT  # of a device that has no care; the generation is the kernel's to say
    rules: tuple[Rule, ...] = ()
    shared: Mapping[str, Any] = field(default_factory=dict)  # [recovery] as it was written


def load(path: Path | None = None) -> Config:
    """Read the file (the default one may be missing: then all is default); ConfigError if bad."""
    return parse(read(path), str(path or DEFAULT_PATH))


def read(path: Path | None = None) -> bytes:
    """Return the file's content, if root alone can have written it; ConfigError."""
    given = path or DEFAULT_PATH
    try:
        return _read_trusted(given)
    except FileNotFoundError:
        if path is not None:
            raise ConfigError(f"{given}: there is no such file") from None
        return b""
    except OSError as error:
        raise ConfigError(f"{given}: {error.strerror}") from error


def problems(content: bytes, name: str) -> list[ConfigError]:
    """Return all that is wrong with a configuration's text, where parse() stops at the first."""
    try:
        document = _document(content, name)
    except ConfigError as error:
        return [error]
    top = {key: value for key, value in document.items() if key not in _TABLES}
    shared = document.get("recovery", {})
    found = [*complaints(top, TOP, name, "", tuple(_TABLES))]
    found += complaints(document.get("metrics", {}), METRICS, name, "metrics.")
    of_all = [*complaints(shared, RECOVERY, name, "recovery.")]
    for kind, keys in (("device", DEVICE), ("server", SERVER)):
        for number, table in enumerate(document.get(kind, []), 1):
            where = f"{kind}[{number}]."
            bad = isinstance(table, dict) and [*complaints(table, keys | RECOVERY, name, where)]
            if bad:
                found += bad
                continue
            try:
                _rule(table, {} if of_all else shared, name, where)
            except ConfigError as error:
                found.append(error)
    if not (found := found + of_all):
        try:
            parse(content, name)
        except ConfigError as error:
            return [error]
    return found


def _document(content: bytes, name: str) -> dict[str, Any]:
    try:
        document = tomllib.loads(content.decode())
    except ValueError as error:  # not UTF-8, not TOML, or a number longer than Python reads
        raise ConfigError(f"{name}: not TOML: {error}") from error
    for key, kind in _TABLES.items():
        if not isinstance(document.get(key, kind()), kind):
            form = f"[[{key}]]" if kind is list else f"[{key}]"
            raise ConfigError(f"{name}: {key}: must be a table, written {form}")
    return document


def parse(content: bytes, name: str) -> Config:
    """Check a configuration's text; ``name`` is what its errors call it."""
    document = _document(content, name)
    top = {key: value for key, value in document.items() if key not in _TABLES}
    values = check(top, TOP, name, "", also=tuple(_TABLES))
    shared = document.get("recovery", {})
    return Config(
        runtime_dir=_absolute(values["runtime_dir"], name, "runtime_dir"),
        state_dir=_absolute(values["state_dir"], name, "state_dir"),
        poll_interval_s=values["poll_interval_s"],
        launcher=values["launcher"],
        profiles=values["profiles"],
        ignore=_words(values["ignore"], name, "ignore"),
        starts_at_once=values["starts_at_once"],
        standby_max=values["standby_max"],
        standby_free_percent=values["standby_free_percent"],
        lock_memory=values["lock_memory"],
        placement=values["placement"],
        admin_group=values["admin_group"],
        metrics=check(document.get("metrics", {}), METRICS, name, "metrics."),
        policy=policy_of(check(shared, RECOVERY, name, "recovery.")),
        rules=_rules(document, shared, name),
        shared=shared,
    )


def _rules(document: dict[str, Any], shared: Mapping[str, Any], name: str) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for kind in ("device", "server"):
        for number, table in enumerate(document.get(kind, []), 1):
            where = f"{kind}[{number}]"
            rule = _rule(table, shared, name, f"{where}.")
            if rule.match.dev_id is not None and rule.match in [other.match for other in rules]:
                raise ConfigError(f"{name}: {where}.dev_id: {rule.match.dev_id} is given twice")
            rules.append(rule)
    return tuple(rules)


def _rule(table: Any, shared: Mapping[str, Any], name: str, where: str) -> Rule:
    if not isinstance(table, dict):
        kind = where.partition("[")[0]
        raise ConfigError(f"{name}: {where[:-1]}: must be a table, written [[{kind}]]")
    return tables.rule(table, shared, name, where)


def _words(value: list[Any], name: str, key: str) -> tuple[str, ...]:
    if not all(isinstance(word, str) and word for word in value):
        raise ConfigError(f"{name}: {key}: must be a list of words")
    return tuple(value)


def _absolute(value: str, name: str, key: str) -> Path:
    if not value.startswith("/"):
        raise ConfigError(f"{name}: {key}: {value!r} must be an absolute path")
    return Path(value)


def _read_trusted(path: Path) -> bytes:
    """Read a file that root alone can have written: judged on the open descriptor."""
    try:
        descriptor = trust.open_trusted(path)
    except trust.TrustError as error:
        raise ConfigError(str(error)) from error
    with os.fdopen(descriptor, "rb") as file:
        return file.read(1 << 20)
