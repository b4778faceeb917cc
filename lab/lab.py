#!/usr/bin/env python3
"""Boot a Debian kernel that has ublk_drv and run one command in it.

A machine under test seldom has the ublk driver, so this brings one: kernels come from Debian's
archive, are kept in a cache outside the checkout, and boot in QEMU on the host's own root file
system. What the guest writes stays in the guest, except below the directories given by --rw.

This file is the command line. Each module imports only from those before it: base, archive,
kernels, kublk, systemd, fetch, initramfs, machine, run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from base import EXIT_LAB, LabError, cache_directory, say
from fetch import PROGRAMS, headers, programs, setup
from initramfs import INITS
from kernels import LINES, load_kernel, need_kernel
from kublk import kublk
from run import accelerator, known_accelerator, run_in_guest, run_on_host


def show_list() -> None:
    """Print the cached kernels and the accelerator."""
    cache = cache_directory()
    for name in LINES:
        kernel = load_kernel(cache, name)
        print(f"{name:<12} {f'{kernel.release} ({kernel.version})' if kernel else 'not set up'}")
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    print(f"{'accelerator':<12} {(known_accelerator(cache) or 'untried') if usable else 'tcg'}")


class Parser(argparse.ArgumentParser):
    """A parser whose complaint has the exit status of the lab, not one a command might give."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line and leave."""
        self.print_usage(sys.stderr)
        say(message)
        sys.exit(EXIT_LAB)


def positive(text: str) -> int:
    """Parse a number of CPUs."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def build_parser() -> Parser:
    """Describe the command line."""
    parser = Parser(prog="lab.py", description="Boot a kernel with ublk_drv and run a command.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    fetch_verb = verbs.add_parser("setup", help="fetch and install everything; fast when done")
    fetch_verb.add_argument("--kernel", action="append", choices=tuple(LINES))
    verbs.add_parser("headers", help="print the directory of the kernel's newest C headers")
    verbs.add_parser("kublk", help="print where the kernel's own ublk test server is")
    for package in PROGRAMS:
        verbs.add_parser(package, help=f"print the directory of the programs of {package}")
    verbs.add_parser("list", help="show the cached kernels and the accelerator")
    run = verbs.add_parser(
        "run", help="run a command in a fresh guest", usage="%(prog)s [OPTION]... -- CMD [ARG]..."
    )
    run.add_argument("--kernel", choices=tuple(LINES), default="lts")
    run.add_argument("--cpus", type=positive, default=2)
    run.add_argument(
        "--possible-cpus",
        type=positive,
        default=0,
        metavar="N",
        help="let its kernel expect so many: a ublk device has no more queues",
    )
    run.add_argument("--memory", default="2G", help="as QEMU writes it (default: %(default)s)")
    run.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    run.add_argument("--console", metavar="FILE", help="keep the kernel's console")
    run.add_argument("--rw", action="append", default=[], metavar="DIR", help="let it write DIR")
    run.add_argument(
        "--init", choices=tuple(INITS), help="process 1 of the guest (default: busybox, a script)"
    )
    run.add_argument(
        "--shutdown", action="store_true", help="end the guest as its systemd shuts a machine down"
    )
    run.add_argument("--root", default="/", metavar="DIR", help="boot on that root, not the host's")
    run.add_argument("--disk", metavar="FILE", help="/dev/vda there, for who loads virtio_blk")
    run.add_argument("--host", action="store_true", help="no guest: this host has the driver")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line. What follows the first "--" is the command's and stays untouched."""
    own, command = list(arguments), []
    if "--" in own:
        cut = own.index("--")
        own, command = own[:cut], own[cut + 1 :]
    parser = build_parser()
    options = parser.parse_args(own)
    if bool(command) != (options.verb == "run"):
        parser.error("`run` takes a command, after --; nothing else does")
    if options.verb == "run":
        if options.host and options.init:
            parser.error("--init is a guest's; --host runs under this machine's own")
        if options.shutdown and options.init != "systemd":
            parser.error("--shutdown is what a systemd does: --init systemd")
        options.init = options.init or "busybox"
    options.command = command
    return options


def main() -> int:
    """Do what was asked; whatever goes wrong in the lab itself is one message and status 125."""
    # A reader of our output that goes away ends us, and QEMU with us.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    options = parse(sys.argv[1:])
    try:
        if options.verb == "setup":
            names = options.kernel or tuple(LINES)
            setup(names)
            # Tried now, so that no `run` has to.
            accelerator(cache_directory(), need_kernel(cache_directory(), names[0]))
        elif options.verb == "headers":
            print(headers())
        elif options.verb == "kublk":
            print(kublk())
        elif options.verb in PROGRAMS:
            print(programs(options.verb))
        elif options.verb == "list":
            show_list()
        elif options.host:
            return run_on_host(options)
        else:
            return run_in_guest(options)
    except (LabError, OSError) as error:
        say(str(error))
        return EXIT_LAB
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
