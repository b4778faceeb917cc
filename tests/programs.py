"""Programs that the lab's `setup` has fetched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_LAB = Path(__file__).parents[1] / "lab/lab.py"


def prometheus(program: str) -> Path:
    """Return where `prometheus` or `promtool` is."""
    return _of("prometheus") / program


def kubectl() -> Path:
    """Return where `kubectl` is."""
    return _of("kubectl") / "kubectl"


def _of(package: str) -> Path:
    done = subprocess.run(
        [sys.executable, _LAB, package], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())
