"""How much of the host's memory is free, as the kernel estimates it."""

from __future__ import annotations

from pathlib import Path


def free_percent(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Return which percentage of the memory programs can have without swapping (proc(5)).

    100 where the kernel does not say.
    """
    try:
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free, total = (int(fields[key].split()[0]) for key in ("MemAvailable", "MemTotal"))
    except (OSError, ValueError, KeyError):
        return 100.0
    return 100.0 * free / total
