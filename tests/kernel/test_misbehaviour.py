"""New servers that misbehave: what each costs, and that the good one after it brings I/O back."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from conftest import DEADLINE_S, wait_until
from supervisor import Supervisor
from test_modes import Disk, held_back, watched
from test_reference_server import PARTIAL

from ublkwatch.model import TAG_VARIABLE, Generation, Reason
from ublkwatch.uapi import DevState

if TYPE_CHECKING:
    from conftest import Control, KernelLog, Servers

    Watch = Callable[..., Supervisor]

BEFORE_THE_LINE = {
    "exit-at-start": Reason.DIED_BEFORE_READY,
    "exit-after-ready": Reason.DIED_BEFORE_READY,
    "hang-at-start": Reason.NOT_READY,
}
AFTER_THE_LINE = {
    "exit-after-mmap": Reason.DIED_ATTACHING,
    "exit-after-fetches:1": Reason.DIED_ATTACHING,
    "hang-after-ready": Reason.ATTACH_TIMEOUT,
    "hang-after-mmap": Reason.ATTACH_TIMEOUT,
    "hang-after-fetches:1": Reason.ATTACH_TIMEOUT,
}
# Its line is never read, and so it cannot have touched the device: on no kernel is that final.
UNREAD = "hang-after-ready"
# These end just as END does, or serve from a process that ublkwatch did not start.
RACING = ("exit-after-all-fetches", "fork-away")


def first(fault: str, server: Servers, directory: Path) -> list[str]:
    """Return the command of a server that misbehaves once, and is a good one from then on."""
    path = directory / f"faults-{fault}"
    path.write_text(f"{fault}\n")
    return [*server.target("null"), "--fault-file", str(path)]


def processes_of_attempts(dev_id: int) -> set[int]:
    """Return the processes, alive, that were started for this device, and theirs."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(TAG_VARIABLE, "").startswith(f"{dev_id}-"):
                found.add(process.pid)
    return found


def said_after_giving_up(supervisor: Supervisor, dev_id: int) -> str:
    """Return what the log has about a device from the moment on in which it was given up."""
    lines = supervisor.said_of(dev_id)
    given_up = next(index for index, line in enumerate(lines) if "-> failed " in line)
    return "\n".join(lines[given_up + 1 :])


def test_a_server_that_fails_before_its_line_costs_an_attempt(
    server: Servers, watch: Watch, tmp_path: Path
) -> None:
    faults = dict(enumerate(BEFORE_THE_LINE))
    creator = server(tuple(faults))
    supervisor = watch(
        {dev_id: first(fault, server, tmp_path) for dev_id, fault in faults.items()},
        "ready_timeout_s = 60",
    )
    befores = [supervisor.watching(dev_id) for dev_id in faults]
    with contextlib.ExitStack() as stack:
        disks = [stack.enter_context(Disk(dev_id)) for dev_id in faults]
        creator.kill()
        reads = [disk.read() for disk in disks]
        # Side by side: the one may be back before the other's server has failed.
        unseen = set(faults)

        def seen(dev_id: int) -> bool:
            now = supervisor.device(dev_id)
            return (
                now is not None
                and now["attempts_left"] < 5
                and now["phase"] not in ("watching", "failed")
            )

        def all_seen() -> bool:
            unseen.difference_update([dev_id for dev_id in unseen if seen(dev_id)])
            return not unseen

        wait_until(all_seen, DEADLINE_S, "a failed attempt of each shows")
        for before, read, fault in zip(befores, reads, faults.values(), strict=True):
            after = supervisor.recovered(before)
            assert read.outcome() == 0
            failed = [line for line in supervisor.said_of(before["dev_id"]) if "-> backoff" in line]
            assert BEFORE_THE_LINE[fault].value in failed[0]
            # One, but on a machine so slow that a good server is not ready in time either.
            assert after["attempts"] == len(failed) + 1
            assert after["attempts_left"] >= 5 - len(failed)


def test_a_server_that_fails_after_its_line_is_replaced_or_on_6_12_the_device_given_up(
    server: Servers, watch: Watch, generation: Generation, kernel_log: KernelLog, tmp_path: Path
) -> None:
    faults = dict(enumerate((*AFTER_THE_LINE, *RACING)))
    healthy = len(faults)
    if generation is Generation.G2:
        kernel_log.expect(PARTIAL)
    creator, other = server(tuple(faults)), server(healthy)
    supervisor = watch(
        {dev_id: first(fault, server, tmp_path) for dev_id, fault in faults.items()}
        | {healthy: "null"},
        # Time enough for many servers that start at once.
        "ready_timeout_s = 200\ndrain_timeout_s = 45\nattach_timeout_s = 30",
    )
    befores = {dev_id: supervisor.watching(dev_id) for dev_id in (*faults, healthy)}

    creator.kill()

    for dev_id, fault in faults.items():
        name = f"ublk {dev_id}, {fault}"
        settled = supervisor.until_true(name, is_settled, dev_id)
        if settled["phase"] == "failed":
            assert generation is Generation.G2, name
            assert fault != UNREAD, name
            reasons = ["HALF_ATTACHED"] + ["LIVE_WITHOUT_SERVER"] * (fault in RACING)
            assert settled["reason"] in reasons, name
        else:
            assert generation is Generation.G3 or fault in (*RACING, UNREAD), name
            wait_until(
                lambda dev=dev_id, pid=settled["server_pid"]: processes_of_attempts(dev) == {pid},  # type: ignore[misc]
                DEADLINE_S,
                name,
            )
            with Disk(dev_id) as disk:
                assert disk.read().outcome() == 0, name
        if fault in AFTER_THE_LINE:
            assert AFTER_THE_LINE[fault].value in "\n".join(supervisor.said_of(dev_id)), name

    # It goes on serving; and meanwhile it has had the time to do what it must not.
    other.kill()
    supervisor.recovered(befores[healthy])
    with Disk(healthy) as disk:
        assert disk.read().outcome() == 0
    for dev_id, fault in faults.items():
        now = supervisor.device(dev_id)
        assert now is not None
        assert is_settled(now), fault
        if now["phase"] == "failed":
            assert said_after_giving_up(supervisor, dev_id) == "", fault
            wait_until(lambda dev=dev_id: not processes_of_attempts(dev), DEADLINE_S, fault)  # type: ignore[misc]
            assert now["remedy"] == f"`ublkwatch stop {dev_id}`"
            supervisor.order("stop", str(dev_id), "--yes")
            supervisor.until_gone(dev_id)


def is_settled(device: dict[str, Any]) -> bool:
    """Tell whether a device was given up, or recovered."""
    recovered = device["phase"] == "watching" and device["state"] == "LIVE"
    return device["phase"] == "failed" or (recovered and bool(device["recoveries"]))


@contextlib.contextmanager
def left_child(
    server: Servers, watch: Watch, _control: Control, tmp_path: Path
) -> Iterator[tuple[str, Supervisor, dict[str, Any]]]:
    """Kill a server whose child holds the character device; at the end of this the child ends."""
    creator = server(more=("--fault", "leak"))
    found = re.search(r"leak: process (\d+) ", creator.stderr)
    assert found is not None
    child = psutil.Process(int(found[1]))
    try:
        supervisor, before = watched(server, watch, tmp_path / "faults")
        creator.kill()
        yield f"{child.pid} (sleep)", supervisor, before
    finally:
        child.kill()


@contextlib.contextmanager
def a_stranger(
    server: Servers, watch: Watch, control: Control, tmp_path: Path
) -> Iterator[tuple[str, Supervisor, dict[str, Any]]]:
    """Kill a server and open its character device ourselves, for as long as this lasts."""
    creator = server()
    supervisor, before = watched(server, watch, tmp_path / "faults")
    with held_back(tmp_path / "faults"):
        creator.kill()
        control.wait_state(0, DevState.QUIESCED)
        fd = opened("/dev/ublkc0")
    try:
        yield f"{os.getpid()} ({psutil.Process().name()})", supervisor, before
    finally:
        os.close(fd)


def opened(node: str) -> int:
    """Open a character device that its server is about to be gone from."""
    found = []

    def tried() -> bool:
        try:
            found.append(os.open(node, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        return bool(found)

    wait_until(tried, DEADLINE_S, f"{node} opened")
    return found[0]


@pytest.mark.parametrize("holder", [left_child, a_stranger])
def test_who_holds_the_character_device_is_named_and_waited_for(
    server: Servers,
    watch: Watch,
    control: Control,
    tmp_path: Path,
    *,
    holder: Callable[..., contextlib.AbstractContextManager[tuple[str, Supervisor, Any]]],
) -> None:
    with holder(server, watch, control, tmp_path) as (who, supervisor, before):
        named = supervisor.until_true(
            f"{who} is named", lambda now: f"held by process {who}" in now["explanation"]
        )
        # Which of them depends on whether the driver calls the device LIVE while it is open.
        assert named["phase"] in ("draining", "starting")

    assert supervisor.recovered(before)["attempts"] == 1


def test_servers_that_ignore_sigterm_or_serve_no_more_are_replaced_once_they_are_killed(
    server: Servers, watch: Watch, tmp_path: Path
) -> None:
    creator = server((0, 1))
    supervisor = watch(
        {0: first("ignore-sigterm", server, tmp_path), 1: first("stop-queue:0", server, tmp_path)}
    )
    befores = [supervisor.watching(dev_id) for dev_id in (0, 1)]
    creator.kill()
    for before in befores:
        supervisor.recovered(before)
    psutil.Process(supervisor.watching(0)["server_pid"]).terminate()
    with Disk(0) as disk, Disk(1) as silent_disk:
        read = silent_disk.read()
        wait_until(read.waits, DEADLINE_S, "a read that is not answered")
        assert disk.read().outcome() == 0

        befores = [supervisor.kill_server(dev_id) for dev_id in (0, 1)]

        for before in befores:
            supervisor.recovered(before)
        assert read.outcome() == 0
