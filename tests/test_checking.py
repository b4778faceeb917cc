"""check-config: all that is wrong is said, and what is right is what the daemon takes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import schema
from hypothesis import given, settings
from hypothesis import strategies as st

from ublkwatch import checking, cli, config
from ublkwatch.finding import Level
from ublkwatch.settings import ConfigError
from ublkwatch.store import Store
from ublkwatch.verbs import Exit


def write(home: Path, text: str) -> Path:
    path = home / "ublkwatch.toml"
    path.write_text(f'state_dir = "{home}/state"\nruntime_dir = "{home}/run"\n{text}')
    return path


def said(path: Path) -> list[tuple[str, str, str, str]]:
    return [(each.about, each.key, each.what, each.fix) for each in checking.check(path)]


def test_all_that_is_wrong_is_said_with_its_key_and_the_way_out(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
poll_interval = 3
launcher = "docker"
[metrics]
port = 70000
[recovery]
grace_s = "4"
[[device]]
dev_id = 0
comand = ["/bin/true"]
[[device]]
dev_id = 1
command = ["true"]
[[server]]
command = ["/bin/true"]
""",
    )
    name = str(path)
    assert said(path) == [
        (name, "poll_interval", "unknown key", "did you mean 'poll_interval_s'?"),
        (name, "launcher", 'must be "auto" or "systemd" or "fork", not \'docker\'', ""),
        (name, "metrics.port", "70000 is not between 0 and 65535", ""),
        (name, "device[1].comand", "unknown key", "did you mean 'command'?"),
        (
            name,
            "device[2].command",
            "'true' must be an absolute path: what root runs does not depend on a PATH",
            "",
        ),
        (name, "server[1].exe", "is missing", "a [[server]] needs exe, process or tag"),
        (name, "recovery.grace_s", "must be a float, not '4'", ""),
    ]


def test_what_cannot_be_read_or_was_written_by_others_is_said(tmp_path: Path) -> None:
    assert said(tmp_path / "none") == [(str(tmp_path / "none"), "", "there is no such file", "")]
    path = write(tmp_path, "poll = 3\n")
    path.chmod(0o666)
    first, second = said(path)
    assert first == (str(path), "", "others can write it", f"chmod go-w {path}")
    assert second[1] == "poll", "and what it says is looked at all the same"
    path.write_text("[")
    assert [each[2][:8] for each in said(path)] == ["others c", "not TOML"]


def test_what_could_not_be_run_is_said(tmp_path: Path) -> None:
    program = tmp_path / "server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o777)
    path = write(
        tmp_path,
        f"""
admin_group = "no-such-group"
[[device]]
dev_id = 0
command = ["{program}"]
[[device]]
dev_id = 1
command = ["/bin/none"]
user = "no-such-user"
""",
    )
    group, unsafe, missing, user = checking.check(path)
    assert (group.level, group.key) == (Level.BAD, "admin_group")
    assert (unsafe.level, unsafe.about) == (Level.BAD, f"{path}: device[1]")
    assert unsafe.fix == f"chmod go-w {program}"
    assert missing.level is Level.WARN, "it may come yet"
    assert missing.what == "/bin/none: No such file or directory"
    assert "no-such-user" in user.what


def test_registrations_are_looked_at_as_well(tmp_path: Path) -> None:
    path = write(tmp_path, '[[device]]\ndev_id = 0\ncommand = ["/bin/true"]\n')
    store = Store(tmp_path / "run", tmp_path / "state")
    store.save_registration("bad", {"dev_id": 3, "command": ["x"]})
    store.save_registration("late", {"dev_id": 0, "command": ["/bin/true"]})
    store.close()
    bad, late = checking.check(path)
    assert (bad.level, bad.about, bad.key) == (Level.BAD, "registration bad", "device.command")
    assert late.level is Level.WARN
    assert late.what == f"is never asked: {path}: device[1] names ublkb0, and comes first"
    assert late.fix == "ublkwatch unregister late"


def test_a_registration_that_is_damaged_is_among_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "")
    Store(tmp_path / "run", tmp_path / "state").close()
    damaged = tmp_path / "state/registered/vms.json"
    damaged.write_text('{"version": 1')
    assert cli.main(["check-config", str(path)]) == Exit.CONFIG
    told = capsys.readouterr()
    assert f"bad     {damaged}: cannot be understood (" in told.out
    assert f"        try: rm {damaged}; then register it anew\n" in told.out
    assert told.err == ""


def test_the_exit_code_tells_and_programs_get_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "")
    assert cli.main(["check-config", str(path)]) == Exit.OK
    assert "can be used as it is; 0 rules for devices" in capsys.readouterr().out
    path = write(tmp_path, "poll = 1\n")
    assert cli.main(["check-config", "--json", "--config", str(path)]) == Exit.CONFIG
    document = json.loads(capsys.readouterr().out)
    assert document["findings"] == [
        {
            "level": "bad",
            "about": str(path),
            "key": "poll",
            "what": "unknown key",
            "fix": document["findings"][0]["fix"],
        }
    ]
    assert not document["healthy"]
    assert schema.complaints(document, schema.of("findings")) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="for root, which can be nobody for a while")
def test_who_may_not_see_the_registrations_is_told_so(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    Store(tmp_path / "run", tmp_path / "state").close()
    for each in (tmp_path, *tmp_path.parents):
        if each == Path("/tmp"):
            break
        each.chmod(0o755)
    os.seteuid(65534)
    try:
        found = checking.check(path)
    finally:
        os.seteuid(0)
    assert [each.level for each in found] == [Level.UNSEEN]


values = st.sampled_from(
    [1, -1, 0.5, "x", "/x", True, [], ["/bin/true"], {}, {"a": 1}, "fork", "delegated", [1]]
)
keys = st.sampled_from(
    ["dev_id", "command", "grace_s", "exe", "launcher", "runtime_dir", "ignore", "unit", "x"]
)
tables = st.dictionaries(keys, values, max_size=4)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)


@settings(max_examples=300, deadline=None)
@given(tables, tables, st.lists(tables, max_size=3), st.lists(tables, max_size=2))
def test_there_are_problems_exactly_where_the_daemon_refuses(
    top: dict[str, Any],
    recovery: dict[str, Any],
    devices: list[dict[str, Any]],
    servers: list[dict[str, Any]],
) -> None:
    text = "".join(f"{key} = {toml(value)}\n" for key, value in top.items())
    for head, each in (
        ("[recovery]", recovery),
        *(("[[device]]", device) for device in devices),
        *(("[[server]]", server) for server in servers),
    ):
        text += head + "\n" + "".join(f"{key} = {toml(value)}\n" for key, value in each.items())
    try:
        config.parse(text.encode(), "t.toml")
    except ConfigError:
        refused = True
    else:
        refused = False
    assert bool(config.problems(text.encode(), "t.toml")) == refused
