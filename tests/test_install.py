"""The README's lines for pip, and pipx, done for every Python that is here; a part of `full` only.

UBLKWATCH_PYTHONS names others than are on PATH, separated by colons.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    text = (TOP / "README.md").read_text().split("## Install it")[1].split("or on Debian")[0]
    make, link, service = re.findall(r"^    (.*)$", text, re.MULTILINE)
    assert service.split("#")[0].split() == ["ublkwatch", "install-systemd", "--now"]
    programs = tmp_path / "bin"
    programs.mkdir()
    called = programs / "python3"  # the Python that the lines mean
    called.write_text(f'#!/bin/sh\nexec {shlex.quote(python)} "$@"\n')
    called.chmod(0o755)

    script = f"{make}\n{link}".replace("/opt/", f"{tmp_path}/").replace("/usr/local", str(tmp_path))
    run("sh", "-e", "-c", script, PATH=f"{programs}:{os.environ['PATH']}")

    program = programs / "ublkwatch"
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
