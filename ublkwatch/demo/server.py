"""The reference server: serves ublk devices, and shows the attach contract (docs/servers.md).

    python -m ublkwatch.demo.server --target ram                  attach: READY, line(s), serve
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
from ublkwatch.demo.runfile import RunFiles, command
from ublkwatch.demo.targets import Target, TargetError, TargetSpec


class Attaching:
    """Serves devices that lost their server: the attach contract, step by step, for one or many."""

    def __init__(self, spec: TargetSpec, dev_ids: list[int], faults: Faults, run: RunFiles) -> None:
        """Open what can be opened before a line says which device it is: the targets."""
        self._spec, self._faults, self._run = spec, faults, run
        self._targets: dict[int | None, Target] = {}
        if not spec.needs_dev_id:
            self._targets[None] = spec.open(None, create=False)
        else:
            for dev_id in dev_ids:
                self._targets[dev_id] = spec.open(dev_id, create=False)
        self._changed = threading.Condition()
        self._lines = 0  # taken so far
        self._busy = 0  # devices that are being attached or served
        self._no_more = False  # end of file
        self._failed: Exception | None = None

    def serve(self) -> None:
        """Attach each device as its line comes; return when all that came have ended."""
        say_ready()
        self._faults.at("ready")
        threading.Thread(target=self._read, name="lines", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: not self._busy and (self._lines or self._no_more))
        if self._failed is not None:
            raise self._failed

    def _read(self) -> None:
        # Not sys.stdin: its lock would be held, in a thread that never ends, when we exit.
        rest = b""
        while part := os.read(0, 1 << 16):
            *lines, rest = (rest + part).split(b"\n")
            self._take(lines)
        self._take([rest] if rest else [])
        with self._changed:
            self._no_more = True
            self._changed.notify()

    def _take(self, lines: list[bytes]) -> None:
        with self._changed:
            self._lines += len(lines)
            self._busy += len(lines)
        for line in lines:
            # A device that takes long must not delay the next: the kernel waits for each of them.
            threading.Thread(target=self._one, args=(line,), daemon=True).start()

    def _one(self, line: bytes) -> None:
        try:
            self._faults.at("line")
            geometry = Geometry.of_line(line)
            device = Device(geometry, self._target(geometry.dev_id), self._faults)
            self._run.write(geometry.dev_id)  # before it can be LIVE: then it is looked for
            device.fetch()
            self._run.write(geometry.dev_id, device.threads())
            self._faults.at("fetched")
            self._faults.at("live")  # as far as a server can tell: it sends no control command
            device.serve_to_its_end(self._run)
        except (OSError, ServerError, TargetError) as error:
            # The others go on: that one cannot be served is no reason to lose them all.
            print(f"server: {error}", file=sys.stderr, flush=True)
            self._failed = self._failed or error
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify()

    def _target(self, dev_id: int) -> Target:
        if self._spec.needs_dev_id:
            return self._targets.get(dev_id) or self._spec.open(dev_id, create=False)
        if self._lines > 1 and self._spec.kind != "null":
            raise ServerError("--file must say {dev_id} where one server has several devices", 78)
        return self._targets[None]


def size(text: str) -> int:
    """Parse bytes, or a number with K, M or G behind it."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    return int(text[:-1] if factor > 1 else text) * factor


def numbers(text: str) -> list[int]:
    """Parse device numbers with commas between them."""
    return [int(part) for part in text.split(",")]


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ublkwatch.demo.server", description="A ublk server to learn and test by."
    )
    add = parser.add_argument
    add("--target", choices=("null", "ram", "loop"), default="null")
    add("--file", help="of ram and loop; {dev_id} is replaced")
    add("--size", type=size, help="bytes, or with K, M, G; default: as large as the file")
    add("--dev-id", type=numbers, default=[], metavar="N[,N...]",
        help="attach: open the targets of these devices before their lines come")  # fmt: skip
    add("--create", type=numbers, metavar="N[,N...]")
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
    add("--run-dir", help="where run files go; default: /run/ublk-servers, for root; '': nowhere")
    add("--group", default="", help="what run files call the devices that one process serves")
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
    if options.create is not None and len(options.create) > 1 and not options.group:
        options.group = "reference-" + "-".join(map(str, options.create))
    run_files = RunFiles(
        options.run_dir, command(spec, options.group, options.run_dir), options.group
    )
    # Late, because asyncio is slower to load than all the rest, and attaching needs none of it.
    if options.recover is not None or options.attach is not None:
        from ublkwatch.demo import recover  # noqa: PLC0415

        recover.run(options, spec, faults, run_files)
    elif (options.create, options.stop, options.delete) != (None, None, None):
        from ublkwatch.demo import create  # noqa: PLC0415

        create.run(options, spec, faults, run_files)
    else:
        Attaching(spec, options.dev_id, faults, run_files).serve()


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
