"""What is for containers and Kubernetes agrees with the code; `make manifests` asks the schemas."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import programs
import pytest
import yaml

from ublkwatch import __version__, checking, config, doctor, profiles, scrape, settings, uapi
from ublkwatch.finding import Level

TOP = Path(__file__).parent.parent
CONTAINER, KUBERNETES = TOP / "deploy/container", TOP / "deploy/kubernetes"
CONFIG = KUBERNETES / "base/ublkwatch.toml"
MANIFESTS = sorted([*KUBERNETES.rglob("*.yaml"), *(TOP / "deploy/prometheus").glob("k*.yaml")])


def load(path: str) -> Any:
    return yaml.safe_load((KUBERNETES / path).read_text())


@pytest.fixture
def pod() -> Any:
    return load("base/daemonset.yaml")["spec"]["template"]["spec"]


@pytest.fixture
def container(pod: Any) -> Any:
    (found,) = pod["containers"]
    return found


def kustomization(directory: Path) -> list[Path]:
    """Return all files and directories that a kustomization names."""
    content = yaml.safe_load((directory / "kustomization.yaml").read_text())
    names = content.get("resources", []) + content.get("components", [])
    names += [patch["path"] for patch in content.get("patches", [])]
    for generator in content.get("configMapGenerator", []):
        names += [name.rpartition("=")[2] for name in generator["files"]]
    return [directory / name for name in names]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_manifest_is_yaml_and_used(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert {"apiVersion", "kind"} <= content.keys()
    if path.name == "kustomization.yaml":
        for each in kustomization(path.parent):
            assert each.is_file() or (each / "kustomization.yaml").is_file(), each
    else:
        assert path in kustomization(path.parent)


@pytest.mark.parametrize("overlay", ["base", "monitored", "unprivileged"])
def test_kubectl_renders_it(overlay: str) -> None:
    command = [str(programs.kubectl()), "kustomize", str(KUBERNETES / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    kinds = {thing["kind"] for thing in yaml.safe_load_all(done.stdout)}
    assert {"Namespace", "ServiceAccount", "ConfigMap", "DaemonSet", "NetworkPolicy"} <= kinds
    assert ("PodMonitor" in kinds) is (overlay == "monitored")


def test_the_pods_configuration_is_one(tmp_path: Path) -> None:
    path = tmp_path / "ublkwatch.toml"  # the checkout may belong to anybody
    shutil.copy(CONFIG, path)
    assert {each.level for each in checking.check(path)} == {Level.OK}
    example = re.sub(r"^# (?=\[\[|exe|command)", "", CONFIG.read_text(), flags=re.MULTILINE)
    (rule,) = config.parse(example.encode(), "example").rules
    assert rule.match.exe
    assert config.parse(CONFIG.read_bytes(), "pod").launcher == "systemd"


def test_ports_and_probes_are_those_of_the_code(container: Any) -> None:
    (port,) = container["ports"]
    assert port["containerPort"] == settings.METRICS["port"].default
    assert "port" not in tomllib.loads(CONFIG.read_text())["metrics"]
    paths = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness")}
    assert {each["path"] for each in paths.values()} == {"/healthz"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    (endpoint,) = load("monitoring/podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    (rule,) = load("base/networkpolicy.yaml")["spec"]["ingress"]
    named = [endpoint["port"], rule["ports"][0]["port"], *(p["port"] for p in paths.values())]
    assert set(named) == {port["name"]}


def test_the_pods_address_is_one_that_others_reach() -> None:
    address = config.parse(CONFIG.read_bytes(), "pod").metrics["address"]

    async def answered() -> bytes:
        async def well() -> scrape.Reply:
            return scrape.Reply.line(200, "well")

        pages = scrape.Scrapes({"/healthz": well})
        with socket.create_server(("127.0.0.1", 0)) as free:  # one for all families, as in the pod
            port = free.getsockname()[1]
        await pages.start(address, port)
        try:
            # Not loopback's own address, but all of 127/8 is reached only by who listens on all.
            reader, writer = await asyncio.open_connection("127.1.2.3", port)
            writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
            first, *_ = (await asyncio.wait_for(reader.read(), 60)).splitlines()
            writer.close()
            await writer.wait_closed()
            return first
        finally:
            pages.close()

    assert b" 200 " in asyncio.run(answered())


def test_the_pod_has_what_the_code_expects_where_it_expects_it(pod: Any, container: Any) -> None:
    outside = {each["name"]: each.get("hostPath", {}).get("path") for each in pod["volumes"]}
    shared = {
        each["mountPath"]: each.get("readOnly", False)
        for each in container["volumeMounts"]
        if outside[each["name"]] == each["mountPath"]  # the same path inside and outside
    }
    writable = {path for path, read_only in shared.items() if not read_only}
    directories = {settings.TOP[key].default for key in ("runtime_dir", "state_dir")}
    assert directories | {"/dev"} == writable
    assert {"/run/systemd/system", "/run/dbus", str(profiles.RUN_FILES)} == shared.keys() - writable
    (file,) = (each for each in container["volumeMounts"] if each["name"] == "config")
    assert (file["mountPath"], file["subPath"]) == (str(config.DEFAULT_PATH), CONFIG.name)
    assert pod["hostPID"] is True
    assert pod["automountServiceAccountToken"] is False


def test_who_runs_it_by_hand_mounts_what_the_pod_has(pod: Any, container: Any) -> None:
    page = (TOP / "docs/kubernetes.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ +podman run (.+)$", page, re.MULTILINE)
    outside = {each["name"]: each.get("hostPath", {}).get("path") for each in pod["volumes"]}
    mounts = {
        f"{path}:{each['mountPath']}" + ":ro" * each.get("readOnly", False)
        for each in container["volumeMounts"]
        if (path := outside[each["name"]])
    }
    configuration = f"{config.DEFAULT_PATH.parent}:{config.DEFAULT_PATH.parent}:ro"
    assert set(re.findall(r"-v (\S+)", line)) == {*mounts, configuration}
    assert {"--privileged", "--pid=host", f"ublkwatch:{__version__}"} < set(line.split())


def test_images_have_the_version_of_the_project() -> None:
    image = f"ublkwatch:{__version__}"
    for path in ("base/daemonset.yaml", "unprivileged/daemonset.yaml"):
        spec = load(path)["spec"]["template"]["spec"]
        containers = spec["containers"] + spec.get("initContainers", [])
        assert {each["image"] for each in containers if "image" in each} == {image}


def test_the_image_has_all_dependencies_as_new_as_they_must_be() -> None:
    wanted = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["dependencies"]
    text = (CONTAINER / "requirements.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+) \\$", text, re.MULTILINE))
    assert pinned.keys() == {re.split(r"[>=]", each)[0] for each in wanted}
    for each in wanted:
        name, _, floor = each.partition(">=")
        assert _number(pinned[name]) >= _number(floor), name
    for path in CONTAINER.glob("*requirements.txt"):
        pins = re.findall(r"^[\w-]+==.*\n((?: +--hash=.*\n)*)", path.read_text(), re.MULTILINE)
        assert pins
        assert all("--hash=sha256:" in hashes for hashes in pins)


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    text = (CONTAINER / "Containerfile").read_text().replace("\\\n", " ")
    ignored = (CONTAINER / "Containerfile.dockerignore").read_text()
    sources = [
        word
        for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
        for word in line.split()[:-1]
    ]
    assert len(sources) > 3
    for source in sources:
        assert (TOP / source).exists(), source
        assert f"\n!{source}\n" in ignored
    # What the wheel takes from elsewhere: by pyproject.toml, or through a link of the package's.
    wheel = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    needed = [TOP / name for name in wheel["wheel"]["shared-data"]]
    needed += [path.resolve() for path in (TOP / "ublkwatch").rglob("*") if path.is_symlink()]
    assert len(needed) > 3
    for path in needed:
        assert any(path.is_relative_to(TOP / source) for source in sources), path


def test_the_profile_for_seccomp_has_what_is_needed() -> None:
    profile = json.loads((KUBERNETES / "unprivileged/seccomp.json").read_text())
    allowed = {
        name: rule.get("args")
        for rule in profile["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW"
        for name in rule["names"]
    }
    needed = ["pidfd_open", "pidfd_send_signal", "mlockall"]
    needed += [name.removeprefix("SYS_").lower() for name in vars(uapi) if name.startswith("SYS_")]
    assert {name: allowed.get(name, "refused") for name in needed} == dict.fromkeys(needed)
    assert {"io_uring_setup", "io_uring_enter", "io_uring_register"} <= set(needed)
    refused = {
        name
        for rule in profile["syscalls"]
        if rule["action"] == "SCMP_ACT_ERRNO" and "args" not in rule
        for name in rule["names"]
    }
    assert refused.isdisjoint(allowed), "containerd knows no conditions: each call has one answer"
    assert "init_module" not in allowed
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"


def test_the_overlay_without_privileges_has_the_capabilities_that_the_doctor_asks_for() -> None:
    (container,) = load("unprivileged/daemonset.yaml")["spec"]["template"]["spec"]["containers"]
    security = container["securityContext"]
    assert security["capabilities"]["drop"] == ["ALL"]
    added = {f"CAP_{name}" for name in security["capabilities"]["add"]}
    # As other users servers are started by systemd.
    assert doctor.CAPABILITIES.keys() - {"CAP_SETUID"} <= added
    assert security["seccompProfile"]["localhostProfile"] == "profiles/ublkwatch.json"
