"""Placement: whether something lies on a ublk device, or on anything that is stacked on one.

A supervisor that reads its state from the very disk whose server died waits for itself. What lies
where is read from mountinfo and sysfs, which are the kernel's memory. A path is walked component by
component, and each is looked at only once it is known that the file system which holds it is on no
ublk device: so the question itself never waits for a dead one.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_UBLK = re.compile(r"ublkb\d+")
_LINKS_MAX = 40  # as the kernel's own limit (path_resolution(7))
_DEPTH_MAX = 16  # of devices and file systems, one on the other
# Options of a file system that name what else it lies on.
_LAYERS = ("lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir")
_DEVICES = ("logdev", "rtdev", "journal_path", "journal_dev")

Chain = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that lies on a ublk device."""

    what: str  # which of our files this is, in words
    path: str
    chain: Chain  # from the file system down to the ublk device: ("ext4", "/dev/dm-3", "ublkb0")

    @property
    def device(self) -> str:
        """The ublk device, ublkbN."""
        return self.chain[-1]

    def __str__(self) -> str:
        """Say what lies where: a clause, without the way out."""
        return f"{self.what} {self.path} is on {', on '.join(self.chain)}"


@dataclass(frozen=True, slots=True)
class _Mount:
    number: int
    parent: int
    device: str  # "major:minor"
    point: str
    kind: str
    source: str
    options: tuple[tuple[str, str], ...]


def findings(
    files: Mapping[str, str | int], root: Path = Path("/"), *, swap: bool
) -> list[Finding]:
    """Return which of ``files`` lie on a ublk device.

    They are paths, or descriptors of ours, by what they are in words. With ``swap`` the areas that
    the kernel pages to are asked about, too. What does not exist yet lies where it would be made.
    ``root`` is where /proc, /sys and all else are, for tests. What cannot be read is taken to be
    elsewhere: no refusal by guessing.
    """
    look = _Look(root)
    asked: list[tuple[str, str | int]] = list(files.items())
    if swap:
        asked += [("swap", area) for area in look.swap_areas()]
    found = []
    for what, where in asked:
        if isinstance(where, int):
            path, chain = look.at_descriptor(where)
        else:
            path, chain = where, look.at_path(where) if where.startswith("/") else None
        if chain is not None:
            found.append(Finding(what, path, chain))
    return found


class _Look:
    """One look: mounts do not change amid it."""

    def __init__(self, root: Path) -> None:
        self._root = str(root).rstrip("/")
        self._depth = 0
        self._chains: dict[int, Chain | None] = {}  # by mount
        mounts = [_mount(line) for line in self._lines("/proc/self/mountinfo")]
        self._mounts = {each.number: each for each in mounts}
        outermost = [
            each for each in mounts if each.parent not in self._mounts.keys() - {each.number}
        ]
        self._top = next((each for each in outermost if each.point == "/"), None) or self._unnamed()
        self._inner = {  # who goes from a mount to a place is in this one then
            (self._top.number if each in outermost else each.parent, each.point): each
            for each in mounts
            if each is not self._top
        }

    def swap_areas(self) -> list[str]:
        return [_plain(line.split()[0]) for line in self._lines("/proc/swaps")[1:] if line.strip()]

    def at_descriptor(self, number: int) -> tuple[str, Chain | None]:
        """Return the name of a file that we have open, and on what it lies.

        Its name says nothing of that: it may be one from before a chroot(2).
        """
        name = self._link(f"/proc/self/fd/{number}") or ""
        for line in self._lines(f"/proc/self/fdinfo/{number}"):
            key, _, value = line.partition(":")
            if key == "mnt_id" and (mount := self._mounts.get(int(value))) is not None:
                return name, self._below(mount)
        return name, None

    # --- paths -----------------------------------------------------------------------------------

    def at_path(self, path: str) -> Chain | None:
        """Return on what a path lies, down to a ublk device; None if there is none below it."""
        with self._deeper() as allowed:
            return self._walk(path) if allowed else None

    def _walk(self, path: str) -> Chain | None:
        top = self._entered(self._top, "/")
        mount, here, links = top, "", 0
        chain = self._below(mount)
        parts = _parts(path)
        while parts:
            part = parts.pop()
            if part == "..":
                if chain:
                    return chain  # whether what we passed is a link is that device's to say
                here = here.rpartition("/")[0]
                mount = self._mount_of(top, here)
                chain = self._below(mount)
                continue
            following = f"{here}/{part}"
            entered = self._entered(mount, following)
            if entered is not mount:
                mount, here, chain = entered, following, self._below(entered)
            elif chain:
                here = following  # not looked at: another file system may be mounted below it
            else:
                target = self._link(following)
                if target is None:
                    here = following
                    continue
                links += 1
                if links > _LINKS_MAX:
                    return None
                parts += _parts(target)
                if target.startswith("/"):
                    mount, here, chain = top, "", self._below(top)
        return chain or self._node(here)

    def _node(self, path: str) -> Chain | None:
        """Return what a device's node, such as swap's, stands for; None if it is none."""
        directory, _, name = path.rpartition("/")
        if directory == "/dev":
            return self._device(name)
        try:
            status = os.lstat(self._root + path)
        except OSError:
            return None
        if not stat.S_ISBLK(status.st_mode):
            return None
        return self._by_number(f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")

    def _link(self, path: str) -> str | None:
        try:
            return os.readlink(self._root + path)  # noqa: PTH115 - for a path that is a str
        except OSError:
            return None  # no link, or not there

    # --- mounts ----------------------------------------------------------------------------------

    def _unnamed(self) -> _Mount:
        """Return what / is in where no mount is shown for it, as in a chroot."""
        try:
            number = os.stat(self._root + "/").st_dev  # noqa: PTH116 - for a path that is a str
        except OSError:
            number = 0
        device = f"{os.major(number)}:{os.minor(number)}"
        return _Mount(-1, -1, device, "/", "a file system", "", ())

    def _entered(self, mount: _Mount, point: str) -> _Mount:
        """Return the mount that one is in who goes to ``point`` inside of ``mount``."""
        while (inner := self._inner.get((mount.number, point))) is not None:
            mount = inner  # and another one may be mounted over that
        return mount

    def _mount_of(self, top: _Mount, real: str) -> _Mount:
        """Return the mount that a path without links is in."""
        mount, here = top, ""
        for part in reversed(_parts(real)):
            here = f"{here}/{part}"
            mount = self._entered(mount, here)
        return mount

    def _below(self, mount: _Mount) -> Chain | None:
        """Return on what a file system lies, itself first, down to a ublk device; or None."""
        if mount.number not in self._chains:
            self._chains[mount.number] = None  # also while we look: nothing lies upon itself
            chains = (below for below in self._foundations(mount) if below is not None)
            found = next(chains, None)
            self._chains[mount.number] = (mount.kind, *found) if found else None
        return self._chains[mount.number]

    def _foundations(self, mount: _Mount) -> Iterator[Chain | None]:
        if not mount.device.startswith("0:"):
            yield self._by_number(mount.device)
        elif mount.kind == "btrfs":
            for name in self._btrfs(mount.source):
                yield self._device(name)
        elif mount.kind != "overlay":
            for source in mount.source.split(":"):  # bcachefs has several
                if source.startswith("/dev/"):
                    yield self.at_path(source)
        for key, value in mount.options:
            if mount.kind == "overlay" and key in _LAYERS:
                for layer in re.split(r"(?<!\\):", value):
                    if layer.startswith("/"):
                        yield self.at_path(layer.replace("\\:", ":"))
            elif key in _DEVICES and value.startswith("/"):
                yield self.at_path(value)

    def _btrfs(self, source: str) -> list[str]:
        """Return all devices of the file system that has ``source`` among them."""
        own = source.rpartition("/")[2]
        if (target := self._link(source)) is not None:  # /dev/mapper/name
            own = target.rpartition("/")[2]
        for each in self._names("/sys/fs/btrfs"):
            names = self._names(f"/sys/fs/btrfs/{each}/devices")
            if own in names:
                return names
        return [own]

    # --- devices ---------------------------------------------------------------------------------

    def _by_number(self, number: str) -> Chain | None:
        target = self._link(f"/sys/dev/block/{number}")
        return self._device(target.rpartition("/")[2]) if target else None

    def _device(self, name: str) -> Chain | None:
        """Return a block device and what it is stacked on, down to a ublk device; or None."""
        if _UBLK.fullmatch(name):
            return (name,)
        home = f"/sys/class/block/{name}"
        with self._deeper() as allowed:
            if not allowed:
                return None
            target = self._link(home)
            if target is not None and self._lines(f"{home}/partition"):
                return _on(name, self._device(target.split("/")[-2]))
            for below in self._names(f"{home}/slaves"):
                if (chain := self._device(below)) is not None:
                    return _on(name, chain)
            for file in ("loop/backing_file", "backing_dev"):  # backing_dev: zram's
                for path in self._lines(f"{home}/{file}")[:1]:
                    path = path.removesuffix(" (deleted)")  # noqa: PLW2901
                    if path.startswith("/") and (chain := self.at_path(path)) is not None:
                        return _on(name, (f"{path}", *chain))
        return None

    # --- reading ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _deeper(self) -> Iterator[bool]:
        """Count how deep we are: what is mounted upon itself must not lead round and round."""
        self._depth += 1
        try:
            yield self._depth <= _DEPTH_MAX
        finally:
            self._depth -= 1

    def _lines(self, path: str) -> list[str]:
        """Return the lines of a file of the kernel's; none where it cannot be read."""
        try:
            return Path(self._root + path).read_text(errors="surrogateescape").splitlines()
        except OSError:
            return []

    def _names(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(self._root + path))  # noqa: PTH208 - names are all we want
        except OSError:
            return []


def _on(name: str, below: Chain | None) -> Chain | None:
    return None if below is None else (f"/dev/{name}", *below)


def _mount(line: str) -> _Mount:
    """Read a line of proc_pid_mountinfo(5)."""
    before, _, after = line.partition(" - ")
    number, parent, device, _, point, *_ = before.split(" ")
    kind, source, *rest = after.split(" ")
    words = re.split(r"(?<!\\),", rest[0]) if rest else []
    options = tuple((key, _plain(value)) for key, _, value in (w.partition("=") for w in words))
    return _Mount(int(number), int(parent), device, _plain(point), kind, _plain(source), options)


def _plain(word: str) -> str:
    """Undo what the kernel does to spaces and their like in its tables."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)


def _parts(path: str) -> list[str]:
    """Return the components of a path, the first one last."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]
