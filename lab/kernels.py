"""The kernels: which Debian packages hold them, and what a cached one is made of."""

from __future__ import annotations

import json
import lzma
import re
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from archive import Archive
from base import LabError, find_tool, me, output_of, say, staging


@dataclass(frozen=True)
class Line:
    """One line of kernels that can be asked for: which versions, and which suites have them."""

    version: str
    suites: tuple[str, ...]


LINES: Final[Mapping[str, Line]] = {
    "lts": Line(r"6\.12\.", ("bookworm-backports", "trixie", "trixie-updates", "trixie-security")),
    "new": Line(r"7\.", ("trixie-backports", "sid")),
}
# Not in this list: the cloud flavour, which lacks 9p, and the realtime one.
IMAGE_PACKAGE: Final = r"linux-image-({version}[^-]+(?:-\d+)?-amd64)(?:-unsigned)?"

# What the initramfs needs to reach the root; virtio itself is built into these kernels.
BOOT_MODULES: Final = ("9pnet_virtio", "9p", "overlay")
# Debian's modules are xz-compressed, which an emulated CPU is slow to undo: the ones that the
# project uses are decompressed once, at setup.
PLAIN_MODULES: Final = (*BOOT_MODULES, "ublk_drv", "loop", "ext4", "xfs", "null_blk", "brd")


@dataclass(frozen=True)
class Kernel:
    """A kernel in the cache. The directory appears by rename, so it is whole or not there."""

    name: str
    release: str
    package: str
    version: str
    image: str
    boot_modules: tuple[str, ...]

    @property
    def modules(self) -> str:
        """Where the modules are, relative to the kernel's directory."""
        return f"lib/modules/{self.release}"


def load_kernel(cache: Path, name: str) -> Kernel | None:
    """Read a cached kernel's description; None when it was not set up."""
    try:
        fields = json.loads((cache / name / "kernel.json").read_text())
        return Kernel(**{**fields, "boot_modules": tuple(fields["boot_modules"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LabError(f"{cache / name} is unusable ({error}); remove it and set up") from error


def need_kernel(cache: Path, name: str) -> Kernel:
    """Return a cached kernel or say how to get it."""
    kernel = load_kernel(cache, name)
    if kernel is None:
        raise LabError(f"kernel '{name}' is not in {cache}; get it: {me()} setup --kernel {name}")
    return kernel


def fetch_kernel(name: str, cache: Path, archive: Archive) -> None:
    """Bring the newest kernel of a line into the cache."""
    line = LINES[name]
    pattern = IMAGE_PACKAGE.format(version=line.version)
    package, version = archive.newest(pattern)
    match = re.fullmatch(pattern, package)
    assert match is not None
    release = match[1]
    with staging(cache) as stage:
        say(f"fetching {package} {version} (about 110 MB)")
        archive.unpack([f"{part}={version}" for part in archive.parts_of(package, version)], stage)
        say(f"preparing {release}")
        home = assemble(stage, name, release, package, version)
        home.rename(cache / name)


def assemble(stage: Path, name: str, release: str, package: str, version: str) -> Path:
    """Make a kernel's directory out of its unpacked packages."""
    home = stage / "home"
    modules = home / "lib/modules" / release
    modules.parent.mkdir(parents=True)
    tree = next((d for d in (stage / "usr/lib/modules", stage / "lib/modules") if d.is_dir()), None)
    image = next(stage.rglob("vmlinuz*"), None)
    if tree is None or image is None:
        raise LabError(f"{package} {version} holds no kernel image or no modules")
    kernel_image = home / "vmlinux"
    kernel_image.write_bytes(uncompressed_kernel(image.read_bytes()))
    (tree / release).rename(modules)
    depmod(home, release)
    for module in module_closure(modules, PLAIN_MODULES):
        decompress(modules / module)
    depmod(home, release)
    kernel = Kernel(
        name,
        release,
        package,
        version,
        kernel_image.name,
        tuple(module_closure(modules, BOOT_MODULES)),
    )
    (home / "kernel.json").write_text(json.dumps(asdict(kernel), indent=2) + "\n")
    return home


def depmod(home: Path, release: str) -> None:
    """Index the modules in the kernel's own directory; the host's /lib/modules is left alone."""
    output_of([find_tool("depmod") or "depmod", "-b", home, release])


def module_closure(modules: Path, names: Sequence[str]) -> list[str]:
    """Return the files of these modules and all they depend on, in an order for insmod."""
    needs: dict[str, list[str]] = {}
    by_name: dict[str, str] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
        by_name[path.rpartition("/")[2].partition(".ko")[0]] = path
    order: list[str] = []
    for name in names:
        if name not in by_name:
            raise LabError(f"the kernel in {modules} has no module {name}")
        # modules.dep lists all dependencies, those to be loaded first at the end.
        path = by_name[name]
        order += [p for p in (*reversed(needs[path]), path) if p not in order]
    return order


def decompress(module: Path) -> None:
    """Replace a compressed module by its plain form."""
    if module.suffix == ".xz":
        module.with_suffix("").write_bytes(lzma.decompress(module.read_bytes()))
        module.unlink()


def uncompressed_kernel(image: bytes) -> bytes:
    """Take the ELF kernel out of a bzImage; QEMU boots it by its PVH entry.

    It spares an emulated CPU the unpacking, a third of the time to the first process. An image that
    is not what we know is returned as it is: it boots as well, only later.
    """
    offset, length = struct.unpack_from("<II", image, 0x248)  # payload_offset, payload_length
    start = ((image[0x1F1] or 4) + 1) * 512 + offset
    # The payload ends in four bytes of its uncompressed size, which are not part of the stream.
    payload = image[start : start + length - 4]
    zstd = subprocess.run(["zstd", "-dcq"], input=payload, capture_output=True, check=False)
    return zstd.stdout if zstd.returncode == 0 and zstd.stdout[:4] == b"\x7fELF" else image
