"""What a doctor says of machines that lack one thing or another, and of this one."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import schema

from ublkwatch import __version__, cli, config, doctor, examined, finding, kernels
from ublkwatch.driver import gate
from ublkwatch.examined import Facts
from ublkwatch.finding import Finding, Level
from ublkwatch.model import DevInfo
from ublkwatch.uapi import DevFlags, DevState
from ublkwatch.verbs import Exit

REISSUE = DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_REISSUE
G3 = DevFlags.SUPPORT_ZERO_COPY | DevFlags.USER_RECOVERY
STATUS = "CapEff:\t000001ffffffffff\nSeccomp:\t0\n"
LIMITS = (
    "Limit          Soft Limit  Hard Limit  Units\nMax open files            4096   4096  files\n"
)


def info(dev_id: int, state: DevState = DevState.LIVE, flags: DevFlags = REISSUE) -> DevInfo:
    return DevInfo(dev_id, state, flags, 1, 8, 4096, 100)


@pytest.fixture
def machine(tmp_path: Path) -> Facts:
    """A machine on which all is well."""
    root = tmp_path / "root"
    for name, content in {
        "sys/module/ublk_drv/refcnt": "",
        "dev/ublk-control": "",
        "proc/self/status": STATUS,
        "proc/77/status": STATUS,
        "proc/77/uid_map": "0 0 4294967295\n",
        "proc/77/limits": LIMITS,
        "proc/sys/kernel/io_uring_disabled": "0\n",
        "proc/self/mountinfo": f"1 0 0:1 / {tmp_path} rw - tmpfs none rw\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (root / "proc/self/ns").mkdir()
    (root / "proc/self/ns/pid").symlink_to("pid:[4026531836]")
    (root / "proc/self/ns/mnt").symlink_to("mnt:[4026531841]")
    (root / "proc/1/ns").mkdir(parents=True)
    (root / "proc/1/ns/mnt").symlink_to("mnt:[4026531841]")
    (root / "run/systemd/system").mkdir(parents=True)
    text = f'runtime_dir = "{tmp_path}/run"\nstate_dir = "{tmp_path}/state"\n'
    return Facts(
        root=root,
        release="7.3.4-amd64",
        settings=config.parse(text.encode(), "t.toml"),
        config=(Finding(Level.OK, "t.toml", "can be used"),),
        features=G3,
        systemd="252.39-1~deb12u1",
        running=True,
        document={"supervisor_pid": 77, "written_at": 100.0, "devices": []},
        version=__version__,
        wall=100.5,
    )


def worst(facts: Facts, about: str = "") -> list[Finding]:
    return [
        each
        for each in finding.ranked(doctor.examine(facts))
        if each.level is not Level.OK and about in each.about
    ]


def test_a_machine_on_which_all_is_well(machine: Facts) -> None:
    found = doctor.examine(machine)
    assert [each for each in found if each.level is not Level.OK] == []
    assert len(found) >= len(doctor.CHECKS)
    assert finding.healthy(found)
    assert finding.text(found).startswith(f"{len(found)} well\n")


@pytest.mark.parametrize(
    ("code", "sysctl", "seccomp", "says", "fix"),
    [
        (errno.EPERM, "2", "0", "kernel.io_uring_disabled = 2: nobody may use", "sysctl kernel"),
        (errno.EPERM, "1", "2", "= 1: only CAP_SYS_ADMIN, and io_uring_group,", "sysctl kernel"),
        (errno.EPERM, "0", "2", "forbidden by a seccomp filter", "allow io_uring_setup"),
        (errno.EPERM, "", "0", "by a security module perhaps", "see the audit log"),
        (errno.EACCES, "0", "0", "by a security module perhaps", "see the audit log"),
        (errno.ENOSYS, "", "2", "hidden by a seccomp filter", "allow io_uring_setup"),
        (errno.ENOSYS, "", "0", "this kernel has no io_uring", "CONFIG_IO_URING"),
        (errno.ENOMEM, "0", "0", "no memory to lock", "LimitMEMLOCK="),
        (errno.EMFILE, "0", "0", "io_uring: Too many open files", "io_uring_setup(2)"),
    ],
)
def test_the_gate_that_is_closed_is_named(  # noqa: PLR0917
    machine: Facts, code: int, sysctl: str, seccomp: str, says: str, fix: str
) -> None:
    (machine.root / "proc/sys/kernel/io_uring_disabled").write_text(sysctl)
    status = STATUS.replace("Seccomp:\t0", f"Seccomp:\t{seccomp}")
    (machine.root / "proc/self/status").write_text(status)
    error = OSError(code, os.strerror(code))
    what, way = gate(error, machine.root)
    assert says in what
    assert fix in way
    found = worst(replace(machine, ring_error=error, features=None))
    assert [(each.level, each.about) for each in found] == [
        (Level.BAD, "io_uring"),
        (Level.UNSEEN, "driver"),
    ]


def remove(name: str) -> Callable[[Facts], Facts]:
    def change(facts: Facts) -> Facts:
        path = facts.root / name
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        else:
            path.unlink()
        return facts

    return change


def write(name: str, text: str) -> Callable[[Facts], Facts]:
    def change(facts: Facts) -> Facts:
        path = facts.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)
        return facts

    return change


def elsewhere(*, shared: bool = True, hidden: bool = False) -> Callable[[Facts], Facts]:
    """Put us into a container: process 1, systemd, has other mounts and another root."""

    def change(facts: Facts) -> Facts:
        write("proc/1/ns/mnt", "")(facts).root.joinpath("proc/1/ns/mnt").unlink()
        (facts.root / "proc/1/ns/mnt").symlink_to("mnt:[4026532841]")
        if hidden:
            return write("proc/1/root", "not to be entered")(facts)
        if shared:
            (facts.root / "proc/1/root").symlink_to("/")
        return facts

    return change


def test_a_container_that_shares_the_runtime_directory_is_well(machine: Facts) -> None:
    assert worst(elsewhere()(machine)) == []


def with_device(
    state: DevState, flags: DevFlags = REISSUE, **seen: object
) -> Callable[[Facts], Facts]:
    def change(facts: Facts) -> Facts:
        shown = [{"dev_id": 3, "phase": "watching", "care": {}, "explanation": "", **seen}]
        document = {**facts.document, "devices": shown if seen else []}
        return replace(facts, devices={3: info(3, state, flags)}, document=document)

    return change


def and_down(change: Callable[[Facts], Facts]) -> Callable[[Facts], Facts]:
    return lambda facts: replace(change(facts), running=False)


BAD, WARN, UNSEEN = Level.BAD, Level.WARN, Level.UNSEEN


@pytest.mark.parametrize(
    ("change", "level", "about", "what", "fix"),
    [
        (remove("sys/module/ublk_drv"), BAD, "module", "has no ublk_drv", "a kernel that has"),
        (remove("dev/ublk-control"), BAD, "node", "a container's /dev?", "give the container"),
        (
            write("proc/77/status", "CapEff:\t0000000000000020\n"),
            BAD,
            "capability",
            "no CAP_SYS_ADMIN: every control",
            "give it that",
        ),
        (
            write("proc/77/uid_map", "0 100000 65536"),
            BAD,
            "capability",
            "user namespace",
            "host's",
        ),
        (
            lambda facts: replace(facts, driver_error="no node; try: modprobe ublk_drv"),
            UNSEEN,
            "driver",
            "GET_FEATURES: no node",
            "modprobe ublk_drv",
        ),
        (lambda facts: replace(facts, features=None), BAD, "driver", "only observes", "Linux 6.7"),
        (
            write("proc/77/limits", LIMITS.replace("4096 ", "256  ")),
            WARN,
            "limits",
            "open files: 256, where 512 may be needed",
            "LimitNOFILE=4096",
        ),
        (remove("proc/77/limits"), UNSEEN, "limits", "cannot be read", "as root"),
        (
            lambda facts: replace(facts, systemd=OSError(2, "no bus")),
            WARN,
            "launcher",
            "does not answer on the system bus",
            'launcher = "fork"',
        ),
        (lambda facts: replace(facts, systemd="239"), WARN, "launcher", "older than 240", "fork"),
        (
            lambda facts: write("proc/1/comm", "systemd\n")(remove("run/systemd/system")(facts)),
            WARN,
            "launcher",
            "not to be seen: servers are children, and die with us",
            "the host's /run/systemd/system and /run/dbus",
        ),
        (
            elsewhere(shared=False),
            BAD,
            "directories",
            "/run is another one for servers",
            "mount the host's /",
        ),
        (
            elsewhere(hidden=True),
            BAD,
            "directories",
            "proc/1/root: Not a directory: nobody can judge",
            "CAP_SYS_PTRACE",
        ),
        (
            lambda facts: replace(facts, release="6.12.30"),
            WARN,
            "kernel",
            "6.12.30: CVE-2025-68823",
            "Linux 6.12.73 or later",
        ),
        (
            write("proc/self/mountinfo", "1 0 8:1 / / rw - ext4 /dev/sda rw\n"),
            WARN,
            "directories",
            "is on ext4",
            "runtime_dir below /run",
        ),
        (
            lambda facts: replace(facts, config=(Finding(BAD, "t.toml", "wrong", "mend it", "x"),)),
            BAD,
            "t.toml",
            "wrong",
            "mend it",
        ),
        (
            lambda facts: replace(facts, running=False),
            BAD,
            "daemon",
            "not running",
            "ublkwatch run",
        ),
        (lambda facts: replace(facts, wall=140.0), BAD, "daemon", "its status 40 s ago", "its log"),
        (
            lambda facts: replace(facts, document={"supervisor_pid": 77}),
            BAD,
            "daemon",
            "its status never",
            "see its log",
        ),
        (lambda facts: replace(facts, version="0.0.9"), WARN, "daemon", "0.0.9 runs", "restart it"),
        (with_device(DevState.LIVE), WARN, "ublkb3", "in nobody's care", "explain ublkb3"),
        (
            with_device(DevState.LIVE, DevFlags(0), care=None),
            WARN,
            "ublkb3",
            "without UBLK_F_USER_RECOVERY",
            "create it anew",
        ),
        (
            with_device(DevState.QUIESCED, care=None),
            BAD,
            "ublkb3",
            "its I/O waits, and it is in nobody's care",
            "ublkwatch register ublkb3 -- COMMAND...; then ublkwatch recover ublkb3",
        ),
        (
            with_device(DevState.FAIL_IO, phase="failed", explanation="not ready"),
            BAD,
            "ublkb3",
            "it was given up: not ready",
            "explain ublkb3",
        ),
        (
            and_down(with_device(DevState.QUIESCED, phase="watching")),
            BAD,
            "ublkb3",
            "QUIESCED, and nobody is there to recover it",
            "start ublkwatch",
        ),
        (
            lambda facts: replace(facts, devices={4: OSError(22, "EINVAL")}),
            UNSEEN,
            "ublkb4",
            "EINVAL",
            "",
        ),
        (
            lambda facts: replace(facts, tagged={"3-1-2": {50, 51}, "4-1-1": {60}}, serving={60}),
            WARN,
            "servers",
            "attempt 3-1-2 is over, and its processes live: 50 51",
            "kill 50 51",
        ),
        (
            lambda facts: replace(facts, sited=("the state directory /s is on ext4, on ublkb3",)),
            BAD,
            "placement",
            "the state directory /s is on ext4, on ublkb3: lost with",
            "move it to another disk",
        ),
        (lambda facts: replace(facts, blind=True), UNSEEN, "servers", "cannot be seen", "as root"),
    ],
)
def test_what_stands_in_the_way_is_named_with_the_way_out(  # noqa: PLR0917
    machine: Facts,
    change: Callable[[Facts], Facts],
    level: Level,
    about: str,
    what: str,
    fix: str,
) -> None:
    found = worst(change(machine), about)
    assert found
    first = found[0]
    assert (first.level, what in first.what, fix in first.fix) == (level, True, True), found


def test_a_module_that_is_only_not_loaded_is_told_from_one_that_is_not_there(
    machine: Facts,
) -> None:
    remove("sys/module/ublk_drv")(machine)
    remove("dev/ublk-control")(machine)
    write("lib/modules/7.3.4-amd64/modules.dep", "kernel/drivers/block/ublk_drv.ko.xz:\n")(machine)
    (found,) = worst(machine)
    assert found.what == "ublk_drv is not loaded"
    assert found.fix.startswith("modprobe ublk_drv; for every boot: ")


def test_who_is_not_root_cannot_tell_what_root_may_do(machine: Facts) -> None:
    (found,) = worst(replace(machine, blind=True, running=False), "capability")
    assert (found.level, found.fix) == (Level.UNSEEN, "run this as root")
    assert worst(replace(machine, blind=True), "capability") == [], "the daemon's can be read"


def test_a_server_of_an_attempt_that_is_under_way_is_no_stray(machine: Facts) -> None:
    facts = with_device(DevState.QUIESCED, phase="draining")(machine)
    assert worst(replace(facts, tagged={"3-1-2": {50}})) == []
    assert worst(replace(facts, tagged={"3-1-2": {50}}, running=False), "servers")


def test_a_standby_is_no_stray_unless_nobody_knows_it(machine: Facts) -> None:
    facts = replace(
        with_device(DevState.LIVE, phase="watching", standby_pid=50)(machine), tagged={"s-1f": {50}}
    )
    assert worst(facts, "servers") == []
    (found,) = worst(replace(facts, tagged={"s-1f": {51}}), "servers")
    assert "standby s-1f is nobody's, and its processes live: 51" in found.what
    assert worst(replace(facts, tagged={"s-1f": {51}}, running=False), "servers") == []


@pytest.mark.parametrize(
    ("release", "count"),
    [
        ("5.15.0-generic", 1),
        ("6.1.0-13-amd64", 2),
        ("6.6.50", 2),
        ("6.10.11", 0),
        ("6.12.117+deb13-amd64", 0),
        ("6.18.41", 1),
        ("6.18.42", 0),
        ("7.0.9", 2),
        ("7.1.5", 1),
        ("7.3.4", 0),
        ("unknown", 0),
    ],
)
def test_known_bad_kernels_are_known_by_version(release: str, count: int) -> None:
    assert len(list(kernels.bugs(release))) == count


def test_this_machine_is_looked_at_and_nothing_is_raised(tmp_path: Path) -> None:
    file = tmp_path / "ublkwatch.toml"
    file.write_text(f'runtime_dir = "{tmp_path}/run"\nstate_dir = "{tmp_path}/state"\n')
    facts = asyncio.run(examined.look(file, {}, running=False))
    assert facts.release == os.uname().release
    found = doctor.examine(facts)
    assert {"daemon", "kernel", "io_uring"} <= {each.about for each in found}


def test_the_verb_says_it_for_people_and_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ublkwatch.toml"
    file.write_text(f'runtime_dir = "{tmp_path}/run"\nstate_dir = "{tmp_path}/state"\n')
    assert cli.main(["doctor", "--config", str(file)]) == Exit.UNHEALTHY
    assert "bad     daemon: ublkwatch is not running" in capsys.readouterr().out
    assert cli.main(["doctor", "--json", "--config", str(file)]) == Exit.UNHEALTHY
    document = json.loads(capsys.readouterr().out)
    assert (document["schema_version"], document["healthy"]) == (1, False)
    assert schema.complaints(document, schema.of("findings")) == []
    file.write_text("nonsense")
    assert cli.main(["doctor", "--config", str(file)]) == Exit.UNHEALTHY
    assert f"bad     {file}: not TOML" in capsys.readouterr().out


def test_which_version_this_is_and_that_none_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ublkwatch.toml"
    file.write_text(f'runtime_dir = "{tmp_path}/run"\n')
    assert cli.main(["version", "--json", "--config", str(file)]) == Exit.OK
    document = json.loads(capsys.readouterr().out)
    assert (document["ublkwatch"], document["running"]) == (__version__, None)
    assert schema.complaints(document, schema.of("version")) == []
    assert cli.main(["version", "--config", str(file)]) == Exit.OK
    assert capsys.readouterr().out.startswith(f"ublkwatch {__version__} (Python 3.")
