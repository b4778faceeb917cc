"""What tests/test_reboot.py runs in a guest that boots with ublkwatch: a server lost in early boot.

    python coming_up.py mount     by a unit that local-fs.target waits for
    python coming_up.py SHARE     when the guest is up, and before it is shut down

/dev/vda is an ext4 behind ublkb0, whose server is lost when it is about to be mounted. SHARE takes
the journal.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from going_down import BEGINS, KEPT, MOUNT, TOP, run, to_the_end, until, watched

BUS = Path("/run/dbus/system_bus_socket")
EARLY = Path("/run/early")
SERVER = "/usr/bin/python3 -m ublkwatch.demo.server"
LOADED = "/usr/sbin/modprobe -a ublk_drv virtio_blk"
AT_BOOT = "[Unit]\nDefaultDependencies=no\n"
UNITS = {
    "disk.service": f"""{AT_BOOT}
[Service]
ExecStartPre={LOADED}
ExecStart={SERVER} --target loop --file /dev/vda --create 0
""",
    # What fsck and mount are to a line of fstab; there is no udevd here to tell of the device.
    "disk-mounted.service": f"""{AT_BOOT}
After=disk.service
Before=local-fs.target
[Service]
Type=oneshot
RemainAfterExit=yes
TimeoutStartSec=900
ExecStart=/usr/bin/python3 {__file__} mount
""",
    # A daemon that is emulated, beside others, takes its time.
    "ublkwatch.service.d/test.conf": "[Service]\nWatchdogSec=0\nTimeoutStartSec=600\n",
}
WANTED = {
    "default.target.wants": ("ublkwatch.service", "disk.service"),
    "local-fs.target.requires": ("disk-mounted.service",),
}


def files() -> Iterator[tuple[str, str]]:
    """Yield what the guest's root needs below /usr/lib/systemd/system: paths and texts."""
    units = TOP / "deploy/systemd"
    text = (units / "ublkwatch.service").read_text()
    program = f"/usr/bin/env PYTHONPATH={TOP} /usr/bin/python3 -m ublkwatch run"
    yield "ublkwatch.service", text.replace("/usr/bin/ublkwatch run", program)
    for name in ("early-boot", "children", "newer-systemd"):
        drop_in = f"{name}.conf"
        yield f"ublkwatch.service.d/{drop_in}", (units / "drop-ins" / drop_in).read_text()
    yield from UNITS.items()


def mount() -> None:
    """Lose the server, and mount its device at once."""
    until(lambda: watched(recoveries=0), "it is watched", tell=False)
    EARLY.write_text("bus" if BUS.exists() else "no bus")
    os.kill(watched(recoveries=0), signal.SIGKILL)
    MOUNT.mkdir(exist_ok=True)
    run("mount", "/dev/ublkb0", MOUNT)


def main(share: Path) -> None:
    to_the_end(share)
    assert EARLY.read_text() == "no bus", "else it was not early"
    assert run("systemctl", "is-active", "local-fs.target").strip() == "active"
    child = watched(recoveries=1)
    assert child, run("ublkwatch", "status")
    assert "/ublkwatch.service/" in Path(f"/proc/{child}/cgroup").read_text()

    # As soon as there is a bus, servers are units.
    ram = ("--target", "ram", "--size", "8M", "--create", "1")
    run("systemd-run", "--quiet", *SERVER.split(), *ram)
    until(lambda: watched(recoveries=0, dev_id=1), "the other one is watched")
    os.kill(watched(recoveries=0, dev_id=1), signal.SIGKILL)
    until(lambda: watched(recoveries=1, dev_id=1), "it was recovered")
    group = Path(f"/proc/{watched(recoveries=1, dev_id=1)}/cgroup").read_text()
    assert "/ublkwatch-ublkb1.service" in group, group

    (MOUNT / "kept").write_bytes(KEPT)
    run("logger", BEGINS)


if __name__ == "__main__":
    if sys.argv[1] == "mount":
        mount()
    else:
        main(Path(sys.argv[1]))
