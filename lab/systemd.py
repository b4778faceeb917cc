"""systemd as process 1 of the guest: what the initramfs prepares for it on the command's root.

The host's own systemd runs, over units of our own: journald and the system bus, then the job. What
the host has enabled, and what units pull in for real hardware and disks, stays out of the guest.
"""

from __future__ import annotations

from typing import Final

# The programs, and the Debian packages that bring them.
SYSTEMD: Final = "/usr/lib/systemd/systemd"
PROGRAMS: Final = {SYSTEMD: "systemd", "/usr/bin/dbus-daemon": "dbus"}

# Goes to the end of the first script, which runs it with the root at /root.
PREPARE: Final = r"""
mkdir -p /root/etc/systemd
mount -t tmpfs -o mode=755 tmpfs /root/etc/systemd
cp -r /job/systemd/* /root/etc/systemd
# What the basic targets pull in: of all that, only the journal and the bus.
for unit in /root/usr/lib/systemd/system/*.target.wants/*; do
    name=${unit##*/}
    case $unit in
        */sysinit.target.wants/systemd-journald.service) ;;
        */sockets.target.wants/systemd-journald*.socket | */sockets.target.wants/dbus.socket) ;;
        */sysinit.target.wants/* | */sockets.target.wants/* | */local-fs.target.wants/* | \
        */timers.target.wants/* | */paths.target.wants/* | */basic.target.wants/*)
            ln -s /dev/null "/root/etc/systemd/system/$name" ;;
    esac
done
# Generators make units of the host's disks and of its init scripts.
for directory in system-generators system-environment-generators; do
    directory=/root/usr/lib/systemd/$directory
    if [ -d "$directory" ]; then mount -t tmpfs -o mode=755 tmpfs "$directory"; fi
done
# The host may be a container; the guest is none.
(cd /root && rm -f .dockerenv)
echo ublkwatch-lab >/root/etc/hostname
# A machine without an identity would be set up as a new one.
echo 75626c6b7761746368206c6162000000 >/root/etc/machine-id
exec switch_root /root /usr/lib/systemd/systemd
"""

FILES: Final = {
    "system.conf": """[Manager]
ShowStatus=no
DefaultLimitCORE=0:infinity
DefaultTasksMax=infinity
""",
    "journald.conf": """[Journal]
Storage=volatile
Audit=no
RateLimitBurst=0
""",
    "system/default.target": """[Unit]
Description=The lab's guest
Requires=basic.target
After=basic.target
Wants=dbus.service lab.service
""",
    # The job's relays and its command, with as few limits as under the script alone.
    "system/lab.service": """[Unit]
Description=The lab's job
After=dbus.service
[Service]
Type=exec
ExecStart=/run/lab/busybox sh /run/lab/main
LimitNOFILE=1024:1048576
Delegate=yes
KillMode=process
""",
}
