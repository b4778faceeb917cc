"""The README's lines for pip and for a cluster, and pipx; a part of `full` only.

pip and pipx are tried with every Python that is here: on PATH, of pyenv, or named by
UBLKWATCH_PYTHONS, separated by colons. What the deb, and pip under systemd, come to:
tests/kernel/package.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import readme
import yaml
from registry import registry

from ublkwatch import __version__

TOP = Path(__file__).parent.parent
SHARED = (
    "man/man8/ublkwatch.8",
    "man/man5/ublkwatch.toml.5",
    "bash-completion/completions/ublkwatch",
    "zsh/site-functions/_ublkwatch",
)


def pythons() -> list[str]:
    """Return this Python, and one of each other version from the oldest that will do on."""
    names = (f"python3.{minor}" for minor in range(11, 20))
    found = [sys.executable, *(shutil.which(name) or "" for name in names)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found += map(str, sorted(pyenv.glob("versions/3.1[1-9]*/bin/python3")))
    found += os.environ.get("UBLKWATCH_PYTHONS", "").split(":")
    versions: dict[str, str] = {}
    for python in filter(None, found):
        command = [python, "-c", "import ensurepip, sys, venv; print(*sys.version_info[:2])"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:  # what is found may be a stub
            versions.setdefault(done.stdout, python)
    return list(versions.values())


def run(*command: str | Path, **environment: str) -> str:
    """Run it as somebody would who has no environment of ours; it must succeed."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=TOP,
        env=mine | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


@pytest.mark.parametrize("python", pythons())
def test_the_readmes_lines_for_pip(python: str, tmp_path: Path) -> None:
    make, link, service = readme.lines("python3 -m venv")
    assert service.split("#")[0].split() == ["ublkwatch", "install-systemd", "--now"]
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    called = bin_dir / "python3"  # the Python that the lines mean
    called.write_text(f'#!/bin/sh\nexec {shlex.quote(python)} "$@"\n')
    called.chmod(0o755)

    script = f"{make}\n{link}".replace("/opt/", f"{tmp_path}/").replace("/usr/local", str(tmp_path))
    run("sh", "-e", "-c", script, PATH=f"{bin_dir}:{os.environ['PATH']}")

    program = bin_dir / "ublkwatch"
    assert run(program, "--version") == f"ublkwatch {__version__}"
    run(program, "check-config", "--config", TOP / "deploy/ublkwatch.toml")
    run(
        tmp_path / "ublkwatch/bin/python",
        "-I",
        "-c",
        "import ublkwatch.daemon, ublkwatch.ctrl_worker",
    )
    for name in SHARED:
        assert (tmp_path / "ublkwatch/share" / name).is_file()


@pytest.mark.parametrize("python", pythons())
def test_pipx_takes_the_sdist_and_shows_the_pages(python: str, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "tool")
    run(tmp_path / "tool/bin/pip", "install", "--quiet", "pipx")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path)
    (sdist,) = tmp_path.glob("ublkwatch-*.tar.gz")
    homes = {f"PIPX_{name}": str(tmp_path / name) for name in ("HOME", "BIN_DIR", "MAN_DIR")}
    run(tmp_path / "tool/bin/pipx", "install", "--python", python, sdist, **homes)
    assert run(tmp_path / "BIN_DIR/ublkwatch", "--version") == f"ublkwatch {__version__}"
    assert (tmp_path / "MAN_DIR/man8/ublkwatch.8").exists()


# There is no cluster here: what would be applied is kept.
KUBECTL = """#!/bin/sh
if [ "$1" = apply ]; then cat >"$KEPT"; else exec "$REAL" "$@"; fi
"""


@pytest.mark.timeout(900)
def test_the_readmes_lines_for_a_cluster(tmp_path: Path) -> None:
    """After `make image`, which is the first of them."""
    first, *rest = readme.lines("make image")
    assert first.split("#")[0].strip() == "make image"
    kept, kubectl = tmp_path / "kept.yaml", tmp_path / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    with registry() as there:
        plain = tmp_path / ".config/containers/registries.conf"
        plain.parent.mkdir(parents=True)
        plain.write_text(f'[[registry]]\nlocation = "{there.name}"\ninsecure = true\n')
        environment = {
            "REGISTRY": there.name,
            "HOME": str(tmp_path),  # or skopeo would speak TLS
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "REAL": str(programs.kubectl()),
            "KEPT": str(kept),
        }
        run("sh", "-e", "-c", "\n".join(rest), **environment)
        manifest = json.loads(there.manifests[f"/v2/ublkwatch/manifests/{__version__}"])
        named = [layer["digest"] for layer in (manifest["config"], *manifest["layers"])]
        assert set(named) == there.blobs
        image = f"{there.name}/ublkwatch:{__version__}"
    things = {thing["kind"]: thing for thing in yaml.safe_load_all(kept.read_text())}
    assert things.keys() == {
        *("Namespace", "ServiceAccount", "ConfigMap", "DaemonSet", "NetworkPolicy"),
    }
    spec = things["DaemonSet"]["spec"]["template"]["spec"]
    assert [container["image"] for container in spec["containers"]] == [image]
