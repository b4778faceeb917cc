"""``python -m tests [lint|full]``: what `make test` runs, and one closing line with the counts.

Lint and types, then the tests of this machine beside tests/kernel in guests of both kernels, and a
short run of the benchmark.
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
# What `make bench-smoke` runs: it fails on a ratio far out of line, which others beside it are not.
SMOKE = ("bench: smoke", ["-m", "bench", "--smoke"])
KERNEL_TESTS_S = 4500
OPTIONS = ("-q", "--tb=short", "--durations=5", "--durations-min=30")


def _kernel(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/kernel/test_{name}.py" for name in names)


# What a version of the driver may do differently: on both kernels in each run.
_DRIVER = _kernel("driver_conformance", "handoffs", "misbehaviour", "modes")
# What takes long as well, and what is about ublkwatch alone: an ordinary run tries it on one.
_LONG = _kernel("own_death", "interference", "kublk", "hung", "standby")
_OURS = _kernel(
    *("armour", "placement", "tools", "orders", "refusals", "c_example", "pages", "verbs"),
    *("scraped", "prometheus"),
)
# In a guest that has nothing else servers are our children; where systemd is process 1, its units.
_MANY = _kernel("many")
_UNITS = ("tests/kernel/systemd",)
_STANDBY = _kernel("standby")  # in _LONG as well
_SERVICE = ("tests/kernel/systemd/test_service.py",)
# What `make deb`, `make image` and the README's own lines come to; in guests where it takes one.
_PACKAGE = ("tests/kernel/package",)
_IMAGE = ("tests/kernel/container",)
_INSTALL = "tests/test_install.py"
_DEMO = "tests/test_demo.py"
# What two versions of systemd say of our units, and a host that goes down.
_SYSTEMD = ("tests/test_systemd.py", "tests/test_reboot.py")


def _all_but(*groups: tuple[str, ...]) -> tuple[str, ...]:
    named = (*_UNITS, *_PACKAGE, *_IMAGE, *(path for group in groups for path in group))
    return ("tests/kernel", *(f"--ignore={path}" for path in named))


Guest = tuple[str, str, tuple[str, ...]]
# Kernel, init and tests of each guest; the longest come first.
GUESTS: tuple[Guest, ...] = (
    ("new", "busybox", _LONG),
    ("lts", "busybox", _DRIVER),
    ("new", "busybox", _DRIVER),
    ("new", "busybox", _OURS),
    ("new", "systemd", (*_UNITS, f"--ignore={_SERVICE[0]}")),
    ("new", "busybox", _all_but(_DRIVER, _LONG, _OURS, _MANY)),
    ("lts", "busybox", _MANY),
)
# What `make test-full` adds, so that every test was run on both kernels; the package and the image.
MORE_GUESTS: tuple[Guest, ...] = (
    ("lts", "busybox", _LONG),
    ("lts", "busybox", _all_but(_DRIVER, _LONG, _MANY)),
    ("lts", "systemd", (*_UNITS, *_MANY)),
    ("new", "systemd", (*_SERVICE, *_MANY, *_STANDBY)),
    ("new", "systemd", _PACKAGE),
    ("new", "systemd", _IMAGE),
    ("new", "busybox", _MANY),
)


class Count:
    """How many checks and tests ended in which way."""

    def __init__(self) -> None:
        self.passed = self.failed = self.skipped = 0
        self.failures: list[str] = []  # where, which test, and the first line of why
        self._lock = threading.Lock()

    def run(self, name: str, command: list[str]) -> bool:
        """Run a command; since others run beside it, what it says is shown when it is over."""
        started = time.monotonic()
        print(f"--- {name}", flush=True)
        done = subprocess.run(
            command, cwd=TOP, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        took_s = time.monotonic() - started
        end = f"--- {name}: status {done.returncode}, {took_s:.0f} s"
        print(done.stdout.decode(errors="replace") + end, flush=True)
        return done.returncode == 0

    def check(self, name: str, arguments: list[str]) -> None:
        """Run what is good or not, as a whole."""
        good = self.run(name, [PYTHON, *arguments])
        with self._lock:
            self.passed += good
            self.failed += not good
            self.failures += [] if good else [name]

    def lint(self) -> None:
        for name, arguments in LINTS.items():
            self.check(name, arguments)

    def guest(self, number: int, guest: Guest, results: Path, spared: tuple[str, ...]) -> None:
        """Run the tests of one guest, without those that are spared."""
        kernel, init, tests = guest
        lab = [PYTHON, "lab/lab.py", "run", "--kernel", kernel, "--init", init, "--cpus", "2"]
        lab += ["--timeout", str(KERNEL_TESTS_S), "--rw", str(results), "--"]
        self.pytest(f"guest {number}: {kernel}, {init}", [*tests, *spared], results, *lab)

    def pytest(self, name: str, arguments: list[str], results: Path, *before: str) -> None:
        """Run pytest, on this machine or behind ``before``; believe its report, not its word."""
        report = results / f"{re.sub(r'[^a-z0-9]+', '-', name)}.xml"
        command = [*before, PYTHON, "-m", "pytest", *OPTIONS, f"--junit-xml={report}"]
        command += arguments
        good = self.run(name, command)
        if not report.exists():
            self.failed += 1
            self.failures.append(f"{name}: it has left no report")
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
            self.failures += [
                f"{name}: {case.get('name')}: {verdict.tag}: {verdict.get('message', '')[:300]!r}"
                for suite in suites
                for case in suite.iter("testcase")
                for verdict in case
                if verdict.tag in ("failure", "error", "skipped")
            ]


def main() -> int:
    count = Count()
    count.lint()
    if sys.argv[1:] != ["lint"]:
        full = sys.argv[1:] == ["full"]
        # Each of them is like one that is run, or a boot of which every guest shows as much.
        spared = () if full else ("-m", "not full")
        guests = (*GUESTS, *(MORE_GUESTS if full else ()))
        with tempfile.TemporaryDirectory(prefix="ublkwatch-tests-", dir="/var/tmp") as name:
            results = Path(name)
            if full:  # it has a time limit of its own: nothing beside it
                count.pytest(_DEMO, [_DEMO], results)
            # One more at once than there are CPUs: a guest waits for a third of its time.
            with ThreadPoolExecutor(1 + (os.cpu_count() or 1)) as pool:
                later = (_INSTALL, _DEMO, *_SYSTEMD)
                ours = ["tests", *(f"--ignore={it}" for it in ("tests/kernel", *later))]
                here = [ours, ["lab", *spared], *([[_INSTALL], [*_SYSTEMD]] if full else ())]
                runs = [pool.submit(count.pytest, it[0], it, results) for it in here]
                runs += [
                    pool.submit(count.guest, number, guest, results, spared)
                    for number, guest in enumerate(guests, 1)
                ]
                runs.append(pool.submit(count.check, *SMOKE))
                for run in runs:
                    run.result()
    for failure in count.failures:  # what is far up by now
        print(failure)
    print(f"{count.passed} passed, {count.failed} failed, {count.skipped} skipped", flush=True)
    return 1 if count.failed or count.skipped else 0


if __name__ == "__main__":
    raise SystemExit(main())
