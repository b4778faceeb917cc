"""Each law and story earns its keep: a machine that is broken where it matters is caught, by name.

A mutant is a text: what it breaks, which test catches it, what that says, and the change.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(900)  # each may wait for all that run before it
MUTANTS = sorted((TOP / "tests/mutants").glob("*.txt"))
LAW_EXAMPLES = "1500"


@dataclass(frozen=True)
class Mutant:
    """One way to break the machine."""

    test: str
    said: str
    file: str
    old: str
    new: str

    @classmethod
    def read(cls, path: Path) -> Mutant:
        head, _, change = path.read_text().partition("\n--- old\n")
        _what, test, said, file = head.splitlines()
        old, _, new = change.partition("\n--- new\n")
        return cls(
            test.removeprefix("caught by: "),
            said.removeprefix("which says: "),
            file.removeprefix("file: "),
            old.strip("\n"),
            new.rstrip("\n"),
        )

    def apply(self, top: Path) -> None:
        source = (top / self.file).read_text()
        found = source.count(self.old)
        assert found == 1, (
            f"the mutant does not apply: {found} places in {self.file} read as its old"
        )
        (top / self.file).write_text(source.replace(self.old, self.new))


def run(path: Path, top: Path) -> subprocess.CompletedProcess[str]:
    """Break a copy of the project, and run there the test that should see it."""
    mutant = Mutant.read(path)
    shutil.copytree(TOP / "ublkwatch", top / "ublkwatch")
    (top / "tests").mkdir()
    for source in (TOP / "tests").glob("*.py"):
        shutil.copy(source, top / "tests")
    shutil.copy(TOP / "pyproject.toml", top)
    shutil.copytree(TOP / "docs", top / "docs")
    mutant.apply(top)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", f"tests/{mutant.test}"],
        cwd=top,
        env={**os.environ, "UBLKWATCH_LAW_EXAMPLES": LAW_EXAMPLES, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Future[subprocess.CompletedProcess[str]]]:
    pool = ThreadPoolExecutor(2)
    place = tmp_path_factory.mktemp("mutants")
    started = {}
    for path in MUTANTS:
        (place / path.stem).mkdir()
        started[path.stem] = pool.submit(run, path, place / path.stem)
    return started


@pytest.mark.parametrize("path", MUTANTS, ids=lambda path: path.stem)
def test_a_mutant_is_caught_by_what_its_header_names(
    path: Path, runs: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> None:
    done, mutant = runs[path.stem].result(), Mutant.read(path)
    assert done.returncode == 1, f"it lives: {done.stdout[-2000:]}{done.stderr[-1000:]}"
    assert f"FAILED tests/{mutant.test}" in done.stdout, done.stdout[-2000:]
    assert mutant.said in done.stdout, done.stdout[-4000:]


def test_there_are_enough_mutants() -> None:
    assert len(MUTANTS) >= 18
