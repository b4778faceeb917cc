"""``python -m bench.rest``: what ublkwatch costs while it watches, and nothing happens.

Where the driver is, as root (``python lab/lab.py run -- python -m bench.rest``): a reference server
makes so many devices, of one queue of depth 1, in one process; a real `ublkwatch run` with its
defaults watches them. When it has learnt all that it wants to know, it is looked at for a while,
and then once more under strace, whose counts are exact and whose times are worth nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from bench import cast
from bench.cast import SERVER, BenchError, Supervisor, Usage
from ublkwatch.async_ring import AsyncRing
from ublkwatch.ctrl import UblkCtrl

DEVICES = (1, 64, 500)
SECONDS = 60.0
# By then it has asked the last time whether a server says which threads serve its queues.
SETTLE_S = 140.0
_DEADLINE_S = 1800.0  # for what takes so long for each device, on an emulated machine
_POLL_S = 0.5
_DETACH_S = 60.0  # strace, from every thread


def measure(
    keep: Callable[[dict[str, Any]], None],
    devices: Sequence[int] = DEVICES,
    seconds: float = SECONDS,
    settle_s: float = SETTLE_S,
) -> None:
    """Keep what it costs, for each number of devices, and what can be said of them all."""
    # The reference server has some descriptors for each device.
    resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 16, 1 << 16))
    about = {"kernel": os.uname().release, "cpus": os.cpu_count(),
             "python": platform.python_version()}  # fmt: skip
    rows: list[dict[str, Any]] = []
    for count in devices:
        rows.append(asyncio.run(_measure(count, seconds, settle_s)))
        keep({"about": about, "rows": rows, "summary": summary(rows)})


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return what is there without any device, and what each adds, by the first and last row.

    On an emulated machine only the ratios of CPU times mean something, the counts are exact.
    """
    first, last = rows[0], rows[-1]
    more = last["devices"] - first["devices"]
    found = {}
    for name, key, unit in (
        ("pss_kib", "pss_bytes", 1024),
        ("cpu_us_per_s", "cpu_s_per_s", 1e-6),
        ("syscalls_per_poll", "syscalls_per_poll", 1),
    ):
        each = (last[key] - first[key]) / more if more else 0.0
        fixed = (first[key] - each * first["devices"]) / unit
        found[name] = {"fixed": fixed, "per_device": each / unit}
    return found


def markdown(result: dict[str, Any]) -> str:
    """Return the table, and what a device adds."""
    parts = [
        "| devices | CPU, % | wakeups/s | calls a poll | bytes written | RSS, MiB | PSS, MiB |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        cells = (
            row["devices"],
            f"{row['cpu_s_per_s'] * 100:.2f}",
            f"{row['wakeups_per_s']:.1f}",
            f"{row['syscalls_per_poll']:.0f}",
            row["write_bytes"],
            *(f"{row[key] / (1 << 20):.1f}" for key in ("rss_bytes", "pss_bytes")),
        )
        parts.append(f"| {' | '.join(map(str, cells))} |")
    pss, cpu = (result["summary"][key] for key in ("pss_kib", "cpu_us_per_s"))
    parts.append(
        f"\nBoth processes together. Without a device: {pss['fixed'] / 1024:.0f} MiB (PSS); each "
        f"one adds {pss['per_device']:.1f} KiB, and {cpu['per_device']:.0f} µs of CPU a second."
    )
    return "\n".join(parts) + "\n"


async def _measure(count: int, seconds: float, settle_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/run") as name:
        home, dev_ids = Path(name), cast.free_ids(count)
        async with _devices(home, dev_ids):
            with Supervisor(home, dev_ids).running() as supervisor:
                await _settled(supervisor, dev_ids)
                await asyncio.sleep(settle_s)
                pids = supervisor.processes()
                row = await _look(pids, seconds)
                calls = {who: _traced(pid, seconds) for who, pid in pids.items()}
                if supervisor.processes() != pids:
                    raise BenchError(f"ublkwatch changed its worker; {supervisor.said()}")
    row |= {"devices": count, "syscalls": calls}
    # strace slows it down, so its polls are counted: each is one submission.
    polls = calls["daemon"].get("io_uring_enter", 0)
    row["syscalls_per_poll"] = sum(sum(each.values()) for each in calls.values()) / max(1, polls)
    say(json.dumps(row))
    return row


async def _look(pids: dict[str, int], seconds: float) -> dict[str, Any]:
    before = {who: (Usage.of(pid), _written(pid)) for who, pid in pids.items()}
    began = time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    found: dict[str, Any] = {"seconds": took, "processes": {}}
    for who, pid in pids.items():
        (was, wrote), now = before[who], Usage.of(pid)
        found["processes"][who] = {
            "cpu_s_per_s": (now.cpu_s - was.cpu_s) / took,
            "wakeups_per_s": (now.voluntary_switches - was.voluntary_switches) / took,
            "write_bytes": _written(pid) - wrote,
            "rss_bytes": now.rss_bytes,
            "pss_bytes": now.pss_bytes or now.rss_bytes,
        }
    for name in ("cpu_s_per_s", "wakeups_per_s", "write_bytes", "rss_bytes", "pss_bytes"):
        found[name] = sum(each[name] for each in found["processes"].values())
    return found


def _written(pid: int) -> int:
    """Return how many bytes it has had written to disks (proc_pid_io(5)); a tmpfs is none."""
    return int(
        re.findall(r"^write_bytes: (\d+)$", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE)[0]
    )


def _traced(pid: int, seconds: float) -> dict[str, int]:
    """Return how often it makes which system call, in so much time."""
    command = ["strace", "-c", "-f", "-q", "-U", "calls,name", "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        time.sleep(seconds)  # what is measured
        tracer.send_signal(signal.SIGINT)
        try:
            _, told = tracer.communicate(timeout=_DETACH_S)
        except subprocess.TimeoutExpired as error:
            tracer.kill()
            raise BenchError(f"strace did not leave process {pid} alone") from error
    rows = re.findall(r"^\s*(\d+)\s+(\w+)$", told, re.MULTILINE)
    return {name: int(calls) for calls, name in rows if name != "total"}


# --- many devices --------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _devices(home: Path, dev_ids: list[int]) -> AsyncIterator[None]:
    """As cast.devices(), for so many that it takes long."""
    log = home / "server.log"
    ids = ",".join(map(str, dev_ids))
    more = ("--recovery", "reissue", "--size", "64M", "--queues", "1", "--depth", "1")
    server = _start([*SERVER, "--create", ids, *more], log)

    def live() -> bool:
        if server.poll() is not None:
            raise BenchError(f"the server ended, {server.returncode}: {log.read_text()[-2000:]}")
        return log.read_text().count("LIVE") == len(dev_ids)

    ring = AsyncRing()
    try:
        await _until(live, "the devices to be LIVE")
        yield
    finally:
        server.kill()
        server.wait()
        ctrl = UblkCtrl(ring)
        for dev_id in dev_ids:
            with contextlib.suppress(OSError):
                await ctrl.stop_dev(dev_id, timeout_s=_DEADLINE_S)
                await ctrl.del_dev(dev_id, timeout_s=_DEADLINE_S)
        ring.close()


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output)


async def _settled(supervisor: Supervisor, dev_ids: list[int]) -> None:
    """Wait until it watches them all and has kept all that a recovery needs."""
    path, specs = supervisor.home / "run/status.json", supervisor.home / "state/specs"

    def settled() -> bool:
        supervisor.device(-1)  # it says when ublkwatch has ended
        if not path.exists():
            return False
        found = [each["phase"] for each in json.loads(path.read_text())["devices"]]
        learnt = len(list(specs.glob("*.json")))
        return found == ["watching"] * len(dev_ids) and learnt == len(dev_ids)

    await _until(settled, "ublkwatch to watch the devices", supervisor.said)


async def _until(
    condition: Callable[[], bool], what: str, said: Callable[[], str] = lambda: ""
) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"waited {_DEADLINE_S:g} s for {what}, in vain\n{said()}")
        await asyncio.sleep(_POLL_S)


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rest", description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--settle", type=float, default=SETTLE_S)
    parser.add_argument("--out", type=Path, help="the JSON file to write, too")
    options = parser.parse_args()
    if not Path("/dev/ublk-control").exists():
        subprocess.run(["modprobe", "ublk_drv"], check=True)
    found: dict[str, Any] = {}
    measure(found.update, options.devices, options.seconds, options.settle)
    text = json.dumps(found, indent=1)
    if options.out:
        options.out.write_text(f"{text}\n")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
