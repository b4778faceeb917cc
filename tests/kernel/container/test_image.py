r"""The image under podman, with the real driver: what it can do there, and what it says it lacks.

After `make image`: lab/lab.py run --kernel new --init systemd --timeout 1800 -- \
    .venv/bin/python -m pytest tests/kernel/container
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from supervisor import DEADLINE_S, SERVER, Supervisor

from ublkwatch import __version__
from ublkwatch.transient import SLICE

if TYPE_CHECKING:
    from conftest import Servers

TOP = Path(__file__).parents[3]
ARCHIVE = TOP / f"build/ublkwatch-{__version__}.oci.tar"
IMAGE = f"localhost/ublkwatch:{__version__}"
UNPRIVILEGED = TOP / "deploy/kubernetes/unprivileged"
LOAD_S = 600.0  # emulated, it takes a minute and a half
RUN_S = 300.0  # emulated, and on a disk in memory, 20 s
SYSTEMD = ("--volume=/run/dbus:/run/dbus:ro", "--volume=/run/systemd/system:/run/systemd/system:ro")
HOST = ("--pid=host", *SYSTEMD)

# An emulated guest has no time for a second one.
pytestmark = pytest.mark.timeout(1800)


def capabilities() -> list[str]:
    """Return those of the overlay without privileges."""
    overlay = yaml.safe_load((UNPRIVILEGED / "daemonset.yaml").read_text())
    (container,) = overlay["spec"]["template"]["spec"]["containers"]
    found: list[str] = container["securityContext"]["capabilities"]["add"]
    return found


PRIVILEGED = ("--privileged", "--volume=/dev:/dev", *HOST)
EXACT = (
    *("--cap-drop=all", f"--cap-add={','.join(capabilities())}", "--device=/dev/ublk-control"),
    *("--read-only", f"--security-opt=seccomp={UNPRIVILEGED / 'seccomp.json'}", *HOST),
)


class Podman:
    """podman, with storage of its own in memory."""

    def __init__(self, home: Path) -> None:
        self._options = (
            *("--root", str(home / "storage"), "--runroot", str(home / "run")),
            *("--storage-driver=vfs", "--cgroup-manager=cgroupfs", "--events-backend=none"),
        )

    def command(self, *arguments: str) -> tuple[str, ...]:
        return ("podman", *self._options, *arguments)

    def run(self, *options: str) -> tuple[str, ...]:
        return self.command("run", "--rm", "--network=none", *options, IMAGE)

    def __call__(self, *arguments: str, timeout_s: float = RUN_S) -> str:
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    if not ARCHIVE.exists():
        pytest.fail(f"{ARCHIVE} is not there: make image")
    found = Podman(tmp_path_factory.mktemp("podman"))
    found("load", "--quiet", "--input", str(ARCHIVE), timeout_s=LOAD_S)
    return found


# --- what is missing is said ---------------------------------------------------------------------

WITHOUT_CAPABILITIES = ("--cap-drop=all", *(each for each in EXACT if "--cap" not in each))
RUNTIME = "--volume=/run/ublkwatch:/run/ublkwatch"
STATE = "--tmpfs=/var/lib/ublkwatch"


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (
            (),
            {
                "node": "is missing, though the driver is loaded",
                "capability": "no CAP_SYS_ADMIN",
                "io_uring": "by a seccomp filter",
                "pid namespace": "not the host's",
            },
        ),
        (
            ("--cap-add=SYS_ADMIN,SYS_PTRACE", "--pid=host"),
            {
                "node": "is missing, though the driver is loaded",
                "io_uring": "by a seccomp filter",
                "launcher": "systemd is process 1, and not to be seen",
            },
        ),
        (("--privileged",), {"pid namespace": "not the host's"}),
        (
            (*WITHOUT_CAPABILITIES, RUNTIME, STATE),
            {"capability": "no CAP_SYS_ADMIN", "directories": "nobody can judge"},
        ),
        (PRIVILEGED, {"directories": "/run/ublkwatch is another one for servers"}),
        ((*PRIVILEGED, RUNTIME), {}),
        ((*EXACT, RUNTIME, STATE), {}),
    ],
)
def test_the_doctor_says_what_a_container_lacks(
    podman: Podman, options: tuple[str, ...], missing: dict[str, str]
) -> None:
    Path("/run/ublkwatch").mkdir(exist_ok=True)
    command = [*podman.run(*options), "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)["findings"]
    bad = {each["about"]: each["what"] for each in found if each["level"] == "bad"}
    assert bad.pop("daemon") == "ublkwatch is not running: no crash is recovered"
    assert bad.keys() == missing.keys() - {"launcher"}, bad
    said = {each["about"]: each["what"] for each in found if each["level"] == "warn"} | bad
    for about, what in missing.items():
        assert what in said[about]


# --- recovery ------------------------------------------------------------------------------------


class Pod(Supervisor):
    """`ublkwatch run` in a container."""

    def __init__(self, podman: Podman, home: Path, options: tuple[str, ...]) -> None:
        command = [*SERVER, "--target", "null", "--run-dir="]
        super().__init__(home, {0: command}, top='launcher = "systemd"')
        self._podman, self._options = podman, (*options, f"--volume={home}:{home}")
        self._starts = 0

    def start(self) -> Pod:
        self._starts += 1
        name = f"--name=ublkwatch-{self._starts}"
        self.command = (*self._podman.run(name, *self._options), "run", "--config")
        super().start()
        return self

    def status(self) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError):
            document: dict[str, Any] = json.loads((self.home / "run/status.json").read_text())
            if "run" in cmdline(document["supervisor_pid"]):
                return document
        return {"devices": []}

    def kill(self) -> None:
        """SIGKILL to all that is in the container, as when a pod is ended by force."""
        if self.proc is not None:
            if self.proc.poll() is None:
                self._podman("kill", f"ublkwatch-{self._starts}")
            self.proc.wait(DEADLINE_S)
            self.proc = None


def cmdline(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return []


@pytest.fixture
def pods() -> Iterator[Callable[[Pod], Pod]]:
    started: list[Pod] = []

    def start(pod: Pod) -> Pod:
        started.append(pod)
        return pod.start()

    yield start
    for pod in started:
        pod.kill()
    for group in Path("/sys/fs/cgroup").glob(f"{SLICE}/ublkwatch-*"):
        (group / "cgroup.kill").write_text("1")


@pytest.mark.parametrize("options", [PRIVILEGED, EXACT], ids=["privileged", "exact"])
def test_servers_are_recovered_and_outlive_the_pod(
    podman: Podman,
    server: Servers,
    pods: Callable[[Pod], Pod],
    tmp_path: Path,
    options: tuple[str, ...],
) -> None:
    reference = server()
    pod = pods(Pod(podman, tmp_path, options))
    pod.watching()
    reference.kill()
    after = pod.until("recovered", phase="watching", state="LIVE", recoveries=1)
    pid = after["server_pid"]
    assert f"/{SLICE}/" in Path(f"/proc/{pid}/cgroup").read_text()
    assert os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/1/ns/mnt")  # noqa: PTH115

    pod.kill()
    assert cmdline(pid), "a pod's end by force ends no server"
    pod.start()
    assert pod.watching()["server_pid"] == pid
    pod.stop()
    assert cmdline(pid), "nor does a pod's end in order"
    pod.start()
    before = pod.kill_server()
    after = pod.recovered(before)
    assert after["server_pid"] != pid
