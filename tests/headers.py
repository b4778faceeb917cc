"""Where the kernel's C headers are: Debian's newest, kept in the lab's cache.

A distribution's own headers may be older than the kernels that ublkwatch knows, hence these.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

_LAB = Path(__file__).parents[1] / "lab/lab.py"
_SUITES = ("trixie-backports", "sid")
_PACKAGE = "linux-libc-dev"


def include_directory() -> Path:
    """Return the directory to give to cc -I; fetches it the first time, which needs a network."""
    if own := os.environ.get("UBLKWATCH_HEADERS"):
        return Path(own)
    lab = _import_lab()
    cache: Path = lab.cache_directory()
    home = cache / "headers"
    with lab.locked(cache):
        if not home.is_dir():
            _fetch(lab, cache, home)
    return home / "usr/include"


def _fetch(lab: ModuleType, cache: Path, home: Path) -> None:
    """Unpack the newest package next to its place and rename it: it is there whole or not."""
    with lab.staging(cache) as stage:
        archive = lab.Archive(stage)
        archive.update(_SUITES)
        rows = archive.apt("apt-cache", "madison", _PACKAGE).splitlines()
        versions = [row.split("|")[1].strip() for row in rows if row.count("|") == 2]
        if not versions:
            raise lab.LabError(f"no {_PACKAGE} in {' or '.join(_SUITES)}; set UBLKWATCH_HEADERS")
        newest = max(versions, key=functools.cmp_to_key(lab.compare_versions))
        unpacked = stage / "headers"
        unpacked.mkdir()
        archive.unpack([f"{_PACKAGE}={newest}"], unpacked)
        unpacked.rename(home)


def _import_lab() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lab", _LAB)
    assert spec is not None
    assert spec.loader is not None
    lab = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = lab  # its dataclasses look themselves up there
    spec.loader.exec_module(lab)
    return lab
