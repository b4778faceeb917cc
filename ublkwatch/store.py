"""What survives us: records in the runtime directory, specs and history in the state directory.

A record is committed before its effects run; the runtime directory is a tmpfs, so that costs no
disk and dies with the boot that it speaks of. Specs and history are off the path of a recovery. One
JSON file each, replaced atomically: a broken one harms one device only, and a person can read it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ublkwatch.care import Origin, Spec, Standby
from ublkwatch.model import (
    Ailment,
    Armed,
    Illness,
    Loss,
    Phase,
    QueueConfig,
    Reason,
    Record,
    ServerId,
)
from ublkwatch.trust import open_trusted

_VERSION = 1
_SPEC_VERSION = 2
HISTORY_NAME = "history.sqlite"
HISTORY_KINDS = ("recovery", "order")
_HISTORY_MAX = 10_000
_GARBAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading it raises
_log = logging.getLogger("ublkwatch")


class StoreError(Exception):
    """A directory or file that cannot be used; says which, why, and what to do."""


class Store:
    """The two directories; while it is open, no second ublkwatch can use them."""

    HistoryError = sqlite3.Error

    def __init__(self, runtime_dir: Path, state_dir: Path) -> None:
        """Make the directories where missing, and take the lock; StoreError when that fails."""
        self._records = runtime_dir / "records"
        self._standbys = runtime_dir / "standbys"
        self._specs = state_dir / "specs"
        self._registered = state_dir / "registered"
        self._runtime_dir = runtime_dir
        self._readers: int | None = None  # the group that may read the records
        for directory, mode in (
            (runtime_dir, 0o755),
            (self._records, 0o700),
            (self._standbys, 0o700),
            (state_dir, 0o700),
            (self._specs, 0o700),
            (self._registered, 0o700),
        ):
            try:
                directory.mkdir(mode=mode, parents=True, exist_ok=True)
                probe = directory / ".probe"
                probe.write_bytes(b"")
                probe.unlink()
            except OSError as error:
                raise StoreError(
                    f"{directory}: {error.strerror}; it must be a directory that root can write "
                    "(runtime_dir and state_dir in the configuration)"
                ) from error
        self._lock = os.open(runtime_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise StoreError(
                f"{runtime_dir}/lock is held: another ublkwatch runs here; stop it first"
            ) from None
        self._history = state_dir / HISTORY_NAME

    def close(self) -> None:
        """Let the next one in."""
        os.close(self._lock)

    def show_records_to(self, group: int | None) -> None:
        """Let a group read the records, beside root; None: root alone. StoreError."""
        self._readers = group
        try:
            if group is not None:
                # Not by a directory that passes its group on: a sandbox may forbid its S_ISGID.
                for path in (self._records, *self._records.glob("*.json")):
                    os.chown(path, -1, group)
            self._records.chmod(0o700 if group is None else 0o750)
        except OSError as error:
            raise StoreError(
                f"{self._records}: {error.strerror}: it cannot be given to admin_group; that takes "
                "CAP_CHOWN, or a configuration without that key"
            ) from error

    def save_record(self, record: Record) -> None:
        """Commit what the machine knows; OSError when it could not be written."""
        content = json.dumps({"version": _VERSION} | _encode(record), default=_shallow)
        path = self._records / f"{record.dev_id}.json"
        replace_file(path, content, mode=0o640, group=self._readers)

    def drop_record(self, dev_id: int) -> None:
        """Forget a device that is gone."""
        (self._records / f"{dev_id}.json").unlink(missing_ok=True)

    def load_records(self) -> dict[int, Record]:
        """Return the records of our former life."""
        return {record.dev_id: record for record in self._load(self._records, _decode_record)}

    def save_spec(self, spec: Spec) -> None:
        """Keep the queue config, and what the server was; OSError when it could not be written."""
        replace_file(
            self._specs / f"{spec.dev_id}.json",
            json.dumps({"version": _SPEC_VERSION} | asdict(spec)),
        )

    def load_specs(self) -> dict[int, Spec]:
        """Return what was kept; a file that cannot be understood is set aside."""
        return {spec.dev_id: spec for spec in self._load(self._specs, _decode_spec)}

    def save_standby(self, standby: Standby) -> None:
        """Keep what has to be known of a standby; OSError when it could not be written."""
        content = {"version": _VERSION} | asdict(standby)
        replace_file(self._standbys / f"{standby.tag}.json", json.dumps(content))

    def drop_standby(self, tag: str) -> None:
        """Forget a standby that has ended, or serves; OSError when that is impossible."""
        (self._standbys / f"{tag}.json").unlink(missing_ok=True)

    def load_standbys(self) -> list[Standby]:
        """Return the standbys of our former life."""
        return list(self._load(self._standbys, _decode_standby))

    def save_registration(self, name: str, table: Mapping[str, Any]) -> None:
        """Keep what an operator has registered; OSError when it could not be written."""
        content = {"version": _VERSION, "name": name, "table": dict(table)}
        replace_file(self._registered / f"{name}.json", json.dumps(content, indent=2))

    def drop_registration(self, name: str) -> None:
        """Remove it; OSError when that is impossible."""
        (self._registered / f"{name}.json").unlink(missing_ok=True)

    def load_registrations(self) -> dict[str, dict[str, Any]]:
        """Return what was registered; a file that cannot be understood is set aside."""
        return dict(self._load(self._registered, _decode_registration))

    def add_history(self, entry: dict[str, Any]) -> None:
        """Append an entry, of a "kind", to the history, which forgets its oldest; for a thread."""
        with contextlib.closing(sqlite3.connect(self._history, timeout=10)) as db, db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(
                "CREATE TABLE IF NOT EXISTS recoveries "
                "(id INTEGER PRIMARY KEY AUTOINCREMENT, dev_id INTEGER, entry TEXT)"
            )
            cursor = db.execute(
                "INSERT INTO recoveries (dev_id, entry) VALUES (?, ?)",
                (entry["dev_id"], json.dumps(entry)),
            )
            oldest = (cursor.lastrowid or 0) - _HISTORY_MAX
            db.execute("DELETE FROM recoveries WHERE id <= ?", (oldest,))

    def write_status(self, document: str) -> None:
        """Replace the status document, which everybody may read."""
        replace_file(self._runtime_dir / "status.json", document, mode=0o644)

    def confirm_status(self) -> None:
        """Say that the document holds still: by its modification time. OSError."""
        os.utime(self._runtime_dir / "status.json")

    def _load(self, directory: Path, decode: Any) -> Iterator[Any]:
        for path in sorted(directory.glob("*.json")):
            try:
                with os.fdopen(open_trusted(path)) as file:  # what root obeys is root's own
                    content = json.loads(file.read())
                yield decode(content, content.pop("version"))
            except _GARBAGE as error:
                aside = path.with_suffix(".bad")
                path.replace(aside)
                _log.error("%s cannot be understood (%r); set aside as %s", path, error, aside)


def lock_host(
    path: Path = Path("/proc/1/ns/uts"), else_path: Path = Path("/proc/self/ns/uts")
) -> int:
    """Take the lock that only one ublkwatch of a host can have, whatever its directories are.

    The name space of process 1 is one file for all who see that process, also from a container
    that has directories of its own; it is there as long as the host is. Who may not look at that
    process (no CAP_SYS_PTRACE) takes what is most often the same. Returns the descriptor that
    holds the lock. StoreError: another one runs.
    """
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        lock = os.open(else_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StoreError(
            "another ublkwatch runs on this host, with other directories; two of them would start "
            "two servers for one device: stop it first"
        ) from None
    return lock


def read_record(runtime_dir: Path, dev_id: int) -> Record | None:
    """Return a device's record as it was last saved, or None; for who only wants to look.

    It takes no lock, and leaves what it cannot understand alone: StoreError, which names it.
    PermissionError where the records are not for us.
    """
    path = runtime_dir / "records" / f"{dev_id}.json"
    try:
        content = json.loads(path.read_text())
        record: Record = _decode_record(content, content.pop("version"))
    except FileNotFoundError:
        return None
    except PermissionError:
        raise
    except _GARBAGE as error:
        raise StoreError(f"{path} cannot be understood ({error!r})") from error
    return record


def read_registrations(
    state_dir: Path, broken: Callable[[Path, Exception], None] | None = None
) -> dict[str, dict[str, Any]]:
    """Return what operators have registered; for who only wants to look. PermissionError.

    ``broken`` is told of each file that cannot be understood; where it is None, the log is.
    """
    found: dict[str, dict[str, Any]] = {}
    home = state_dir / "registered"
    try:
        names = os.listdir(home)  # noqa: PTH208 - glob() would not say that we may not look
    except FileNotFoundError:
        return found
    for path in sorted(home / name for name in names if name.endswith(".json")):
        try:
            content = json.loads(path.read_text())
            name, table = _decode_registration(content, content.pop("version"))
            found[name] = table
        except PermissionError:
            raise
        except _GARBAGE as error:
            if broken is None:
                _log.error("%s cannot be understood (%r)", path, error)
            else:
                broken(path, error)
    return found


def read_history(state_dir: Path) -> list[dict[str, Any]]:
    """Return all entries, oldest first, with their "id"; for who only wants to look.

    PermissionError where the history is not for us; StoreError where it cannot be read.
    """
    path = state_dir / HISTORY_NAME
    try:
        path.open("rb").close()  # sqlite would not say why
    except FileNotFoundError:
        return []
    try:
        uri = f"file:{quote(str(path))}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=10)) as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'recoveries'").fetchone():
                return []  # it is being made just now
            rows = db.execute("SELECT id, entry FROM recoveries ORDER BY id").fetchall()
        # There were recoveries before there were kinds.
        return [{"id": number, "kind": "recovery"} | json.loads(entry) for number, entry in rows]
    except (sqlite3.Error, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def replace_file(path: Path, content: str, mode: int = 0o600, group: int | None = None) -> None:
    """Write the file so that a reader sees the old content or the new, whole."""
    # By descriptor: each step of a recovery writes one, and a file object takes longer.
    draft = f"{path.parent}/.{path.name}.new"
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        if group is not None:
            os.fchown(file, -1, group)
        os.fchmod(file, mode)
        rest = memoryview(content.encode())
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)
    os.rename(draft, path)  # noqa: PTH104 - as above


_KEPT = tuple(field.name for field in fields(Record) if field.name != "info")  # is read anew


def _shallow(part: Any) -> dict[str, Any]:
    return {name: getattr(part, name) for name in part.__slots__}


def _encode(record: Record) -> dict[str, Any]:
    # Not asdict(), which copies all of it deeply: this is done at every step of every recovery.
    content = {name: getattr(record, name) for name in _KEPT}
    content["phase"] = record.phase.name
    content["reason"] = record.reason.name if record.reason else None
    if record.ill:
        content["ill"] = asdict(record.ill) | {"kind": record.ill.kind.name}
    content["armed"] = record.armed.name
    content["then"] = record.then.name if record.then else None
    return content


def _decode_record(content: dict[str, Any], version: int) -> Record:
    _check_version(version)
    known = {field.name for field in fields(Record)}
    return Record(
        **{key: value for key, value in content.items() if key in known}  # an older one has others
        | {
            "phase": Phase[content["phase"]],
            "reason": Reason[content["reason"]] if content["reason"] else None,
            "armed": Armed[content["armed"]],
            "then": Phase[content["then"]] if content["then"] else None,
            "server": ServerId(**content["server"]) if content["server"] else None,
            "candidate": ServerId(**content["candidate"]) if content["candidate"] else None,
            "ended": ServerId(**content["ended"]) if content.get("ended") else None,
            "loss": _decode_loss(content["loss"]) if content.get("loss") else None,
            "ill": _decode_illness(content["ill"]) if content.get("ill") else None,
            "failures": tuple(content["failures"]),
            "marks": tuple((name, at) for name, at in content["marks"]),
        }
    )


def _decode_illness(content: dict[str, Any]) -> Illness:
    return Illness(**content | {"kind": Ailment[content["kind"]]})


def _decode_loss(content: dict[str, Any]) -> Loss:
    server = content["server"] and ServerId(**content["server"])
    return Loss(**content | {"server": server})


def _decode_registration(content: dict[str, Any], version: int) -> tuple[str, dict[str, Any]]:
    _check_version(version)
    name, table = content["name"], content["table"]
    if not isinstance(name, str) or not isinstance(table, dict):
        raise TypeError("no name with a table")
    return name, table


def _check_version(version: int, known: int = _VERSION) -> None:
    if version != known:
        raise ValueError(f"version {version}, where this ublkwatch knows {known}")


def _decode_standby(content: dict[str, Any], version: int) -> Standby:
    _check_version(version)
    server = content["server"] and ServerId(**content["server"])
    return Standby(**content | {"server": server})


def _decode_spec(content: dict[str, Any], version: int) -> Spec:
    if version == 1:  # it kept the command, and not what the server had been
        content = {key: value for key, value in content.items() if key != "command"}
        content["origin"] = None
    else:
        _check_version(version, _SPEC_VERSION)
    origin = content["origin"]
    if origin is not None:
        origin = Origin(**origin | {"groups": tuple(origin["groups"])})
    return Spec(**content | {"queue": QueueConfig(**content["queue"]), "origin": origin})
