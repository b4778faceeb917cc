"""The crash demo: fio runs, with verification, through ten killed servers.

``python -m ublkwatch.demo`` needs root, ublk_drv and fio; ``make demo`` provides them. It makes a
loop device on the reference server (with USER_RECOVERY and REISSUE), starts ``ublkwatch run`` and
fio, kills the server with SIGKILL again and again, and exits 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

_SIZE = 64 << 20
_QUEUES = 2
_DEPTH = 32
_DEADLINE_S = 90.0
_PAUSE_S = 0.5  # of ordinary I/O between a recovery and the next kill
_SERVER = [sys.executable, "-m", "ublkwatch.demo.server"]
_SHOWN = (
    "ublkwatch_device_state",
    "ublkwatch_server_up",
    "ublkwatch_recoveries_total",
    "ublkwatch_recovery_duration_seconds_count",
    "ublkwatch_recovery_duration_seconds_sum",
)


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=10)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory(prefix="ublkwatch-demo-", dir="/run") as name:
        return _Demo(Path(name), kills).run()


class _Demo:
    def __init__(self, home: Path, kills: int) -> None:
        self._home = home
        self._kills = kills
        self._dev_id = _free_id()
        self._page = ""

    def run(self) -> int:
        _show(f"kernel {os.uname().release}, {os.cpu_count()} CPUs")
        if not Path("/dev/ublk-control").exists():
            subprocess.run(["modprobe", "ublk_drv"], check=True)
        backing = self._home / "disk"
        with backing.open("wb") as file:
            file.truncate(_SIZE)
        with self._device(backing), self._supervisor(backing), self._fio() as fio:
            for number in range(1, self._kills + 1):
                self._kill_and_wait(number)
            report = self._finish(fio)
            self._show_end(report)
        return 0 if report["error"] == 0 and report["verified"] > 0 else 1

    # --- the cast --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _device(self, backing: Path) -> Iterator[None]:
        """Create the device, as any administrator would with any ublk server."""
        log = self._home / "first-server.log"
        command = [*_SERVER, "--create", str(self._dev_id), "--recovery", "reissue"]
        command += ["--target", "loop", "--file", str(backing)]
        command += ["--queues", str(_QUEUES), "--depth", str(_DEPTH)]
        with log.open("wb") as output:
            first = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            _wait(lambda: "LIVE" in log.read_text(), "the device to be LIVE", log, first)
            _show(f"/dev/ublkb{self._dev_id}: {log.read_text().strip()} (loop, on {backing})")
            yield
        finally:
            for verb in ("--stop", "--delete"):
                subprocess.run([*_SERVER, verb, str(self._dev_id)], timeout=60, check=False)
            first.kill()
            first.wait()

    @contextlib.contextmanager
    def _supervisor(self, backing: Path) -> Iterator[None]:
        config = self._home / "ublkwatch.toml"
        command = json.dumps([*_SERVER, "--target", "loop", "--file", str(backing)])
        config.write_text(
            f'runtime_dir = "{self._home}/run"\nstate_dir = "{self._home}/state"\n'
            "[metrics]\nport = 0\n"
            f"[[device]]\ndev_id = {self._dev_id}\ncommand = {command}\n"
        )
        log = self._home / "ublkwatch.log"
        with log.open("wb") as output:
            daemon = subprocess.Popen(
                [sys.executable, "-m", "ublkwatch", "run", "--config", str(config)], stderr=output
            )
        try:
            _wait(lambda: self._status()["phase"] == "watching", "ublkwatch to watch", log)
            text = log.read_text()
            port = text.split("metrics on port ")[1].split()[0]
            self._page = f"http://127.0.0.1:{port}/metrics"
            _show("ublkwatch watches it")
            yield
        except BaseException:
            print(log.read_text(), file=sys.stderr)
            raise
        finally:
            daemon.terminate()
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()

    @contextlib.contextmanager
    def _fio(self) -> Iterator[subprocess.Popen[bytes]]:
        if shutil.which("fio") is None:
            _give_up("fio is not installed; try: apt-get install --yes fio")
        options = f"""
            --name=demo --filename=/dev/ublkb{self._dev_id} --rw=randwrite --bs=4k --direct=1
            --ioengine=libaio --iodepth=16 --time_based --runtime=3600
            --verify=crc32c --verify_backlog=256 --verify_fatal=1
            --output-format=json --output={self._home}/fio.json
        """
        fio = subprocess.Popen(["fio", *options.split()], cwd=self._home)
        try:
            _wait(lambda: self._writes() > 0, "fio to write")
            _show("fio writes 4 KiB blocks at random, reads them back and checks their crc32c\n")
            yield fio
        finally:
            if fio.poll() is None:
                fio.kill()
                fio.wait()

    # --- the plot --------------------------------------------------------------------------------

    def _kill_and_wait(self, number: int) -> None:
        before = self._status()
        pidfd = os.pidfd_open(before["server_pid"])
        killed = time.time()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)

        def recovered() -> bool:
            now = self._status()
            more = int(now["recoveries"]) > int(before["recoveries"])
            return more and now["phase"] == "watching"

        _wait(recovered, "the device to be LIVE again")
        after = self._status()
        detected_ms = (after["detected_at"] - killed) * 1000
        live_ms = detected_ms + after["last_held_s"] * 1000
        _show(
            f"kill {number:2}: server {before['server_pid']} killed; "
            f"detected after {detected_ms:.0f} ms ({after['detected_by']}), "
            f"held for {after['last_held_s'] * 1000:.0f} ms, "
            f"LIVE after {live_ms:.0f} ms under server {after['server_pid']}"
        )
        writes = self._writes()
        _wait(lambda: self._writes() > writes, "fio to go on")
        time.sleep(_PAUSE_S)

    def _finish(self, fio: subprocess.Popen[bytes]) -> dict[str, Any]:
        fio.send_signal(signal.SIGINT)
        fio.wait(timeout=_DEADLINE_S)
        report = (self._home / "fio.json").read_text()
        job = json.loads(report[report.index("{") :])["jobs"][0]
        return {
            "error": job["error"],
            "written": job["write"]["total_ios"],
            "verified": job["read"]["total_ios"],
        }

    def _show_end(self, report: dict[str, Any]) -> None:
        print("\n$ ublkwatch status", flush=True)
        config = str(self._home / "ublkwatch.toml")
        subprocess.run(
            [sys.executable, "-m", "ublkwatch", "status", "--config", config], check=False
        )
        print("\n$ curl -s http://127.0.0.1/metrics", flush=True)
        with urllib.request.urlopen(self._page, timeout=10) as page:
            for line in page.read().decode().splitlines():
                if line.startswith(_SHOWN):
                    print(line)
        verdict = "no error, no corruption" if report["error"] == 0 else "FAILED"
        _show(
            f"\nfio: err={report['error']}, {report['written']} blocks written, "
            f"{report['verified']} verified, through {self._kills} killed servers: {verdict}"
        )

    def _status(self) -> dict[str, Any]:
        document = json.loads((self._home / "run/status.json").read_text())
        found = [d for d in document["devices"] if d["dev_id"] == self._dev_id]
        return found[0] if found else {"phase": None, "recoveries": 0}

    def _writes(self) -> int:
        """Return how many writes the disk completed (field 5 of /sys/block/*/stat)."""
        return int(Path(f"/sys/block/ublkb{self._dev_id}/stat").read_text().split()[4])


def _free_id() -> int:
    return next(n for n in range(1 << 20) if not Path(f"/sys/class/ublk-char/ublkc{n}").exists())


def _wait(
    condition: Callable[[], bool],
    what: str,
    log: Path | None = None,
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    """Wait within the deadline; a status document that is not there yet is a reason to wait on."""
    deadline = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        with contextlib.suppress(FileNotFoundError):
            if condition():
                return
        time.sleep(0.02)
    said = f"; it said:\n{log.read_text()}" if log and log.exists() else ""
    _give_up(f"waited for {what}, in vain{said}")


def _give_up(why: str) -> NoReturn:
    raise SystemExit(f"demo: {why}")


def _show(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
