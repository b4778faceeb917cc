"""Programs that the lab's `setup` has fetched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_LAB = Path(__file__).parents[1] / "lab/lab.py"


def prometheus(program: str) -> Path:
    """Return where `prometheus` or `promtool` is."""
    done = subprocess.run(
        [sys.executable, _LAB, "prometheus"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip()) / program
