"""What tests put on devices: file systems, loop and mapped devices, swap."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from supervisor import DEADLINE_S


def tool(*command: str | Path) -> str:
    # There is no udevd here: device-mapper's nodes are its library's to make.
    env = os.environ | {"DM_DISABLE_UDEV": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=DEADLINE_S, env=env
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


MAPPED = Path("/dev/mapper/ublkwatch-test")


class Stack:
    """What is put on devices; all of it is taken down again, before they go."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._undo: list[tuple[str | Path, ...]] = []

    def mount(self, device: str, point: Path | None = None) -> Path:
        """Make an ext4 on a device, and mount it."""
        if point is None:
            point = self._directory / f"on-{device.rpartition('/')[2]}"
            point.mkdir()
        tool("mkfs.ext4", "-q", "-F", device)
        self.attach(device, point)
        return point

    def attach(self, *words: str | Path) -> None:
        """mount(8), with the place as the last word; who is on it may end a moment later."""
        tool("mount", *words)
        self._undo.append(("umount", "--lazy", words[-1]))

    def loop(self, image: Path) -> str:
        """Make a loop device of a file."""
        tool("modprobe", "loop")
        device = tool("losetup", "--find", "--show", image)
        self._undo.append(("losetup", "-d", device))
        return device

    def linear(self, on: str) -> str:
        """Make a device-mapper device over a device."""
        tool("modprobe", "dm_mod")
        table = f"0 {tool('blockdev', '--getsz', on)} linear {on} 0"
        tool("dmsetup", "create", MAPPED.name, "--table", table)
        self._undo.append(("dmsetup", "remove", "--deferred", MAPPED.name))
        return str(MAPPED)

    def stall(self) -> None:
        """Let I/O of the device-mapper device wait, until it goes on or all is taken down."""
        tool("dmsetup", "suspend", "--noflush", "--nolockfs", MAPPED.name)
        self._undo.append(("dmsetup", "resume", MAPPED.name))

    def go_on(self) -> None:
        tool(*self._undo.pop())

    def overlay(self, on: Path) -> Path:
        point = self._directory / "merged"
        for each in (point, on / "upper", on / "work", self._directory / "lower"):
            each.mkdir()
        layers = f"lowerdir={self._directory}/lower,upperdir={on}/upper,workdir={on}/work"
        self.attach("-t", "overlay", "-o", layers, "overlay", point)
        return point

    def swap(self, device: str) -> None:
        tool("mkswap", device)
        tool("swapon", device)
        self._undo.append(("swapoff", device))

    def down(self) -> None:
        while self._undo:
            tool(*self._undo.pop())
