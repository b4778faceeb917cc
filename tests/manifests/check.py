"""Holds what deploy/kubernetes renders to against the schemas of Kubernetes and of the operator.

`make manifests`; strictly: a field that does not exist is an error. No API server is asked.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-not-found]
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/kernel/container"))
from pod import Pod

TOP = Path(__file__).parents[2]
OVERLAYS = ("base", "monitored", "unprivileged")
VERSIONS = ("1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
OPERATOR = "monitoring.coreos.com/v1"


def rendered(overlay: str) -> list[dict[str, Any]]:
    """Return the objects of an overlay, as kubectl would send them."""
    command = ["kubectl", "kustomize", str(TOP / "deploy/kubernetes" / overlay)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(yaml.safe_load_all(text))


def problem(thing: dict[str, Any], version: str) -> str:
    """Say what is wrong with an object; "" when nothing is."""
    if thing["apiVersion"] == OPERATOR:
        done = subprocess.run(
            ["node", "check.js"],
            input=json.dumps(thing),
            text=True,
            capture_output=True,
            check=False,
        )
        return done.stderr if done.returncode else ""
    try:
        kubernetes_validate.validate(thing, version, strict=True)
    except Exception as error:  # noqa: BLE001 - it has several, of other libraries too
        return str(error)
    return ""


def tried(overlay: str, things: list[dict[str, Any]]) -> bool:
    """Tell whether tests/kernel/container tries the very pod that kustomize makes."""
    (daemonset,) = (thing for thing in things if thing["kind"] == "DaemonSet")
    spec = daemonset["spec"]["template"]["spec"]
    for volume in spec["volumes"]:
        if "configMap" in volume:  # its name ends with a hash of its content
            name = volume["configMap"]["name"]
            volume["configMap"]["name"] = re.sub(r"-[a-z0-9]{10}$", "", name)
    return bool(Pod.of(overlay).spec == spec)


def main() -> int:
    """Check all, and that what is wrong is noticed at all."""
    bad = checked = 0
    for overlay in OVERLAYS:
        things = rendered(overlay)
        if not tried(overlay, things):
            bad += 1
            print(f"{overlay}: the tests try another pod")
        for thing in things:
            versions = VERSIONS if thing["apiVersion"] != OPERATOR else VERSIONS[-1:]
            for version in versions:
                checked += 1
                if said := problem(thing, version):
                    bad += 1
                    print(f"{overlay}: {thing['kind']} for {version}: {said}")
            if not problem({**thing, "spec": {"nonsense": 1}}, versions[-1]):
                bad += 1
                print(f"{overlay}: {thing['kind']}: nonsense is not noticed")
    print(f"{checked} checks of {len(OVERLAYS)} overlays, {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
