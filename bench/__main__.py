"""``python -m bench``: boots each kernel once, measures in it, and writes the report.

The results go to build/bench: for each kernel a JSON file with every sample, and performance.md,
which is docs/performance.md with new tables and pictures; --publish puts it there. What took
several runs is told together by --report, which measures nothing. Status 1 when a measurement
failed, or a ratio to the oracle is above ``--fail-above``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import report
from bench.cast import BenchError
from bench.contestants import CONTESTANTS
from bench.lot import HANDOFFS, TARGETS
from bench.options import SHAPES, SMOKE, Options
from bench.programs import build
from bench.scenarios import SCENARIOS, chosen

TOP = Path(__file__).parent.parent
KERNELS = ("lts", "new")
LAB = (sys.executable, "lab/lab.py")
SYSTEMD = {"unit", "ublkwatch-units"}  # the contestants that need it as process 1
CPUS = 2
# Each wait in the guest has its own deadline; these bound their sum.
PREPARATION_S, STRIKE_S, MASS_S, REST_S = 900, 30, 200, 2700
SMOKE_FAIL_ABOVE = 4.0
SMOKE_S = 400


def main() -> int:
    arguments, options = parse()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    published = TOP / "docs" if arguments.publish else out
    if arguments.report:
        write(out, [json.loads(path.read_text()) for path in arguments.report], published)
        return 0
    runs: list[dict[str, Any]] = []
    status = 0
    try:
        headers = Path(_lab("headers").strip())
        options = replace(options, programs=str(build(TOP / "build/bench/bin", headers)))
        for kernel in ("host",) if arguments.host else arguments.kernel:
            if chosen(options, driver=True):
                run, ended = measure(kernel, arguments, options)
                runs.append(run)
                status = status or ended
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    here: dict[str, Any] = {}
    for name, each in chosen(options, driver=False).items():
        each.measure(options, partial(here.__setitem__, name))
    if here:
        (out / "here.json").write_text(json.dumps(here, indent=1) + "\n")
    write(out, [*runs, here], published)
    worst = report.worst(runs)
    if arguments.fail_above is not None and worst is not None and worst > arguments.fail_above:
        print(f"bench: a ratio of {worst:.2f} is above {arguments.fail_above:g}", file=sys.stderr)
        return 1
    return status


def write(out: Path, runs: list[dict[str, Any]], published: Path) -> None:
    """Print the sections, and write the report and its pictures."""
    made = report.sections(runs)
    print("\n\n".join(made.values()))
    text = report.filled((TOP / "docs/performance.md").read_text(), made)
    for home in dict.fromkeys((out, published)):
        (home / "performance.md").write_text(text)
        (home / report.PICTURES).mkdir(exist_ok=True)
        for name, svg in report.pictures(runs).items():
            (home / report.PICTURES / f"{name}.svg").write_text(svg)


def parse() -> tuple[argparse.Namespace, Options]:
    parser = argparse.ArgumentParser(prog="python -m bench")
    add = parser.add_argument
    add("--host", action="store_true", help="measure on this very machine, which has the driver")
    add("--kernel", action="append", choices=KERNELS, help="default: all of them")
    add("--only", nargs="+", choices=tuple(SCENARIOS), metavar="SCENARIO", help=_list(SCENARIOS))
    add("--contestants", nargs="+", choices=tuple(CONTESTANTS), metavar="NAME",
        help=_list(CONTESTANTS))  # fmt: skip
    add("--handoffs", nargs="+", choices=HANDOFFS)
    add("--targets", nargs="+", choices=TARGETS)
    add("--queues", nargs="+", type=int, metavar="N")
    add("--kills", type=int, help="of each contestant, for each kind of device")
    add("--devices", nargs="+", type=int, metavar="N", help="that are lost at once")
    add("--shapes", nargs="+", choices=SHAPES, help="a server for each device, or for all")
    add("--rounds", type=int, help="of mass crashes")
    add("--memory", help="of the guest (default: what the devices take)")
    add("--smoke", action="store_true", help="a short run on one kernel: does it work at all?")
    add("--fail-above", type=float, metavar="RATIO", help="status 1 when it is slower than that")
    add("--out", type=Path, help="where the results go")
    add("--report", nargs="+", type=Path, metavar="JSON",
        help="measure nothing, report what runs have written")  # fmt: skip
    add("--publish", action="store_true", help="write docs/performance.md and its pictures, too")
    given = parser.parse_args()
    options = SMOKE if given.smoke else Options()
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key in (field.name for field in fields(Options))
        if (value := getattr(given, key, None)) is not None
    }
    options = replace(options, **values)
    if options.kills < 1 or options.rounds < 1:
        parser.error("--kills and --rounds must be more than nothing")
    given.kernel = given.kernel or (("new",) if given.smoke else KERNELS)
    given.out = given.out or TOP / ("build/bench/smoke" if given.smoke else "build/bench")
    if given.smoke and given.fail_above is None:
        given.fail_above = SMOKE_FAIL_ABOVE
    return given, options


def _list(names: Any) -> str:
    return ", ".join(names)


def measure(
    kernel: str, arguments: argparse.Namespace, options: Options
) -> tuple[dict[str, Any], int]:
    """Measure on that kernel; returns what came of it, and the status."""
    result = arguments.out.resolve() / f"{kernel}.json"
    result.unlink(missing_ok=True)
    options = replace(options, accelerator=accelerator(kernel))
    before = list(os.getloadavg())
    guest = [sys.executable, "-m", "bench.guest", options.dumped(), str(result)]
    place = ["--host"] if kernel == "host" else machine(kernel, arguments.memory, options)
    limits = ["--timeout", str(timeout(options)), "--rw", str(result.parent)]
    done = subprocess.run([*LAB, "run", *place, *limits, "--", *guest], cwd=TOP, check=False)
    if not result.exists():
        raise BenchError(f"{kernel}: no result, status {done.returncode}")
    run: dict[str, Any] = json.loads(result.read_text())
    if kernel != "host":
        run["about"]["host_load"] = [before, list(os.getloadavg())]
        result.write_text(json.dumps(run) + "\n")
    return run, done.returncode


def machine(kernel: str, memory: str | None, options: Options) -> list[str]:
    """Return the lab's options for a guest that can do all this."""
    names = set(options.contestants or CONTESTANTS)
    scenarios = chosen(options, driver=True)
    words = ["--kernel", kernel, "--cpus", str(CPUS)]
    words += ["--memory", memory or ("8G" if "mass" in scenarios else "2G")]
    if "recovery" in scenarios:
        words += ["--possible-cpus", str(max(CPUS, *options.queues))]
        if names & SYSTEMD:
            words += ["--init", "systemd"]
    return words


def timeout(options: Options) -> float:
    """Return what bounds a run that hangs, in seconds."""
    many = len(options.contestants or CONTESTANTS)
    kinds = sum(1 for _ in options.kinds())
    total = PREPARATION_S
    if "recovery" in chosen(options, driver=True):
        total += kinds * (options.kills + 2) * many * STRIKE_S
    if "mass" in chosen(options, driver=True):
        total += len(options.devices) * len(options.shapes) * (options.rounds + 2) * many * MASS_S
    if "rest" in chosen(options, driver=True):
        total += REST_S
    return min(total, SMOKE_S) if options == replace(SMOKE, programs=options.programs) else total


def accelerator(kernel: str) -> str:
    """Return "real", or what the lab's guests run on."""
    if kernel == "host":
        return "real"
    words = dict(line.split(maxsplit=1) for line in _lab("list").splitlines())
    return words["accelerator"].strip()


def _lab(verb: str) -> str:
    done = subprocess.run([*LAB, verb], cwd=TOP, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchError(f"lab.py {verb}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
