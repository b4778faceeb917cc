"""Every key of the configuration, declared once: its type, default, range, and what it is for.

Pure. Nothing is guessed: an unknown key, a wrong type or a number out of range is an error that
names the file, the key and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ublkwatch.model import Policy


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
    "launcher": Key(str, "auto", "who starts servers", choices=("auto", "systemd", "fork")),
    "admin_group": Key(str, "", "the group that may give orders, too; none: root alone"),
    "profiles": Key(bool, True, "take care of known servers that nothing else names"),
    "ignore": Key(list, [], "systemd units whose servers somebody else restarts; * for any part"),
    "starts_at_once": Key(int, 0, "servers started at once; 0: 4 for each CPU", 0, 64),
    "standby_max": Key(int, 64, "standby servers on this host; 0: none", 0, 4096),
    "standby_free_percent": Key(
        int, 10, "percent of the memory that are free, or no standby is started", 0, 100
    ),
    "lock_memory": Key(bool, True, "keep all of ublkwatch in memory, whatever hangs"),
    "placement": Key(
        str,
        "refuse",
        "what if ublkwatch itself lies on a ublk device",
        choices=("refuse", "warn"),
    ),
    "poll_interval_s": Key(float, 1.0, "seconds between two looks at all devices", 0.05, 60),
}
METRICS = {
    "enabled": Key(bool, True, "serve /metrics, /healthz and /readyz"),
    "address": Key(str, "127.0.0.1", "the address to listen on"),
    "port": Key(int, 9787, "the port to listen on; 0 lets the kernel choose", 0, 65535),
}
# Each may stand in [recovery], for all devices, and in a [[device]], for that one. Their names are
# those of Policy's fields.
RECOVERY = {
    "stall_timeout_s": _key(
        _DEFAULT.stall_timeout_s,
        "seconds without a request completed, while some wait, that are a stall; 0: not looked for",
        0,
        _DAY_S,
    ),
    "on_stall": _key(_DEFAULT.on_stall, "what is done about a server that stalls"),
    "on_dead_queue": _key(
        _DEFAULT.on_dead_queue, "what is done about a server that lost a queue's thread"
    ),
    "grace_s": _key(_DEFAULT.grace_s, "seconds that others have to recover it", 0, _DAY_S),
    "attempts_max": _key(_DEFAULT.attempts_max, "failed attempts until giving up", 1, 100),
    "window_s": _key(_DEFAULT.window_s, "seconds for which a failed attempt counts", 1, _DAY_S),
    "stable_s": _key(_DEFAULT.stable_s, "seconds LIVE that make up for failures", 0, _DAY_S),
    "backoff_base_s": _key(_DEFAULT.backoff_base_s, "the first pause; doubles", 0.001, 3600),
    "backoff_max_s": _key(_DEFAULT.backoff_max_s, "the longest such pause", 0.001, 3600),
    "permanent_exits": _key(
        _DEFAULT.permanent_exits, "exit codes after which no attempt can help", 1, 255
    ),
    "retry_exits": _key(
        _DEFAULT.retry_exits,
        "exit codes of a recover command that sent nothing to the kernel: tried again",
        1,
        255,
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
    "hook_pause_s": _key(
        _DEFAULT.hook_pause_s,
        "seconds until pre_recover is asked again that said: later",
        0.1,
        3600,
    ),
    "queue_timeout_s": _key(
        _DEFAULT.queue_timeout_s, "seconds that a start may wait for others' starts", 1, _DAY_S
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
    "settle_s": _key(
        _DEFAULT.settle_s,
        "seconds from nobody holding the character device to a delegate's start, on Linux 6.12",
        0,
        3600,
    ),
    "attach_timeout_s": _key(
        _DEFAULT.attach_timeout_s, "seconds from a server's line to LIVE", 0.1, 3600
    ),
    "probation_s": _key(
        _DEFAULT.probation_s, "seconds that LIVE must hold to be believed", 0, 3600
    ),
}
# Of a [[device]] and a [[server]], beside all of RECOVERY's.
CARE = {
    "name": Key(str, "", "its server's name, for people"),
    "command": Key(list, [], "argv that starts a server by the attach contract, or recovers it"),
    "unit": Key(str, "", "the systemd unit to start, in the place of a command"),
    "handoff": _key(_DEFAULT.handoff, "who sends the recovery commands"),
    "attach": _key(_DEFAULT.attach, "when a managed server attaches"),
    "profile": Key(str, "", "the kind of server, where it is a known one"),
    "accept_delete_on_failure": Key(
        bool, False, "take it that the server's recover command removes the device if it fails"
    ),
    "on_exhausted_command": Key(list, [], "argv that decides about a device that was given up"),
    "pre_recover": Key(list, [], "argv that is asked before each start: 0 go, 75 later, 78 never"),
    "pre_recover_timeout_s": Key(float, 10.0, "seconds for pre_recover", 0.1, 3600),
    "user": Key(str, "", "whom the server runs as; else as whom the lost one ran"),
    "cwd": Key(str, "/", "its working directory"),
    "env": Key(dict, {}, "its environment, beside PATH, LANG, TZ and HOME"),
    "limits": Key(dict, {}, 'its resource limits, e.g. {memlock = "infinity"}'),
    "oom_score_adj": Key(int, -900, "how unlikely the OOM killer picks it", -1000, 1000),
    "cpus": Key(list, [], "the CPUs that it may run on; none: all", 0, 8191),
    "group": Key(str, "", "devices of one group are served by one process"),
    "standby": Key(
        bool, False, "have the next server started beforehand, waiting for its line in memory"
    ),
    "priority": Key(int, 0, "of many lost at once, the highest is started first", -1000, 1000),
    "keep": Key(list, [], "files that a failed recover command loses, to be restored"),
}
DEVICE = {"dev_id": Key(int, None, "N of /dev/ublkbN", 0, (1 << 20) - 1), **CARE}
SERVER = {
    "exe": Key(str, "", "the server's executable; * stands for any part of a name"),
    "process": Key(str, "", "the name of its process, likewise"),
    "tag": Key(int, -1, "what the server put into ublksrv_flags", 0, (1 << 64) - 1),
    "tag_mask": Key(int, (1 << 64) - 1, "the bits of it that count", 1, (1 << 64) - 1),
    **CARE,
}
# What `register` has options for; whatever else a table may say goes by its --set.
MATCHES = ("exe", "process", "tag")
OPTIONS = ("handoff", "attach", "user", "cwd", "profile", "unit", "group")
LIMITS = frozenset(
    {
        *("as", "core", "cpu", "data", "fsize", "memlock", "msgqueue", "nice"),
        *("nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack"),
    }
)


def check(
    table: dict[str, Any], keys: dict[str, Key], name: str, where: str, also: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the values of all keys, the defaults for those that are not given; ConfigError."""
    for error in complaints(table, keys, name, where, also):
        raise error
    return {key: _value(table, key, keys[key], f"{name}: {where}{key}") for key in keys}


def complaints(
    table: dict[str, Any], keys: dict[str, Key], name: str, where: str, also: tuple[str, ...] = ()
) -> Iterator[ConfigError]:
    """Yield all that is wrong with a table, key by key."""
    for unknown in table.keys() - keys.keys():
        near = difflib.get_close_matches(unknown, [*keys, *also], 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join([*keys, *also])}"
        yield ConfigError(f"{name}: {where}{unknown}: unknown key; {hint}")
    for key, declared in keys.items():
        try:
            _value(table, key, declared, f"{name}: {where}{key}")
        except ConfigError as error:
            yield error


def _value(table: dict[str, Any], key: str, declared: Key, where: str) -> Any:
    if key not in table:
        if declared.default is None:
            raise ConfigError(f"{where}: is missing; {declared.help}")
        return declared.default
    value = table[key]
    if _has_nul(value):
        raise ConfigError(f"{where}: holds a NUL, which no command line can")
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


def _has_nul(value: Any) -> bool:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return any(_has_nul(each) for each in value)
    return isinstance(value, str) and "\0" in value
