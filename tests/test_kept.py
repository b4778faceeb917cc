"""Files that a failed recover command removes: kept while they are there, brought back."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from ublkwatch.kept import Kept


@pytest.fixture
def run(tmp_path: Path) -> Path:
    home = tmp_path / "run"
    home.mkdir()
    return home


def test_what_was_lost_is_brought_back_as_it_was(
    tmp_path: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "3.pid"
    path.write_text("[1] params")
    path.chmod(0o640)
    os.chown(path, -1, 6)
    Kept(run).keep(3, (str(path), str(tmp_path / "never there")))
    path.unlink()

    Kept(run).restore(3, (str(path), str(tmp_path / "never there")))

    status = path.stat()
    assert path.read_text() == "[1] params"
    assert (status.st_mode & 0o777, status.st_gid) == (0o640, 6)
    assert f"ublk 3: {path} is restored; it was: [Errno 2] No such file" in caplog.text
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["3.pid", "run"]


def test_what_is_there_is_left_alone_and_the_newest_is_kept(tmp_path: Path, run: Path) -> None:
    path, kept = tmp_path / "3.pid", Kept(run)
    path.write_text("old")
    kept.keep(3, (str(path),))
    path.write_text("new")
    kept.restore(3, (str(path),))
    assert path.read_text() == "new"
    kept.keep(3, (str(path),))
    path.unlink()
    kept.keep(3, (str(path),))  # there is nothing to be kept: that is no news
    kept.restore(3, (str(path),))
    assert path.read_text() == "new"


def test_each_device_has_its_own_and_a_device_that_is_gone_none(tmp_path: Path, run: Path) -> None:
    path, kept = tmp_path / "x", Kept(run)
    path.write_text("x")
    kept.keep(3, (str(path),))
    path.unlink()
    kept.restore(4, (str(path),))
    assert not path.exists()
    kept.drop(3)
    kept.drop(3)
    kept.restore(3, (str(path),))
    assert not path.exists()


@pytest.mark.parametrize("how", ["another's", "open to all", "link", "second name"])
def test_what_others_have_put_into_its_place_is_not_believed(
    tmp_path: Path, run: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, kept = tmp_path / "3.pid", Kept(run)
    path.write_text("ours")
    kept.keep(3, (str(path),))
    path.unlink()
    (tmp_path / "theirs").write_text("theirs")
    if how == "link":
        path.symlink_to(tmp_path / "theirs")
    elif how == "second name":
        path.hardlink_to(tmp_path / "theirs")
    else:
        path.write_text("theirs")
        if how == "open to all":
            path.chmod(0o666)
        else:
            os.chown(path, 5, 6)
    kept.keep(3, (str(path),))
    kept.restore(3, (str(path),))
    assert path.read_text() == "ours"
    assert f"{path} is restored; it was: " in caplog.text


def test_nobody_foresees_the_name_under_which_it_is_written(tmp_path: Path, run: Path) -> None:
    victim, path, kept = tmp_path / "victim", tmp_path / "3.pid", Kept(run)
    victim.write_text("precious")
    path.write_text("ours")
    kept.keep(3, (str(path),))
    path.unlink()
    (tmp_path / ".3.pid.ublkwatch").symlink_to(victim)
    kept.restore(3, (str(path),))
    assert (path.read_text(), victim.read_text()) == ("ours", "precious")
    assert not path.is_symlink()


@pytest.mark.parametrize("what", ["link", "directory", "fifo", "large"])
def test_only_small_regular_files_are_kept(
    tmp_path: Path, run: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, kept = tmp_path / "x", Kept(run)
    if what == "link":
        path.symlink_to("/etc/shadow")
    elif what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(b"x" * ((1 << 20) + 1))
    kept.keep(3, (str(path),))
    assert list((run / "kept").iterdir()) == []
    assert f"{path} is not kept: " in caplog.text


def test_what_cannot_be_kept_or_brought_back_is_said_and_harms_nobody(
    tmp_path: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    path, kept = home / "x", Kept(run)
    path.write_text("x")
    kept.keep(3, (str(path),))
    path.unlink()
    home.rmdir()
    with caplog.at_level(logging.ERROR):
        kept.restore(3, (str(path),))
    assert f"ublk 3: {path} is not restored: " in caplog.text
