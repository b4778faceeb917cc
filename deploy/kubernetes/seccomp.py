#!/usr/bin/env python3
"""Makes unprivileged/seccomp.json: containers-common's default profile, with io_uring.

    deploy/kubernetes/seccomp.py /usr/share/containers/seccomp.json

That file is Debian's, of the package golang-github-containers-common. What depends on capabilities
is decided here, for those of the overlay, since containerd reads no conditions; what is for other
architectures than amd64 and arm64 goes.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "unprivileged"
IO_URING = ["io_uring_enter", "io_uring_register", "io_uring_setup"]
ARCHITECTURES = {
    "amd64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "arm64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
}


def capabilities() -> set[str]:
    """Return those that the overlay adds."""
    text = (HERE / "daemonset.yaml").read_text().partition("add:")[2].partition("seccompProfile")[0]
    return {f"CAP_{name}" for name in re.findall(r"- ([A-Z_]+)", text)}


def applies(rule: dict[str, Any], has: set[str]) -> bool:
    """Decide a rule's conditions, as containers-common does."""
    includes, excludes = rule.get("includes", {}), rule.get("excludes", {})
    arches = includes.get("arches")
    return (
        set(includes.get("caps", ())) <= has
        and not set(excludes.get("caps", ())) & has
        and (not arches or not ARCHITECTURES.keys().isdisjoint(arches))
    )


def profile(default: dict[str, Any], has: set[str]) -> dict[str, Any]:
    """Return the profile as the OCI runtime specification has it."""
    rules: list[dict[str, Any]] = []
    for rule in default["syscalls"]:
        if applies(rule, has):
            kept = {"names": sorted(rule["names"]), "action": rule["action"]}
            kept |= {key: rule[key] for key in ("args", "errnoRet") if rule.get(key)}
            rules.append(kept)
    rules.append({"names": IO_URING, "action": "SCMP_ACT_ALLOW"})
    return {
        "defaultAction": default["defaultAction"],
        "defaultErrnoRet": default["defaultErrnoRet"],
        "architectures": [name for names in ARCHITECTURES.values() for name in names],
        "syscalls": rules,
    }


def main() -> None:
    default = json.loads(Path(sys.argv[1]).read_text())
    text = json.dumps(profile(default, capabilities()), indent=1)
    # One rule's words are one paragraph: hundreds of system calls are not hundreds of lines.
    (HERE / "seccomp.json").write_text(re.sub(r'",\n    "', '", "', text) + "\n")


if __name__ == "__main__":
    main()
