"""The guest's side: the initramfs with its two scripts, and the job that they run.

The first script builds the root that the command sees: the host's, or another one, read-only over
9p, under an overlay in memory. The second runs the job there and tells its progress: as process 1,
or as a service of the systemd that is.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import systemd
from base import EXIT_LAB
from kernels import Kernel

# Process 1 in the initramfs: builds the root that the command sees, then becomes process 1 in it.
STAGE1: Final = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /lower /upper /root
mount -t proc proc /proc
mount -t devtmpfs devtmpfs /dev
exec </dev/null >/dev/console 2>&1
for module in /modules/*.ko; do insmod "$module" || echo "lab: insmod $module failed"; done

nine=trans=virtio,version=9p2000.L,msize=512000
# Nobody else changes what is read-only here, so it may be cached without asking again.
mount -t 9p -o $nine,ro,cache=loose root /lower || exec poweroff -f
mount -t tmpfs -o mode=755 tmpfs /upper
mkdir /upper/data /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work overlay /root ||
    exec poweroff -f

# A working directory below a directory that is covered by a tmpfs is carried over.
. /job/directory
keep=
case $directory/ in /tmp/*|/var/tmp/*|/run/*)
    mkdir /keep && [ -d "/root$directory" ] && mount --bind "/root$directory" /keep && keep=1 ;;
esac
mkdir -p /root/proc /root/sys /root/dev /root/run /root/tmp /root/var/tmp
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /root/run
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /root/tmp
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /root/var/tmp
mkdir -p -m 1777 /root/run/lock
if [ "$keep" ]; then mkdir -p "/root$directory" && mount --move /keep "/root$directory"; fi

modules=/root/lib/modules/$(uname -r)
mkdir -p "$modules"
mount -t 9p -o $nine,ro,cache=loose modules "$modules"
. /job/mounts

mount --move /proc /root/proc
mount --move /dev /root/dev
mount -t sysfs sysfs /root/sys
mount -t debugfs debugfs /root/sys/kernel/debug
mount -t tracefs tracefs /root/sys/kernel/tracing
mount -t cgroup2 -o nsdelegate cgroup2 /root/sys/fs/cgroup
cd /root/dev
mkdir -p pts shm mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts pts
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs shm
mount -t mqueue mqueue mqueue
ln -s /proc/self/fd fd
ln -s fd/0 stdin
ln -s fd/1 stdout
ln -s fd/2 stderr
cd /
hostname ublkwatch-lab
ifconfig lo 127.0.0.1 up

mkdir /root/run/lab
cp -r /bin/busybox /job/main /job/command /job/flush /job/end /root/run/lab
. /job/init
"""
INITS: Final[Mapping[str, str]] = {
    "busybox": "exec switch_root /root /run/lab/busybox sh /run/lab/main\n",
    "systemd": systemd.PREPARE,
}

# On the real root. The command's output goes through pipes because a program may
# reopen /dev/stdout, and a virtio port can be opened only once.
STAGE2: Final = r"""cd /run/lab
box=/run/lab/busybox
# The ports are named after the number of their virtio device, and turn up one after the other.
until [ -c /dev/vport*p1 ] && [ -c /dev/vport*p2 ] && [ -c /dev/vport*p3 ]; do
    $box usleep 5000
done
port=$(echo /dev/vport*p1)
port=${port%1}
ulimit -H -n 1048576
$box mkfifo out err
$box cat out >"${port}1" & spared="1 $$ $!"
$box cat err >"${port}2" & spared="$spared $!"
exec 3<>"${port}3"
# The kernel patches itself once more when it trusts its clock; QEMU's TCG may get that wrong, and a
# guest that dies of it shall do so before anything is begun.
tries=60
while read -r clock </sys/devices/system/clocksource/clocksource0/current_clocksource &&
    [ "$clock" = tsc-early ] && [ "$tries" -gt 0 ]; do
    tries=$((tries - 1))
    $box usleep 50000
done
# Long enough that it does not matter how late the host reads either of them.
echo "tick $($box cut -d ' ' -f 1 /proc/uptime)" >&3
$box usleep 2000000
echo "tock $($box cut -d ' ' -f 1 /proc/uptime)" >&3
read -r go <&3
echo started >&3
$box setsid $box sh command </dev/null >out 2>err 3>&- &
wait $!
echo "exit $?" >&3
. ./end
"""
# How a guest ends behind its command: at once, or as a machine does.
END: Final = r"""# What the command left behind would keep the pipes open.
# Kernel threads take no notice.
for process in /proc/[0-9]*; do
    process=${process#/proc/}
    case " $spared " in *" $process "*) ;; *) kill -9 "$process" 2>/dev/null ;; esac
done
. ./flush
wait
echo done >&3
exec $box poweroff -f
"""
SHUTDOWN: Final = "exec systemctl poweroff\n"


@dataclass(frozen=True)
class Job:
    """What to run in a guest, and which host directories it may write."""

    command: tuple[str, ...]
    directory: str
    environment: Mapping[str, str]
    writable: tuple[str, ...] = ()
    init: str = "busybox"
    shutdown: bool = False

    def files(self) -> dict[str, str]:
        """Return the job as shell scripts; quoting carries every byte that an argument can hold."""
        variables = [f"{key}={value}" for key, value in self.environment.items()]
        run = shlex.join(["/usr/bin/env", "-i", *variables, *self.command])
        mounts = [
            f"mkdir -p {shlex.quote('/root' + path)} && mount -t 9p "
            f"-o $nine,rw,cache=mmap,access=client rw{number} {shlex.quote('/root' + path)}\n"
            for number, path in enumerate(self.writable)
        ]
        return {
            "directory": f"directory={shlex.quote(self.directory)}\n",
            "mounts": "".join(mounts),
            "command": f"cd {shlex.quote(self.directory)} || exit {EXIT_LAB}\nexec {run}\n",
            "flush": "".join(f"$box sync -f {shlex.quote(p)}\n" for p in self.writable),
            "main": STAGE2,
            "end": SHUTDOWN if self.shutdown else END,
            "init": INITS[self.init],
            **{f"systemd/{name}": text for name, text in systemd.FILES.items()},
        }


def cpio_entry(number: int, name: str, mode: int, data: bytes = b"") -> bytes:
    """Return one member of a "newc" cpio archive, the format of an initramfs."""
    path = name.encode() + b"\0"
    numbers = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in numbers) + path
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


def make_initramfs(cache: Path, kernel: Kernel, job: Job) -> bytes:
    """Build the initramfs for one run; its parts are small and plain, so it takes no time."""
    modules = cache / kernel.name / kernel.modules
    members: list[tuple[str, int, bytes]] = [
        (folder, stat.S_IFDIR | 0o755, b"")
        for folder in ("bin", "dev", "job", "job/systemd", "job/systemd/system", "modules")
    ]
    members.append(("bin/busybox", stat.S_IFREG | 0o755, (cache / "busybox").read_bytes()))
    members.append(("init", stat.S_IFREG | 0o755, STAGE1.encode()))
    for number, module in enumerate(kernel.boot_modules):
        data = (modules / module).read_bytes()
        members.append((f"modules/{number:02}-{Path(module).name}", stat.S_IFREG | 0o644, data))
    for name, text in job.files().items():
        members.append((f"job/{name}", stat.S_IFREG | 0o644, os.fsencode(text)))
    entries = [cpio_entry(number, *member) for number, member in enumerate(members, 1)]
    return b"".join(entries) + cpio_entry(0, "TRAILER!!!", 0)
