r"""The image under podman, run as the DaemonSet says, with the real driver and the host's systemd.

After `make image`: lab/lab.py run --kernel new --init systemd --timeout 1800 -- \
    .venv/bin/python -m pytest tests/kernel/container

What podman is told comes from deploy/kubernetes, by pod.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import wait_until
from kubelet import Podman, Running, network
from pod import Node, Pod
from supervisor import DEADLINE_S, SERVER, Supervisor

from ublkwatch import __version__
from ublkwatch.transient import SLICE

if TYPE_CHECKING:
    from conftest import Load, Servers

TOP = Path(__file__).parents[3]
ARCHIVE = TOP / f"build/ublkwatch-{__version__}.oci.tar"
CONFIG = Path("ublkwatch/ublkwatch.toml")
RUNTIME, STATE = Path("/run/ublkwatch"), Path("/var/lib/ublkwatch")
LOAD_S = 600.0  # emulated, it takes a minute and a half
RUN_S = 300.0
ELSEWHERE, LOCKED = 73, "another ublkwatch runs on this host"

# An emulated guest has no time for a second one.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    if not ARCHIVE.exists():
        pytest.fail(f"{ARCHIVE} is not there: make image")
    found = Podman(tmp_path_factory.mktemp("podman"))
    found("load", "--quiet", "--input", str(ARCHIVE), timeout_s=LOAD_S)
    return found


@pytest.fixture(scope="session", autouse=True)
def pod_network() -> Iterator[None]:
    with network():
        yield


# --- what is missing is said ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlay", "without", "instead", "missing"),
    [
        ("base", ("--pid=",), (), {"pid namespace": "not the host's"}),
        (
            "base",
            ("--volume=/run/",),
            ("--tmpfs=/run/ublkwatch",),
            {"launcher": "systemd is process 1, and not to be seen"},
        ),
        (
            "base",
            ("--volume=/run/ublkwatch:",),
            ("--tmpfs=/run/ublkwatch",),
            {"directories": "/run/ublkwatch is another one for servers"},
        ),
        (
            "unprivileged",
            ("--device=", "--security-opt=seccomp="),
            (),
            {
                "node": "is missing, though the driver is loaded",
                "io_uring": "by a seccomp filter",
            },
        ),
        (
            "unprivileged",
            ("--cap-add=", "--security-opt=seccomp="),
            ("--security-opt=seccomp=unconfined",),
            {"capability": "no CAP_SYS_ADMIN", "directories": "nobody can judge"},
        ),
    ],
    ids=["pids", "systemd", "runtime", "device-seccomp", "capabilities"],
)
def test_the_doctor_says_what_a_pod_lacks(
    podman: Podman,
    tmp_path: Path,
    *,
    overlay: str,
    without: tuple[str, ...],
    instead: tuple[str, ...],
    missing: dict[str, str],
) -> None:
    pod = Pod.of(overlay)
    *options, image, verb = Node(pod, tmp_path).options(pod.container)
    assert verb == "run"
    kept = [each for each in options if not each.startswith(without)]
    assert len(kept) < len(options)
    command = podman.command(
        *("run", "--rm", "--network=none", *kept, *instead, image), "doctor", "--json"
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)["findings"]
    bad = {each["about"]: each["what"] for each in found if each["level"] == "bad"}
    assert bad.pop("daemon") == "ublkwatch is not running: no crash is recovered"
    assert bad.keys() == missing.keys(), bad
    for about, what in missing.items():
        assert what in bad[about]


# --- what becomes of servers, and of I/O ---------------------------------------------------------


class Gate:
    """A program of the host's that starts the server; while it is shut, no server comes up."""

    def __init__(self, directory: Path) -> None:
        self._shut, self._waits = directory / "shut", directory / "waits"
        self.program = directory / "gate"
        wait = f"[ -p {self._shut} ] && {{ echo $$ >{self._waits}; read -r go <{self._shut}; }}"
        self.program.write_text(f'#!/bin/sh\n{wait}\nexec "$@"\n')
        self.program.chmod(0o755)

    def shut(self) -> None:
        os.mkfifo(self._shut)

    def open(self) -> None:
        """Let the server go that waits; it must be there."""
        fifo = os.open(self._shut, os.O_WRONLY | os.O_NONBLOCK)
        self._shut.unlink()
        os.write(fifo, b"go\n")
        os.close(fifo)

    def waits(self) -> int:
        """Return the pid of the server that waits before it, once there is one; else 0."""
        return int(self._waits.read_text() or 0) if self._waits.exists() else 0


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def configured(pod: Pod, directory: Path, command: list[str]) -> Pod:
    """Return the pod with that command for device 0, in a configuration of its own."""
    (base,) = pod.config_maps["ublkwatch"].values()
    path = directory / base.name
    device = f"[[device]]\ndev_id = 0\ncommand = {json.dumps(command)}\n"
    recovery = "[recovery]\nprobation_s = 0.3\n"
    for key in ("ready", "attach"):  # emulated, and behind a gate
        recovery += f"{key}_timeout_s = 1200\n"
    path.write_text(f"{base.read_text()}\n{recovery}{device}")
    return replace(pod, config_maps={**pod.config_maps, "ublkwatch": {path.name: path}})


@pytest.fixture(params=["base", "unprivileged"])
def pod(
    request: pytest.FixtureRequest, podman: Podman, server: Servers, gate: Gate, tmp_path: Path
) -> Iterator[Running]:
    command = [str(gate.program), *SERVER, *server.target("loop")]
    running = Running(podman, configured(Pod.of(request.param), tmp_path, command), tmp_path)
    yield running
    running.end()
    for group in Path("/sys/fs/cgroup").glob(f"{SLICE}/ublkwatch-*"):
        (group / "cgroup.kill").write_text("1")
    for directory in (RUNTIME, STATE):
        subprocess.run(["find", directory, "-mindepth", "1", "-delete"], check=True)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/exe").exists()


def test_servers_and_io_outlive_the_pod(
    pod: Running,
    server: Servers,
    gate: Gate,
    fio: Load,
    no_block_errors: None,  # noqa: ARG001
) -> None:
    reference = server(target="loop")
    pod.start()
    pod.watching()
    assert pod.well("startup")
    wait_until(lambda: pod.well("readiness"), DEADLINE_S, "the pod is ready")
    assert pod.well("liveness")
    found = json.loads(pod.exec("ublkwatch", "doctor", "--json"))["findings"]
    assert [each for each in found if each["level"] == "bad"] == []

    load = fio(verify_backlog=64, time_based=1, runtime=3600, rate_iops=100)
    load.wait_progress()
    reference.kill()
    first = pod.until("recovered", phase="watching", state="LIVE", recoveries=1)["server_pid"]
    assert f"/{SLICE}/" in Path(f"/proc/{first}/cgroup").read_text()
    assert os.readlink(f"/proc/{first}/ns/mnt") == os.readlink("/proc/1/ns/mnt")  # noqa: PTH115

    # A roll: in order, in time, and no request waits for it.
    assert pod.stop() == 0, pod.said()
    assert alive(first)
    load.wait_progress()
    pod.start()
    now = pod.watching()
    assert (now["server_pid"], now["recoveries"]) == (first, 1)
    load.wait_progress()

    # An eviction that leaves no time; a crash meanwhile waits for the next pod.
    pod.stop(grace_s=1)
    assert alive(first)
    os.kill(first, signal.SIGKILL)
    pod.start()
    second = pod.until("recovered", phase="watching", state="LIVE", recoveries=2)["server_pid"]
    load.wait_progress()

    # The pod is killed amid a recovery: the next one goes on, with the server that was started.
    gate.shut()
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: bool(gate.waits()), DEADLINE_S, "the new server is started")
    third = gate.waits()
    pod.die()
    assert alive(third)
    pod.start()
    wait_until(lambda: pod.device() is not None, DEADLINE_S, "the next pod has looked")
    gate.open()
    now = pod.until("recovered", phase="watching", state="LIVE", recoveries=3)
    assert now["server_pid"] == third, pod.said()
    load.wait_progress()
    load.interrupt()
    load.report()

    (device,) = json.loads(pod.exec("ublkwatch", "status", "-o", "json"))["devices"]
    assert (device["dev_id"], device["phase"], device["recoveries"]) == (0, "watching", 3)

    def kept() -> int:
        history = json.loads(pod.exec("ublkwatch", "history", "--json"))["history"]
        return sum(entry["kind"] == "recovery" for entry in history)

    wait_until(lambda: kept() == 3, DEADLINE_S, "the history is that of all pods: the node's")


# --- one node has one ----------------------------------------------------------------------------


def test_a_second_one_on_the_node_is_refused(
    pod: Running,
    podman: Podman,
    tmp_path: Path,
    server: Servers,
    watch: Callable[..., Supervisor],
) -> None:
    server(target="loop")
    hosts = watch({})
    wait_until(lambda: hosts.device() is not None, DEADLINE_S, "the host's own has looked")
    pod.start()
    assert pod.wait() == ELSEWHERE, pod.said()
    assert LOCKED in pod.said()
    hosts.stop()

    pod.start()
    pod.watching()
    hosts.start()
    assert hosts.wait() == ELSEWHERE
    assert hosts.said().count(LOCKED) == 1
    other = Running(podman, pod.pod, tmp_path / "other")
    (tmp_path / "other").mkdir()
    assert other.start().wait() == ELSEWHERE
    assert "/run/ublkwatch/lock is held" in other.said()
    pod.watching()
