"""Rows that cost a kernel or half a minute, each with a boot of its own in the lab.

``python tests/conformance_own_boot.py`` boots and prints what happened. The lab's kernels panic
when they oops; elsewhere the mutex stays locked and the device is lost until the next boot.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from conformance_steps import (
    G2,
    G3,
    START,
    Hush,
    Kill,
    Later,
    Read,
    Row,
    Serve,
    Shows,
    Tell,
    back,
    crashed,
    live,
)

TOP = Path(__file__).parent.parent
PYTHON = str(TOP / ".venv/bin/python")
TEST = "tests/kernel/test_driver_conformance.py::test_the_driver_answers_as_the_table_says"
KERNELS = {G2: "lts", G3: "new"}

OWN_BOOT = (
    Row(
        "START after one of two queues was fetched by a server that was killed",
        "3.5, T4",
        (
            *crashed(queues=2),
            Tell(START),
            Serve("new", "one queue"),
            Kill("new"),
            Shows("QUIESCED", "old", stays=True),
            # put_task_struct(NULL) in ublk_ctrl_start_recovery(), with the mutex held
            Tell(START, "waits"),
            Tell("GET_PARAMS", "waits"),
            Tell("GET_DEV_INFO"),
        ),
        generations=(G2,),
        own_boot=True,
        note="6.12.117: NULL pointer dereference in that START; the lab's kernel panics (125)",
    ),
    Row(
        "a saturated queue hides its server's end for 30 s",
        "3.1, 3.2, T10",
        (
            *live(),
            Read("before"),
            Hush("old"),
            Read("first", "waits"),
            Read("second", "waits"),
            Kill("old"),
            Shows("LIVE", "old", stays=True),
            Tell(START, "EBUSY"),
            Shows("QUIESCED", "old"),
            Tell(START),
            *back("new"),
            Later("first", "0"),
            Later("second", "0"),
        ),
        generations=(G2,),
        own_boot=True,
        note="6.12.117: as the row says; QUIESCED 30.6 s after the kill",
    ),
)


def boot(row: Row, kernel: str) -> None:
    """Run a row in a boot of its own, and print how that ended."""
    lab = [PYTHON, "lab/lab.py", "run", "--kernel", kernel, "--cpus", "2", "--timeout", "300"]
    pytest = [PYTHON, "-m", "pytest", "-q", "-m", "own_boot", f"{TEST}[{row.name}]"]
    started = time.monotonic()
    done = subprocess.run(
        [*lab, "--", *pytest],
        cwd=TOP,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(done.stdout.decode(errors="replace"))
    took_s = time.monotonic() - started
    print(f"--- {row.name}, {kernel}: status {done.returncode}, {took_s:.0f} s")
    print(f"    expected: {row.note}", flush=True)


def main() -> None:
    for row in OWN_BOOT:
        for generation in row.generations:
            boot(row, KERNELS[generation])


if __name__ == "__main__":
    main()
