"""The reference server's other start: it makes its devices itself, by control commands."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import threading
from typing import Final

from ublkwatch.async_ring import AsyncRing
from ublkwatch.ctrl import UblkCtrl
from ublkwatch.demo.device import Device, Geometry, say_ready
from ublkwatch.demo.faults import Faults
from ublkwatch.demo.runfile import RunFiles
from ublkwatch.demo.targets import SECTOR, Target, TargetSpec
from ublkwatch.model import DevInfo
from ublkwatch.uapi import DevFlags

RECOVERY: Final = {
    "none": DevFlags(0),
    "plain": DevFlags.USER_RECOVERY,
    "reissue": DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_REISSUE,
    "fail_io": DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_FAIL_IO,
}


def run(options: argparse.Namespace, spec: TargetSpec, faults: Faults, run_files: RunFiles) -> None:
    """Create the devices and serve them to their end, or only send --stop and --delete."""
    if options.create is None:
        asyncio.run(control(options))
        return
    devices = asyncio.run(create(options, spec, faults, run_files))
    say_ready()
    ends = [
        threading.Thread(target=device.serve_to_its_end, args=(run_files,)) for device in devices
    ]
    for end in ends:
        end.start()
    for end in ends:
        end.join()


async def create(
    options: argparse.Namespace, spec: TargetSpec, faults: Faults, run_files: RunFiles
) -> list[Device]:
    """Add the devices and bring them to LIVE; when one fails, all are deleted again."""
    ring = AsyncRing()
    ctrl = UblkCtrl(ring)
    devices: dict[int, Device | None] = {}
    try:
        for dev_id in options.create:
            target = spec.open(dev_id, create=True)
            info = await ctrl.add_dev(
                dev_id,
                queues=options.queues,
                depth=options.depth,
                max_io_buf_bytes=options.max_io_buf_bytes,
                flags=RECOVERY[options.recovery],
            )
            devices[dev_id] = None
            basic = basic_params(info, target, options.block_size)
            await ctrl.set_params(dev_id, {"basic": basic})
            device = Device(geometry(info, basic["dev_sectors"]), target, faults)
            devices[dev_id] = device
            await asyncio.to_thread(device.fetch)
            faults.at("fetched")
            # Before it can be LIVE: then it is looked for.
            run_files.write(dev_id, device.threads())
            await ctrl.start_dev(dev_id, os.getpid())
            info = await ctrl.get_dev_info(dev_id)
            granted = f"queues={info.nr_hw_queues} depth={info.queue_depth} flags={info.flags:#x}"
            print(f"LIVE {dev_id} {granted}", flush=True)
    except BaseException:
        for dev_id, made in devices.items():
            run_files.remove(dev_id)
            await remove(ctrl, dev_id, made)
        raise
    finally:
        ring.close()
    faults.at("live")
    return [device for device in devices.values() if device is not None]


async def remove(ctrl: UblkCtrl, dev_id: int, device: Device | None) -> None:
    """Delete a device of ours; STOP first, since DEL_DEV waits until we have let go of it."""
    with contextlib.suppress(OSError):
        await ctrl.stop_dev(dev_id)
        if device is not None:
            await asyncio.to_thread(device.close)
        await ctrl.del_dev(dev_id)


def geometry(info: DevInfo, dev_sectors: int) -> Geometry:
    """Return what the kernel granted."""
    return Geometry(
        dev_id=info.dev_id,
        char_device=f"/dev/ublkc{info.dev_id}",
        queues=info.nr_hw_queues,
        depth=info.queue_depth,
        max_io_buf_bytes=info.max_io_buf_bytes,
        flags=info.flags,
        dev_sectors=dev_sectors,
    )


def basic_params(info: DevInfo, target: Target, block_size: int) -> dict[str, int]:
    """Return ``struct ublk_param_basic`` for a new device."""
    shift = block_size.bit_length() - 1
    return {
        "attrs": target.attrs,
        "logical_bs_shift": shift,
        "physical_bs_shift": max(shift, 12),
        "io_opt_shift": max(shift, 12),
        "io_min_shift": shift,
        "max_sectors": info.max_io_buf_bytes // SECTOR,
        "dev_sectors": target.sectors or 0,
    }


async def control(options: argparse.Namespace) -> None:
    """--stop and --delete."""
    ring = AsyncRing()
    try:
        ctrl = UblkCtrl(ring)
        if options.stop is not None:
            await ctrl.stop_dev(options.stop)
        if options.delete is not None:
            await ctrl.del_dev(options.delete)
    finally:
        ring.close()
