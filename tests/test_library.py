"""The rules of this moment: configuration, registrations, profiles, and how they change."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_rules import INFO, ORIGIN

from ublkwatch import config
from ublkwatch.care import Care
from ublkwatch.host import check_programs
from ublkwatch.library import Library, known_servers
from ublkwatch.model import Generation, Reason
from ublkwatch.rules import Unmanaged
from ublkwatch.settings import ConfigError
from ublkwatch.store import Store

TABLE = {"dev_id": 3, "command": ["/bin/true", "{dev_id}"], "attempts_max": 2}
FILE = b"[recovery]\ngrace_s = 4\n[[device]]\ndev_id = 9\ncommand = ['/bin/true']\n"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with contextlib.closing(Store(tmp_path / "run", tmp_path / "lib")) as opened:
        yield opened


def library(store: Store, text: bytes = FILE) -> Library:
    return Library(
        config.parse(text, "t.toml"),
        store,
        lambda _: lambda _info, _origin: None,
        check_programs,
        Generation.G3,
    )


def found(books: Library, dev_id: int = 3) -> Care:
    care = books.find(replace(INFO, dev_id=dev_id), ORIGIN)
    assert isinstance(care, Care)
    return care


def test_what_is_registered_is_there_at_once_and_after_a_restart(store: Store) -> None:
    books = library(store)
    assert books.find(INFO, ORIGIN) == Unmanaged(Reason.NO_SPEC)
    books.register("ublkb3", TABLE)
    for each in (books, library(store)):
        care = found(each)
        assert care.command == ("/bin/true", "{dev_id}")
        assert (care.policy.attempts_max, care.policy.grace_s) == (2, 4), "[recovery] is shared"
        assert care.policy.generation is Generation.G3
        assert each.registered() == {"ublkb3": TABLE}
        assert each.names_of(3) == ["ublkb3"]
        assert each.names_of(4) == []


def test_a_second_registration_of_a_name_takes_the_place_of_the_first(store: Store) -> None:
    books = library(store)
    books.register("ublkb3", TABLE)
    books.register("ublkb3", TABLE | {"attempts_max": 7})
    assert found(books).policy.attempts_max == found(library(store)).policy.attempts_max == 7


def test_what_is_unregistered_is_gone(store: Store) -> None:
    books = library(store)
    books.register("ublkb3", TABLE)
    assert books.unregister("ublkb3")
    assert not books.unregister("ublkb3")
    assert isinstance(books.find(INFO, ORIGIN), Unmanaged)
    assert library(store).registered() == {}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"dev_id": 3}, "registration x: device.command: is missing"),
        ({"process": "p", "command": ["true"]}, "registration x: server.command: 'true' must be"),
        (TABLE | {"dev_id": 9}, "t.toml: device[1] names ublkb9 already, and comes first"),
        (TABLE | {"command": ["/bin/no such"]}, "No such file or directory"),
        (TABLE | {"pre_recover": ["/bin/no such"]}, "No such file or directory"),
        (TABLE | {"command": ["/etc/passwd"]}, "/etc/passwd"),
    ],
)
def test_what_is_wrong_is_refused_and_changes_nothing(
    store: Store, table: dict[str, object], says: str
) -> None:
    books = library(store)
    with pytest.raises((ConfigError, OSError)) as caught:
        books.register("x", table)
    assert says in str(caught.value)
    assert books.registered() == library(store).registered() == {}


def test_what_others_can_write_is_not_run(store: Store, tmp_path: Path) -> None:
    script = tmp_path / "server"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o777)
    with pytest.raises(OSError, match=f"chmod go-w {script}"):
        library(store).register("x", TABLE | {"command": [str(script)]})


def test_what_became_unsafe_is_said_before_it_is_needed_and_what_is_missing_is_not_forgotten(
    store: Store, tmp_path: Path
) -> None:
    script = tmp_path / "server"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    books = library(store)
    books.register("x", TABLE | {"command": [str(script)]})
    script.chmod(0o777)
    why = books.find(INFO, ORIGIN)
    assert isinstance(why, Unmanaged)
    assert (why.reason, f"chmod go-w {script}" in why.detail) == (Reason.UNTRUSTED, True)
    script.unlink()
    assert found(books).command == (str(script),)


def test_a_registration_that_others_could_write_is_set_aside(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library(store).register("x", TABLE)
    path = tmp_path / "lib/registered/x.json"
    path.chmod(0o666)
    assert library(store).registered() == {}
    assert f"chmod go-w {path}" in caplog.text
    assert path.with_suffix(".bad").exists()


def test_a_server_that_somebody_else_restarts_is_only_reported() -> None:
    settings = config.parse(b'ignore = ["mine@*.service"]', "t.toml")
    for origin, says in (
        (replace(ORIGIN, cgroup="/system.slice/mine@3.service"), "which `ignore` names"),
        (replace(ORIGIN, cgroup="/kubepods.slice/pod1"), "its server runs in a container"),
        (replace(ORIGIN, foreign_ns=True), "its server runs in a container"),
    ):
        found = known_servers(settings)(INFO, origin)
        assert isinstance(found, Unmanaged)
        assert found.reason is Reason.FOREIGN
        assert says in found.detail


def test_a_server_that_nobody_knows_is_shown_with_the_command_that_registers_it() -> None:
    for text in (b"", b"profiles = false"):
        unknown = replace(ORIGIN, exe="/usr/bin/mine", name="mine")
        found = known_servers(config.parse(text, "t.toml"))(INFO, unknown)
        assert isinstance(found, Unmanaged)
        assert "`ublkwatch register 3 -- /usr/bin/mine ARGUMENT...`" in found.detail


def test_a_broken_registration_is_set_aside_and_the_others_work(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library(store).register("good", TABLE)
    home = tmp_path / "lib/registered"
    (home / "bad.json").write_text("{")
    (home / "newer.json").write_text(json.dumps({"version": 9, "name": "newer", "table": {}}))
    wrong = {"version": 1, "name": "wrong", "table": {"dev_id": 5, "command": ["x"]}}
    (home / "wrong.json").write_text(json.dumps(wrong))
    books = library(store)
    assert found(books).command == ("/bin/true", "{dev_id}")
    assert sorted(path.name for path in home.iterdir()) == [
        *("bad.bad", "good.json", "newer.bad", "wrong.json")
    ]
    assert "registration wrong: device.command: 'x' must be an absolute path" in caplog.text


def test_a_new_configuration_takes_the_place_of_the_old_one(store: Store) -> None:
    books = library(store)
    books.register("ublkb3", TABLE)
    assert found(books, 9).policy.grace_s == 4
    text = b"poll_interval_s = 3\n[metrics]\nport = 1\n[recovery]\ngrace_s = 5\n"
    new, known = config.parse(text, "t.toml"), [(replace(INFO, dev_id=9), ORIGIN), (INFO, ORIGIN)]
    was, is_now = (dict(each.metrics) for each in (books.settings, new))
    changes = [
        f"metrics: {was} -> {is_now}, when ublkwatch is restarted",
        "poll_interval_s: 1.0 -> 3.0, when ublkwatch is restarted",
        "recovery.grace_s: 4 -> 5",
        "ublkb9: no rule any more (t.toml: device[1])",
        "ublkb9: its care: t.toml: device[1] -> nobody",
    ]
    assert list(books.changes(new, books.registered(), known)) == changes
    assert found(books, 9).policy.grace_s == 4, "it only looked"
    books.reload(new)
    assert isinstance(books.find(replace(INFO, dev_id=9), ORIGIN), Unmanaged)
    assert found(books).policy.grace_s == 5
    assert list(books.changes(new, books.registered(), known)) == []
