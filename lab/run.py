"""What `run` does: one command in a guest that may take several boots, or on this very machine."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import systemd
from base import EXIT_LAB, EXIT_TIMEOUT, LabError, cache_directory, me, say, staging
from fetch import install_command, missing_packages
from initramfs import Job
from kernels import Kernel, need_kernel
from machine import SHUTDOWN_SECONDS, Guest, Machine, Outcome, Plan, Stage, die_with

BOOT_ATTEMPTS: Final = 3
BOOT_SECONDS: Final = 240.0  # it takes some 10, and ten times as long beside other guests
PROBE_SECONDS: Final = 12.0
CONSOLE_SHOWN: Final = 80

# A guest has no service manager: these would make a program talk to the host's.
MANAGER_VARIABLES: Final = frozenset(
    {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "JOURNAL_STREAM"}
)
# A host may want no bytecode beside its sources. A guest's goes with the guest, and without it each
# start of Python compiles anew, slowly.
HOST_ONLY_VARIABLES: Final = MANAGER_VARIABLES | {"PYTHONDONTWRITEBYTECODE"}


def boot_id() -> str:
    """Name this boot of this host: what KVM can do may change with the next."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.uname().release


def accelerator(cache: Path, kernel: Kernel) -> str:
    """Return "kvm" where a kernel really boots with it, else "tcg"; tried once per host boot."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    if (known := known_accelerator(cache)) is not None:
        return known
    say("trying whether KVM works here")
    plan = Plan(cache, kernel, Machine("kvm", 1, "512M"), Job(("/bin/true",), "/", {}))
    outcome = Guest(PROBE_SECONDS, PROBE_SECONDS, None).run(plan)
    result = "kvm" if outcome.status == 0 else "tcg"
    with contextlib.suppress(OSError), staging(cache) as stage:
        (stage / "new").write_text(json.dumps({"boot": boot_id(), "accelerator": result}) + "\n")
        (stage / "new").rename(cache / "accelerator.json")
    return result


def known_accelerator(cache: Path) -> str | None:
    """Return the answer that an earlier try found on this boot of the host."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads((cache / "accelerator.json").read_text())
        if found["boot"] == boot_id():
            return str(found["accelerator"])
    return None


def show_console(console: bytes | bytearray) -> None:
    """Print the end of the kernel's console, for the one who has to find out."""
    lines = bytes(console).decode(errors="replace").replace("\r", "").strip().splitlines()
    for line in lines[-CONSOLE_SHOWN:]:
        print(f"lab: | {line}", file=sys.stderr)
    sys.stderr.flush()


def guest_environment() -> dict[str, str]:
    """Return the environment that the command gets: the caller's own."""
    return {key: value for key, value in os.environ.items() if key not in HOST_ONLY_VARIABLES}


def run_in_guest(options: argparse.Namespace) -> int:
    """Run the command in a fresh guest and return its exit status."""
    tools = ["qemu-system-x86_64", *(systemd.PROGRAMS if options.init == "systemd" else ())]
    if packages := missing_packages(tools):
        hint = shlex.join(install_command(packages))
        raise LabError(f"not installed: {', '.join(packages)}; as root: {hint}")
    cache = cache_directory()
    kernel = need_kernel(cache, options.kernel)
    if not (cache / "busybox").is_file():
        raise LabError(f"busybox is not in {cache}; get it: {me()} setup")
    machine = Machine(
        accelerator(cache, kernel), options.cpus, options.memory, options.possible_cpus
    )
    writable = tuple(dict.fromkeys(existing_directory("--rw", path) for path in options.rw))
    job = Job(
        tuple(options.command),
        str(Path.cwd()),
        guest_environment(),
        writable,
        options.init,
        options.shutdown,
    )
    root = existing_directory("--root", options.root)
    disk = str(Path(options.disk).resolve()) if options.disk else ""
    if disk and not Path(disk).is_file():
        raise LabError(f"--disk {options.disk}: not a file")
    with contextlib.ExitStack() as stack:
        console = None
        if options.console:
            console = stack.enter_context(open_console(options.console)).fileno()
        plan = Plan(cache, kernel, machine, job, root, disk)
        return boot(plan, options.timeout, console)


def boot(plan: Plan, timeout: float, console: int | None) -> int:
    """Boot until the command was started, and report how the guest ended."""
    machine = plan.machine
    for attempt in range(1, BOOT_ATTEMPTS + 1):
        say(f"booting {plan.kernel.release} ({machine.accelerator}, {machine.cpus} cpus)")
        outcome = Guest(BOOT_SECONDS, timeout, console).run(plan)
        if outcome.stage is not Stage.BOOTING:
            return verdict(plan, outcome, timeout)
        if outcome.hasty:
            how = "has a clock that runs too fast"
        else:
            show_console(outcome.console)
            how = f"did not start within {BOOT_SECONDS:.0f} s" if outcome.late else "died at boot"
        say(f"the guest {how} (boot {attempt} of {BOOT_ATTEMPTS})")
    return EXIT_LAB


def verdict(plan: Plan, outcome: Outcome, timeout: float) -> int:
    """Turn a started guest's end into an exit status."""
    if outcome.status is not None and (outcome.powered_off or not plan.job.shutdown):
        return outcome.status
    show_console(outcome.console)
    if outcome.status is not None:
        how = f"hung in it for {SHUTDOWN_SECONDS:g} s" if outcome.late else "died in it"
        say(f"the guest was to shut down, and {how}; the command's status was {outcome.status}")
        return EXIT_TIMEOUT if outcome.late else EXIT_LAB
    if outcome.late:
        say(f"the command was still running after {timeout:g} s; the guest was killed")
        return EXIT_TIMEOUT
    say("the guest died while the command was running")
    return EXIT_LAB


def existing_directory(option: str, path: str) -> str:
    """Check a directory that an option names and return its absolute path."""
    if not Path(path).is_dir():
        raise LabError(f"{option} {path}: not a directory")
    return str(Path(path).resolve())


def open_console(path: str) -> contextlib.AbstractContextManager[io.FileIO]:
    """Open the file that gets the kernel's console."""
    try:
        return Path(path).open("wb", buffering=0)
    except OSError as error:
        raise LabError(f"--console {path}: {error.strerror}") from error


def run_on_host(options: argparse.Namespace) -> int:
    """Run the command on this very machine, which must have the driver."""
    if not Path("/dev/ublk-control").exists():
        raise LabError("this host has no /dev/ublk-control; load the driver: modprobe ublk_drv")
    try:
        child = subprocess.Popen(
            options.command,
            stdin=subprocess.DEVNULL,
            preexec_fn=functools.partial(die_with, os.getpid()),  # noqa: PLW1509 (no threads here)
            process_group=0,
        )
    except OSError as error:
        say(f"{options.command[0]}: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError) else 126
    try:
        status = child.wait(options.timeout)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        say(f"the command was still running after {options.timeout:g} s; it was killed")
        return EXIT_TIMEOUT
    return status if status >= 0 else 128 - status
