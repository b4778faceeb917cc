"""The README's first line: a part of `full` only, before all else, since it boots a guest."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import readme

TOP = Path(__file__).parent.parent


@pytest.mark.timeout(900)
def test_the_readmes_line_that_shows_it_at_work() -> None:
    (line,) = readme.lines("apt-get install --yes make")
    done = subprocess.run(
        ["sh", "-e", "-c", line], cwd=TOP, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
