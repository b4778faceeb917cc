"""``python -m bench``: boots each kernel once, measures in it, and writes the report.

Status 1 when a measurement failed, or when the ratio of medians, kill to LIVE, is above
``--fail-above``. The results go to build/bench/ (a smoke run's to build/bench/smoke/): one JSON
file for each kernel, with every sample and the figures, scrape.json, and report.md. Without a
kernel: python -m bench.scrape.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import report, scrape

TOP = Path(__file__).parent.parent
KERNELS = ("lts", "new")
LAB = (sys.executable, "lab/lab.py")
# Each wait in the guest has its own deadline; these bound their sum.
SLOWEST_PAIR_S = 30
PREPARATION_S = 300
SMOKE_KILLS, SMOKE_REST_S, SMOKE_FAIL_ABOVE = 3, 5.0, 3.0


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for kernel in ("host",) if options.host else options.kernel:
        run = measure(kernel, options)
        if run is None:
            print(f"bench: {kernel}: no result", file=sys.stderr)
            return 1
        runs.append(run)
    scrapes = scrape.measure()
    (options.out / "scrape.json").write_text(json.dumps(scrapes, indent=1) + "\n")
    text = f"{report.markdown(runs)}\n## A scrape, on this machine\n\n{scrape.markdown(scrapes)}"
    (options.out / "report.md").write_text(text)
    print(text)
    worst = max(run["summary"]["recovery"]["live"]["ratio_of_medians"] for run in runs)
    if options.fail_above is not None and worst > options.fail_above:
        print(f"bench: the ratio {worst:.2f} is above {options.fail_above:g}", file=sys.stderr)
        return 1
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench")
    add = parser.add_argument
    add("--host", action="store_true", help="measure on this very machine, which has the driver")
    add("--kernel", action="append", choices=KERNELS, help="default: all of them")
    add("--kills", type=int, help="of each side (default: 100)")
    add("--rest", type=float, metavar="SECONDS", help="to look at it at rest (default: 60)")
    add("--fail-above", type=float, metavar="RATIO", help="status 1 when ublkwatch is slower")
    add("--smoke", action="store_true", help="a short run on one kernel: does it work at all?")
    add("--out", type=Path, help="where the results go")
    options = parser.parse_args()
    smoke = options.smoke
    defaults: dict[str, Any] = {
        "kernel": KERNELS[:1] if smoke else KERNELS,
        "kills": SMOKE_KILLS if smoke else 100,
        "rest": SMOKE_REST_S if smoke else 60.0,
        "fail_above": SMOKE_FAIL_ABOVE if smoke else None,
        "out": TOP / "build/bench/smoke" if smoke else TOP / "build/bench",
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.kills < 1 or options.rest <= 0:
        parser.error("--kills and --rest must be more than nothing")
    return options


def measure(kernel: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Run the scenario; None when it failed, which it has said itself."""
    result = options.out.resolve() / f"{kernel}.json"
    result.unlink(missing_ok=True)
    timeout = PREPARATION_S + options.kills * SLOWEST_PAIR_S + 2 * options.rest
    where = ["--host"] if kernel == "host" else ["--kernel", kernel, "--cpus", "2"]
    before = list(os.getloadavg())
    scenario = [sys.executable, "-m", "bench.guest", "--accelerator", accelerator(kernel)]
    scenario += ["--kills", str(options.kills), "--rest", str(options.rest), "--out", str(result)]
    limits = ("--timeout", str(timeout), "--rw", str(result.parent))
    status = subprocess.run(
        [*LAB, "run", *where, *limits, "--", *scenario],
        cwd=TOP,
        check=False,
    ).returncode
    if status != 0 or not result.exists():
        return None
    run: dict[str, Any] = json.loads(result.read_text())
    if kernel != "host":
        run["about"] |= {"host_load_start": before, "host_load_end": list(os.getloadavg())}
    run["summary"] = report.summary(run)
    result.write_text(json.dumps(run, indent=1) + "\n")
    return run


def accelerator(kernel: str) -> str:
    """Return "real", or what the lab's guests run on."""
    if kernel == "host":
        return "real"
    listed = subprocess.run([*LAB, "list"], cwd=TOP, check=True, capture_output=True, text=True)
    words = dict(line.split(maxsplit=1) for line in listed.stdout.splitlines())
    return words["accelerator"].strip()


if __name__ == "__main__":
    raise SystemExit(main())
