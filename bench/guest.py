"""Measures where the driver is, and writes every sample down as JSON.

``python -m bench`` runs this in the lab's guest, or on a host that has the driver. It needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import ublkwatch
from bench.cast import BenchError
from bench.options import Options
from bench.scenarios import chosen
from bench.stage import say


def about(options: Options) -> dict[str, Any]:
    """Return what was measured on, and when."""
    return {
        "kernel": os.uname().release,
        "accelerator": options.accelerator,
        "cpus": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "python": platform.python_version(),
        "compiler": _first_line("cc", "--version"),
        "init": Path("/proc/1/comm").read_text().strip(),
        "ublkwatch": ublkwatch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": [list(os.getloadavg())],
    }


def _first_line(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout.partition("\n")[0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.guest")
    parser.add_argument("options", type=Options.loaded, help="as JSON")
    parser.add_argument("out", type=Path, help="the JSON file to write")
    arguments = parser.parse_args()
    if not Path("/dev/ublk-control").exists():
        subprocess.run(["modprobe", "ublk_drv"], check=True)
    options: Options = arguments.options
    run: dict[str, Any] = {"about": about(options)}
    status = 0

    def keep(name: str, result: Any) -> None:
        """Write down what was measured so far: what fails after hours has not lost them."""
        run[name] = result
        arguments.out.write_text(json.dumps(run) + "\n")

    for name, scenario in chosen(options, driver=True).items():
        try:
            scenario.measure(options, partial(keep, name))
        except BenchError as error:
            say(f"{name} FAILED: {error}")
            status = 1
        keep("about", run["about"] | {"load": [*run["about"]["load"], list(os.getloadavg())]})
    return status


if __name__ == "__main__":
    raise SystemExit(main())
