"""The programs in C: compiled on the machine that has the compiler, run where the driver is."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bench.cast import BenchError

SOURCES = Path(__file__).parent / "c"
NAMES = ("oracle", "witness", "list")


def build(home: Path, headers: Path) -> Path:
    """Compile them into ``home`` with the kernel's headers there; return the directory."""
    home.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        compiler = [
            "cc",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pthread",
            "-isystem",
            str(headers),
        ]
        done = subprocess.run(
            [*compiler, "-o", str(home / name), str(SOURCES / f"{name}.c")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise BenchError(f"bench/c/{name}.c: {done.stderr}")
    return home
