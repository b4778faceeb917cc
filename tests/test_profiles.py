"""Which server a device has, by executable and run files: real files, below a root of ours."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ublkwatch.care import Origin
from ublkwatch.demo import runfile
from ublkwatch.demo.targets import TargetSpec
from ublkwatch.model import DevInfo
from ublkwatch.profiles import (
    Found,
    Host,
    belongs_elsewhere,
    queue_threads,
    recognise,
    suggestion,
)
from ublkwatch.traits import PROFILES
from ublkwatch.uapi import DevFlags, DevState

PID = 4711
INFO = DevInfo(7, DevState.LIVE, DevFlags.USER_RECOVERY, 2, 64, 524288, PID)


def origin(exe: str = "", cgroup: str = "/system.slice/storage.service") -> Origin:
    return Origin(exe=exe, name=exe.rpartition("/")[2][:15], cgroup=cgroup)


class Machine:
    """Files below a directory, and what was judged of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.refused: set[str] = set()
        self.host = Host(self._check, self._open, root)

    def file(self, path: str, content: bytes | dict[str, Any] = b"", mode: int = 0o644) -> Path:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(json.dumps(content).encode() if isinstance(content, dict) else content)
        file.chmod(mode)
        return file

    def recognise(self, exe: str, info: DevInfo = INFO) -> Found | None:
        return recognise(info, origin(exe), self.host)

    def found(self, exe: str, info: DevInfo = INFO) -> Found:
        found = self.recognise(exe, info)
        assert found is not None
        return found

    def _judge(self, path: Path) -> None:
        name = f"/{path.relative_to(self.root)}"
        if name in self.refused:
            raise PermissionError(f"{name}: others can write it")
        path.stat()

    def _check(self, path: Path) -> None:
        self._judge(path)

    def _open(self, path: Path) -> int:
        self._judge(path)
        return os.open(path, os.O_RDONLY)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# --- ublksrv -------------------------------------------------------------------------------------


def record(**changes: Any) -> bytes:
    """Return a run file as ublksrv writes it: the pid, zeros, and a record of JSON."""
    content = {"dev_info": {"dev_id": 7}, "target": {"name": "loop"}} | changes
    return f"{PID}\n".encode().ljust(32, b"\0") + json.dumps(content).encode()


@pytest.fixture
def ublksrv(machine: Machine) -> Machine:
    machine.file("/usr/sbin/ublk", mode=0o755)
    machine.file("/usr/sbin/ublk.loop", mode=0o755)
    machine.file("/run/ublksrvd/7.pid", record(), 0o600)
    return machine


def test_ublksrv_is_recovered_by_the_front_end_beside_its_daemon(ublksrv: Machine) -> None:
    found = ublksrv.found("/usr/sbin/ublk.loop")

    assert found == Found(
        "ublksrv",
        {
            "dev_id": 7,
            "handoff": "delegated",
            "command": ["/usr/sbin/ublk", "recover", "-n", "{dev_id}"],
            "keep": ["/run/ublksrvd/7.pid"],
        },
    )


def test_ublksrv_after_an_upgrade(ublksrv: Machine) -> None:
    assert ublksrv.found("/usr/sbin/ublk.loop (deleted)").table


def test_ublksrv_after_its_removal(ublksrv: Machine) -> None:
    (ublksrv.root / "usr/sbin/ublk.loop").unlink()

    found = ublksrv.found("/usr/sbin/ublk.loop (deleted)")

    assert not found.table
    assert "/usr/sbin/ublk.loop" in found.why


@pytest.mark.parametrize("program", ["/usr/sbin/ublk", "/usr/sbin/ublk.loop"])
def test_ublksrv_that_others_can_write_is_not_run(ublksrv: Machine, program: str) -> None:
    ublksrv.refused.add(program)

    found = ublksrv.found("/usr/sbin/ublk.loop")

    assert not found.table
    assert f"{program}: others can write it" in found.why


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "invalid literal"),
        (b"4712\n".ljust(32, b"\0") + record()[32:], "pid 4712, and it is 4711"),
        (record()[:40], ""),
        (f"{PID}\n".encode(), ""),
        (record(dev_info={"dev_id": 8}), "dev_id 8, and it is 7"),
        (record(target={"name": "null"}), "target.name 'null', and it is 'loop'"),
        (record(dev_info={}), "has no 'dev_id'"),
        (record(dev_info=[]), ""),
        (f"{PID}\n".encode() + b"{" * 20000, ""),
        (record(queues="x" * 70000), "longer than"),
    ],
)
def test_ublksrvs_run_file_has_to_fit(ublksrv: Machine, content: bytes, says: str) -> None:
    ublksrv.file("/run/ublksrvd/7.pid", content, 0o600)

    found = ublksrv.found("/usr/sbin/ublk.loop")

    assert not found.table
    assert found.why.startswith("it looks like ublksrv's, but ")
    assert says in found.why


def test_ublksrvs_run_file_is_needed(ublksrv: Machine) -> None:
    (ublksrv.root / "run/ublksrvd/7.pid").unlink()

    assert "/run/ublksrvd/7.pid" in ublksrv.found("/usr/sbin/ublk.loop").why


def _writable(file: Path) -> None:
    file.chmod(0o622)


def _linked(file: Path) -> None:
    file.with_name("8.pid").hardlink_to(file)


def _symlink(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("spoil", [_writable, _linked, _symlink, _fifo])
def test_ublksrvs_run_file_has_to_be_roots_own(
    ublksrv: Machine, spoil: Callable[[Path], None]
) -> None:
    spoil(ublksrv.root / "run/ublksrvd/7.pid")

    found = ublksrv.found("/usr/sbin/ublk.loop")

    assert not found.table
    assert found.why


@pytest.mark.parametrize(("mode", "warned"), [(0o777, True), (0o1777, False), (0o755, False)])
def test_ublksrvs_run_directory_is_complained_of(
    ublksrv: Machine, mode: int, *, warned: bool
) -> None:
    (ublksrv.root / "run/ublksrvd").chmod(mode)

    found = ublksrv.found("/usr/sbin/ublk.loop")

    assert found.table
    assert ("chmod +t /run/ublksrvd" in found.warning) == warned


def test_a_brace_of_a_path_is_no_placeholder(machine: Machine) -> None:
    machine.file("/opt/{x}/ublk", mode=0o755)
    machine.file("/opt/{x}/ublk.loop", mode=0o755)
    machine.file("/run/ublksrvd/7.pid", record(), 0o600)

    assert machine.found("/opt/{x}/ublk.loop").table["command"][0] == "/opt/{{x}}/ublk"


# --- rublk, kublk, SPDK --------------------------------------------------------------------------


@pytest.fixture
def rublk(machine: Machine) -> Machine:
    machine.file("/usr/bin/rublk", mode=0o755)
    machine.file("/run/ublksrvd/0007.json", {"dev_info": {"dev_id": 7}}, 0o700)
    return machine


def test_rublk_is_recovered_by_itself(rublk: Machine) -> None:
    found = rublk.found("/usr/bin/rublk")

    assert found.table["command"] == ["/usr/bin/rublk", "recover", "-n", "{dev_id}"]
    assert found.table["keep"] == ["/run/ublksrvd/0007.json"]
    assert found.table["handoff"] == "delegated"


def test_rublk_does_not_recover_a_device_that_fails_io(rublk: Machine) -> None:
    fails = INFO.flags | DevFlags.USER_RECOVERY_FAIL_IO

    found = rublk.found("/usr/bin/rublk", replace(INFO, flags=fails))

    assert not found.table
    assert "fails I/O" in found.why


def test_rublks_record_of_another_device(rublk: Machine) -> None:
    rublk.file("/run/ublksrvd/0007.json", {"dev_info": {"dev_id": 8}})

    assert "dev_id 8" in rublk.found("/usr/bin/rublk").why


@pytest.mark.parametrize("exe", ["/usr/bin/kublk", "/usr/bin/spdk_tgt"])
def test_what_deletes_its_device_is_registered_by_hand(machine: Machine, exe: str) -> None:
    found = machine.found(exe)

    assert not found.table
    assert "deletes the device when it fails" in found.why


@pytest.mark.parametrize(
    "exe", ["", "/usr/bin/python3", "/usr/sbin/ublk", "/srv/ublk.", "/ublk.a b"]
)
def test_a_server_that_nobody_knows(machine: Machine, exe: str) -> None:
    assert machine.recognise(exe) is None


def test_the_profiles_that_delete_say_so() -> None:
    assert {name for name, each in PROFILES.items() if each.deletes_on_failure} == {"kublk", "spdk"}


def test_what_a_profile_sets_is_what_recognition_yields(ublksrv: Machine) -> None:
    table = ublksrv.found("/usr/sbin/ublk.loop").table

    settings = PROFILES["ublksrv"].settings
    assert {key: table[key] for key in settings} == {**settings, "keep": ["/run/ublksrvd/7.pid"]}
    assert settings["keep"] == ["/run/ublksrvd/{dev_id}.pid"]


# --- run files -----------------------------------------------------------------------------------

RUN_FILE = {
    "version": 1,
    "dev_id": 7,
    "pid": PID,
    "handoff": "managed",
    "attach": "line",
    "command": ["/opt/server", "--device", "{dev_id}"],
}


@pytest.fixture
def server(machine: Machine) -> Machine:
    machine.file("/opt/server", mode=0o755)
    machine.file("/run/ublk-servers/7.json", RUN_FILE)
    return machine


def test_a_run_file_is_believed_whatever_the_executable_is(server: Machine) -> None:
    assert server.found("/usr/bin/python3") == Found(
        "contract",
        {
            "dev_id": 7,
            "handoff": "managed",
            "attach": "line",
            "command": ["/opt/server", "--device", "{dev_id}"],
        },
    )


def test_a_run_file_of_a_group(server: Machine) -> None:
    server.file("/run/ublk-servers/7.json", RUN_FILE | {"group": "pool", "name": "disk"})

    table = server.found("").table

    assert (table["group"], table["name"]) == ("pool", "disk")


def test_a_run_file_of_a_delegated_server(server: Machine) -> None:
    server.file("/run/ublk-servers/7.json", RUN_FILE | {"handoff": "delegated"})

    assert server.found("").table.keys() == {"dev_id", "handoff", "command"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version 2 is not 1"),
        ({"dev_id": 8}, "dev_id 8, and it is 7"),
        ({"pid": 1}, "pid 1, and it is 4711"),
        ({"pid": True}, "pid True"),
        ({"handoff": "maybe"}, "handoff: 'maybe'"),
        ({"attach": []}, "attach: []"),
        ({"command": "server"}, "list of words"),
        ({"command": []}, "absolute path"),
        ({"command": ["server"]}, "absolute path"),
        ({"command": ["/opt/server", "{home}"]}, "{home}"),
        ({"command": ["/opt/other"]}, "/opt/other"),
        ({"group": 1}, "group: must be a text"),
        ({"user": "root"}, "unknown key 'user'"),
    ],
)
def test_a_run_file_has_to_fit(server: Machine, change: dict[str, Any], says: str) -> None:
    server.file("/run/ublk-servers/7.json", RUN_FILE | change)

    found = server.found("/usr/bin/python3")

    assert not found.table
    assert found.why.startswith("its run file /run/ublk-servers/7.json is not believed: ")
    assert says in found.why


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 20000, b"\xff", b"{}"])
def test_a_run_file_that_is_none(server: Machine, content: bytes) -> None:
    server.file("/run/ublk-servers/7.json", content)

    assert server.found("").why


@pytest.mark.parametrize("which", ["/run/ublk-servers/7.json", "/opt/server"])
def test_a_run_file_that_others_could_have_written(server: Machine, which: str) -> None:
    server.refused.add(which)

    found = server.found("")

    assert not found.table
    assert f"{which}: others can write it" in found.why


def test_an_old_run_file_hides_no_other_server(ublksrv: Machine) -> None:
    ublksrv.file("/run/ublk-servers/7.json", RUN_FILE | {"pid": PID - 1})

    assert ublksrv.found("/usr/sbin/ublk.loop").profile == "ublksrv"


def test_the_reference_servers_run_file_is_one(machine: Machine, tmp_path: Path) -> None:
    directory = tmp_path / "run/ublk-servers"
    directory.mkdir(parents=True)
    spec = TargetSpec("ram", "/dev/shm/disk-{dev_id}")
    files = runfile.RunFiles(str(directory), runfile.command(spec, "pool", None), "pool")
    files.write(7)
    own = json.loads((directory / "7.json").read_text())
    machine.file(own["command"][0], mode=0o755)

    found = machine.found("", replace(INFO, ublksrv_pid=os.getpid()))

    assert found.table["group"] == "pool"
    # What the server is to fill in itself reaches it as it was.
    assert found.table["command"][-3:] == ["/dev/shm/disk-{{dev_id}}", "--group", "pool"]
    files.write(7, [5, 6])
    assert queue_threads(replace(INFO, ublksrv_pid=os.getpid()), machine.host) == (5, 6)
    files.remove(7)
    assert list(directory.iterdir()) == []


def test_the_run_file_of_another_server_is_left_alone(tmp_path: Path) -> None:
    files = runfile.RunFiles(str(tmp_path), ["/opt/server"])
    (tmp_path / "7.json").write_text(json.dumps({"pid": os.getpid() + 1}))

    files.remove(7)

    assert (tmp_path / "7.json").exists()


# --- whose it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cgroup",
    [
        "/docker/0123456789ab",
        "/system.slice/docker-0123456789ab.scope",
        "/machine.slice/libpod-0123.scope/container",
        "/user.slice/user-0.slice/podman-12.scope",
        "/lxc.payload.web",
        "/kubepods.slice/kubepods-besteffort.slice/cri-containerd-01.scope",
    ],
)
def test_a_container_belongs_to_its_orchestrator(cgroup: str) -> None:
    assert "container" in belongs_elsewhere(origin(cgroup=cgroup))


def test_namespaces_of_its_own_are_a_container() -> None:
    assert "namespaces" in belongs_elsewhere(replace(origin(), foreign_ns=True))


@pytest.mark.parametrize(
    ("ignore", "ignored"),
    [
        ((), False),
        (("storage.service",), True),
        (("stor*.service",), True),
        (("storage",), False),
        (("other.service", "system.slice"), True),
    ],
)
def test_units_that_are_to_be_ignored(ignore: tuple[str, ...], *, ignored: bool) -> None:
    assert bool(belongs_elsewhere(origin(), ignore)) == ignored


@pytest.mark.parametrize("cgroup", ["", "/", "/system.slice/mydocker.service", "/lxcfs.service"])
def test_an_ordinary_server_is_nobodys(cgroup: str) -> None:
    assert belongs_elsewhere(origin(cgroup=cgroup)) == ""


@pytest.mark.parametrize(
    ("exe", "words"),
    [
        ("", ["--", "/PATH/TO/SERVER", "ARGUMENT..."]),
        ("/opt/my server", ["--", "/opt/my server", "ARGUMENT..."]),
        (
            "/usr/sbin/ublk.loop (deleted)",
            ["--profile", "ublksrv", "--", "/usr/sbin/ublk", "recover", "-n", "{dev_id}"],
        ),
        (
            "/usr/bin/rublk",
            ["--profile", "rublk", "--", "/usr/bin/rublk", "recover", "-n", "{dev_id}"],
        ),
    ],
)
def test_the_command_that_would_register_it(exe: str, words: list[str]) -> None:
    assert shlex.split(suggestion(INFO, origin(exe))) == ["ublkwatch", "register", "7", *words]


def test_what_deletes_is_registered_only_by_somebody_who_accepts_that() -> None:
    for exe in ("/usr/bin/kublk", "/usr/bin/spdk_tgt"):
        assert "--accept-delete-on-failure" in suggestion(INFO, origin(exe)).split()


# --- the threads that serve queues ---------------------------------------------------------------


def test_a_run_file_declares_threads(server: Machine) -> None:
    assert queue_threads(INFO, server.host) == ()
    server.file("/run/ublk-servers/7.json", RUN_FILE | {"queue_threads": [5, 6]})
    assert queue_threads(INFO, server.host) == (5, 6)
    assert server.found("/usr/bin/anything").table, "and is believed as before"
    assert queue_threads(replace(INFO, ublksrv_pid=1), server.host) == ()


@pytest.mark.parametrize("tids", ["5", [0], [True], [1 << 40], [5.0], ["5"], {"5": 5}])
def test_threads_that_are_none(server: Machine, tids: Any) -> None:
    server.file("/run/ublk-servers/7.json", RUN_FILE | {"queue_threads": tids})
    assert queue_threads(INFO, server.host) == ()
    assert "must be a list of thread ids" in server.found("/usr/bin/anything").why


QUEUES = {"0": {"qid": 0, "tid": 5, "affinity": [0]}, "1": {"qid": 1, "tid": 6, "affinity": [1]}}


@pytest.mark.parametrize("path", ["/run/ublksrvd/7.pid", "/run/ublksrvd/0007.json"])
def test_ublksrvs_and_rublks_records_have_threads(machine: Machine, path: str) -> None:
    content = {"dev_info": {"dev_id": 7}, "queues": QUEUES}
    machine.file(path, record(queues=QUEUES) if path.endswith("pid") else content)
    assert queue_threads(INFO, machine.host) == (), "its predecessor's"
    for tid in (5, 6):
        machine.file(f"/proc/{PID}/task/{tid}/stat")
    assert queue_threads(INFO, machine.host) == (5, 6)
    assert queue_threads(replace(INFO, nr_hw_queues=3), machine.host) == (), "one is missing"
    for garbage in (b"{", b'{"queues": {"0": {"tid": 1e999}}}', b'{"queues": 5}', b"[]"):
        machine.file(path, garbage)
        assert queue_threads(INFO, machine.host) == ()
