"""The reference server: serves ublk devices, and shows the attach contract (ARCHITECTURE.md).

    python -m ublkwatch.demo.server --target ram                      attach: READY, line, serve
    python -m ublkwatch.demo.server --target ram --size 64M --create 0    create the device, serve
    python -m ublkwatch.demo.server --target ram --recover 0    recover it by commands of its own

It exits 0 when its devices are gone, 1 on an error that may pass, 78 on one that will not.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

from ublkwatch.demo.device import EX_CONFIG, Device, Geometry, ServerError, say_ready
from ublkwatch.demo.faults import Faults, next_fault
from ublkwatch.demo.targets import TargetError, TargetSpec


def attach(spec: TargetSpec, dev_id: int | None, faults: Faults) -> None:
    """Serve a device that lost its server: the attach contract, step by step."""
    known = dev_id is not None or not spec.needs_dev_id
    target = spec.open(dev_id, create=False) if known else None
    say_ready()
    faults.at("ready")
    line = sys.stdin.buffer.readline()
    if not line:  # not needed any more
        return
    faults.at("line")
    geometry = Geometry.of_line(line)
    if target is None:
        target = spec.open(geometry.dev_id, create=False)
    device = Device(geometry, target, faults)
    device.fetch()
    faults.at("fetched")
    faults.at("live")  # as far as a server can tell: it sends no control command
    device.wait()
    faults.at("ended")


def size(text: str) -> int:
    """Parse bytes, or a number with K, M or G behind it."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    return int(text[:-1] if factor > 1 else text) * factor


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ublkwatch.demo.server", description="A ublk server to learn and test by."
    )
    add = parser.add_argument
    add("--target", choices=("null", "ram", "loop"), default="null")
    add("--file", help="of ram and loop; {dev_id} is replaced")
    add("--size", type=size, help="bytes, or with K, M, G; default: as large as the file")
    add("--dev-id", type=int, help="attach: open the target of this device before the line comes")
    add("--create", type=lambda text: [int(part) for part in text.split(",")], metavar="N[,N...]")
    add("--recover", type=int, metavar="N", help="send START and END itself (delegated)")
    add("--attach", type=int, metavar="N", help="attach at once, without a line (attach = start)")
    add("--daemonize", action="store_true", help="serve in a child (with --recover, --attach)")
    add("--stop", type=int, metavar="N", help="only send STOP_DEV")
    add("--delete", type=int, metavar="N", help="only send DEL_DEV")
    add("--recovery", choices=("none", "plain", "reissue", "fail_io"), default="reissue")
    add("--queues", type=int, default=1)
    add("--depth", type=int, default=64)
    add("--max-io-buf-bytes", type=size, default=512 << 10)
    add("--block-size", type=int, default=512, help="512 or 4096")
    add("--fault", default="none", help="misbehave; see ublkwatch/demo/faults.py")
    add("--fault-file", type=Path, help="take the fault from this file's first line")
    return parser


def die_with_thread(caught: threading.ExceptHookArgs) -> None:
    """End the process: one that lacks a queue would look alive to the kernel for ever."""
    if not issubclass(caught.exc_type, SystemExit):
        print(f"server: {caught.exc_value!r}", file=sys.stderr, flush=True)
        os._exit(1)


def run(options: argparse.Namespace, spec: TargetSpec, faults: Faults) -> None:
    """Do what the command line says."""
    # Late, because asyncio is slower to load than all the rest, and attaching needs none of it.
    if options.recover is not None or options.attach is not None:
        from ublkwatch.demo import recover  # noqa: PLC0415

        recover.run(options, spec, faults)
    elif (options.create, options.stop, options.delete) != (None, None, None):
        from ublkwatch.demo import create  # noqa: PLC0415

        create.run(options, spec, faults)
    else:
        attach(spec, options.dev_id, faults)


def main() -> NoReturn:
    """Run the command line; never returns."""
    threading.excepthook = die_with_thread
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parser = build_parser()
    options = parser.parse_args()
    default = "/dev/shm/ublkwatch-ram-{dev_id}" if options.target == "ram" else ""  # noqa: S108
    spec = TargetSpec(options.target, options.file or default, options.size)
    if spec.kind == "loop" and not spec.file:
        parser.error("--target loop needs --file")
    try:
        faults = Faults(next_fault(options.fault_file) if options.fault_file else options.fault)
        faults.at("start")
        run(options, spec, faults)
    except (OSError, ValueError, ServerError, TargetError) as error:
        permanent = isinstance(error, (TargetError, ValueError))
        status = error.status if isinstance(error, ServerError) else EX_CONFIG if permanent else 1
        print(f"server: {error}", file=sys.stderr, flush=True)
        sys.exit(status)
    sys.exit(0)


if __name__ == "__main__":
    main()
