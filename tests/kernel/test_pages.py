"""What `ublkwatch status` shows of the real thing, word by word, in each situation of a device.

The pages are in tests/golden/captured. This writes them anew; read the difference:

    UBLKWATCH_CAPTURE=1 lab/lab.py run --rw "$PWD/tests/golden/captured" -- \
        .venv/bin/python -m pytest tests/kernel/test_pages.py
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from captures import Captures
from conftest import DEADLINE_S, wait_until
from supervisor import PATIENCE, SERVER, Supervisor
from test_modes import Disk
from test_reference_server import PARTIAL

from ublkwatch.model import Generation, Policy

if TYPE_CHECKING:
    from conftest import Control, KernelLog, Servers

    Watch = Callable[..., Supervisor]

WELL, RECOVERED, RECOVERING, BACKING_OFF, EXHAUSTED, HELD, STALLED = range(7)
# How the next server misbehaves, and what the configuration says of the device.
SITUATIONS = {
    WELL: ("none", ""),
    RECOVERED: ("none", ""),
    RECOVERING: ("hang-after-mmap", "attach_timeout_s = 3600"),
    BACKING_OFF: ("exit-at-start", "backoff_base_s = 3600\nbackoff_max_s = 3600"),
    EXHAUSTED: ("exit-at-start", "attempts_max = 2\nbackoff_base_s = 0.001"),
    HELD: ("none", ""),
    STALLED: ("none", "stall_timeout_s = 2"),
}
LOOKED_AT_S = 600.0  # what it takes to take all pages, and far more


def tables(server: Servers) -> str:
    # All times as by default, so that no page tells of them.
    made = "".join(f"{key} = {getattr(Policy(), key)}\n" for key in PATIENCE)
    for dev_id, (fault, more) in SITUATIONS.items():
        command = json.dumps([*SERVER, *server.target("null"), "--fault", fault])
        made += f"[[device]]\ndev_id = {dev_id}\n{more}\ncommand = {command}\n"
    return made


def back_off(supervisor: Supervisor, server: Servers, control: Control) -> None:
    """Have a device wait for its next attempt; for how long is drawn, and often enough is long."""
    for _ in range(20):
        creator = server(BACKING_OFF)
        supervisor.watching(BACKING_OFF)
        creator.proc.kill()
        shown = supervisor.until("it backs off", BACKING_OFF, phase="backoff")
        if shown["next_at"] > time.time() + LOOKED_AT_S:
            return
        creator.kill()
        control.remove(BACKING_OFF)
        supervisor.until_gone(BACKING_OFF)
    pytest.fail("no wait of twenty was long enough to look at")


@pytest.mark.full
def test_pages_of_the_real_thing_are_what_they_were(
    server: Servers,
    watch: Watch,
    control: Control,
    generation: Generation,
    kernel_log: KernelLog,
) -> None:
    if generation is Generation.G2:  # at the end one server is half attached
        kernel_log.expect(PARTIAL)
    creator = server((RECOVERED, RECOVERING, EXHAUSTED, HELD))
    stalling = server(STALLED)
    server(WELL)
    supervisor = watch({}, tables(server))
    captures = Captures(supervisor)
    for dev_id in SITUATIONS.keys() - {BACKING_OFF}:
        supervisor.watching(dev_id)
    captures.take("healthy", "status", f"status ublkb{WELL}", "status -x")

    back_off(supervisor, server, control)
    supervisor.order("hold", f"ublkb{HELD}", "--reason", "new disk")
    creator.proc.kill()  # and not waited for: before 6.15 only a zombie tells how it ended
    stalling.proc.send_signal(signal.SIGSTOP)
    with Disk(STALLED) as disk:
        read = disk.read()
        wait_until(read.waits, DEADLINE_S, "a read that is not answered")
        supervisor.until("recovered", RECOVERED, phase="watching", recoveries=1)
        supervisor.until("a new server attaches", RECOVERING, phase="attaching")
        supervisor.until("given up", EXHAUSTED, phase="failed")
        supervisor.until("held", HELD, phase="held", state="QUIESCED")
        supervisor.until("stalled", STALLED, ailment="stall")
        captures.take("all-situations", "status")
        captures.take("recovered", f"status ublkb{RECOVERED}")
        for name, dev_id in (
            ("recovering", RECOVERING),
            ("backing-off", BACKING_OFF),
            ("exhausted", EXHAUSTED),
            ("held", HELD),
            ("stalled", STALLED),
        ):
            captures.take(name, f"status -x ublkb{dev_id}", f"status ublkb{dev_id}")
        supervisor.stop()
        captures.take(
            "daemon-down", "status", f"status ublkb{WELL}", f"status ublkb{EXHAUSTED}", "status -x"
        )
        stalling.proc.send_signal(signal.SIGCONT)
        assert read.outcome() == 0
    captures.compared()
