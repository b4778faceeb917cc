"""What people do without a supervisor: with one device, by its server's own recover command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shlex
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from bench.cast import DEADLINE_S, wait_for
from bench.contestant import Plain, Script, Told
from bench.lot import filled
from bench.witness import Witness
from ublkwatch.uapi import DevState

UNITS = Path("/run/systemd/system")


class Usual(Plain):
    """What people do with one device and its server's own recover command."""

    def unfit(self) -> str:
        if self.lot.kind.handoff == "managed":
            return "it has a recover command only"
        return "it has one device" if len(self.lot.dev_ids) > 1 else ""

    @property
    def dev_id(self) -> int:
        return self.lot.dev_ids[0]

    @property
    def recover(self) -> str:
        """The command, which returns when the device is LIVE."""
        return shlex.join([*filled(self.lot.recover, self.dev_id), "--daemonize"])


class ShellLoop(Usual):
    """``while sleep 1``: list the devices, grep QUIESCED, recover."""

    async def poise(self) -> None:
        listing = f"{shlex.quote(str(self.stage.programs / 'list'))} {self.dev_id}"
        script = f"""while sleep 1; do
            if {listing} | grep -q QUIESCED; then {self.recover}; exit; fi
        done"""
        self._script = Script(script, self.lot.home / "shell.log")
        # A crash comes at any moment of the second.
        await asyncio.sleep(1 + random.random())  # noqa: S311

    async def over(self) -> Told:
        await self._script.ended()
        return {}


class FixedSleeps(Usual):
    """The script of the patches that brought recovery to ublk: kill, sleep 6, recover."""

    async def strike(self, witness: Witness, pids: Mapping[int, int]) -> None:
        await super().strike(witness, pids)
        self._script = Script(f"sleep 6; {self.recover}", self.lot.home / "sleeps.log")

    async def over(self) -> Told:
        await self._script.ended()
        return {}


class Unit(Usual):
    """A unit of systemd with Restart=always around the recover command, which is the server."""

    def unfit(self) -> str:
        return super().unfit() or no_systemd()

    @property
    def _name(self) -> str:
        return f"ublkwatch-bench-{self.dev_id}.service"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        ctrl, dev_id = self.stage.ctrl, self.dev_id
        former = (await ctrl.get_dev_info(dev_id)).ublksrv_pid
        command = " ".join(f'"{word}"' for word in filled(self.lot.recover, dev_id))
        working = f"WorkingDirectory={Path.cwd()}"
        service = f"ExecStart={command}\n{working}\nRestart=always\n"
        unit = f"[Unit]\nStartLimitIntervalSec=0\n[Service]\n{service}"
        (UNITS / self._name).write_text(unit)
        try:
            _systemctl("daemon-reload")
            os.kill(former, signal.SIGKILL)
            await self._until(live=False)
            _systemctl("start", self._name)
            await self._until(live=True)
            yield
        finally:
            _systemctl("stop", self._name)
            (UNITS / self._name).unlink()
            _systemctl("daemon-reload")

    async def over(self) -> Told:
        await wait_for(self._active, f"{self._name} to be active")
        return {}

    async def _until(self, *, live: bool) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while await self._live() is not live:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.02)

    async def _live(self) -> bool:
        info = await self.stage.ctrl.get_dev_info(self.dev_id)
        return info.state is DevState.LIVE

    def _active(self) -> bool:
        return (
            subprocess.run(["systemctl", "-q", "is-active", self._name], check=False).returncode
            == 0
        )


def no_systemd() -> str:
    """Say so, where systemd is not the init."""
    return "" if UNITS.exists() else "no systemd here"


def _systemctl(*words: str) -> None:
    subprocess.run(["systemctl", *words], check=True)
