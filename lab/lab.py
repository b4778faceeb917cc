#!/usr/bin/env python3
"""Boot a Debian kernel that has ublk_drv and run one command in it.

A machine under test seldom has the ublk driver, so this brings one: kernels come from Debian's
archive, are kept in a cache outside the checkout, and boot in QEMU on the host's own root file
system. What the guest writes stays in the guest, except below the directories given by --rw.

The guest's way: QEMU loads the kernel and an initramfs made here (busybox, a few modules, the job).
It mounts the host's root read-only over 9p, with a tmpfs overlay on top. There a shell as process 1
runs the job. Three virtio ports carry its standard output, its standard error and its progress
("started", "exit N", "done"); a serial port carries the kernel's console.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import enum
import fcntl
import functools
import io
import json
import lzma
import os
import re
import selectors
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, NoReturn

EXIT_TIMEOUT: Final = 124
EXIT_LAB: Final = 125

BOOT_ATTEMPTS: Final = 3
BOOT_SECONDS: Final = 90.0
PROBE_SECONDS: Final = 8.0
# After the command's end: how long the guest may stay silent while it flushes and relays the rest.
DRAIN_SECONDS: Final = 5.0
CONSOLE_KEPT: Final = 1 << 20
CONSOLE_SHOWN: Final = 80

KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEFAULT_MIRROR: Final = "http://deb.debian.org/debian"
DEFAULT_SECURITY: Final = "http://deb.debian.org/debian-security"
# Names of suites that only Debian's own archives carry; tells its mirrors from other sources.
DEBIAN_SUITE: Final = re.compile(
    r"(?:(?:old)*stable|testing|unstable|sid|bookworm|trixie|forky)"
    r"(?P<security>-security)?(?:-updates|-backports|-proposed-updates)?"
)


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

# What must be there, and the Debian package that brings it.
TOOLS: Final[Mapping[str, str]] = {
    "qemu-system-x86_64": "qemu-system-x86",
    "depmod": "kmod",
    "zstd": "zstd",
    "fio": "fio",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    str(KEYRING): "debian-archive-keyring",
}
SEARCH_PATH: Final = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"

# A guest has no service manager: these would make a program talk to the host's.
HOST_ONLY_VARIABLES: Final = frozenset(
    {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "JOURNAL_STREAM"}
)


class LabError(Exception):
    """The lab itself cannot go on; the text says why, and what to do."""


def say(text: str) -> None:
    """Tell the person at the terminal; standard output belongs to the command."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def find_tool(name: str) -> str | None:
    """Find a program, also where a plain user's PATH does not look."""
    return shutil.which(name, path=SEARCH_PATH)


# --- the cache ------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Where everything that was fetched lives."""
    if own := os.environ.get("UBLKWATCH_LAB_CACHE"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "ublkwatch-lab"


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Let one setup at a time change the cache."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        handle = (cache / "lock").open("w")
    except OSError as error:
        raise LabError(f"cannot write the cache: {error}; set UBLKWATCH_LAB_CACHE") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def staging(cache: Path) -> Iterator[Path]:
    """Give a directory on the cache's file system whose content can be renamed into place."""
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=cache) as name:
        yield Path(name)


def sweep(cache: Path) -> None:
    """Remove what an interrupted setup left; only under the lock."""
    for leftover in cache.glob(".staging-*"):
        shutil.rmtree(leftover, ignore_errors=True)


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


def me() -> str:
    """How this script was called, for messages that tell what to type."""
    return shlex.quote(os.path.relpath(__file__))


# --- fetching -------------------------------------------------------------------------------


def output_of(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """Run a helper and return what it printed; its last words become the error."""
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C", "PATH": SEARCH_PATH},
        check=False,
    )
    if done.returncode != 0:
        last_words = "\n".join((done.stderr or done.stdout).strip().splitlines()[-6:])
        words = [str(word) for word in command if not str(word).startswith("-o")]
        raise LabError(f"{shlex.join(words[:3])} failed:\n{last_words}")
    return done.stdout


class Archive:
    """Debian's archive, through apt with sources, lists and cache of our own.

    The machine's apt configuration (proxies, certificates) applies; its sources and lists are
    neither used nor changed, apart from asking which mirror it is set to.
    """

    def __init__(self, directory: Path) -> None:
        """Prepare the folders apt wants to find."""
        self.directory = directory
        for folder in ("lists/partial", "cache/archives/partial", "parts"):
            (directory / folder).mkdir(parents=True, exist_ok=True)
        (directory / "status").touch()

    def apt(self, *command: str, cwd: Path | None = None) -> str:
        """Run an apt program on our sources."""
        places: dict[str, str | Path] = {
            "Dir::Etc::sourcelist": self.directory / "sources.list",
            "Dir::Etc::sourceparts": self.directory / "parts",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": self.directory / "parts",
            **self.state(),
        }
        options = [f"-o{key}={value}" for key, value in places.items()]
        return output_of([command[0], *options, *command[1:]], cwd)

    def state(self) -> dict[str, str | Path]:
        """Return the options that keep apt's state here, so that nobody needs to be root."""
        return {
            "Dir::State": self.directory,
            "Dir::State::lists": self.directory / "lists",
            "Dir::State::status": self.directory / "status",
            "Dir::Cache": self.directory / "cache",
            # A container's apt is often set to keep no index, and would build it for each call.
            "Dir::Cache::pkgcache": "packages.bin",
            "Dir::Cache::srcpkgcache": "sources.bin",
            "Acquire::Languages": "none",
            # Root's downloads would otherwise be done by a user who cannot enter our folders.
            "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
        }

    def mirrors(self) -> tuple[list[str], list[str]]:
        """Return the archives and security archives that the machine's apt is set to."""
        options = [f"-o{key}={value}" for key, value in self.state().items()]
        found: tuple[list[str], list[str]] = ([], [])
        for uri in re.findall(r"^'(\S+)'", self.print_uris(options), re.MULTILINE):
            base, _, rest = uri.partition("/dists/")
            suite = DEBIAN_SUITE.fullmatch(rest.rpartition("/")[0])
            if suite and base not in found[bool(suite["security"])]:
                found[bool(suite["security"])].append(base)
        return found[0] or [DEFAULT_MIRROR], found[1] or [DEFAULT_SECURITY]

    @staticmethod
    def print_uris(options: Sequence[str]) -> str:
        """Ask apt for its index addresses, whichever format its sources are written in."""
        try:
            return output_of(["apt-get", *options, "update", "--print-uris"])
        except LabError:
            return ""  # no sources at all, or broken ones: Debian's default mirror will do

    def update(self, suites: Sequence[str]) -> None:
        """Fetch the lists of these suites; a mirror may lack some, so only the result counts."""
        main, security = self.mirrors()
        entries = [
            f"deb [arch=amd64 signed-by={KEYRING}] {base} {suite} main\n"
            for suite in suites
            for base in (security if suite.endswith("-security") else main)
        ]
        (self.directory / "sources.list").write_text("".join(entries))
        say(f"reading package lists of {', '.join(suites)}")
        try:
            # Without "any", apt calls it a success when nothing could be reached.
            self.apt("apt-get", "update", "-oAcquire::Retries=3", "-oAPT::Update::Error-Mode=any")
        except LabError as error:
            say(f"some package lists could not be read: {error}")

    def newest(self, pattern: str) -> tuple[str, str]:
        """Return name and version of the newest package whose name matches."""
        names = [
            name
            for name in self.apt("apt-cache", "pkgnames", "linux-image-").split()
            if re.fullmatch(pattern, name)
        ]
        if not names:
            raise LabError(f"no package matches {pattern}: is the Debian mirror reachable?")
        rows = [line.split("|") for line in self.apt("apt-cache", "madison", *names).splitlines()]
        found = [(row[0].strip(), row[1].strip()) for row in rows if len(row) > 2]
        if not found:
            raise LabError(f"no version of {names[0]} can be downloaded")
        by_version = functools.cmp_to_key(compare_versions)
        return max(found, key=lambda candidate: by_version(candidate[1]))

    def parts_of(self, package: str, version: str) -> list[str]:
        """Return the package and the parts of the same source that it needs at its version."""
        text = self.apt("apt-cache", "show", f"{package}={version}")
        depends = re.search(r"^Depends: (.*)", text, re.MULTILINE)
        exact = rf"(linux-\S+) \(= {re.escape(version)}\)"
        return [package, *re.findall(exact, depends[1] if depends else "")]

    def unpack(self, packages: Sequence[str], into: Path) -> None:
        """Download packages, verified by apt against the signed lists, and unpack them."""
        debs = into / "debs"
        debs.mkdir()
        self.apt("apt-get", "download", "-oAcquire::Retries=3", *packages, cwd=debs)
        for deb in sorted(debs.glob("*.deb")):
            output_of(["dpkg-deb", "--extract", deb, into])
        shutil.rmtree(debs)


def compare_versions(left: str, right: str) -> int:
    """Order two Debian versions as dpkg does."""
    if left == right:
        return 0
    asked = ["dpkg", "--compare-versions", left, "gt", right]
    return 1 if subprocess.run(asked, check=False).returncode == 0 else -1


def fetch_kernel(cache: Path, name: str, archive: Archive) -> None:
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


def fetch_busybox(cache: Path, archive: Archive) -> None:
    """Bring a static busybox into the cache: the guest's first programs, whatever the host has."""
    with staging(cache) as stage:
        say("fetching busybox")
        archive.unpack(["busybox-static"], stage)
        found = next((p for p in stage.glob("**/bin/busybox") if p.is_file()), None)
        if found is None:
            raise LabError("the package busybox-static holds no busybox")
        found.rename(cache / "busybox")


def missing_packages(tools: Sequence[str] = tuple(TOOLS)) -> list[str]:
    """Return the Debian packages of the tools that are not here."""
    return [TOOLS[tool] for tool in tools if not find_tool(tool) and not Path(tool).is_file()]


def install_command(packages: Sequence[str]) -> list[str]:
    """Return the command that installs packages on this machine."""
    return ["apt-get", "install", "--yes", "--no-install-recommends", *packages]


def install_tools() -> None:
    """Install what is missing, or say what to type."""
    packages = missing_packages()
    if not packages:
        return
    command = install_command(packages)
    if os.geteuid() != 0:
        raise LabError(f"not installed: {', '.join(packages)}; as root: {shlex.join(command)}")
    say(f"installing {', '.join(packages)}")
    os.environ.setdefault("DEBIAN_FRONTEND", "noninteractive")
    try:
        output_of(command)
    except LabError:
        output_of(["apt-get", "update"])  # a fresh machine or image comes without lists
        output_of(command)
    if packages := missing_packages():
        raise LabError(f"still missing after installation: {', '.join(packages)}")


def setup(names: Sequence[str]) -> None:
    """Bring everything here that `run` needs; what is here already is left alone."""
    cache = cache_directory()
    with locked(cache):
        sweep(cache)
        install_tools()
        wanted = [name for name in names if load_kernel(cache, name) is None]
        need_busybox = not (cache / "busybox").is_file()
        if wanted or need_busybox:
            fetch(cache, wanted, need_busybox=need_busybox)
        accelerator(cache, need_kernel(cache, names[0]))


def fetch(cache: Path, names: Sequence[str], *, need_busybox: bool) -> None:
    """Download what the cache lacks."""
    with staging(cache) as stage:
        archive = Archive(stage)
        suites = {suite: None for name in names for suite in LINES[name].suites}
        if need_busybox:
            suites["trixie"] = None
        archive.update(tuple(suites))
        if need_busybox:
            fetch_busybox(cache, archive)
        for name in names:
            fetch_kernel(cache, name, archive)


# --- the guest's side -------------------------------------------------------------------------

# Process 1 in the initramfs: builds the root that the command sees, then becomes STAGE2 in it.
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
    mkdir /keep && mount --bind "/root$directory" /keep && keep=1 ;;
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
cp -r /bin/busybox /job/main /job/command /job/flush /root/run/lab
exec switch_root /root /run/lab/busybox sh /run/lab/main
"""

# Process 1 on the real root. The command's output goes through pipes because a program may
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
$box cat out >"${port}1" & spared="1 $!"
$box cat err >"${port}2" & spared="$spared $!"
exec 3>"${port}3"
echo started >&3
$box setsid $box sh command </dev/null >out 2>err 3>&- &
wait $!
echo "exit $?" >&3
# What the command left behind would keep the pipes open. Kernel threads take no notice.
for process in /proc/[0-9]*; do
    process=${process#/proc/}
    case " $spared " in *" $process "*) ;; *) kill -9 "$process" 2>/dev/null ;; esac
done
. ./flush
wait
echo done >&3
exec $box poweroff -f
"""


@dataclass(frozen=True)
class Job:
    """What to run in a guest, and which host directories it may write."""

    command: tuple[str, ...]
    directory: str
    environment: Mapping[str, str]
    writable: tuple[str, ...] = ()

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
        (folder, stat.S_IFDIR | 0o755, b"") for folder in ("bin", "dev", "job", "modules")
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


# --- the host's side --------------------------------------------------------------------------


class Channel(enum.IntEnum):
    """The guest's byte streams; the first three are virtio ports of that number."""

    STDOUT = 1
    STDERR = 2
    CONTROL = 3
    CONSOLE = 4


class Stage(enum.Enum):
    """How far a guest has come."""

    BOOTING = enum.auto()
    RUNNING = enum.auto()
    ENDING = enum.auto()


@dataclass(frozen=True)
class Machine:
    """The virtual hardware."""

    accelerator: str
    cpus: int
    memory: str


@dataclass(frozen=True)
class Plan:
    """All that one boot takes."""

    cache: Path
    kernel: Kernel
    machine: Machine
    job: Job

    @property
    def home(self) -> Path:
        """Where the kernel is."""
        return self.cache / self.kernel.name


@dataclass
class Outcome:
    """What came of one boot: the command's status, or the stage at which the guest was lost."""

    stage: Stage = Stage.BOOTING
    status: int | None = None
    late: bool = False
    console: bytearray = field(default_factory=bytearray)


KERNEL_OPTIONS: Final = (
    "console=ttyS0,115200 loglevel=5 printk.time=1 "
    # Boot time: protections and searches that nobody in here needs.
    "mitigations=off nokaslr audit=0 tsc=reliable no_timer_check raid=noautodetect "
    "cryptomgr.notests apparmor=0 selinux=0 "
    # A guest that is broken must end, and QEMU with it (-no-reboot).
    "oops=panic panic=-1"
)


def qemu_command(plan: Plan, initramfs: int, channels: Mapping[Channel, int]) -> list[str]:
    """Return the command line of QEMU; descriptors are inherited."""
    machine = plan.machine
    # QEMU's cmpxchg16b panics these kernels now and then, hence cx16=off.
    cpu = "max,cx16=off" if machine.accelerator == "tcg" else "host"
    accel = "tcg,thread=multi" if machine.accelerator == "tcg" else machine.accelerator
    model = "passthrough" if os.geteuid() == 0 else "none"
    command = (
        f"qemu-system-x86_64 -machine q35 -accel {accel} -cpu {cpu} -smp {machine.cpus} "
        f"-m {machine.memory} -nodefaults -no-user-config -display none -no-reboot"
    ).split()
    command += ["-kernel", str(plan.home / plan.kernel.image), "-initrd", f"/dev/fd/{initramfs}"]
    command += ["-append", KERNEL_OPTIONS]
    shares = [("root", "/"), ("modules", str(plan.home / plan.kernel.modules))]
    for tag, path in shares:
        command += share(tag, path, "security_model=none,readonly=on")
    for number, path in enumerate(plan.job.writable):
        command += share(f"rw{number}", path, f"security_model={model}")
    for channel, descriptor in channels.items():
        command += ["-chardev", f"socket,id=c{channel},fd={descriptor}"]
    command += ["-serial", f"chardev:c{Channel.CONSOLE}", "-device", "virtio-serial-pci"]
    for port in (Channel.STDOUT, Channel.STDERR, Channel.CONTROL):
        command += ["-device", f"virtserialport,nr={port},chardev=c{port}"]
    return command


def share(tag: str, path: str, options: str) -> list[str]:
    """Return the QEMU options that offer a host directory over 9p."""
    # Commas separate options, so they are doubled. "remap": the tree may span file systems.
    escaped = path.replace(",", ",,")
    return [
        "-fsdev",
        f"local,id={tag},path={escaped},multidevs=remap,{options}",
        "-device",
        f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
    ]


PR_SET_PDEATHSIG: Final = 1
LIBC: Final = ctypes.CDLL(None, use_errno=True)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(EXIT_LAB)  # it ended before we asked


class Guest:
    """One QEMU, from its start to its end, and the streams that it carries."""

    def __init__(self, boot_seconds: float, run_seconds: float, console: int | None) -> None:
        """Prepare a guest; `console` is a descriptor that gets a copy of the kernel's console."""
        self.outcome = Outcome()
        self.boot_seconds = boot_seconds
        self.run_seconds = run_seconds
        self.console = console
        self.deadline = 0.0
        self.control = b""
        self.finished = False

    def run(self, plan: Plan) -> Outcome:
        """Boot, relay, and end the guest."""
        with contextlib.ExitStack() as stack:
            pairs = {channel: socket.socketpair() for channel in Channel}
            for ours, theirs in pairs.values():
                stack.enter_context(ours)
                stack.enter_context(theirs)
            initramfs = os.memfd_create("initramfs")
            stack.callback(os.close, initramfs)
            with open(initramfs, "wb", closefd=False) as file:
                file.write(make_initramfs(plan.cache, plan.kernel, plan.job))
            descriptors = {channel: theirs.fileno() for channel, (_, theirs) in pairs.items()}
            qemu = self.spawn(
                qemu_command(plan, initramfs, descriptors),
                (initramfs, *descriptors.values()),
                descriptors[Channel.CONSOLE],
            )
            for _, theirs in pairs.values():
                theirs.close()  # so that QEMU's end is the end of the streams
            try:
                self.relay({channel: ours for channel, (ours, _) in pairs.items()})
            finally:
                qemu.kill()
                qemu.wait()
        return self.outcome

    @staticmethod
    def spawn(command: Sequence[str], keep: Sequence[int], errors: int) -> subprocess.Popen[bytes]:
        """Start QEMU; what it has to complain about joins the console."""
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=tuple(keep),
            env={**os.environ, "PATH": SEARCH_PATH},
            preexec_fn=functools.partial(die_with, os.getpid()),  # noqa: PLW1509 (no threads here)
        )

    def relay(self, streams: Mapping[Channel, socket.socket]) -> None:
        """Pass on what the guest says until it is done, gone or late."""
        self.deadline = time.monotonic() + self.boot_seconds
        with selectors.DefaultSelector() as selector:
            for channel, stream in streams.items():
                selector.register(stream, selectors.EVENT_READ, channel)
            while selector.get_map() and not self.finished:
                ready = selector.select(max(0.0, self.deadline - time.monotonic()))
                if not ready and time.monotonic() >= self.deadline:
                    self.outcome.late = True
                    return
                # Control comes last: "done" must not overtake the output that went before it.
                for key, _ in sorted(ready, key=lambda item: item[0].data == Channel.CONTROL):
                    self.drain(selector, key)
            self.rest(streams)

    def drain(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        """Take what one stream has."""
        stream, channel = key.fileobj, key.data
        assert isinstance(stream, socket.socket)
        data = receive(stream, 0)
        if data:
            self.take(channel, data)
        else:
            selector.unregister(stream)

    def rest(self, streams: Mapping[Channel, socket.socket]) -> None:
        """Take what arrived between the last look at a stream and the guest's "done"."""
        for channel, stream in streams.items():
            while data := receive(stream, socket.MSG_DONTWAIT):
                self.take(channel, data)

    def take(self, channel: Channel, data: bytes) -> None:
        """Handle a piece of a stream."""
        if channel is Channel.CONTROL:
            *lines, self.control = (self.control + data).split(b"\n")
            for line in lines:
                self.obey(line.decode())
        elif channel is Channel.CONSOLE:
            self.outcome.console = (self.outcome.console + data)[-CONSOLE_KEPT:]
            if self.console is not None:
                write_all(self.console, data)
        else:
            write_all(int(channel), data)  # the channel's number is the descriptor's
            if self.outcome.stage is Stage.ENDING:
                self.deadline = time.monotonic() + DRAIN_SECONDS

    def obey(self, line: str) -> None:
        """Follow the guest's progress."""
        word, _, rest = line.partition(" ")
        if word == "started":
            self.outcome.stage = Stage.RUNNING
            self.deadline = time.monotonic() + self.run_seconds
        elif word == "exit":
            self.outcome.stage = Stage.ENDING
            self.outcome.status = int(rest)
            self.deadline = time.monotonic() + DRAIN_SECONDS
        elif word == "done":
            self.finished = True


def receive(stream: socket.socket, flags: int) -> bytes:
    """Read what a stream has; nothing when it has ended or, if asked so, is empty."""
    try:
        return stream.recv(1 << 16, flags)
    except (BlockingIOError, ConnectionResetError):
        return b""


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything, past any buffer of Python's."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def boot_id() -> str:
    """Name this boot of this host: what KVM can do may change with the next."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.uname().release


def accelerator(cache: Path, kernel: Kernel) -> str:
    """Return "kvm" where a kernel really boots with it, else "tcg"; tried once per host boot."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    if (known := known_accelerator(cache)) is not None:
        return known
    say("trying whether KVM works here")
    plan = Plan(cache, kernel, Machine("kvm", 1, "512M"), Job(("/bin/true",), "/", {}))
    outcome = Guest(PROBE_SECONDS, PROBE_SECONDS, None).run(plan)
    result = "kvm" if outcome.status == 0 else "tcg"
    with contextlib.suppress(OSError), staging(cache) as stage:
        (stage / "new").write_text(json.dumps({"boot": boot_id(), "accelerator": result}) + "\n")
        (stage / "new").rename(cache / "accelerator.json")
    return result


def known_accelerator(cache: Path) -> str | None:
    """Return the answer that an earlier try found on this boot of the host."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads((cache / "accelerator.json").read_text())
        if found["boot"] == boot_id():
            return str(found["accelerator"])
    return None


def show_console(console: bytes | bytearray) -> None:
    """Print the end of the kernel's console, for the one who has to find out."""
    lines = bytes(console).decode(errors="replace").replace("\r", "").strip().splitlines()
    for line in lines[-CONSOLE_SHOWN:]:
        print(f"lab: | {line}", file=sys.stderr)
    sys.stderr.flush()


def guest_environment() -> dict[str, str]:
    """Return the environment that the command gets: the caller's own."""
    return {key: value for key, value in os.environ.items() if key not in HOST_ONLY_VARIABLES}


def run_in_guest(options: argparse.Namespace) -> int:
    """Run the command in a fresh guest and return its exit status."""
    if packages := missing_packages(["qemu-system-x86_64"]):
        hint = shlex.join(install_command(packages))
        raise LabError(f"QEMU is not installed; as root: {hint}")
    cache = cache_directory()
    kernel = need_kernel(cache, options.kernel)
    if not (cache / "busybox").is_file():
        raise LabError(f"busybox is not in {cache}; get it: {me()} setup")
    machine = Machine(accelerator(cache, kernel), options.cpus, options.memory)
    writable = tuple(dict.fromkeys(writable_directory(path) for path in options.rw))
    job = Job(tuple(options.command), str(Path.cwd()), guest_environment(), writable)
    with contextlib.ExitStack() as stack:
        console = None
        if options.console:
            console = stack.enter_context(open_console(options.console)).fileno()
        return boot(Plan(cache, kernel, machine, job), options.timeout, console)


def boot(plan: Plan, timeout: float, console: int | None) -> int:
    """Boot until the command was started, and report how the guest ended."""
    machine = plan.machine
    for attempt in range(1, BOOT_ATTEMPTS + 1):
        say(f"booting {plan.kernel.release} ({machine.accelerator}, {machine.cpus} cpus)")
        outcome = Guest(BOOT_SECONDS, timeout, console).run(plan)
        if outcome.stage is not Stage.BOOTING:
            return verdict(outcome, timeout)
        show_console(outcome.console)
        how = f"did not start within {BOOT_SECONDS:.0f} s" if outcome.late else "died at boot"
        say(f"the guest {how} (boot {attempt} of {BOOT_ATTEMPTS})")
    return EXIT_LAB


def verdict(outcome: Outcome, timeout: float) -> int:
    """Turn a started guest's end into an exit status."""
    if outcome.status is not None:
        return outcome.status
    show_console(outcome.console)
    if outcome.late:
        say(f"the command was still running after {timeout:g} s; the guest was killed")
        return EXIT_TIMEOUT
    say("the guest died while the command was running")
    return EXIT_LAB


def writable_directory(path: str) -> str:
    """Check a --rw directory and return its absolute path."""
    if not Path(path).is_dir():
        raise LabError(f"--rw {path}: not a directory")
    return str(Path(path).resolve())


def open_console(path: str) -> contextlib.AbstractContextManager[io.FileIO]:
    """Open the file that gets the kernel's console."""
    try:
        return Path(path).open("wb", buffering=0)
    except OSError as error:
        raise LabError(f"--console {path}: {error.strerror}") from error


def run_on_host(options: argparse.Namespace) -> int:
    """Run the command on this very machine, which must have the driver."""
    if not Path("/dev/ublk-control").exists():
        raise LabError("this host has no /dev/ublk-control; load the driver: modprobe ublk_drv")
    try:
        child = subprocess.Popen(
            options.command,
            stdin=subprocess.DEVNULL,
            preexec_fn=functools.partial(die_with, os.getpid()),  # noqa: PLW1509 (no threads here)
            process_group=0,
        )
    except OSError as error:
        say(f"{options.command[0]}: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError) else 126
    try:
        status = child.wait(options.timeout)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        say(f"the command was still running after {options.timeout:g} s; it was killed")
        return EXIT_TIMEOUT
    return status if status >= 0 else 128 - status


# --- the command line -------------------------------------------------------------------------


def show_list() -> None:
    """Print the cached kernels and the accelerator."""
    cache = cache_directory()
    for name in LINES:
        kernel = load_kernel(cache, name)
        print(f"{name:<12} {f'{kernel.release} ({kernel.version})' if kernel else 'not set up'}")
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    print(f"{'accelerator':<12} {(known_accelerator(cache) or 'untried') if usable else 'tcg'}")


class Parser(argparse.ArgumentParser):
    """A parser whose complaint has the exit status of the lab, not one a command might give."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line and leave."""
        self.print_usage(sys.stderr)
        say(message)
        sys.exit(EXIT_LAB)


def positive(text: str) -> int:
    """Parse a number of CPUs."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def build_parser() -> Parser:
    """Describe the command line."""
    parser = Parser(prog="lab.py", description="Boot a kernel with ublk_drv and run a command.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    fetch_verb = verbs.add_parser("setup", help="fetch and install everything; fast when done")
    fetch_verb.add_argument("--kernel", action="append", choices=tuple(LINES))
    verbs.add_parser("list", help="show the cached kernels and the accelerator")
    run = verbs.add_parser(
        "run", help="run a command in a fresh guest", usage="%(prog)s [OPTION]... -- CMD [ARG]..."
    )
    run.add_argument("--kernel", choices=tuple(LINES), default="lts")
    run.add_argument("--cpus", type=positive, default=2)
    run.add_argument("--memory", default="2G", help="as QEMU writes it (default: %(default)s)")
    run.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    run.add_argument("--console", metavar="FILE", help="keep the kernel's console")
    run.add_argument("--rw", action="append", default=[], metavar="DIR", help="let it write DIR")
    run.add_argument("--host", action="store_true", help="no guest: this host has the driver")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line. What follows the first "--" is the command's and stays untouched."""
    own, command = list(arguments), []
    if "--" in own:
        cut = own.index("--")
        own, command = own[:cut], own[cut + 1 :]
    parser = build_parser()
    options = parser.parse_args(own)
    if bool(command) != (options.verb == "run"):
        parser.error("`run` takes a command, after --; nothing else does")
    options.command = command
    return options


def main() -> int:
    """Do what was asked; whatever goes wrong in the lab itself is one message and status 125."""
    # A reader of our output that goes away ends us, and QEMU with us.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    options = parse(sys.argv[1:])
    try:
        if options.verb == "setup":
            setup(options.kernel or tuple(LINES))
        elif options.verb == "list":
            show_list()
        elif options.host:
            return run_on_host(options)
        else:
            return run_in_guest(options)
    except (LabError, OSError) as error:
        say(str(error))
        return EXIT_LAB
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
