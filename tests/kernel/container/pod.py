"""The pod of deploy/kubernetes, as options of podman's: what a kubelet and a runtime make of it.

So what is tried is what the manifests say. Fields that are not understood here are errors: no line
of theirs goes untried unnoticed. `make manifests` compares the merging with kustomize's own.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).parents[3] / "deploy/kubernetes"
KUBELET = Path("/var/lib/kubelet")
# By which lists of objects are merged: x-kubernetes-patch-merge-key in Kubernetes' own schema.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
    "volumes": "name",
}
# What a scheduler, an API server or an operator of the cluster goes by, and no runtime.
NOT_HERE = {
    *("serviceAccountName", "automountServiceAccountToken", "enableServiceLinks", "nodeSelector"),
    *("tolerations", "terminationGracePeriodSeconds", "imagePullPolicy", "ports"),
    *("startupProbe", "livenessProbe", "readinessProbe", "terminationMessagePolicy", "name"),
}
OOM_SCORES = {"system-node-critical": -997}  # kubelet's, for the pods of that priority
SIZES = {"Mi": 1 << 20, "Gi": 1 << 30}
# What the node's device plugin answers for its resource; its name is the cluster's own.
DEVICES = {"example.com/ublk-control": "/dev/ublk-control:/dev/ublk-control:rw"}


def merged(base: Any, patch: Any, key: str = "") -> Any:
    """Return ``base`` with a strategic merge patch; ``key`` is what both are the values of."""
    if isinstance(base, dict) and isinstance(patch, dict):
        both = {name: merged(base[name], patch[name], name) for name in base.keys() & patch.keys()}
        return {**base, **patch, **both}
    if isinstance(base, list) and key in MERGE_KEYS:
        name = MERGE_KEYS[key]
        changes = {each[name]: each for each in patch}
        kept = [merged(each, changes.pop(each[name], {})) for each in base]
        new = [*changes.values(), *kept]
        return [each for each in new if each.get("$patch") != "delete"]
    return patch


@dataclass(frozen=True)
class Pod:
    """A pod's specification, and the files of its ConfigMaps by their names."""

    spec: dict[str, Any]
    config_maps: dict[str, dict[str, Path]]

    @classmethod
    def of(cls, overlay: str) -> Pod:
        """Read it, as `kubectl kustomize` would."""
        spec: dict[str, Any] = {}
        config_maps: dict[str, dict[str, Path]] = {}
        for directory in dict.fromkeys((KUBERNETES / "base", KUBERNETES / overlay)):
            kustomization = yaml.safe_load((directory / "kustomization.yaml").read_text())
            if (path := directory / "daemonset.yaml").exists():
                daemonset = yaml.safe_load(path.read_text())
                spec = merged(spec, daemonset["spec"]["template"]["spec"])
            for generator in kustomization.get("configMapGenerator", ()):
                files = [file.rpartition("=") for file in generator["files"]]
                config_maps[generator["name"]] = {
                    key or name: directory / name for key, _, name in files
                }
        return cls(spec, config_maps)

    @property
    def container(self) -> dict[str, Any]:
        """The only container that goes on."""
        (found,) = self.spec["containers"]
        return dict(found)

    @property
    def grace_s(self) -> int:
        """How long a kubelet waits between SIGTERM and SIGKILL."""
        return int(self.spec["terminationGracePeriodSeconds"])

    def port(self, probe: dict[str, Any]) -> int:
        """Return the number of the port that a probe asks."""
        (found,) = (
            each["containerPort"]
            for each in self.container["ports"]
            if each["name"] == probe["httpGet"]["port"]
        )
        return int(found)


class Node:
    """What a kubelet keeps for a pod on its node, below ``home``, and tells the runtime."""

    def __init__(self, pod: Pod, home: Path) -> None:
        self.pod = pod
        self._home = home
        self.termination_log = home / "termination-log"
        self._volumes = {each["name"]: self._volume(each) for each in pod.spec["volumes"]}

    def options(self, container: dict[str, Any]) -> list[str]:
        """Return what follows `podman run`: options, image, arguments."""
        known = {"securityContext", "resources", "volumeMounts", "terminationMessagePath"}
        known |= {"image", "command", "args", "env"}
        _only(container, known | NOT_HERE)
        options = ["--pull=never", *self._of_the_pod(), *_security(container["securityContext"])]
        options += _resources(container["resources"])
        options += [f"--env={each['name']}={each['value']}" for each in container.get("env", ())]
        options += [f"--volume={self._mount(each)}" for each in container["volumeMounts"]]
        if path := container.get("terminationMessagePath"):
            self.termination_log.write_text("")
            options.append(f"--volume={self.termination_log}:{path}")
        if command := container.get("command"):
            options.append(f"--entrypoint={json.dumps(command)}")
        return [*options, container["image"], *container.get("args", ())]

    def _of_the_pod(self) -> list[str]:
        known = {"containers", "initContainers", "volumes", "hostPID", "priorityClassName"}
        _only(self.pod.spec, known | NOT_HERE)
        options = [f"--oom-score-adj={OOM_SCORES[self.pod.spec['priorityClassName']]}"]
        if self.pod.spec.get("hostPID"):
            options.append("--pid=host")
        return options

    def _mount(self, mount: dict[str, Any]) -> str:
        _only(mount, {"name", "mountPath", "subPath", "readOnly"})
        source = self._volumes[mount["name"]]
        if "subPath" in mount:
            source = (source / mount["subPath"]).resolve(strict=True)
        return f"{source}:{mount['mountPath']}:{'ro' if mount.get('readOnly') else 'rw'}"

    def _volume(self, volume: dict[str, Any]) -> Path:
        _only(volume, {"name", "hostPath", "configMap"})
        if "configMap" in volume:
            return self._config_map(volume["name"], volume["configMap"])
        _only(volume["hostPath"], {"path", "type"})
        path = Path(volume["hostPath"]["path"])
        if volume["hostPath"]["type"] == "DirectoryOrCreate":
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
        else:
            assert volume["hostPath"]["type"] == "Directory"
            assert path.is_dir(), f"{path} is missing: the pod would not be started"
        return path

    def _config_map(self, name: str, source: dict[str, Any]) -> Path:
        """Lay it out as a kubelet does: links over a directory that an update exchanges."""
        _only(source, {"name", "defaultMode"})
        volume = self._home / "volumes" / name
        shutil.rmtree(volume, ignore_errors=True)
        (volume / "..1").mkdir(parents=True)
        volume.chmod(0o777)  # and sticky it is not
        (volume / "..data").symlink_to("..1")
        for key, path in self.pod.config_maps[source["name"]].items():
            (volume / "..1" / key).write_bytes(path.read_bytes())
            (volume / "..1" / key).chmod(source.get("defaultMode", 0o644))
            (volume / key).symlink_to(f"..data/{key}")
        return volume


def _only(found: dict[str, Any], known: set[str]) -> None:
    assert found.keys() <= known, f"not understood here: {sorted(found.keys() - known)}"


def _security(context: dict[str, Any]) -> list[str]:
    known = {"privileged", "readOnlyRootFilesystem", "runAsUser", "allowPrivilegeEscalation"}
    _only(context, known | {"capabilities", "seccompProfile", "appArmorProfile", "seLinuxOptions"})
    options = [f"--user={context['runAsUser']}"]
    if context.get("readOnlyRootFilesystem"):  # of a file system in memory nobody has spoken
        options += ["--read-only", "--read-only-tmpfs=false"]
    if context.get("privileged"):
        return [*options, "--privileged"]
    if not context.get("allowPrivilegeEscalation", True):
        options.append("--security-opt=no-new-privileges")
    for verb in ("drop", "add"):
        options += [f"--cap-{verb}={name}" for name in context["capabilities"].get(verb, ())]
    return [*options, *(f"--security-opt={each}" for each in _profiles(context))]


def _profiles(context: dict[str, Any]) -> list[str]:
    found = []
    match context.get("seccompProfile", {"type": "Unconfined"}):
        case {"type": "Unconfined"}:
            found.append("seccomp=unconfined")
        case {"type": "Localhost", "localhostProfile": str(path)}:
            found.append(f"seccomp={KUBELET / 'seccomp' / path}")
        case other:
            assert other == {"type": "RuntimeDefault"}
    if "appArmorProfile" in context:
        assert context["appArmorProfile"] == {"type": "Unconfined"}
        found.append("apparmor=unconfined")
    for key, value in context.get("seLinuxOptions", {}).items():
        found.append(f"label={key}:{value}")
    return found


def _resources(resources: dict[str, Any]) -> list[str]:
    _only(resources, {"requests", "limits"})
    limits, requests = resources["limits"], resources["requests"]
    _only(limits, {"memory", *DEVICES})
    _only(requests, {"cpu", "memory", *DEVICES})
    memory = int(limits["memory"][:-2]) * SIZES[limits["memory"][-2:]]
    shares = int(requests["cpu"].removesuffix("m")) * 1024 // 1000
    options = [f"--memory={memory}", f"--memory-swap={memory}", f"--cpu-shares={shares}"]
    return [*options, *(f"--device={DEVICES[name]}" for name in limits if name in DEVICES)]
