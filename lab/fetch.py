"""What `setup` does: install the machine's tools, and fetch what the cache lacks."""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import systemd
from archive import KEYRING, Archive
from base import (
    LabError,
    again,
    cache_directory,
    find_tool,
    locked,
    me,
    output_of,
    say,
    staging,
    sweep,
)
from kernels import LINES, fetch_kernel, load_kernel
from kublk import SUITES, fetch_kublk

# What the lab and the project's tests take from the machine, and the Debian package that brings it.
TOOLS: Final[Mapping[str, str]] = {
    "qemu-system-x86_64": "qemu-system-x86",
    "depmod": "kmod",
    "zstd": "zstd",
    "xz": "xz-utils",
    "fio": "fio",
    "kill": "procps",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "dmsetup": "dmsetup",
    "strace": "strace",
    "zsh": "zsh",
    "cc": "gcc",
    "/usr/include/stdio.h": "libc6-dev",
    str(KEYRING): "debian-archive-keyring",
    **systemd.PROGRAMS,
}

BUSYBOX_SUITE: Final = "trixie"
HEADERS_PACKAGE: Final = "linux-libc-dev"
HEADERS_SUITES: Final = ("trixie-backports", "sid")
# Programs that are not installed, and the suite that they are of: Prometheus would start as a
# service, and is the oldest that our rules are for; kubectl is the first that knows our manifests.
PROGRAMS: Final[Mapping[str, str]] = {"prometheus": "bookworm", "kubectl": "trixie"}


@dataclass(frozen=True)
class Part:
    """One thing in the cache: its name, the suites that have it, and how it is fetched."""

    name: str
    suites: tuple[str, ...]
    fetch: Callable[[Path, Archive], None]


def fetch_busybox(cache: Path, archive: Archive) -> None:
    """Bring a static busybox into the cache: the guest's first programs, whatever the host has."""
    with staging(cache) as stage:
        say("fetching busybox")
        # Of the stable suite, also where the kernels asked for bring newer ones into view.
        archive.unpack([f"busybox-static/{BUSYBOX_SUITE}"], stage)
        found = next((p for p in stage.glob("**/bin/busybox") if p.is_file()), None)
        if found is None:
            raise LabError("the package busybox-static holds no busybox")
        found.rename(cache / "busybox")


def fetch_headers(cache: Path, archive: Archive) -> None:
    """Bring the kernel's newest C headers: a distribution's own may be older than our kernels."""
    package, version = archive.newest(HEADERS_PACKAGE)
    with staging(cache) as stage:
        say(f"fetching {package} {version}")
        home = stage / "home"
        home.mkdir()
        archive.unpack([f"{package}={version}"], home)
        home.rename(cache / "headers")


def headers() -> Path:
    """Return the directory to give to cc -I, or say how to get it."""
    include = cache_directory() / "headers/usr/include"
    if not include.is_dir():
        raise LabError(f"the kernel's headers are not at {include}; get them: {me()} setup")
    return include


def fetch_programs(package: str, cache: Path, archive: Archive) -> None:
    """Bring the programs of a package into the cache."""
    with staging(cache) as stage:
        say(f"fetching {package}")
        home = stage / "home"
        home.mkdir()
        archive.unpack([f"{package}/{PROGRAMS[package]}"], home)
        (home / "usr/bin").rename(cache / package)


def programs(package: str) -> Path:
    """Return the directory of a package's programs, or say how to get them."""
    directory = cache_directory() / package
    if not directory.is_dir():
        raise LabError(f"{package} is not at {directory}; get it: {me()} setup")
    return directory


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
    names = ", ".join(packages)
    if os.geteuid() != 0:
        raise LabError(f"not installed: {names}; as root: {shlex.join(command)}")
    say(f"installing {names}")
    os.environ.setdefault("DEBIAN_FRONTEND", "noninteractive")
    try:
        output_of(command)
    except LabError:
        unread = refresh()
        try:
            output_of(command)
        except LabError as error:
            cause = unread or error
            text = f"could not install {names}: {cause}; to try again: {again()}"
            raise LabError(text) from error
    if packages := missing_packages():
        raise LabError(f"still missing after installation: {', '.join(packages)}")


def refresh() -> str:
    """Read the machine's own package lists, as a new image has none; return what went wrong."""
    try:
        # Without "any", apt calls it a success when nothing could be reached.
        output_of(["apt-get", "update", "-oAPT::Update::Error-Mode=any"])
    except LabError as error:
        return str(
            error
        )  # one bad source is no reason to stop: what was asked for may be elsewhere
    return ""


def lacking(cache: Path, kernels: Sequence[str]) -> list[Part]:
    """Return the parts that have yet to be fetched, of those that each `run` and `headers` need."""
    parts = {
        cache / "busybox": Part("busybox", (BUSYBOX_SUITE,), fetch_busybox),
        cache / "headers": Part("headers", HEADERS_SUITES, fetch_headers),
        cache / "kublk": Part("kublk", SUITES, fetch_kublk),  # built against the headers
    }
    for package, suite in PROGRAMS.items():
        bring = functools.partial(fetch_programs, package)
        parts[cache / package] = Part(package, (suite,), bring)
    missing = [part for place, part in parts.items() if not place.exists()]
    for name in dict.fromkeys(kernels):
        if load_kernel(cache, name) is None:
            bring = functools.partial(fetch_kernel, name)
            missing.append(Part(f"kernel {name}", LINES[name].suites, bring))
    return missing


def setup(kernels: Sequence[str]) -> None:
    """Bring everything here that is not; what is here already is left alone."""
    cache = cache_directory()
    with locked(cache):
        sweep(cache)
        install_tools()
        missing = lacking(cache, kernels)
        if not missing:
            return
        try:
            fetch(cache, missing)
        except LabError as error:
            names = ", ".join(part.name for part in lacking(cache, kernels))
            raise LabError(f"could not fetch {names}: {error}; to try again: {again()}") from error


def fetch(cache: Path, parts: Sequence[Part]) -> None:
    """Download parts of the cache; each is there as soon as it is whole."""
    with staging(cache) as stage:
        archive = Archive(stage)
        archive.update(tuple(dict.fromkeys(suite for part in parts for suite in part.suites)))
        for part in parts:
            part.fetch(cache, archive)
