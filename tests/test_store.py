"""What survives us, on real files and a real sqlite."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ublkwatch.care import Origin, Spec, Standby
from ublkwatch.model import (
    Ailment,
    Armed,
    DevInfo,
    Illness,
    Loss,
    Phase,
    QueueConfig,
    Reason,
    Record,
    ServerId,
)
from ublkwatch.store import Store, StoreError, lock_host, read_record, replace_file
from ublkwatch.uapi import DevFlags, DevState

RECORD = Record(
    dev_id=3,
    instance="boot/17",
    phase=Phase.STOPPING,
    reason=Reason.DIED_ATTACHING,
    detail="exit status 1: no “backing” file",
    since=1234.5,
    wake=1235.25,
    info=DevInfo(3, DevState.QUIESCED, DevFlags.USER_RECOVERY, 1, 128, 4096, 77),
    server=ServerId(77, 88, "boot"),
    candidate=ServerId(99, 100, "boot"),
    seq=12,
    standby=True,
    spawned_at=1233.5,
    ready=True,
    holders="no visible holder of /dev/ublkc3",
    agreed=2,
    quiet_since=1234.0,
    free_since=1234.25,
    armed=Armed.UNSURE,
    lined=True,
    pending=True,
    over=False,
    shared=True,
    ends=3,
    then=Phase.OBSERVED,
    failures=(1230.0, 1234.0),
    attempts=2,
    decisions=1,
    held=True,
    held_until=1300.5,
    held_by="uid 0: maintenance",
    give_up_at=1400.25,
    overdue=True,
    ended=ServerId(55, 66, "boot"),
    refused="EBUSY",
    stopped=True,
    ill=Illness(Ailment.STALL, "2 requests wait", 1225.0, condemned=True),
    loss=Loss(ServerId(55, 66, "boot"), "SIGKILL"),
    asked_by="uid 0",
    detected_by="pidfd",
    marks=(("lost", 1229.0), ("draining", 1229.0)),
    recoveries=4,
    last_held_s=0.125,
)
SPEC = Spec(
    dev_id=3,
    instance="boot/17",
    queue=QueueConfig(2, 128, 524288, 8, {"basic": {"dev_sectors": 1 << 40}}),
    origin=Origin("/usr/bin/server", "server", 5, 6, (6, 7), "/system.slice/s.service"),
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with contextlib.closing(Store(tmp_path / "run", tmp_path / "lib")) as opened:
        yield opened


def variants() -> list[Record]:
    phases = [replace(RECORD, phase=phase, dev_id=n) for n, phase in enumerate(Phase)]
    reasons = [replace(RECORD, reason=reason, dev_id=100 + n) for n, reason in enumerate(Reason)]
    armed = [replace(RECORD, armed=armed, dev_id=200 + n) for n, armed in enumerate(Armed)]
    nobody = replace(RECORD, loss=Loss(), dev_id=301)
    return [*phases, *reasons, *armed, Record(dev_id=300, instance="boot/18"), nobody]


def test_every_record_comes_back_as_it_was_but_for_the_kernels_answer(store: Store) -> None:
    for record in variants():
        store.save_record(record)
    expected = {record.dev_id: replace(record, info=None) for record in variants()}
    assert store.load_records() == expected


def test_who_only_looks_needs_no_lock_and_changes_nothing(store: Store, tmp_path: Path) -> None:
    store.save_record(RECORD)
    assert read_record(tmp_path / "run", RECORD.dev_id) == replace(RECORD, info=None)
    assert read_record(tmp_path / "run", 99) is None
    bad = tmp_path / "run/records/4.json"
    bad.write_text('{"version": 2}')
    with pytest.raises(StoreError, match=r"records/4\.json cannot be understood"):
        read_record(tmp_path / "run", 4)
    assert bad.read_text() == '{"version": 2}'


@pytest.mark.skipif(os.geteuid() != 0, reason="for root, who can give files to any group")
def test_a_group_may_read_the_records_that_are_and_those_to_come(
    store: Store, tmp_path: Path
) -> None:
    records, group = tmp_path / "run/records", os.getegid() + 1
    store.save_record(RECORD)
    store.show_records_to(group)
    store.save_record(replace(RECORD, dev_id=4))
    seen = {path.name: path.stat() for path in (records, *records.iterdir())}
    assert {each.st_gid for each in seen.values()} == {group}
    modes = {name: stat.S_IMODE(each.st_mode) for name, each in seen.items()}
    # No S_ISGID: the unit's RestrictSUIDSGID= forbids it.
    assert modes == {"records": 0o750, "3.json": 0o640, "4.json": 0o640}
    store.show_records_to(None)
    assert stat.S_IMODE(records.stat().st_mode) == 0o700


def test_who_may_not_give_the_records_to_a_group_is_told_the_way_out(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys\nfrom ublkwatch.store import Store, StoreError\n"
        f"home = pathlib.Path({str(tmp_path)!r})\nstore = Store(home / 'run', home / 'state')\n"
        "try:\n    store.show_records_to(4711)\nexcept StoreError as error:\n    print(error)"
    )
    done = subprocess.run(
        ["setpriv", "--bounding-set", "-chown", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"{tmp_path}/run/records: Operation not permitted: ")
    assert "without that key" in done.stdout


def test_the_sample_record_has_no_field_at_its_default() -> None:
    """Else a field that is not saved would come back right by chance."""
    plain = Record(dev_id=0, instance="")
    same = {name for name in Record.__slots__ if getattr(plain, name) == getattr(RECORD, name)}
    assert same == set()


def test_the_last_save_counts_and_a_dropped_record_is_gone(store: Store) -> None:
    store.save_record(RECORD)
    store.save_record(replace(RECORD, seq=13))
    assert store.load_records()[3].seq == 13
    store.drop_record(3)
    store.drop_record(3)
    assert store.load_records() == {}


def test_a_status_that_holds_still_is_confirmed_by_its_files_time(
    store: Store, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        store.confirm_status()
    store.write_status("{}")
    path = tmp_path / "run/status.json"
    os.utime(path, (1000, 1000))
    before = path.stat()
    store.confirm_status()
    after = path.stat()
    assert after.st_mtime > before.st_mtime
    assert after.st_ino == before.st_ino
    assert path.read_text() == "{}"


def test_specs_come_back_as_they_were(store: Store) -> None:
    other = replace(SPEC, dev_id=4)
    store.save_spec(SPEC)
    store.save_spec(other)
    assert store.load_specs() == {3: SPEC, 4: other}


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b'"words"',
        b"[]",
        b"{}",
        b'{"version": 1}',
        b'{"version": 2, "dev_id": 3, "instance": "boot/17"}',
        b'{"version": 1, "dev_id": 3, "instance": "boot/17", "unheard_of": 1}',
    ],
)
@pytest.mark.parametrize("kind", ["run/records", "lib/specs"])
def test_what_cannot_be_understood_is_set_aside_and_the_others_are_loaded(
    store: Store, tmp_path: Path, garbage: bytes, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.save_record(RECORD)
    store.save_spec(SPEC)
    bad = tmp_path / kind / "0.json"
    bad.write_bytes(garbage)
    with caplog.at_level(logging.ERROR, "ublkwatch"):
        assert store.load_records().keys() == store.load_specs().keys() == {3}
    assert str(bad) in caplog.text
    assert bad.with_suffix(".bad").read_bytes() == garbage
    assert not bad.exists()


def test_what_another_version_wrote_is_set_aside(store: Store, tmp_path: Path) -> None:
    store.save_record(RECORD)
    store.save_spec(SPEC)
    for path in (tmp_path / "run/records/3.json", tmp_path / "lib/specs/3.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3}))
    assert store.load_records() == {}
    assert store.load_specs() == {}


def test_a_spec_of_the_first_version_is_read_without_the_servers_origin(
    store: Store, tmp_path: Path
) -> None:
    store.save_spec(SPEC)
    path = tmp_path / "lib/specs/3.json"
    content = json.loads(path.read_text()) | {"version": 1, "command": ["/usr/bin/server"]}
    del content["origin"]
    path.write_text(json.dumps(content))
    assert store.load_specs() == {3: replace(SPEC, origin=None)}


def test_who_reads_while_a_file_is_replaced_has_the_old_content_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, "old" * 100, mode=0o644)
    with path.open() as reading:
        replace_file(path, "new")
        assert reading.read() == "old" * 100
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "long enough " * 10_000 + "\ud800")
    assert path.read_text() == "old"
    replace_file(path, "new")
    assert path.read_text() == "new"


def test_everybody_may_read_the_status_and_nobody_the_records(store: Store, tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        store.save_record(RECORD)
        store.write_status("{}")
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*.json")}
    assert modes == {"3.json": 0o640, "status.json": 0o644}
    assert (tmp_path / "run/records").stat().st_mode & 0o077 == 0


def test_a_second_one_is_refused_by_the_lock_until_the_first_is_closed(tmp_path: Path) -> None:
    first = Store(tmp_path / "run", tmp_path / "lib")
    with pytest.raises(StoreError, match="run/lock is held: another ublkwatch"):
        Store(tmp_path / "run", tmp_path / "other")
    first.close()
    Store(tmp_path / "run", tmp_path / "lib").close()


@pytest.mark.parametrize("name", ["run", "lib"])
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a file in its place")
    with pytest.raises(StoreError, match=rf"{name}: File exists; .*runtime_dir and state_dir"):
        Store(tmp_path / "run", tmp_path / "lib")
    (tmp_path / name).unlink()
    Store(tmp_path / "run", tmp_path / "lib").close()


def test_one_host_has_one_ublkwatch(tmp_path: Path) -> None:
    ours = tmp_path / "uts"
    ours.touch()
    lock = lock_host(ours)
    with pytest.raises(StoreError, match="another ublkwatch runs on this host"):
        lock_host(ours)
    os.close(lock)
    os.close(lock_host(ours))
    os.close(lock_host(tmp_path / "not ours to see", ours))
    os.close(lock_host())


def test_a_record_of_an_older_version_keeps_what_it_knew(store: Store, tmp_path: Path) -> None:
    store.save_record(RECORD)
    path = tmp_path / "run/records/3.json"
    content = json.loads(path.read_text())
    del content["ill"]
    path.write_text(json.dumps(content | {"crippled": "thread 78"}))
    assert store.load_records() == {3: replace(RECORD, info=None, ill=None)}


def test_standbys_are_kept_until_they_are_dropped(tmp_path: Path) -> None:
    whole = Standby("s-1f", "ublkb3", 3, "a job", "a file", ServerId(77, 88, "boot"), ready=True)
    begun = Standby("s-20", "group-g", 4, "another job")
    with contextlib.closing(Store(tmp_path / "run", tmp_path / "state")) as store:
        for standby in (whole, begun):
            store.save_standby(standby)
        assert store.load_standbys() == [whole, begun]
        store.drop_standby("s-20")
        store.drop_standby("s-20")
        assert store.load_standbys() == [whole]
