"""The configuration: what is accepted, and how each error names file, key and way out."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from ublkwatch import config
from ublkwatch.care import Care, Run
from ublkwatch.model import Attach, Exhausted, Handoff, Policy, Remedy
from ublkwatch.rules import Match
from ublkwatch.settings import CARE, DEVICE, METRICS, RECOVERY, SERVER, TOP, ConfigError

NAME = "ublkwatch.toml"
FULL = b"""
runtime_dir = "/run/other"
state_dir = "/srv/state"
poll_interval_s = 2
launcher = "fork"
profiles = false
ignore = ["mine@*.service"]
starts_at_once = 3
standby_max = 5
standby_free_percent = 25
lock_memory = false
placement = "warn"
admin_group = "disk"

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
retry_exits = [16]
stall_timeout_s = 45
on_stall = "kill"
on_dead_queue = "alert"
on_exhausted = "fail"
hold_timeout_s = 600
exec_timeout_s = 9
decisions_max = 1
backoff_base_s = 0.5
backoff_max_s = 5.5
hook_pause_s = 2
queue_timeout_s = 300
ready_timeout_s = 10
drain_timeout_s = 20
start_timeout_s = 40
settle_s = 0.5
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
    stall_timeout_s=45,
    on_stall=Remedy.KILL,
    on_dead_queue=Remedy.ALERT,
    grace_s=7,
    attempts_max=3,
    window_s=30,
    stable_s=12.5,
    permanent_exits=frozenset({2, 78}),
    retry_exits=frozenset({16}),
    on_exhausted=Exhausted.FAIL,
    hold_timeout_s=600,
    exec_timeout_s=9,
    decisions_max=1,
    backoff_base_s=0.5,
    backoff_max_s=5.5,
    hook_pause_s=2,
    queue_timeout_s=300,
    ready_timeout_s=10,
    drain_timeout_s=20,
    start_timeout_s=40,
    settle_s=0.5,
    attach_timeout_s=5,
    probation_s=0,
)


def care_of(text: str) -> Care:
    """Return what is made of the only device in the text."""
    (rule,) = config.parse(text.encode(), NAME).rules
    return rule.care


def test_an_empty_file_is_all_defaults() -> None:
    empty = config.parse(b"", NAME)
    assert (empty.runtime_dir, empty.state_dir, empty.poll_interval_s) == (
        Path("/run/ublkwatch"),
        Path("/var/lib/ublkwatch"),
        1.0,
    )
    assert empty.metrics == {"enabled": True, "address": "127.0.0.1", "port": 9787}
    assert empty.policy == Policy()
    assert empty.rules == ()


def test_every_key_is_taken() -> None:
    full = config.parse(FULL, NAME)
    assert (full.runtime_dir, full.state_dir) == (Path("/run/other"), Path("/srv/state"))
    assert full.poll_interval_s == 2.0
    assert full.metrics == {"enabled": False, "address": "::1", "port": 0}
    assert full.policy == SHARED
    assert {rule.match.dev_id: rule.care for rule in full.rules} == {
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
    if isinstance(value, frozenset | tuple):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value


def test_the_example_has_every_key_and_none_at_its_default() -> None:
    full = config.parse(FULL, NAME)
    policy = {key: plain(value) for key, value in asdict(full.policy).items()}
    top = (
        *("poll_interval_s", "launcher", "profiles", "ignore", "starts_at_once", "lock_memory"),
        *("placement", "admin_group", "standby_max", "standby_free_percent"),
    )
    given = {key: plain(getattr(full, key)) for key in top} | dict(full.metrics)
    given |= {key: policy[key] for key in RECOVERY}
    declared = {**TOP, **METRICS, **RECOVERY}
    assert given.keys() | {"runtime_dir", "state_dir"} == declared.keys()
    assert [key for key, value in given.items() if value == declared[key].default] == []


def test_every_default_is_within_its_own_range() -> None:
    device = {key: each for key, each in DEVICE.items() if each.default is not None}
    every = {**TOP, **METRICS, **RECOVERY, **device}
    for key, declared in every.items():
        assert type(declared.default) is declared.type, key
        assert not declared.choices or declared.default in declared.choices, key
        values = declared.default if isinstance(declared.default, list) else [declared.default]
        for value in values:
            if isinstance(value, int | float):
                assert declared.low <= value <= declared.high, key


def test_every_choice_of_a_policy_is_a_key_but_for_what_nobody_should_turn() -> None:
    # Facts, no choices.
    mine = {"generation", "has_spec", "seen_live", "shutting_down", "chance", "hands_off"}
    mine |= {"hands_off_why", "bystander"}
    inner = {"stop_timeout_s", "drain_poll_s", "drain_poll_max_s", "holders_after_s"}
    assert asdict(Policy()).keys() - mine - inner == RECOVERY.keys() | {"handoff", "attach"}


# --- one device's own choices --------------------------------------------------------------------

DISK = "[[device]]\ndev_id = 1\ncommand = ['/s']\n"


def test_a_device_differs_from_the_others_where_it_says_so() -> None:
    text = f"[recovery]\ngrace_s = 3\nwindow_s = 30\n{DISK}grace_s = 0\n"
    assert care_of(text).policy == Policy(grace_s=0, window_s=30)


def test_a_delegated_command_has_the_time_that_public_ones_need() -> None:
    delegated = f"{DISK}handoff = 'delegated'\n"
    assert care_of(delegated).policy == Policy(handoff=Handoff.DELEGATED, attach_timeout_s=60)
    assert care_of(f"{delegated}attach_timeout_s = 5").policy.attach_timeout_s == 5
    shared = f"[recovery]\nattach_timeout_s = 6\n{delegated}"
    assert care_of(shared).policy.attach_timeout_s == 6
    assert care_of(DISK).policy.attach_timeout_s == 15


def test_what_decides_is_taken_from_the_device_and_when_from_either() -> None:
    shared = f"[recovery]\non_exhausted = 'exec'\n{DISK}on_exhausted_command = ['/d']"
    own = f"{DISK}on_exhausted = 'exec'\non_exhausted_command = ['/d']"
    assert care_of(shared) == care_of(own)
    assert care_of(own).decider == ("/d",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("poll_interval = 1", "poll_interval: unknown key; did you mean 'poll_interval_s'?"),
        ("devices = []", "devices: unknown key; did you mean 'device'?"),
        ("zzz = 1", "zzz: unknown key; known are runtime_dir, state_dir, launcher, "),
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
        ("[recovery]\nhandoff = 'managed'", "recovery.handoff: unknown key; known are stall"),
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


def test_whatever_a_care_may_say_is_taken() -> None:
    text = """
    [[device]]
    dev_id = 4
    name = "disk-a"
    command = ["/s", "--id", "{dev_id}", "{char_dev}", "{queues}x{depth}", "{{x}}"]
    user = "ublk:disk"
    cwd = "/srv"
    env = {TOKEN = "a-{name}"}
    limits = {memlock = "infinity", nofile = "10:20", core = 0}
    oom_score_adj = -1000
    cpus = [0, 2]
    priority = 5
    keep = ["/run/ublksrvd/{dev_id}.pid"]
    pre_recover = ["/fence", "{dev_id}"]
    pre_recover_timeout_s = 3
    """
    care = care_of(text)
    assert care == Care(
        ("/s", "--id", "{dev_id}", "{char_dev}", "{queues}x{depth}", "{{x}}"),
        hook=("/fence", "{dev_id}"),
        hook_timeout_s=3,
        run=Run(
            user="ublk:disk",
            cwd="/srv",
            env=(("TOKEN", "a-{name}"),),
            limits=(("memlock", "infinity"), ("nofile", "10:20"), ("core", "0")),
            oom_score_adj=-1000,
            cpus=(0, 2),
        ),
        name="disk-a",
        priority=5,
        keep=("/run/ublksrvd/{dev_id}.pid",),
    )
    assert care.source == f"{NAME}: device[1]"


def test_a_server_table_is_for_devices_that_come_and_go() -> None:
    text = """
    [[server]]
    exe = "/usr/sbin/ublk.*"
    process = "ublk.loop"
    tag = 0x70000
    tag_mask = 0xffff0000
    unit = "my-ublk@{dev_id}.service"
    attach = "start"
    [[device]]
    dev_id = 9
    command = ["/s"]
    group = "all"
    """
    device, server = config.parse(text.encode(), NAME).rules
    assert (device.match, device.care.group) == (Match(dev_id=9), "all")
    match = Match(exe="/usr/sbin/ublk.*", process="ublk.loop", tag=0x70000, tag_mask=0xFFFF0000)
    assert server.match == match
    assert (server.care.command, server.care.run.unit) == ((), "my-ublk@{dev_id}.service")
    assert server.care.source == f"{NAME}: server[1]"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("user = 3", "device[1].user: must be a str, not 3"),
        ("cwd = 'srv'", "device[1].cwd: 'srv' must be an absolute path"),
        ("env = ['A=b']", "device[1].env: must be a dict, not ['A=b']"),
        ("env = {A = 3}", "device[1].env.A: must be a text, not 3"),
        ("env = {A = '{home}'}", "device[1].env.A: '{home}': {home} is none of {dev_id}, "),
        ("limits = {file = 3}", "device[1].limits.file: is no limit; known are as, core, "),
        ("limits = {core = -1}", "device[1].limits.core: -1 is none of 1024, "),
        ("limits = {core = true}", "device[1].limits.core: True is none of 1024, "),
        ("limits = {core = '1:2:3'}", "device[1].limits.core: '1:2:3' is none of 1024, "),
        ("oom_score_adj = -1001", "device[1].oom_score_adj: -1001 is not between -1000 and 1000"),
        ("cpus = [-1]", "device[1].cpus: -1 is not between 0 and 8191"),
        ("keep = ['x']", "device[1].keep: 'x' must be an absolute path"),
        ("keep = ['/x/{pid}']", "device[1].keep: '/x/{pid}': {pid} is none of {dev_id}, "),
        ("pre_recover = ['fence']", "device[1].pre_recover: 'fence' must be an absolute path"),
        ("pre_recover_timeout_s = 0", "pre_recover_timeout_s: 0 is not between 0.1 and 3600"),
        ("name = 'a b'", "device[1].name: 'a b': letters, digits and _.- only, at most 64"),
        ("unit = 'a.service'", "device[1].unit: systemd has the command; remove one of unit and"),
        ("group = 'g'\nattach = 'start'", "device[1].group: is for servers that attach by lines"),
        ("group = 'g'\nhandoff = 'delegated'", "device[1].group: is for servers that attach by"),
        (
            "standby = true\nhandoff = 'delegated'",
            'device[1].standby: a standby waits for its line; with handoff = "delegated" the',
        ),
        (
            "standby = true\nattach = 'start'",
            'device[1].standby: a standby waits for its line; with attach = "start" a server',
        ),
        ("exe = '/s'", "device[1].exe: unknown key; known are"),
        ("profile = 'nbd'", "device[1].profile: 'nbd' is none of "),
    ],
)
def test_a_mistake_in_a_care_names_the_key(more: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(f"{DISK}{more}\n".encode(), NAME)
    assert f"{NAME}: " in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("command = ['/s']", "server[1].exe: is missing; a [[server]] needs exe, process or tag"),
        ("exe = 's'\ncommand = ['/s']", "server[1].exe: 's' must be an absolute path"),
        ("tag = -1\ncommand = ['/s']", "server[1].tag: -1 is not between 0 and "),
        ("tag = 3\ntag_mask = 1\ncommand = ['/s']", "server[1].tag: has bits that tag_mask has"),
        ("tag = 3", "server[1].command: is missing; argv"),
        (
            "tag = 3\nunit = 'a'",
            'server[1].unit: its server is given no line; say attach = "start"',
        ),
        ("tag = 3\ncommand = ['/s', '{a}']", "server[1].command: '{a}': {a} is none of {dev_id}"),
        ("tag = 3\ncommand = ['/s', '{']", "server[1].command: '{': "),
        ("tag = 3\ncommand = ['/s', '{name!r}']", "server[1].command: '{name!r}': {name} is none"),
        ("tag = 3\ncommand = ['/{name}']", "server[1].command: '/{name}': what is run is not foun"),
        ("tag = 3\ngroup = 'g'\ncommand = ['/s', '{dev_id}']", "'{dev_id}' names one device"),
        ("dev_id = 3\ncommand = ['/s']", "server[1].dev_id: unknown key"),
    ],
)
def test_a_mistake_in_a_server_table_names_the_key(table: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(f"[[server]]\n{table}\n".encode(), NAME)
    assert says in str(caught.value)


def test_every_key_of_a_care_is_in_both_tables() -> None:
    assert CARE.keys() == DEVICE.keys() & SERVER.keys()


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
