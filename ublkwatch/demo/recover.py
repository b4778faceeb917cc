"""The reference server's other ways to a device that lost its server: as public servers go.

    python -m ublkwatch.demo.server --recover 0    handoff = "delegated": START and END by itself
    python -m ublkwatch.demo.server --attach 0     attach = "start": attaches as soon as it starts

With --daemonize a child serves, and the process that was started exits: 0 once the device is LIVE
(--recover) or the child has fetched every tag (--attach), 1 when the child failed.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
from collections.abc import Callable
from typing import Final

from ublkwatch.async_ring import AsyncRing
from ublkwatch.ctrl import CtrlError, UblkCtrl
from ublkwatch.demo.create import geometry
from ublkwatch.demo.device import Device
from ublkwatch.demo.faults import Faults
from ublkwatch.demo.runfile import RunFiles
from ublkwatch.demo.targets import TargetSpec

BUSY_S: Final = 30.0
BUSY_POLL_S: Final = 0.02


def run(options: argparse.Namespace, spec: TargetSpec, faults: Faults, run_files: RunFiles) -> None:
    """Attach to the device, and serve it to its end."""
    done = daemonize() if options.daemonize else None
    device = asyncio.run(bring_back(options, spec, faults, run_files))
    if done is not None:
        done()
    faults.at("live")
    device.serve_to_its_end(run_files)


def daemonize() -> Callable[[], None]:
    """Go on in a child; return what lets its parent exit well."""
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        os._exit(0 if os.read(reading, 1) else 1)
    os.setsid()
    os.close(reading)
    return lambda: os.close(writing) if os.write(writing, b"1") else None


async def bring_back(
    options: argparse.Namespace, spec: TargetSpec, faults: Faults, run_files: RunFiles
) -> Device:
    """Do what is left to this server of START, fetching every tag, and END."""
    delegated = options.recover is not None
    dev_id: int = options.recover if delegated else options.attach
    ring = AsyncRing()
    try:
        ctrl = UblkCtrl(ring)
        info, params = await ctrl.get_dev_info(dev_id), await ctrl.get_params(dev_id)
        target = spec.open(dev_id, create=False)
        faults.at("ready")
        if delegated:
            await start(ctrl, dev_id)
        faults.at("line")
        device = Device(geometry(info, params["basic"]["dev_sectors"]), target, faults)
        run_files.write(dev_id)  # before it can be LIVE: then it is looked for
        await asyncio.to_thread(device.fetch)
        run_files.write(dev_id, device.threads())
        faults.at("fetched")
        if delegated:
            await ctrl.end_user_recovery(dev_id, os.getpid(), timeout_s=BUSY_S)
    finally:
        ring.close()
    return device


async def start(ctrl: UblkCtrl, dev_id: int) -> None:
    """Send START, again while the kernel still lets go of the old server."""
    deadline = asyncio.get_running_loop().time() + BUSY_S
    while True:
        try:
            await ctrl.start_user_recovery(dev_id)
        except CtrlError as error:
            if error.errno != errno.EBUSY or asyncio.get_running_loop().time() > deadline:
                raise
        else:
            return
        await asyncio.sleep(BUSY_POLL_S)
