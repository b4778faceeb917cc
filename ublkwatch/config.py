"""The configuration: TOML to a frozen Config; every key declared once.

Nothing is guessed: an unknown key, a wrong type or a number out of range is an error that names the
file, the key and the way out. The file says what root will run, so it must be root's own.
"""

from __future__ import annotations

import difflib
import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_PATH = Path("/etc/ublkwatch/ublkwatch.toml")


class ConfigError(Exception):
    """A configuration that cannot be used: names file, key and the way out."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its type, its default, the range of a number, and what it is for."""

    type: type
    default: Any
    help: str
    low: float = 0
    high: float = float("inf")


TOP = {
    "runtime_dir": Key(str, "/run/ublkwatch", "records, status, attempts; on a tmpfs"),
    "state_dir": Key(str, "/var/lib/ublkwatch", "specs and history; never on a watched device"),
    "poll_interval_s": Key(float, 1.0, "seconds between two looks at all devices", 0.05, 60),
}
METRICS = {
    "enabled": Key(bool, True, "serve /metrics"),
    "address": Key(str, "127.0.0.1", "the address to listen on"),
    "port": Key(int, 9787, "the port to listen on; 0 lets the kernel choose", 0, 65535),
}
RECOVERY = {
    "attempts_max": Key(int, 5, "failed attempts within window_s until giving up", 1, 100),
    "window_s": Key(float, 60.0, "seconds for which a failed attempt counts", 1, 86400),
    "backoff_base_s": Key(float, 0.2, "seconds before the second attempt; doubles", 0.001, 3600),
    "backoff_max_s": Key(float, 10.0, "the longest such pause", 0.001, 3600),
    "ready_timeout_s": Key(float, 30.0, "seconds for a new server to say READY=1", 0.1, 3600),
    "drain_timeout_s": Key(float, 90.0, "seconds for the kernel to let go of a server", 1, 3600),
    "start_timeout_s": Key(float, 60.0, "seconds of EBUSY from START_USER_RECOVERY", 0.1, 3600),
    "attach_timeout_s": Key(float, 15.0, "seconds from a server's line to LIVE", 0.1, 3600),
    "probation_s": Key(float, 1.0, "seconds that LIVE must hold to be believed", 0, 3600),
}
DEVICE = {
    "dev_id": Key(int, None, "N of /dev/ublkbN", 0, (1 << 20) - 1),
    "command": Key(list, None, "argv that starts a server by the attach contract"),
}


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration that was checked."""

    runtime_dir: Path
    state_dir: Path
    poll_interval_s: float
    metrics: Mapping[str, Any] = field(default_factory=dict)
    recovery: Mapping[str, float] = field(default_factory=dict)
    commands: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


def load(path: Path | None = None) -> Config:
    """Read the file (the default one may be missing: then all is default); ConfigError if bad."""
    given = path or DEFAULT_PATH
    try:
        content = _read_trusted(given)
    except FileNotFoundError:
        if path is not None:
            raise ConfigError(f"{given}: there is no such file") from None
        content = b""
    except OSError as error:
        raise ConfigError(f"{given}: {error.strerror}") from error
    return parse(content, str(given))


def parse(content: bytes, name: str) -> Config:
    """Check a configuration's text; ``name`` is what its errors call it."""
    try:
        document = tomllib.loads(content.decode())
    except ValueError as error:  # not UTF-8, not TOML, or a number longer than Python reads
        raise ConfigError(f"{name}: not TOML: {error}") from error
    tables = {"metrics": dict, "recovery": dict, "device": list}
    for key, kind in tables.items():
        if not isinstance(document.get(key, kind()), kind):
            form = f"[[{key}]]" if kind is list else f"[{key}]"
            raise ConfigError(f"{name}: {key}: must be a table, written {form}")
    top = {key: value for key, value in document.items() if key not in tables}
    values = _check(top, TOP, name, "", also=tuple(tables))
    return Config(
        runtime_dir=_absolute(values["runtime_dir"], name, "runtime_dir"),
        state_dir=_absolute(values["state_dir"], name, "state_dir"),
        poll_interval_s=values["poll_interval_s"],
        metrics=_check(document.get("metrics", {}), METRICS, name, "metrics."),
        recovery=_check(document.get("recovery", {}), RECOVERY, name, "recovery."),
        commands=_devices(document.get("device", []), name),
    )


def _devices(tables: list[Any], name: str) -> dict[int, tuple[str, ...]]:
    commands: dict[int, tuple[str, ...]] = {}
    for number, table in enumerate(tables, 1):
        where = f"device[{number}]."
        if not isinstance(table, dict):
            raise ConfigError(f"{name}: {where[:-1]}: must be a table, written [[device]]")
        values = _check(table, DEVICE, name, where)
        command = values["command"]
        if not command or not all(isinstance(word, str) and word for word in command):
            raise ConfigError(f"{name}: {where}command: must be a list of words (no shell)")
        if not command[0].startswith("/"):
            raise ConfigError(
                f"{name}: {where}command: {command[0]!r} must be an absolute path: "
                "what root runs does not depend on a PATH"
            )
        if values["dev_id"] in commands:
            raise ConfigError(f"{name}: {where}dev_id: {values['dev_id']} is given twice")
        commands[values["dev_id"]] = tuple(command)
    return commands


def _check(
    table: dict[str, Any], keys: dict[str, Key], name: str, where: str, also: tuple[str, ...] = ()
) -> dict[str, Any]:
    for unknown in table.keys() - keys.keys():
        near = difflib.get_close_matches(unknown, [*keys, *also], 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join([*keys, *also])}"
        raise ConfigError(f"{name}: {where}{unknown}: unknown key; {hint}")
    return {key: _value(table, key, keys[key], f"{name}: {where}{key}") for key in keys}


def _value(table: dict[str, Any], key: str, declared: Key, where: str) -> Any:
    value = table.get(key, declared.default)
    if value is None:
        raise ConfigError(f"{where}: is missing; {declared.help}")
    whole = declared.type is float and type(value) is int
    if type(value) is not declared.type and not whole:
        raise ConfigError(f"{where}: must be a {declared.type.__name__}, not {value!r}")
    if isinstance(value, int | float) and not declared.low <= value <= declared.high:
        raise ConfigError(f"{where}: {value} is not between {declared.low:g} and {declared.high:g}")
    return float(value) if whole else value


def _absolute(value: str, name: str, key: str) -> Path:
    if not value.startswith("/"):
        raise ConfigError(f"{name}: {key}: {value!r} must be an absolute path")
    return Path(value)


def _read_trusted(path: Path) -> bytes:
    """Read a file that root alone can have written: judged on the open descriptor."""
    # O_NONBLOCK: a FIFO is refused below, and not waited for here.
    extra = os.O_CLOEXEC | os.O_NONBLOCK
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | extra)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: must be a regular file")
        if status.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"{path}: belongs to uid {status.st_uid}; try: chown root {path}")
        if status.st_mode & 0o022:
            raise ConfigError(f"{path}: others can write it; try: chmod go-w {path}")
        return file.read(1 << 20)
