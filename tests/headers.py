"""Where the kernel's C headers are: Debian's newest, kept in the lab's cache by its `setup`.

A distribution's own headers may be older than the kernels that ublkwatch knows, hence these.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_LAB = Path(__file__).parents[1] / "lab/lab.py"


def include_directory() -> Path:
    """Return the directory to give to cc -I."""
    if own := os.environ.get("UBLKWATCH_HEADERS"):
        return Path(own)
    done = subprocess.run(
        [sys.executable, _LAB, "headers"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())
