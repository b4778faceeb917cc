"""What a kubelet does with the pod of pod.py: starts, probes, stops and kills it, by podman."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pod import Node, Pod
from supervisor import Shown

RUN_S = 300.0  # emulated, and on a disk in memory, it takes some 20 s
NAMESPACE = "ublkwatch-pod"
ADDRESS = "192.0.2.2"  # of documentation's networks


class Podman:
    """podman, with storage of its own in memory."""

    def __init__(self, home: Path) -> None:
        self._options = (
            *("--root", str(home / "storage"), "--runroot", str(home / "run")),
            *("--storage-driver=overlay", "--cgroup-manager=cgroupfs", "--events-backend=none"),
        )

    def command(self, *arguments: str) -> tuple[str, ...]:
        return ("podman", *self._options, *arguments)

    def __call__(self, *arguments: str, timeout_s: float = RUN_S) -> str:
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Make the pod's network, with an address that its node reaches, as a CNI plugin would."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    subprocess.run(["modprobe", "veth"], check=True)
    ip("netns", "add", NAMESPACE)
    try:
        ip("link", "add", "pod", "type", "veth", "peer", "name", "eth0", "netns", NAMESPACE)
        ip("address", "add", "192.0.2.1/24", "dev", "pod")
        ip("link", "set", "pod", "up")
        ip("-n", NAMESPACE, "address", "add", f"{ADDRESS}/24", "dev", "eth0")
        for name in ("eth0", "lo"):
            ip("-n", NAMESPACE, "link", "set", name, "up")
        yield
    finally:
        ip("netns", "delete", NAMESPACE)


class Running(Shown):
    """The pod; start() and what ends it may be repeated: then it is the next one."""

    def __init__(self, podman: Podman, pod: Pod, home: Path) -> None:
        super().__init__(Path("/run/ublkwatch"), home / "pod.log")
        self.pod = pod
        self._podman, self._home = podman, home
        self._starts = 0

    @property
    def _name(self) -> str:
        return f"{self._home.name}-{self._starts}"

    @property
    def _pidfile(self) -> Path:
        return self._home / f"{self._name}.pid"

    def pid(self) -> int | None:
        """Return what the supervisor's pid is on the node, once it has one."""
        with contextlib.suppress(FileNotFoundError):
            return int(self._pidfile.read_text() or 0) or None
        return None

    def start(self) -> Running:
        self._starts += 1
        node = Node(self.pod, self._home)
        for each in self.pod.spec.get("initContainers", ()):
            self._podman("run", "--rm", "--network=none", *node.options(each))
        command = self._podman.command(
            *("run", "--rm", f"--name={self._name}", f"--pidfile={self._pidfile}"),
            *(f"--network=ns:/run/netns/{NAMESPACE}", *node.options(self.pod.container)),
        )
        with self.log.open("ab") as log:
            self.proc = subprocess.Popen(command, stdout=log, stderr=log)
        return self

    def exec(self, *words: str) -> str:
        """`kubectl exec`; it must succeed."""
        return self._podman("exec", self._name, *words)

    def well(self, kind: str) -> bool:
        """Ask as often as the kubelet would before it says that the probe failed."""
        probe: dict[str, Any] = self.pod.container[f"{kind}Probe"]
        for _ in range(probe["failureThreshold"]):
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection(
                    ADDRESS, self.pod.port(probe), timeout=probe["timeoutSeconds"]
                )
                connection.request("GET", probe["httpGet"]["path"])
                if 200 <= connection.getresponse().status < 400:
                    return True
            time.sleep(probe["periodSeconds"])
        return False

    def stop(self, grace_s: int | None = None) -> int:
        """SIGTERM, and SIGKILL when the grace is over: the pod's own, or an eviction's.

        Returns the exit status.
        """
        grace_s = self.pod.grace_s if grace_s is None else grace_s
        self._podman("stop", f"--time={grace_s}", self._name)
        return self.wait()

    def die(self) -> None:
        """SIGKILL, as from the OOM killer; the runtime ends what else is in the container."""
        pid = self.pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        self.wait()

    def end(self) -> None:
        """Make sure that none is left."""
        if self.proc is not None:
            if self.proc.poll() is None:
                self._podman("kill", self._name)
            self.wait()
