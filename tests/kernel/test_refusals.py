"""Where ublkwatch cannot run it says so: one line, the way out, and an exit code of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE_S, unload_driver
from supervisor import UBLKWATCH

from ublkwatch.verbs import Exit

IO_URING = Path("/proc/sys/kernel/io_uring_disabled")
NO_ADMIN = ("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin")


def run(config: Path, *before: str) -> tuple[int, str]:
    """Run ublkwatch until it refuses; return its exit code and the line that it said."""
    done = subprocess.run(
        [*before, *UBLKWATCH, "run", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("ublkwatch: ")
    return done.returncode, lines[0]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "ublkwatch.toml"
    path.write_text(f'runtime_dir = "{tmp_path}/run"\nstate_dir = "{tmp_path}/state"\n')
    return path


@pytest.fixture
def io_uring_disabled() -> Iterator[None]:
    before = IO_URING.read_text()
    IO_URING.write_text("2")
    yield
    IO_URING.write_text(before)


@pytest.fixture
def no_driver() -> Iterator[None]:
    unload_driver()
    yield
    subprocess.run(["modprobe", "ublk_drv"], check=True)


def test_a_bad_configuration(config: Path) -> None:
    config.write_text(config.read_text() + "pol_interval_s = 1\n")
    code, line = run(config)
    assert code == Exit.CONFIG
    assert f"{config}: pol_interval_s: unknown key; did you mean 'poll_interval_s'?" in line


def test_a_state_directory_that_cannot_be_written(config: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file in its place")
    code, line = run(config)
    assert code == Exit.STATE
    assert f"{tmp_path}/state" in line
    assert "state_dir" in line


@pytest.mark.usefixtures("no_driver")
def test_no_ublk_control(config: Path) -> None:
    code, line = run(config)
    assert code == Exit.UNAVAILABLE
    assert "/dev/ublk-control: No such file or directory; try: modprobe ublk_drv" in line


def test_no_cap_sys_admin(config: Path) -> None:
    code, line = run(config, *NO_ADMIN)
    assert code == Exit.NO_PERMISSION
    assert "CAP_SYS_ADMIN" in line
    assert "give this container or unit that capability" in line  # it is root already


@pytest.mark.usefixtures("io_uring_disabled")
def test_io_uring_disabled(config: Path) -> None:
    code, line = run(config)
    assert code == Exit.UNAVAILABLE
    assert "sysctl kernel.io_uring_disabled=0" in line


def test_a_second_ublkwatch(config: Path) -> None:
    first = subprocess.Popen([*UBLKWATCH, "run", "--config", str(config)], stderr=subprocess.PIPE)
    try:
        assert first.stderr
        first.stderr.readline()  # it watches, so it has the lock
        code, line = run(config)
        assert code == Exit.STATE
        assert "another ublkwatch runs here" in line
        text = config.read_text().replace("/run", "/other run").replace("/state", "/other state")
        config.write_text(text)
        code, line = run(config)
        assert code == Exit.STATE
        assert "another ublkwatch runs on this host" in line
    finally:
        first.kill()
        first.communicate()


def test_status_without_a_daemon_says_so(config: Path) -> None:
    done = subprocess.run(
        [*UBLKWATCH, "status", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == Exit.NOT_RUNNING
    assert "ublkwatch is not running" in done.stderr
