"""The host's files, as who is in a container, or in none, has to see them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ublkwatch import cgroup
from ublkwatch.care import Care
from ublkwatch.host import OURS, check_programs, systemd_root
from ublkwatch.trust import TrustError, check_executable


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A root directory from which process 1, a systemd, is seen to have other mounts than we."""
    for who, number in (("1", 1), ("self", 2)):
        (tmp_path / f"proc/{who}/ns").mkdir(parents=True)
        (tmp_path / f"proc/{who}/ns/mnt").symlink_to(f"mnt:[{number}]")
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    return tmp_path


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_who_has_other_mounts_than_systemd_looks_into_its_root(machine: Path) -> None:
    assert systemd_root("auto", machine) == systemd_root("systemd", machine)
    assert systemd_root("auto", machine) == machine / "proc/1/root"
    assert systemd_root("fork", machine) == OURS
    (machine / "proc/1/ns/mnt").unlink()
    assert systemd_root("auto", machine) == machine / "proc/1/root", "unseen is not: the same"


def test_who_has_the_same_mounts_or_no_systemd_looks_into_his_own(machine: Path) -> None:
    (machine / "proc/1/ns/mnt").unlink()
    (machine / "proc/1/ns/mnt").symlink_to("mnt:[2]")
    assert systemd_root("auto", machine) == OURS
    (machine / "proc/1/ns/mnt").unlink()
    (machine / "run/systemd/system").rmdir()
    assert systemd_root("systemd", machine) == OURS


def test_a_program_is_judged_where_it_will_be_run_from(tmp_path: Path) -> None:
    host = tmp_path / "host"
    program(host / "usr/sbin/server", "#!/bin/interpreter\n")
    (host / "sbin").symlink_to("/usr/sbin")  # leads to the host's, as it does there
    interpreter = program(host / "usr/bin/interpreter", "\x7fELF")
    (host / "bin").symlink_to("usr/bin")
    seen = tmp_path / "root"  # as /proc/PID/root is: a link
    seen.symlink_to(host)
    check_executable(Path("/sbin/server"), seen)
    with pytest.raises(FileNotFoundError):
        check_executable(Path("/sbin/server"))
    interpreter.chmod(0o777)
    with pytest.raises(TrustError, match=r"^/usr/bin/interpreter: others can write it"):
        check_executable(Path("/sbin/server"), seen)


def test_servers_are_the_hosts_and_the_operators_commands_ours(tmp_path: Path) -> None:
    program(tmp_path / "usr/sbin/of-the-host", "\x7fELF")
    check_programs(Care(("/usr/sbin/of-the-host",), hook=("/bin/sh",)), tmp_path)
    for bad in (Care(("/usr/sbin/of-the-host",)), Care(("/bin/sh",), hook=("/of-the-host",))):
        with pytest.raises(FileNotFoundError):
            check_programs(bad)


def test_the_hierarchy_of_another_process_is_seen_through_its_root(tmp_path: Path) -> None:
    root = tmp_path / "proc/1/root"
    root.mkdir(parents=True)
    (tmp_path / "proc/1/mountinfo").write_text(
        "24 1 0:21 / /sys rw - sysfs sysfs rw\n"
        "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    )
    assert cgroup.root(root) == root / "sys/fs/cgroup"
    (tmp_path / "proc/1/mountinfo").unlink()
    assert cgroup.root(root) is None


def test_on_this_very_machine_ours_is_found_both_ways() -> None:
    check_executable(Path("/bin/sh"), Path(f"/proc/{os.getpid()}/root"))
