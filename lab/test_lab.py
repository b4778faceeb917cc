"""The lab's promises, each against a guest that really boots; run on the host."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from base import cache_directory
from machine import Guest, Stage

LAB = Path(__file__).with_name("lab.py")
PATIENCE = 1000.0  # three boots, each as slow as it may be

Result = subprocess.CompletedProcess[bytes]


def lab(
    *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> Result:
    """Run lab.py and return what it gave."""
    return subprocess.run(
        [sys.executable, LAB, *arguments],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.fixture(scope="session", autouse=True)
def lab_is_set_up() -> None:
    """Have both kernels here; at once when they are."""
    done = subprocess.run([sys.executable, LAB, "setup"], check=False, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()


def test_arguments_output_and_status_pass_unharmed() -> None:
    every_byte = os.fsdecode(bytes(range(1, 256)))
    odd = ["", " two  spaces ", 'it\'s "quoted"', "line\nbreak", "$HOME `id` \\ *", "naïve ✓"]
    script = r"""printf '%s\0' "$@"; printf '\000\r\n\377'; printf 'err\r\n' >/dev/stderr; exit 7"""
    done = lab("run", "--", "/bin/sh", "-c", script, "sh", *odd, every_byte)
    expected = b"".join(os.fsencode(text) + b"\0" for text in (*odd, every_byte))
    assert done.stdout == expected + b"\0\r\n\xff"
    said, _, passed = done.stderr.rpartition(b"cpus)\n")
    assert said.startswith(b"lab: booting ")
    assert passed == b"err\r\n"
    assert done.returncode == 7


@pytest.mark.full
def test_much_output_arrives_whole_even_from_what_the_command_left_behind() -> None:
    script = "seq 1 300000; seq 1 50000 >&2; sleep 1000 & exit 0"
    done = lab("run", "--", "/bin/sh", "-c", script)
    assert done.returncode == 0
    assert done.stdout == b"".join(b"%d\n" % number for number in range(1, 300001))
    assert done.stderr.endswith(b"".join(b"%d\n" % number for number in range(1, 50001)))


@pytest.mark.parametrize("kernel", ["lts", "new"])
def test_every_kernel_has_the_driver_and_the_asked_cpus(kernel: str) -> None:
    script = (
        "nproc; modprobe ublk_drv && test -c /dev/ublk-control && echo there;"
        "modprobe -r ublk_drv && test ! -e /dev/ublk-control && echo gone;"
        "modprobe -a loop ext4 xfs null_blk brd && test -b /dev/ram0 && echo others"
    )
    done = lab("run", "--kernel", kernel, "--cpus", "4", "--", "/bin/sh", "-c", script)
    assert done.stdout.split() == [b"4", b"there", b"gone", b"others"], done.stderr.decode()
    assert done.returncode == 0


@pytest.mark.parametrize("kernel", [pytest.param("lts", marks=pytest.mark.full), "new"])
def test_systemd_can_be_process_1_and_the_command_is_its_service(kernel: str) -> None:
    script = (
        "cat /proc/1/comm; cat /proc/self/cgroup; stat -f -c %T /sys/fs/cgroup; hostname;"
        "for try in $(seq 200); do state=$(systemctl is-system-running) && break; sleep 1;"
        "done; echo $state; systemctl is-active systemd-journald dbus;"
        "systemctl is-active systemd-udevd systemd-logind;"
        "busctl --system call org.freedesktop.DBus / org.freedesktop.DBus NameHasOwner s "
        "org.freedesktop.systemd1; echo ${INVOCATION_ID-unset} ${KEPT-unset};"
        # Left to itself, systemd would start it again and again while the guest ends.
        "systemd-run --quiet --unit=left -p Restart=always -p RestartSec=0 sleep 1000;"
        "systemctl show -P MainPID left | grep -cvx 0; sleep 1000 & printf '\\377' >&2; exit 7"
    )
    arguments = ("run", "--init", "systemd", "--kernel", kernel, "--", "/bin/sh", "-c", script)
    done = lab(*arguments, environment={"KEPT": "kept"})
    assert done.stdout.decode().splitlines() == [
        *("systemd", "0::/system.slice/lab.service", "cgroup2fs", "ublkwatch-lab", "running"),
        *("active", "active", "inactive", "inactive", "b true", "unset kept", "1"),
    ], done.stderr.decode(errors="replace")
    assert done.stderr.endswith(b"cpus)\n\xff")
    assert done.returncode == 7


@pytest.mark.full
def test_a_command_under_systemd_that_takes_too_long_is_killed() -> None:
    script = "echo up; sleep 1000"
    done = lab("run", "--init", "systemd", "--timeout", "30", "--", "/bin/sh", "-c", script)
    assert done.returncode == 124
    assert done.stdout == b"up\n"
    assert b"still running after 30 s" in done.stderr


@pytest.mark.full
def test_a_guest_may_be_shut_down_as_a_machine_is(tmp_path: Path) -> None:
    """What its units do then is done, and the command's status is the lab's."""
    keep = f"ExecStop=/bin/sh -c 'echo stopped >{tmp_path}/kept'"
    script = f'systemd-run -q -p RemainAfterExit=yes -p "{keep}" true; echo up; exit 7'
    arguments = ("run", "--init", "systemd", "--shutdown", "--rw", str(tmp_path))
    done = lab(*arguments, "--", "/bin/sh", "-c", script)
    assert done.returncode == 7, done.stderr.decode()
    assert done.stdout == b"up\n"
    assert (tmp_path / "kept").read_text() == "stopped\n"


@pytest.mark.full
def test_a_guest_that_dies_while_it_is_shut_down_is_no_success() -> None:
    crash = "ExecStop=/bin/sh -c 'echo c >/proc/sysrq-trigger'"
    script = f'systemd-run -q -p RemainAfterExit=yes -p "{crash}" true'
    done = lab("run", "--init", "systemd", "--shutdown", "--", "/bin/sh", "-c", script)
    assert done.returncode == 125
    assert b"the guest was to shut down, and died in it" in done.stderr


@pytest.mark.full
def test_the_root_may_be_another_one(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    shutil.copy(cache_directory() / "busybox", tmp_path / "usr/bin/env")
    (tmp_path / "here").write_text("another root\n")
    command = ("/run/lab/busybox", "cat", "/here")
    done = lab("run", "--root", str(tmp_path), "--", *command, cwd=Path("/"))
    assert done.stdout == b"another root\n", done.stderr.decode()


@pytest.mark.full
def test_a_guest_may_have_a_disk(tmp_path: Path) -> None:
    image = tmp_path / "a disk, with a comma"
    image.write_bytes(b"before".ljust(1 << 20, b"\0"))
    script = (
        "modprobe virtio_blk; until [ -b /dev/vda ]; do sleep 0.1; done;"
        "dd if=/dev/vda bs=6 count=1;"
        "echo after | dd of=/dev/vda conv=fsync"
    )
    done = lab("run", "--disk", str(image), "--", "/bin/sh", "-c", script)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"before"
    assert image.read_bytes()[:6] == b"after\n"


def test_a_guest_writes_what_it_was_given_and_nothing_else(tmp_path: Path) -> None:
    given, kept = tmp_path / "given it's", tmp_path / "kept"
    given.mkdir()
    kept.mkdir()
    (kept / "old").write_text("old")
    # The command's death by a signal is told as a shell tells it.
    script = (
        'echo new >old && echo new >"$GIVEN/new" && cp old "$GIVEN/copy" && rm -f /etc/passwd &&'
        "echo leak >/lab-leak && cat /lab-leak && pwd && kill -KILL $$"
    )
    arguments = ("run", "--rw", str(given), "--", "/bin/sh", "-c", script)
    done = lab(*arguments, cwd=kept, environment={"GIVEN": str(given)})
    assert done.stdout.decode().split() == ["leak", str(kept)], done.stderr.decode()
    assert done.returncode == 128 + signal.SIGKILL
    assert (given / "new").read_text() == (given / "copy").read_text() == "new\n"
    assert (kept / "old").read_text() == "old"
    assert Path("/etc/passwd").is_file()
    assert not Path("/lab-leak").exists()


@pytest.mark.full
def test_the_guest_keeps_bytecode_whatever_the_caller_does() -> None:
    script = "echo ${PYTHONDONTWRITEBYTECODE-unset} ${KEPT-unset}"
    environment = {"PYTHONDONTWRITEBYTECODE": "1", "KEPT": "kept"}
    done = lab("run", "--", "/bin/sh", "-c", script, environment=environment)
    assert done.stdout.split() == [b"unset", b"kept"], done.stderr.decode()


@pytest.mark.full
def test_a_command_that_takes_too_long_is_killed() -> None:
    done = lab("run", "--timeout", "15.5", "--", "/bin/sh", "-c", "echo up; sleep 1000")
    assert done.returncode == 124
    assert done.stdout == b"up\n"
    assert b"still running after 15.5 s" in done.stderr


def test_a_panic_under_the_command_is_told_and_not_retried(tmp_path: Path) -> None:
    console = tmp_path / "console"
    crash = "echo up; sleep 3; echo c >/proc/sysrq-trigger; sleep 1000"
    done = lab("run", "--console", str(console), "--", "/bin/sh", "-c", crash)
    assert done.returncode == 125
    # Once: a boot before it may have failed, and been tried again.
    assert done.stdout == b"up\n"
    assert b"Kernel panic" in done.stderr
    assert b"Kernel panic" in console.read_bytes()


@pytest.mark.full
def test_a_guest_that_never_starts_the_command_is_booted_three_times() -> None:
    done = lab("run", "--memory", "none", "--", "/bin/true")
    assert done.returncode == 125
    assert done.stderr.count(b"lab: booting") == 3


@pytest.mark.full
def test_qemu_does_not_outlive_the_script() -> None:
    command = [sys.executable, str(LAB), "run", "--", "/bin/sh", "-c", "echo up; sleep 1000"]
    script = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert script.stdout is not None
    with script, script.stdout:
        assert script.stdout.readline() == b"up\n"
        children = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
        assert len(children) == 1
        qemu = os.pidfd_open(int(children[0]))
        try:
            script.kill()
            assert select.select([qemu], [], [], PATIENCE)[0]
        finally:
            os.close(qemu)


def test_what_is_missing_is_named_with_the_command_that_brings_it(tmp_path: Path) -> None:
    done = lab("run", "--", "/bin/true", environment={"UBLKWATCH_LAB_CACHE": str(tmp_path)})
    assert done.returncode == 125
    assert b"lab.py setup --kernel lts" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_headers_are_where_the_verb_says_and_only_setup_fetches_them(tmp_path: Path) -> None:
    done = lab("headers", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert (Path(done.stdout.decode().strip()) / "linux/ublk_cmd.h").is_file()
    done = lab("headers", environment={"UBLKWATCH_LAB_CACHE": str(tmp_path)})
    assert done.returncode == 125
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1
    assert b"lab.py setup" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_kublk_is_where_the_verb_says_and_runs_here_and_in_a_guest() -> None:
    program = lab("kublk").stdout.decode().strip()
    here = subprocess.run([program, "help"], capture_output=True, check=False)
    assert b"recover" in here.stdout
    script = 'modprobe ublk_drv && "$0" features && "$0" add -t null -q 2 -r 1 && "$0" del -n 0'
    done = lab("run", "--", "/bin/sh", "-c", script, program)
    assert done.returncode == 0, done.stderr.decode()
    assert b"USER_RECOVERY" in done.stdout
    assert b"state LIVE" in done.stdout


def test_programs_are_where_the_verb_says_and_run_here() -> None:
    for package, *command in (
        ("prometheus", "prometheus", "--version"),
        ("prometheus", "promtool", "--version"),
        ("kubectl", "kubectl", "version", "--client"),
    ):
        directory = Path(lab(package).stdout.decode().strip())
        subprocess.run([directory / command[0], *command[1:]], capture_output=True, check=True)


def test_a_setup_without_a_network_ends_in_one_line_that_says_what_to_repeat(
    tmp_path: Path,
) -> None:
    apt, cache = tmp_path / "apt-get", tmp_path / "cache"
    apt.write_text(
        '#!/bin/sh\ncase "$*" in *--print-uris*)\n'
        "echo \"'http://mirror.invalid/debian/dists/bookworm/InRelease' x 0\"; exit 0;; esac\n"
        "echo 'W: So it goes' >&2\necho 'E: Failed to fetch it' >&2\n"
        "echo 'E: Some index files failed to download.' >&2\nexit 100\n"
    )
    apt.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {"UBLKWATCH_LAB_CACHE": str(cache), "PATH": path}
    done = lab("setup", "--kernel", "new", environment=environment)
    assert done.returncode == 125
    progress, last = done.stderr.decode().splitlines()
    assert progress.startswith("lab: reading package lists of ")
    parts = "busybox, headers, kublk, prometheus, kubectl, kernel new"
    assert last.startswith(f"lab: could not fetch {parts}: ")
    assert "Failed to fetch it" in last
    assert last.endswith("lab.py setup --kernel new")
    assert [path.name for path in cache.iterdir()] == ["lock"]


@pytest.mark.skipif(Path("/dev/ublk-control").exists(), reason="this host has the driver")
def test_a_host_without_the_driver_says_so() -> None:
    done = lab("run", "--host", "--", "/bin/true")
    assert done.returncode == 125
    assert b"modprobe ublk_drv" in done.stderr


@pytest.mark.parametrize(("aged_s", "hasty"), [(2.0, False), (20.0, True)])
def test_a_guest_whose_clock_runs_too_fast_is_not_let_go(aged_s: float, *, hasty: bool) -> None:
    """A kernel that was disturbed while it calibrated its clock: its two seconds are soon over."""
    said: list[bytes] = []
    now = 100.0
    guest = Guest(90.0, 90.0, None, lambda: now)
    guest.answer = said.append
    guest.obey("tick 8.25")
    now += 2.0
    guest.obey(f"tock {8.25 + aged_s}")
    assert (guest.finished, guest.outcome.hasty) == (hasty, hasty)
    assert said == ([] if hasty else [b"go\n"])
    assert guest.outcome.stage is Stage.BOOTING
