"""The configuration: what is accepted, and how each error names file, key and way out."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from ublkwatch import config
from ublkwatch.care import Care
from ublkwatch.config import ConfigError
from ublkwatch.model import Attach, Exhausted, Handoff, Policy

NAME = "ublkwatch.toml"
FULL = b"""
runtime_dir = "/run/other"
state_dir = "/srv/state"
poll_interval_s = 2

[metrics]
enabled = false
address = "::1"
port = 0

[recovery]
grace_s = 7
attempts_max = 3
window_s = 30
stable_s = 12.5
permanent_exits = [2, 78]
on_exhausted = "fail"
hold_timeout_s = 600
exec_timeout_s = 9
decisions_max = 1
backoff_base_s = 0.5
backoff_max_s = 5.5
ready_timeout_s = 10
drain_timeout_s = 20
start_timeout_s = 40
attach_timeout_s = 5
probation_s = 0

[[device]]
dev_id = 0
command = ["/usr/bin/server", "--file", "/a b"]

[[device]]
dev_id = 7
command = ["/bin/true"]
handoff = "delegated"
on_exhausted = "exec"
on_exhausted_command = ["/bin/decide", "now"]
attempts_max = 9
permanent_exits = []

[[device]]
dev_id = 8
command = ["/bin/true"]
attach = "start"
"""
SHARED = Policy(
    grace_s=7,
    attempts_max=3,
    window_s=30,
    stable_s=12.5,
    permanent_exits=frozenset({2, 78}),
    on_exhausted=Exhausted.FAIL,
    hold_timeout_s=600,
    exec_timeout_s=9,
    decisions_max=1,
    backoff_base_s=0.5,
    backoff_max_s=5.5,
    ready_timeout_s=10,
    drain_timeout_s=20,
    start_timeout_s=40,
    attach_timeout_s=5,
    probation_s=0,
)


def care_of(text: str) -> Care:
    """Return what is made of the only device in the text."""
    (care,) = config.parse(text.encode(), NAME).cares.values()
    return care


def test_an_empty_file_is_all_defaults() -> None:
    empty = config.parse(b"", NAME)
    assert (empty.runtime_dir, empty.state_dir, empty.poll_interval_s) == (
        Path("/run/ublkwatch"),
        Path("/var/lib/ublkwatch"),
        1.0,
    )
    assert empty.metrics == {"enabled": True, "address": "127.0.0.1", "port": 9787}
    assert empty.policy == Policy()
    assert empty.cares == {}


def test_every_key_is_taken() -> None:
    full = config.parse(FULL, NAME)
    assert (full.runtime_dir, full.state_dir) == (Path("/run/other"), Path("/srv/state"))
    assert full.poll_interval_s == 2.0
    assert full.metrics == {"enabled": False, "address": "::1", "port": 0}
    assert full.policy == SHARED
    assert full.cares == {
        0: Care(("/usr/bin/server", "--file", "/a b"), SHARED),
        7: Care(
            ("/bin/true",),
            replace(
                SHARED,
                handoff=Handoff.DELEGATED,
                on_exhausted=Exhausted.EXEC,
                attempts_max=9,
                permanent_exits=frozenset(),
            ),
            ("/bin/decide", "now"),
        ),
        8: Care(("/bin/true",), replace(SHARED, attach=Attach.START)),
    }


def plain(value: Any) -> Any:
    """Return a field of Policy as the file would have it."""
    if isinstance(value, frozenset):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value


def test_the_example_has_every_key_and_none_at_its_default() -> None:
    full = config.parse(FULL, NAME)
    policy = {key: plain(value) for key, value in asdict(full.policy).items()}
    given = {"poll_interval_s": full.poll_interval_s, **full.metrics}
    given |= {key: policy[key] for key in config.RECOVERY}
    declared = {**config.TOP, **config.METRICS, **config.RECOVERY}
    assert given.keys() | {"runtime_dir", "state_dir"} == declared.keys()
    assert [key for key, value in given.items() if value == declared[key].default] == []


def test_every_default_is_within_its_own_range() -> None:
    device = {key: each for key, each in config.DEVICE.items() if each.default is not None}
    every = {**config.TOP, **config.METRICS, **config.RECOVERY, **device}
    for key, declared in every.items():
        assert type(declared.default) is declared.type, key
        assert not declared.choices or declared.default in declared.choices, key
        values = declared.default if isinstance(declared.default, list) else [declared.default]
        for value in values:
            if isinstance(value, int | float):
                assert declared.low <= value <= declared.high, key


def test_every_choice_of_a_policy_is_a_key_but_for_what_nobody_should_turn() -> None:
    mine = {"generation", "has_spec", "seen_live", "shutting_down", "chance"}  # facts, no choices
    inner = {"stop_timeout_s", "drain_poll_s", "drain_poll_max_s", "holders_after_s"}
    keys = config.RECOVERY.keys() | config.DEVICE.keys() - {"dev_id", "command"}
    assert asdict(Policy()).keys() - mine - inner == keys - {"on_exhausted_command"}


# --- one device's own choices --------------------------------------------------------------------

DEVICE = "[[device]]\ndev_id = 1\ncommand = ['/s']\n"


def test_a_device_differs_from_the_others_where_it_says_so() -> None:
    text = f"[recovery]\ngrace_s = 3\nwindow_s = 30\n{DEVICE}grace_s = 0\n"
    assert care_of(text).policy == Policy(grace_s=0, window_s=30)


def test_a_delegated_command_has_the_time_that_public_ones_need() -> None:
    delegated = f"{DEVICE}handoff = 'delegated'\n"
    assert care_of(delegated).policy == Policy(handoff=Handoff.DELEGATED, attach_timeout_s=60)
    assert care_of(f"{delegated}attach_timeout_s = 5").policy.attach_timeout_s == 5
    shared = f"[recovery]\nattach_timeout_s = 6\n{delegated}"
    assert care_of(shared).policy.attach_timeout_s == 6
    assert care_of(DEVICE).policy.attach_timeout_s == 15


def test_what_decides_is_taken_from_the_device_and_when_from_either() -> None:
    shared = f"[recovery]\non_exhausted = 'exec'\n{DEVICE}on_exhausted_command = ['/d']"
    own = f"{DEVICE}on_exhausted = 'exec'\non_exhausted_command = ['/d']"
    assert care_of(shared) == care_of(own)
    assert care_of(own).decider == ("/d",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("poll_interval = 1", "poll_interval: unknown key; did you mean 'poll_interval_s'?"),
        ("devices = []", "devices: unknown key; did you mean 'device'?"),
        ("zzz = 1", "zzz: unknown key; known are runtime_dir, state_dir, poll_interval_s, "),
        ("[metrics]\nprt = 1", "metrics.prt: unknown key; did you mean 'port'?"),
        ("[recovery]\nwindow = 1", "recovery.window: unknown key; did you mean 'window_s'?"),
        ("poll_interval_s = 'fast'", "poll_interval_s: must be a float, not 'fast'"),
        ("poll_interval_s = true", "poll_interval_s: must be a float, not True"),
        ("poll_interval_s = 0.01", "poll_interval_s: 0.01 is not between 0.05 and 60"),
        ("poll_interval_s = nan", "poll_interval_s: nan is not between 0.05 and 60"),
        (f"poll_interval_s = {10**400}", "0 is not between 0.05 and 60"),
        (f"poll_interval_s = 1{'0' * 5000}", "not TOML: "),
        ("runtime_dir = 'run'", "runtime_dir: 'run' must be an absolute path"),
        ("state_dir = ''", "state_dir: '' must be an absolute path"),
        ("runtime_dir = 3", "runtime_dir: must be a str, not 3"),
        ("metrics = 3", "metrics: must be a table, written [metrics]"),
        ("recovery = []", "recovery: must be a table, written [recovery]"),
        ("[device]\ndev_id = 1", "device: must be a table, written [[device]]"),
        ("device = [1]", "device[1]: must be a table, written [[device]]"),
        ("[metrics]\nport = true", "metrics.port: must be a int, not True"),
        ("[metrics]\nport = 1.5", "metrics.port: must be a int, not 1.5"),
        ("[metrics]\nport = 65536", "metrics.port: 65536 is not between 0 and 65535"),
        ("[metrics]\nenabled = 1", "metrics.enabled: must be a bool, not 1"),
        ("[recovery]\nattempts_max = 0", "recovery.attempts_max: 0 is not between 1 and 100"),
        ("[recovery]\ngrace_s = -1", "recovery.grace_s: -1 is not between 0 and 86400"),
        ("[recovery]\npermanent_exits = 78", "recovery.permanent_exits: must be a list, not 78"),
        ("[recovery]\npermanent_exits = [0]", "permanent_exits: 0 is not between 1 and 255"),
        ("[recovery]\npermanent_exits = [256]", "permanent_exits: 256 is not between 1 and 255"),
        ("[recovery]\npermanent_exits = ['1']", "permanent_exits: must be a list of whole numbers"),
        ("[recovery]\npermanent_exits = [true]", "must be a list of whole numbers, not [True]"),
        (
            "[recovery]\non_exhausted = 'stop'",
            'recovery.on_exhausted: must be "hold" or "fail" or "exec", not \'stop\'',
        ),
        ("[recovery]\non_exhausted = 1", "recovery.on_exhausted: must be a str, not 1"),
        ("[recovery]\nhold_timeout_s = inf", "hold_timeout_s: inf is not between 0 and 2.592e+06"),
        ("[recovery]\nhandoff = 'managed'", "recovery.handoff: unknown key; known are grace_s"),
        ("= 1", "not TOML: "),
    ],
)
def test_a_mistake_names_file_key_and_way_out(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(text.encode(), NAME)
    message = str(caught.value)
    assert message.startswith(f"{NAME}: ")
    assert says in message


OK = "dev_id = 1\ncommand = ['/s']\n"


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("command = ['/s']", "device[2].dev_id: is missing; N of /dev/ublkbN"),
        ("dev_id = 1", "device[2].command: is missing; argv"),
        ("dev_id = -1\ncommand = ['/s']", "device[2].dev_id: -1 is not between 0 and "),
        ("dev_id = true\ncommand = ['/s']", "device[2].dev_id: must be a int, not True"),
        ("dev_id = 1\ncommand = '/s -x'", "device[2].command: must be a list, not '/s -x'"),
        ("dev_id = 1\ncommand = []", "device[2].command: must be a list of words (no shell)"),
        ("dev_id = 1\ncommand = ['/s', 3]", "device[2].command: must be a list of words"),
        ("dev_id = 1\ncommand = ['/s', '']", "device[2].command: must be a list of words"),
        ("dev_id = 1\ncommand = ['s']", "device[2].command: 's' must be an absolute path"),
        ("dev_id = 0\ncommand = ['/s']", "device[2].dev_id: 0 is given twice"),
        ("dev_id = 1\ncomand = ['/s']", "device[2].comand: unknown key; did you mean 'command'?"),
        (f"{OK}attempts_max = 0", "device[2].attempts_max: 0 is not between 1 and 100"),
        (f"{OK}windows_s = 9", "device[2].windows_s: unknown key; did you mean 'window_s'?"),
        (f"{OK}handoff = 'both'", 'device[2].handoff: must be "managed" or "delegated", not'),
        (f"{OK}attach = 'late'", 'device[2].attach: must be "line" or "start", not'),
        (
            f"{OK}attach = 'line'\nhandoff = 'delegated'",
            'device[2].attach: says nothing with handoff = "delegated"; remove it',
        ),
        (
            f"{OK}on_exhausted = 'exec'",
            'device[2].on_exhausted_command: is missing; on_exhausted = "exec" needs it',
        ),
        (
            f"{OK}on_exhausted_command = ['/d']",
            'device[2].on_exhausted_command: is never run without on_exhausted = "exec"',
        ),
        (
            f"{OK}on_exhausted = 'exec'\non_exhausted_command = ['d']",
            "device[2].on_exhausted_command: 'd' must be an absolute path",
        ),
    ],
)
def test_a_mistake_in_a_device_names_which_one(device: str, says: str) -> None:
    text = f"[[device]]\ndev_id = 0\ncommand = ['/s']\n[[device]]\n{device}\n"
    with pytest.raises(ConfigError) as caught:
        config.parse(text.encode(), NAME)
    assert says in str(caught.value)


def test_what_is_not_utf8_is_not_toml() -> None:
    with pytest.raises(ConfigError, match=f"{NAME}: not TOML: .*utf-8"):
        config.parse(b'runtime_dir = "/\xff"', NAME)


# --- trust ---------------------------------------------------------------------------------------


def test_a_file_of_our_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(FULL)
    path.chmod(0o644)
    assert config.load(path) == config.parse(FULL, NAME)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused_with_the_way_out(
    tmp_path: Path, mode: int
) -> None:
    path = tmp_path / NAME
    path.write_bytes(FULL)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"others can write it; try: chmod go-w {path}"):
        config.load(path)


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    for path, says in ((fifo, "must be a regular file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"{path}: {says}"):
            config.load(path)


def test_a_file_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path / NAME}: there is no such file"):
        config.load(tmp_path / NAME)
