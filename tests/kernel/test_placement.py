"""ublkwatch on a ublk device: refused, whatever lies in between, and without touching it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from conftest import DEADLINE_S
from stack import Stack
from supervisor import UBLKWATCH, Supervisor, worker_of
from test_refusals import run

from ublkwatch import placement
from ublkwatch.verbs import Exit

if TYPE_CHECKING:
    from conftest import Control, Servers

    Watch = Callable[..., Supervisor]


def on(what: Path | int) -> str:
    """Return on what a file lies, or one that we have open."""
    (found,) = placement.findings({"it": what if isinstance(what, int) else str(what)}, swap=False)
    return ", on ".join(found.chain)


def test_what_lies_on_a_device_is_warned_of_or_refused_also_while_that_is_dead(
    server: Servers, control: Control, stack: Stack, watch: Watch, attach: Path
) -> None:
    below = server(0, target="loop", size="64M")
    server(1, target="loop")
    plain = stack.mount("/dev/ublkb0")
    with (plain / "image").open("wb") as file:
        file.truncate(8 << 20)
    loop = stack.loop(plain / "image")
    image = stack.mount(loop)
    merged = stack.overlay(plain)
    stack.swap(stack.linear("/dev/ublkb1"))
    assert on(plain) == "ext4, on ublkb0"
    assert on(image) == f"ext4, on {loop}, on {plain}/image, on ext4, on ublkb0"
    assert on(merged / "new") == "overlay, on ext4, on ublkb0"
    with (merged / "log").open("wb") as log:
        assert on(log.fileno()) == "overlay, on ext4, on ublkb0"

    meant(watch, plain, attach)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    below.kill()
    looking = subprocess.Popen(["ls", "-l", plain, image], stdout=subprocess.DEVNULL)
    config = plain.with_name("ublkwatch.toml")
    config.write_text(f'runtime_dir = "{merged}/run"\nstate_dir = "{image}/state"\n')
    code, line = run(config)
    assert code == Exit.STATE
    for finding in (
        f"the state directory {image}/state is on ext4, on {loop}, on {plain}/image, on ext4, on ",
        f"the runtime directory {merged}/run is on overlay, on ext4, on ublkb0",
        "is on /dev/dm-0, on ublkb1",  # swap
        "try: move it to another disk (state_dir, runtime_dir, --config), or, if that risk is mea",
    ):
        assert finding in line
    assert looking.poll() is None, "the device was not dead"
    control.run(lambda ctrl: ctrl.stop_dev(0, timeout_s=DEADLINE_S))  # its I/O fails now
    looking.wait(DEADLINE_S)


def meant(watch: Watch, on_device_0: Path, attach: Path) -> None:
    """Run where that is meant, with a server's program on a device, and without capabilities."""
    program = on_device_0 / "attach"
    shutil.copy(attach, program)
    command = json.dumps([str(program)])
    tables = "\n".join(f"[[device]]\ndev_id = {each}\ncommand = {command}" for each in (0, 1))
    less = "-ipc_lock,-sys_resource"
    without = ("setpriv", "--bounding-set", less, "--inh-caps", less)
    limited = ("prlimit", "--memlock=65536:65536")
    ublkwatch = (*limited, *without, *UBLKWATCH, "run", "--config")
    supervisor = watch({}, tables, command=ublkwatch, top='placement = "warn"')
    supervisor.until_said("is on /dev/dm-0, on ublkb1: should that device's server be lost, ")
    for dev_id, itself in ((0, ", this very device"), (1, "")):
        supervisor.watching(dev_id)
        where = f"ublk {dev_id}: its server's program {program} is on ext4, on ublkb0{itself}: "
        supervisor.until_said(where + "while that is lost, it cannot be run")
    supervisor.recovered(supervisor.kill_server(1))
    assert supervisor.proc is not None
    for pid in (supervisor.proc.pid, worker_of(supervisor.proc.pid)):
        assert "VmLck:\t       0 kB" in Path(f"/proc/{pid}/status").read_text()
    for words in (
        "PR_SET_IO_FLUSHER is not to be had",
        "oom_score_adj stays 0",
        "memory is not locked (no CAP_IPC_LOCK, and RLIMIT_MEMLOCK is 65536",
    ):
        assert supervisor.said().count(words) == 1
    supervisor.stop()
