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
from enum import Enum
from pathlib import Path
from typing import Any

from ublkwatch.care import Care
from ublkwatch.model import Exhausted, Handoff, Policy

DEFAULT_PATH = Path("/etc/ublkwatch/ublkwatch.toml")


class ConfigError(Exception):
    """A configuration that cannot be used: names file, key and the way out."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its type, its default, the range of a number (or of a list's), what it is for."""

    type: type
    default: Any  # None: the key must be given
    help: str
    low: float = 0
    high: float = float("inf")
    choices: tuple[str, ...] = ()  # of a string; none: any


_DAY_S = 86400
_DEFAULT = Policy()
# Public recover commands may be at it for 32 s (ublksrv's), and nobody can tell that from hanging.
DELEGATED_ATTACH_TIMEOUT_S = 60.0


def _key(default: Any, text: str, low: float = 0, high: float = float("inf")) -> Key:
    """Declare a key that is a field of Policy, whose default and kind are the field's."""
    if isinstance(default, Enum):
        choices = tuple(each.value for each in type(default))
        return Key(str, default.value, text, choices=choices)
    if isinstance(default, frozenset):
        return Key(list, sorted(default), text, low, high)
    return Key(type(default), default, text, low, high)


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
# Each may stand in [recovery], for all devices, and in a [[device]], for that one. Their names are
# those of Policy's fields.
RECOVERY = {
    "grace_s": _key(_DEFAULT.grace_s, "seconds that others have to recover it", 0, _DAY_S),
    "attempts_max": _key(_DEFAULT.attempts_max, "failed attempts until giving up", 1, 100),
    "window_s": _key(_DEFAULT.window_s, "seconds for which a failed attempt counts", 1, _DAY_S),
    "stable_s": _key(_DEFAULT.stable_s, "seconds LIVE that make up for failures", 0, _DAY_S),
    "backoff_base_s": _key(_DEFAULT.backoff_base_s, "the first pause; doubles", 0.001, 3600),
    "backoff_max_s": _key(_DEFAULT.backoff_max_s, "the longest such pause", 0.001, 3600),
    "permanent_exits": _key(
        _DEFAULT.permanent_exits, "exit codes after which no attempt can help", 1, 255
    ),
    "on_exhausted": _key(_DEFAULT.on_exhausted, "what becomes of a device that was given up"),
    "hold_timeout_s": _key(
        _DEFAULT.hold_timeout_s,
        "seconds that I/O may wait until STOP_DEV; 0: for ever",
        0,
        30 * _DAY_S,
    ),
    "exec_timeout_s": _key(_DEFAULT.exec_timeout_s, "seconds for on_exhausted_command", 0.1, 3600),
    "decisions_max": _key(
        _DEFAULT.decisions_max, "how often on_exhausted_command may ask for more attempts", 1, 100
    ),
    "ready_timeout_s": _key(
        _DEFAULT.ready_timeout_s, "seconds for a new server to say READY=1", 0.1, 3600
    ),
    "drain_timeout_s": _key(
        _DEFAULT.drain_timeout_s, "seconds for the kernel to let go of a server", 1, 3600
    ),
    "start_timeout_s": _key(
        _DEFAULT.start_timeout_s, "seconds of EBUSY from START_USER_RECOVERY", 0.1, 3600
    ),
    "attach_timeout_s": _key(
        _DEFAULT.attach_timeout_s, "seconds from a server's line to LIVE", 0.1, 3600
    ),
    "probation_s": _key(
        _DEFAULT.probation_s, "seconds that LIVE must hold to be believed", 0, 3600
    ),
}
DEVICE = {
    "dev_id": Key(int, None, "N of /dev/ublkbN", 0, (1 << 20) - 1),
    "command": Key(list, None, "argv that starts a server by the attach contract, or recovers it"),
    "handoff": _key(_DEFAULT.handoff, "who sends the recovery commands"),
    "attach": _key(_DEFAULT.attach, "when a managed server attaches"),
    "on_exhausted_command": Key(list, [], "argv that decides about a device that was given up"),
}


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration that was checked."""

    runtime_dir: Path
    state_dir: Path
    poll_interval_s: float
    metrics: Mapping[str, Any] = field(default_factory=dict)
    policy: Policy = _DEFAULT  # of a device that has no care; the generation is the kernel's to say
    cares: Mapping[int, Care] = field(default_factory=dict)  # by dev_id


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
        policy=_policy(_check(document.get("recovery", {}), RECOVERY, name, "recovery.")),
        cares=_devices(document.get("device", []), document.get("recovery", {}), name),
    )


def _devices(tables: list[Any], shared: dict[str, Any], name: str) -> dict[int, Care]:
    """Check each device; ``shared`` is what holds for all of them where they do not differ."""
    cares: dict[int, Care] = {}
    for number, table in enumerate(tables, 1):
        where = f"device[{number}]."
        if not isinstance(table, dict):
            raise ConfigError(f"{name}: {where[:-1]}: must be a table, written [[device]]")
        if table.get("handoff") == Handoff.DELEGATED.value:
            shared_here = {"attach_timeout_s": DELEGATED_ATTACH_TIMEOUT_S, **shared}
        else:
            shared_here = shared
        values = _check(shared_here | table, DEVICE | RECOVERY, name, where)
        policy = _policy({key: value for key, value in values.items() if key in _POLICY_KEYS})
        if policy.handoff is Handoff.DELEGATED and "attach" in table:
            raise ConfigError(
                f'{name}: {where}attach: says nothing with handoff = "delegated"; remove it'
            )
        if values["dev_id"] in cares:
            raise ConfigError(f"{name}: {where}dev_id: {values['dev_id']} is given twice")
        command = _argv(values["command"], name, f"{where}command")
        decider = _decider(values["on_exhausted_command"], policy, name, where)
        cares[values["dev_id"]] = Care(command, policy, decider=decider)
    return cares


_POLICY_KEYS = RECOVERY.keys() | {"handoff", "attach"}


def _policy(values: dict[str, Any]) -> Policy:
    """Make a policy of checked values, each as the field's own kind."""
    kinds = {key: type(getattr(_DEFAULT, key)) for key in values}
    return Policy(**{key: kinds[key](value) for key, value in values.items()})


def _decider(value: list[Any], policy: Policy, name: str, where: str) -> tuple[str, ...]:
    wanted = policy.on_exhausted is Exhausted.EXEC
    where += "on_exhausted_command"
    if wanted and not value:
        raise ConfigError(f'{name}: {where}: is missing; on_exhausted = "exec" needs it')
    if value and not wanted:
        raise ConfigError(f'{name}: {where}: is never run without on_exhausted = "exec"')
    return _argv(value, name, where) if value else ()


def _argv(command: list[Any], name: str, where: str) -> tuple[str, ...]:
    if not command or not all(isinstance(word, str) and word for word in command):
        raise ConfigError(f"{name}: {where}: must be a list of words (no shell)")
    if not command[0].startswith("/"):
        raise ConfigError(
            f"{name}: {where}: {command[0]!r} must be an absolute path: "
            "what root runs does not depend on a PATH"
        )
    return tuple(command)


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
    if declared.choices and value not in declared.choices:
        words = " or ".join(f'"{word}"' for word in declared.choices)
        raise ConfigError(f"{where}: must be {words}, not {value!r}")
    ranged = isinstance(value, int | float) or declared.high < float("inf")
    for number in (value if isinstance(value, list) else [value]) if ranged else ():
        if isinstance(value, list) and type(number) is not int:
            raise ConfigError(f"{where}: must be a list of whole numbers, not {value!r}")
        if not declared.low <= number <= declared.high:
            bounds = f"{declared.low:g} and {declared.high:g}"
            raise ConfigError(f"{where}: {number} is not between {bounds}")
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
