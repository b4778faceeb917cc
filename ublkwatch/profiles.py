"""What we know of the servers that there are: how each is recognised, and what brings it back.

A device's server is recognised by facts that root vouches for: its executable, and the run file
that it left. Never by its command line, which is the crashed process's own word. What comes out is
a table such as [[device]] has in the configuration, so that one place judges both, or the reason
why there is none. docs/servers.md has a page for each server, and what was seen of it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from ublkwatch.care import Origin, unknown_placeholder
from ublkwatch.model import DevInfo, RecoveryMode
from ublkwatch.traits import UBLKSRV_RUN

_UBLKSRV_RUN: Final = Path(UBLKSRV_RUN)
RUN_FILES: Final = Path("/run/ublk-servers")  # of servers by the attach contract
_RUN_FILE_MAX: Final = 1 << 16  # bytes; a record of 32 queues takes 3 KiB
_RUN_FILE_KEYS: Final = {"version", "dev_id", "pid", "handoff", "attach", "command"}
_RUN_FILE_MORE: Final = {"group", "name"}
_QUEUE_THREADS: Final = "queue_threads"
_PID_MAX: Final = 1 << 22
_DELETED: Final = " (deleted)"  # what /proc/PID/exe says behind a name that was replaced
# Parts of a control group's path that container runtimes and their orchestrators put there.
_CONTAINER: Final = re.compile(
    r"(?:^|[/.:_-])(docker|podman|libpod|lxc|kubepods|containerd|crio|machine)(?=$|[/.:_-])"
)


@dataclass(frozen=True, slots=True)
class Host:
    """Where facts are read, and who judges whether they are root's word."""

    check_executable: Callable[[Path], None]  # OSError: root must not run it
    open_trusted: Callable[[Path], int]  # a descriptor; OSError: others could have written it
    root: Path = Path("/")


@dataclass(frozen=True, slots=True)
class Found:
    """Which kind of server a device has, and how it is brought back."""

    profile: str
    table: Mapping[str, Any] = field(default_factory=dict)  # a [[device]]; empty: ``why`` says why
    why: str = ""
    warning: str = ""  # what root should mend, though the device is in our care


def belongs_elsewhere(origin: Origin, ignore: Iterable[str] = ()) -> str:
    """Say why a server is somebody else's to restart, or "".

    ``ignore`` has names of systemd units, with * for any part of one.
    """
    if match := _CONTAINER.search(origin.cgroup):
        return f"its server runs in a container ({match[1]}): its orchestrator restarts it"
    if origin.foreign_ns:
        return "its server runs in a container (it has namespaces of its own)"
    for part in origin.cgroup.split("/"):
        for pattern in ignore:
            if part and fnmatchcase(part, pattern):
                return f"its server is of {part}, which `ignore` names"
    return ""


def recognise(info: DevInfo, origin: Origin, host: Host) -> Found | None:
    """Tell what serves a LIVE device, and how it would be brought back; None: nobody knows.

    Files are read, so a caller that must not wait calls it in a thread.
    """
    path = RUN_FILES / f"{info.dev_id}.json"
    exe = origin.exe.removesuffix(_DELETED)
    name = exe.rpartition("/")[2]
    if os.path.lexists(_at(host, path)):
        found = _by_run_file(info, path, host)
        if not found.why:
            return found
    else:
        found = None
    if name.startswith("ublk.") and re.fullmatch(r"ublk\.\w+", name):
        return _ublksrv(info, exe, host)
    if name == "rublk":
        return _rublk(info, exe, host)
    if name == "kublk":
        return Found(name, why="kublk cannot be asked which target it serves, and its recover "
                     "command deletes the device when it fails; register it")  # fmt: skip
    if name == "spdk_tgt":
        return Found("spdk", why="its recover command deletes the device when it fails, and names "
                     "a bdev that only you know; register it")  # fmt: skip
    return found


def queue_threads(info: DevInfo, host: Host) -> tuple[int, ...]:
    """Return the threads that a device's server declares to serve its queues; none: it does not."""
    readers = {
        RUN_FILES / f"{info.dev_id}.json": _declared,
        _UBLKSRV_RUN / f"{info.dev_id}.pid": _declared_by_ublksrv,
        _UBLKSRV_RUN / f"{info.dev_id:04}.json": _declared_by_ublksrv,
    }
    for path, declared in readers.items():
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError
        ):
            if tids := declared(info, path, host):
                return tids
    return ()


def _declared(info: DevInfo, path: Path, host: Host) -> tuple[int, ...]:
    content = _json(_read(host.open_trusted(_at(host, path))))
    check_run_file(content, dev_id=info.dev_id, pid=info.ublksrv_pid)
    return tuple(content.get(_QUEUE_THREADS, ()))


def _declared_by_ublksrv(info: DevInfo, path: Path, host: Host) -> tuple[int, ...]:
    """Read what ublksrv and rublk have in common: "queues", by their numbers.

    It may still be the predecessor's word: only threads that the server has are its own.
    """
    content = _read(_open_shared(_at(host, path)))
    queues = _json(content[content.index(b"{") :])["queues"]
    tids = tuple(int(queues[str(queue)]["tid"]) for queue in range(info.nr_hw_queues))
    own = _at(host, Path(f"/proc/{info.ublksrv_pid}/task"))
    return tids if all((own / str(tid)).exists() for tid in tids) else ()


def suggestion(info: DevInfo, origin: Origin | None = None) -> str:
    """Return the command that would register a device; what nobody can know stands in capitals."""
    exe = origin.exe.removesuffix(_DELETED) if origin else ""
    name = exe.rpartition("/")[2]
    words = ["ublkwatch", "register", str(info.dev_id)]
    if name == "kublk":
        words += ["--profile", "kublk", "--accept-delete-on-failure", "--", exe, "recover"]
        words += ["-t", "TYPE", "-n", "{dev_id}", "-q", "{queues}", "-d", "{depth}"]
    elif name == "spdk_tgt":
        words += ["--profile", "spdk", "--accept-delete-on-failure", "--", "/PATH/TO/rpc.py"]
        words += ["ublk_recover_disk", "BDEV", "{dev_id}"]
    elif name == "rublk":
        words += ["--profile", "rublk", "--", exe, "recover", "-n", "{dev_id}"]
    elif re.fullmatch(r"ublk\.\w+", name):
        words += ["--profile", "ublksrv", "--", f"{exe.rpartition('/')[0]}/ublk"]
        words += ["recover", "-n", "{dev_id}"]
    else:
        words += ["--", exe or "/PATH/TO/SERVER", "ARGUMENT..."]
    return " ".join(word if re.fullmatch(r"[\w{}./-]+", word) else shlex.quote(word)
                    for word in words)  # fmt: skip


# --- each of them --------------------------------------------------------------------------------


def _by_run_file(info: DevInfo, path: Path, host: Host) -> Found:
    """Judge a run file of the attach contract."""
    try:
        content = _json(_read(host.open_trusted(_at(host, path))))
        check_run_file(content, dev_id=info.dev_id, pid=info.ublksrv_pid)
        host.check_executable(_at(host, Path(content["command"][0])))
    except (OSError, ValueError) as error:
        return Found("contract", why=f"its run file {path} is not believed: {error}")
    keys = ("handoff", "attach", "command", *sorted(_RUN_FILE_MORE))
    table = {key: content[key] for key in keys if key in content}
    if content["handoff"] == "delegated":
        del table["attach"]
    return Found("contract", {"dev_id": info.dev_id, **table})


def check_run_file(content: Mapping[str, Any], *, dev_id: int, pid: int) -> None:
    """Check a run file of the attach contract for that device and its server; ValueError if bad."""
    if content.get("version") != 1:
        raise ValueError(f"version {content.get('version')!r} is not 1")
    if unknown := content.keys() - _RUN_FILE_KEYS - _RUN_FILE_MORE - {_QUEUE_THREADS}:
        raise ValueError(f"unknown key {min(unknown)!r}")
    if missing := _RUN_FILE_KEYS - content.keys():
        raise ValueError(f"{min(missing)!r} is missing")
    _same("dev_id", content["dev_id"], dev_id)
    _same("pid", content["pid"], pid)
    ways = {"handoff": ("managed", "delegated"), "attach": ("line", "start")}
    for key, choices in ways.items():
        if content[key] not in choices:
            raise ValueError(f"{key}: {content[key]!r} is none of {', '.join(choices)}")
    for key in _RUN_FILE_MORE & content.keys():
        if not isinstance(content[key], str):
            raise ValueError(f"{key}: must be a text, not {content[key]!r}")  # noqa: TRY004
    tids = content.get(_QUEUE_THREADS, [])
    if not isinstance(tids, list) or not all(map(_is_tid, tids)):
        raise ValueError(f"{_QUEUE_THREADS}: must be a list of thread ids, not {tids!r}")
    command = content["command"]
    if not isinstance(command, list) or not all(isinstance(w, str) and w for w in command):
        raise ValueError("command: must be a list of words")
    if not command or not command[0].startswith("/"):
        raise ValueError("command: must begin with an absolute path")
    if problem := next(filter(None, map(unknown_placeholder, command)), None):
        raise ValueError(f"command: {problem}")


def _is_tid(tid: object) -> bool:
    return isinstance(tid, int) and not isinstance(tid, bool) and 0 < tid <= _PID_MAX


def _ublksrv(info: DevInfo, exe: str, host: Host) -> Found:
    """Judge ublksrv's daemon ublk.TYPE: its front end beside it is what recovers."""
    # Never ublk.TYPE itself: called directly, it deletes the device when it fails.
    front = Path(exe).parent / "ublk"
    path = _UBLKSRV_RUN / f"{info.dev_id}.pid"
    try:
        for program in (Path(exe), front):
            host.check_executable(_at(host, program))
        content = _read(_open_shared(_at(host, path)))
        _same("pid", int(content[:32].split(b"\0")[0]), info.ublksrv_pid)
        # Behind the number and, in some versions, zeros comes the record.
        record = _json(content[content.index(b"{") :])
        _same("dev_info.dev_id", record["dev_info"]["dev_id"], info.dev_id)
        _same("target.name", record["target"]["name"], exe.rpartition("/ublk.")[2])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Found("ublksrv", why=_not_believed("ublksrv", error))
    table = _delegated(info, front, "recover", "-n", "{dev_id}")
    return Found("ublksrv", table | {"keep": [str(path)]}, warning=_open_to_all(host))


def _rublk(info: DevInfo, exe: str, host: Host) -> Found:
    """Judge rublk, which is front end and daemon in one program."""
    path = _UBLKSRV_RUN / f"{info.dev_id:04}.json"
    if RecoveryMode.of(info.flags) is RecoveryMode.FAIL_IO:
        return Found("rublk", why="rublk recovers no device that fails I/O meanwhile")
    try:
        host.check_executable(_at(host, Path(exe)))
        record = _json(_read(_open_shared(_at(host, path))))
        _same("dev_info.dev_id", record["dev_info"]["dev_id"], info.dev_id)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Found("rublk", why=_not_believed("rublk", error))
    table = _delegated(info, Path(exe), "recover", "-n", "{dev_id}")
    return Found("rublk", table | {"keep": [str(path)]}, warning=_open_to_all(host))


def _delegated(info: DevInfo, program: Path, *arguments: str) -> dict[str, Any]:
    # What stands in braces is a placeholder; a brace of a path is none.
    name = str(program).replace("{", "{{").replace("}", "}}")
    return {"dev_id": info.dev_id, "handoff": "delegated", "command": [name, *arguments]}


# --- what is believed ----------------------------------------------------------------------------


def _not_believed(profile: str, error: Exception) -> str:
    missing = isinstance(error, KeyError)
    return f"it looks like {profile}'s, but {f'its run file has no {error}' if missing else error}"


def _same(what: str, found: object, expected: object) -> None:
    if found != expected or isinstance(found, bool):
        raise ValueError(f"its run file says {what} {found!r}, and it is {expected!r}")


def _at(host: Host, path: Path) -> Path:
    return host.root / path.relative_to("/")


def _open_shared(path: Path) -> int:
    """Open a file of a directory that everybody may write, as ublksrv and rublk make theirs.

    The file itself must be of root (or ours), and nobody else's to write or to have linked there.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    ours = status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022
    if ours and stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    raise PermissionError(errno.EPERM, "is not a file that root alone can write", str(path))


def _open_to_all(host: Host) -> str:
    """Say what is wrong with ublksrv's run directory: its own programs make it so."""
    try:
        mode = _at(host, _UBLKSRV_RUN).stat().st_mode
    except OSError:
        return ""
    if mode & 0o002 and not mode & stat.S_ISVTX:
        return (
            f"{_UBLKSRV_RUN}: everybody can put another record into the place of this device's, "
            f"which root's recover command believes; try: chmod +t {_UBLKSRV_RUN}"
        )
    return ""


def _read(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(_RUN_FILE_MAX + 1)
    if len(content) > _RUN_FILE_MAX:
        raise ValueError(f"is longer than {_RUN_FILE_MAX} bytes")
    return content


def _json(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content.rstrip(b"\0"))
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("is not an object of JSON")  # noqa: TRY004 - it is the file that is wrong
    return found
