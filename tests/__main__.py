"""``python -m tests [lint]``: what `make test` runs, and one closing line with the counts.

Lint and types, the tests of this machine, then tests/kernel in the lab's guest on both kernels.
Status 1 if any failed, or was skipped: what this project's tests need, its set-up installs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOP = Path(__file__).parent.parent
PYTHON = str(TOP / ".venv/bin/python")
LINTS = {
    "ruff check": ["-m", "ruff", "check", "--quiet", "."],
    "ruff format": ["-m", "ruff", "format", "--quiet", "--check", "."],
    "mypy": ["-m", "mypy", "ublkwatch", "lab", "bench", *map(str, sorted(TOP.glob("tests/*.py")))],
    "mypy tests/kernel": ["-m", "mypy", "tests/kernel"],
}
KERNEL_TESTS_S = 3600
# In a guest that has nothing else servers are our children; where systemd is process 1, its units.
# What is long is tested once for each launcher, and once on each kernel.
_MANY = "tests/kernel/test_many.py"
_LONG = tuple(
    f"tests/kernel/test_{it}.py"
    for it in (
        *("watch", "interference", "kublk", "modes", "armour", "placement", "tools", "hung"),
        *("pages", "verbs"),
    )
)
_REST = ("tests/kernel", *(f"--ignore={path}" for path in (*_LONG, _MANY, "tests/kernel/systemd")))
# Kernel, init and tests of each guest; the longest come first.
GUESTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("lts", "busybox", _REST),
    ("new", "busybox", _REST),
    ("lts", "busybox", _LONG),
    ("new", "busybox", _LONG),
    ("new", "systemd", ("tests/kernel/systemd", _MANY)),
    ("lts", "busybox", (_MANY,)),
)


class Count:
    """How many checks and tests ended in which way."""

    def __init__(self) -> None:
        self.passed = self.failed = self.skipped = 0
        self._lock = threading.Lock()

    def run(self, name: str, command: list[str], *, beside: bool = False) -> bool:
        """Run a command; one that has others beside it is shown when it is over."""
        started = time.monotonic()
        print(f"--- {name}", flush=True)
        output = subprocess.PIPE if beside else None
        done = subprocess.run(
            command,
            cwd=TOP,
            check=False,
            stdout=output,
            stderr=subprocess.STDOUT if beside else None,
        )
        if beside:
            print(done.stdout.decode(errors="replace"))
        took_s = time.monotonic() - started
        print(f"--- {name}: status {done.returncode}, {took_s:.0f} s", flush=True)
        return done.returncode == 0

    def lint(self) -> None:
        for name, arguments in LINTS.items():
            if self.run(name, [PYTHON, *arguments]):
                self.passed += 1
            else:
                self.failed += 1

    def guest(self, number: int, results: Path) -> None:
        """Run the tests of one guest."""
        kernel, init, tests = GUESTS[number]
        lab = [PYTHON, "lab/lab.py", "run", "--kernel", kernel, "--init", init, "--cpus", "2"]
        lab += ["--timeout", str(KERNEL_TESTS_S), "--rw", str(results), "--"]
        self.pytest(f"guest {number + 1}: {kernel}, {init}", list(tests), results, *lab)

    def pytest(self, name: str, arguments: list[str], results: Path, *before: str) -> None:
        """Run pytest, on this machine or behind ``before``; believe its report, not its word."""
        report = results / f"{re.sub(r'[^a-z0-9]+', '-', name)}.xml"
        command = [*before, PYTHON, "-m", "pytest", "-q", f"--junit-xml={report}", *arguments]
        good = self.run(name, command, beside=bool(before))
        if not report.exists():
            self.failed += 1
            return
        suites = list(ET.parse(report).iter("testsuite"))  # noqa: S314 - pytest's own
        total, failed, skipped = (
            sum(int(suite.get(kind, 0)) for suite in suites)
            for kind in ("tests", "failures", "skipped")
        )
        failed += sum(int(suite.get("errors", 0)) for suite in suites)
        with self._lock:
            self.passed += total - failed - skipped
            self.failed += failed or (not good)
            self.skipped += skipped


def main() -> int:
    count = Count()
    count.lint()
    if sys.argv[1:] != ["lint"]:
        with tempfile.TemporaryDirectory(prefix="ublkwatch-tests-", dir="/var/tmp") as name:
            results = Path(name)
            count.pytest("tests", ["--ignore=tests/kernel", "tests"], results)
            count.pytest("lab", ["lab"], results)
            # One more at once than there are CPUs: a guest waits for a third of its time.
            with ThreadPoolExecutor(1 + (os.cpu_count() or 1)) as pool:
                runs = [pool.submit(count.guest, number, results) for number in range(len(GUESTS))]
                for run in runs:
                    run.result()
    print(f"{count.passed} passed, {count.failed} failed, {count.skipped} skipped", flush=True)
    return 1 if count.failed or count.skipped else 0


if __name__ == "__main__":
    raise SystemExit(main())
