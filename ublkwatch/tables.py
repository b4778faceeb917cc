"""A [[device]] or [[server]] table, from the configuration or registered, to a rule. Pure.

An error names the file, the table and the key, and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ublkwatch.care import ALWAYS, PLACEHOLDERS, Care, Run, unknown_placeholder
from ublkwatch.model import Attach, Exhausted, Handoff, Policy
from ublkwatch.rules import Match, Rule
from ublkwatch.settings import DEVICE, LIMITS, RECOVERY, SERVER, ConfigError, check
from ublkwatch.traits import PROFILES

# Public recover commands may be at it for 32 s (ublksrv's), and nobody can tell that from hanging.
DELEGATED_ATTACH_TIMEOUT_S = 60.0
_POLICY = RECOVERY.keys() | {"handoff", "attach"}
_DEFAULT = Policy()


def policy_of(values: Mapping[str, Any]) -> Policy:
    """Make a policy of checked values, each as the field's own kind."""
    kinds = {key: type(getattr(_DEFAULT, key)) for key in values}
    return Policy(**{key: kinds[key](value) for key, value in values.items()})


def rule(table: Mapping[str, Any], shared: Mapping[str, Any], name: str, where: str) -> Rule:
    """Understand one table: a [[device]] if it has a dev_id, else a [[server]].

    ``shared`` is [recovery], for what the table does not say; ``name`` and ``where`` are what
    errors call the file and the table.
    """
    complain = _Complaints(name, where)
    keys = DEVICE if where.startswith("device") else SERVER
    table = {**_of_profile(table, complain), **table}
    if table.get("handoff") == Handoff.DELEGATED.value:
        shared = {"attach_timeout_s": DELEGATED_ATTACH_TIMEOUT_S, **shared}
    values = check({**shared, **table}, keys | RECOVERY, name, where)
    return Rule(_match(values, complain), _care(table, values, complain))


def _of_profile(table: Mapping[str, Any], complain: _Complaints) -> Mapping[str, Any]:
    """Return what the kind of server says, where the table says nothing."""
    kind = table.get("profile")
    if not kind:
        return {}
    traits = PROFILES.get(kind) if isinstance(kind, str) else None
    if traits is None:
        raise complain("profile", f"{kind!r} is none of {', '.join(PROFILES)}")
    if traits.deletes_on_failure and table.get("accept_delete_on_failure") is not True:
        raise complain(
            "accept_delete_on_failure",
            f"must be true: `{traits.deletes_on_failure}` removes the device when it fails, and "
            "what was written to it with it",
        )
    return traits.settings


class _Complaints:
    """Errors that name the file and the table."""

    def __init__(self, name: str, where: str) -> None:
        self._name, self._where = name, where

    def __str__(self) -> str:
        return f"{self._name}: {self._where.rstrip('.')}".removesuffix(": ")

    def __call__(self, key: str, what: str) -> ConfigError:
        return ConfigError(f"{self._name}: {self._where}{key}: {what}")


def _match(values: Mapping[str, Any], complain: _Complaints) -> Match:
    if "dev_id" in values:
        return Match(dev_id=values["dev_id"])
    tag = values["tag"] if values["tag"] >= 0 else None
    if not (values["exe"] or values["process"] or tag is not None):
        raise complain("exe", "is missing; a [[server]] needs exe, process or tag")
    if values["exe"] and not values["exe"].startswith("/"):
        raise complain("exe", f"{values['exe']!r} must be an absolute path")
    if tag is not None and tag & ~values["tag_mask"]:
        raise complain("tag", "has bits that tag_mask has not")
    return Match(exe=values["exe"], process=values["process"], tag=tag, tag_mask=values["tag_mask"])


def _care(table: Mapping[str, Any], values: Mapping[str, Any], complain: _Complaints) -> Care:
    policy = policy_of({key: value for key, value in values.items() if key in _POLICY})
    if policy.handoff is Handoff.DELEGATED and "attach" in table:
        raise complain("attach", 'says nothing with handoff = "delegated"; remove it')
    command = _command(values, policy, complain, given="command" in table)
    if values["group"]:
        _check_group(values, policy, command, complain)
    if values["standby"]:
        _check_standby(policy, complain)
    return Care(
        command,
        policy,
        decider=_decider(values["on_exhausted_command"], policy, complain),
        hook=argv(values["pre_recover"], "pre_recover", complain) if values["pre_recover"] else (),
        hook_timeout_s=values["pre_recover_timeout_s"],
        run=_run(values, complain),
        name=_name(values["name"], "name", complain),
        group=_name(values["group"], "group", complain),
        priority=values["priority"],
        keep=_paths(values["keep"], complain),
        standby=values["standby"],
        source=str(complain),
    )


def _command(
    values: Mapping[str, Any], policy: Policy, complain: _Complaints, *, given: bool
) -> tuple[str, ...]:
    command, unit = values["command"], values["unit"]
    if not unit:
        if not given:
            raise complain("command", "is missing; argv that starts a server, or recovers it")
        return argv(command, "command", complain)
    if command:
        raise complain("unit", "systemd has the command; remove one of unit and command")
    if policy.handoff is Handoff.MANAGED and policy.attach is Attach.LINE:
        raise complain("unit", 'its server is given no line; say attach = "start"')
    if problem := unknown_placeholder(unit):
        raise complain("unit", problem)
    return ()


def _check_group(
    values: Mapping[str, Any], policy: Policy, command: tuple[str, ...], complain: _Complaints
) -> None:
    if policy.handoff is not Handoff.MANAGED or policy.attach is not Attach.LINE:
        raise complain("group", "is for servers that attach by lines, one for each device")
    one = [word for word in command if "{" in word.replace("{{", "").replace("{name}", "")]
    if one:
        raise complain("command", f"{one[0]!r} names one device, where group says: several")
    if values["unit"]:
        raise complain("unit", "cannot be a group's: its server is given no line")


def _check_standby(policy: Policy, complain: _Complaints) -> None:
    if policy.handoff is Handoff.DELEGATED:
        raise complain(
            "standby",
            'a standby waits for its line; with handoff = "delegated" the server\'s own command '
            "recovers the device as soon as it runs: remove one of them",
        )
    if policy.attach is Attach.START:
        raise complain(
            "standby",
            'a standby waits for its line; with attach = "start" a server touches the device as '
            "soon as it runs: remove one of them",
        )


def _decider(value: list[Any], policy: Policy, complain: _Complaints) -> tuple[str, ...]:
    wanted = policy.on_exhausted is Exhausted.EXEC
    if wanted and not value:
        raise complain("on_exhausted_command", 'is missing; on_exhausted = "exec" needs it')
    if value and not wanted:
        raise complain("on_exhausted_command", 'is never run without on_exhausted = "exec"')
    return argv(value, "on_exhausted_command", complain, ALWAYS) if value else ()


def argv(
    command: list[Any], key: str, complain: _Complaints, known: tuple[str, ...] = PLACEHOLDERS
) -> tuple[str, ...]:
    """Check an argv: words, the first an absolute path, no placeholder that nobody fills."""
    if not command or not all(isinstance(word, str) and word for word in command):
        raise complain(key, "must be a list of words (no shell)")
    if not command[0].startswith("/"):
        raise complain(
            key,
            f"{command[0]!r} must be an absolute path: what root runs does not depend on a PATH",
        )
    for word in command:
        if problem := unknown_placeholder(word, known):
            raise complain(key, problem)
    if "{" in command[0]:
        raise complain(key, f"{command[0]!r}: what is run is not found by a placeholder")
    return tuple(command)


def _run(values: Mapping[str, Any], complain: _Complaints) -> Run:
    if not values["cwd"].startswith("/"):
        raise complain("cwd", f"{values['cwd']!r} must be an absolute path")
    for key, value in values["env"].items():
        if not isinstance(value, str):
            raise complain(f"env.{key}", f"must be a text, not {value!r}")
        if problem := unknown_placeholder(value):
            raise complain(f"env.{key}", problem)
    return Run(
        user=values["user"],
        cwd=values["cwd"],
        env=tuple(values["env"].items()),
        limits=tuple((key, _limit(key, val, complain)) for key, val in values["limits"].items()),
        oom_score_adj=values["oom_score_adj"],
        cpus=tuple(values["cpus"]),
        unit=values["unit"],
    )


def _limit(key: str, value: Any, complain: _Complaints) -> str:
    if key not in LIMITS:
        raise complain(f"limits.{key}", f"is no limit; known are {', '.join(sorted(LIMITS))}")
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"(\d+|infinity)(:(\d+|infinity))?", text):
        raise complain(f"limits.{key}", f'{value!r} is none of 1024, "1024:4096" and "infinity"')
    return text


def _name(value: str, key: str, complain: _Complaints) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{0,64}", value):
        raise complain(key, f"{value!r}: letters, digits and _.- only, at most 64")
    return value


def _paths(value: list[Any], complain: _Complaints) -> tuple[str, ...]:
    for path in value:
        if not isinstance(path, str) or not path.startswith("/"):
            raise complain("keep", f"{path!r} must be an absolute path")
        if problem := unknown_placeholder(path, ALWAYS):
            raise complain("keep", problem)
    return tuple(value)
