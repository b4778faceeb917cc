"""What tests/test_reboot.py runs in the guest that it shuts down: a file system on a ublk device.

    python going_down.py SHARE

/dev/vda is an ext4, and what the device stores its data in: a disk, since a file of the host's is
cached here in ways that have nothing to do with ublk. SHARE takes the journal. The device's server
was lost once and brought back by ublkwatch, so it is a unit of ours; data is written, and nothing
is synced, stopped or unmounted: that is left to systemd.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TOP = Path(__file__).parents[1]
STATUS = Path("/run/ublkwatch/status.json")
MOUNT = Path("/srv/disk")
KEPT = b"what was written before the shutdown\n" * 30_000
BEGINS = "the shutdown begins"
DEADLINE_S = 300.0
TRANSIENT = ("systemd-run", "--quiet", "-p", "DefaultDependencies=no")


def run(*command: str | Path) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd="/", stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def until(condition: Callable[[], object], what: str, *, tell: bool = True) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            told = run("journalctl", "-q", "-n", "60") if tell else ""
            sys.exit(f"not within {DEADLINE_S:g} s: {what}\n{told}")
        time.sleep(0.2)


def watched(recoveries: int, dev_id: int = 0) -> int:
    """Return the server of a device if it is well after so many recoveries; else 0."""
    try:
        devices = json.loads(STATUS.read_text())["devices"]
    except FileNotFoundError:
        return 0
    wanted = {"phase": "watching", "state": "LIVE", "recoveries": recoveries, "dev_id": dev_id}
    return next((each["server_pid"] for each in devices if wanted.items() <= each.items()), 0)


def to_the_end(share: Path) -> None:
    """Have the journal written out until systemd ends, when nobody else sees it."""
    output = f"StandardOutput=file:{share}/journal"
    run(*TRANSIENT, "-p", output, "journalctl", "-fn", "all")


def service() -> None:
    """Have the service installed and started, from wherever the tests are, however slow it is."""
    drop_in = Path("/run/systemd/system/ublkwatch.service.d/test.conf")
    drop_in.parent.mkdir(parents=True)
    private = "PrivateTmp=no\n" if any(map(TOP.is_relative_to, ("/tmp", "/var/tmp"))) else ""
    drop_in.write_text(f"[Service]\nWatchdogSec=0\nTimeoutStartSec=600\n{private}")
    run(sys.executable, "-m", "ublkwatch", "install-systemd")
    run("systemctl", "start", "ublkwatch")
    run("systemctl", "reload", "ublkwatch")


def main(share: Path) -> None:
    for mine in ("/etc/ublkwatch", "/var/lib/ublkwatch"):  # the host's: here they are a copy
        shutil.rmtree(mine, ignore_errors=True)
    run("modprobe", "-a", "ublk_drv", "virtio_blk")
    until(Path("/dev/vda").is_block_device, "the disk is there")
    to_the_end(share)
    options = ("--target", "loop", "--file", "/dev/vda", "--create", "0")
    run(*TRANSIENT, sys.executable, "-m", "ublkwatch.demo.server", *options)
    until(Path("/dev/ublkb0").exists, "the device is there")
    service()
    until(lambda: watched(recoveries=0), "it is watched")
    os.kill(watched(recoveries=0), signal.SIGKILL)
    until(lambda: watched(recoveries=1), "it was recovered")
    MOUNT.mkdir()
    run("mount", "/dev/ublkb0", MOUNT)
    (MOUNT / "kept").write_bytes(KEPT)
    run("logger", BEGINS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
