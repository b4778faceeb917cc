"""A server that was started beforehand, and waits for its line: taken, lost, found, replaced."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from conftest import DEADLINE_S, wait_until
from supervisor import SERVER, Supervisor

if TYPE_CHECKING:
    from conftest import Control, Load, Servers

    Watch = Callable[..., Supervisor]

AT_ONCE = "stable_s = 0.5\n"  # LIVE for so long, and its standby is started


def cared(command: list[str], *dev_ids: int, more: str = "standby = true") -> str:
    """Return tables for these devices, behind [recovery]'s own keys."""
    return AT_ONCE + "".join(
        f"[[device]]\ndev_id = {dev_id}\ncommand = {json.dumps(command)}\n{more}\n"
        for dev_id in dev_ids or (0,)
    )


def waiting(supervisor: Supervisor, beside: int | None = None, dev_id: int = 0) -> int:
    """Wait until a standby waits, another one than that, and return its pid."""
    shown = supervisor.until_true(
        "a standby waits",
        lambda now: now["standby"] == "waiting" and now["standby_pid"] != beside,
        dev_id,
    )
    assert psutil.Process(shown["standby_pid"]).is_running()
    return int(shown["standby_pid"])


def gone(pid: int) -> None:
    wait_until(lambda: not psutil.pid_exists(pid), DEADLINE_S, f"process {pid} is gone")


def recovered_by(supervisor: Supervisor, before: dict[str, Any]) -> int:
    return int(supervisor.recovered(before)["server_pid"])


def test_the_process_that_waited_takes_over_and_another_one_waits(
    server: Servers, watch: Watch
) -> None:
    server()
    supervisor = watch({}, cared([*SERVER, *server.target("null")]))
    standby = waiting(supervisor)
    before = supervisor.kill_server()
    after = supervisor.recovered(before)
    assert (after["server_pid"], after["attempts"]) == (standby, 1)
    another = waiting(supervisor, standby)
    assert another != standby
    assert recovered_by(supervisor, supervisor.kill_server()) == another
    waiting(supervisor, another)
    port = supervisor.said().rpartition("metrics on port ")[2].split()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE_S) as page:
        text = page.read().decode()
    assert 'ublkwatch_recovery_starts_total{start="standby"} 2.0' in text
    assert 'ublkwatch_standbys{state="waiting"} 1.0' in text
    assert f"its standby, process {standby}, is taken" in supervisor.said()


def test_where_it_died_a_new_server_is_started_and_no_attempt_is_spent(
    server: Servers, watch: Watch
) -> None:
    server()
    supervisor = watch({}, cared([*SERVER, *server.target("null")]))
    standby = waiting(supervisor)
    os.kill(standby, signal.SIGKILL)  # as `killall` would: both at once
    before = supervisor.kill_server()
    after = supervisor.recovered(before)
    assert after["server_pid"] != standby
    assert "DIED_BEFORE_READY" not in supervisor.said()
    waiting(supervisor, standby)
    os.kill(waiting(supervisor), signal.SIGKILL)  # nobody else died: the next one is to come
    waiting(supervisor, standby)


def test_it_is_found_again_after_our_own_death(server: Servers, watch: Watch) -> None:
    server()
    supervisor = watch({}, cared([*SERVER, *server.target("null")]))
    standby = waiting(supervisor)
    supervisor.kill()
    supervisor.start()
    assert waiting(supervisor) == standby
    assert recovered_by(supervisor, supervisor.kill_server()) == standby
    another = waiting(supervisor, standby)
    before = supervisor.watching()
    supervisor.kill()  # and now its server dies while nobody looks
    os.kill(standby, signal.SIGKILL)
    supervisor.start()
    assert recovered_by(supervisor, before) == another
    supervisor.until_tagged(another, waiting(supervisor, another))


def test_it_ends_when_nobody_wants_it_any_more(
    server: Servers, watch: Watch, control: Control
) -> None:
    creator = server()
    command = [*SERVER, *server.target("null")]
    supervisor = watch({}, cared(command))
    standby, said = waiting(supervisor), supervisor.config.read_text()
    supervisor.config.write_text(said.replace("standby = true", ""))
    supervisor.reload()
    gone(standby)
    supervisor.config.write_text(said)
    supervisor.reload()
    standby = waiting(supervisor, standby)
    supervisor.order("forget", "0", "--yes")
    gone(standby)
    supervisor.order("recover", "0")
    standby = waiting(supervisor, standby)
    supervisor.stop()  # ends nothing: servers outlive us, and so do standbys
    assert psutil.Process(standby).is_running()
    supervisor.start()
    assert waiting(supervisor) == standby
    control.remove(0)
    creator.wait()
    gone(standby)


def test_it_is_replaced_with_its_program(server: Servers, watch: Watch, tmp_path: Path) -> None:
    program = tmp_path / "server"

    def install(version: int) -> None:
        fresh = program.with_name("fresh")
        fresh.write_text(f'#!/bin/sh\n# {version}\nexec {" ".join(SERVER)} "$@"\n')
        fresh.chmod(0o755)
        fresh.rename(program)

    server()
    install(1)
    supervisor = watch({}, cared([str(program), *server.target("null")]))
    standby = waiting(supervisor)
    install(2)
    another = waiting(supervisor, standby)
    gone(standby)
    before = supervisor.watching()
    install(3)  # and its server dies before anybody had a look
    os.kill(before["server_pid"], signal.SIGKILL)
    assert recovered_by(supervisor, before) != another
    gone(another)
    waiting(supervisor, another)


@pytest.mark.usefixtures("no_block_errors")
def test_no_io_fails_and_nothing_is_spoilt(server: Servers, watch: Watch, fio: Load) -> None:
    server(target="ram", depth=32)
    supervisor = watch({}, cared([*SERVER, *server.target("ram")]))
    standby = waiting(supervisor)
    writer = fio(size="4m", verify_backlog=64, time_based=1, runtime=3600)
    for _ in range(4):
        writer.wait_progress()
        assert recovered_by(supervisor, supervisor.kill_server()) == standby
        standby = waiting(supervisor, standby)
    writer.wait_progress()
    writer.interrupt()
    writer.report()


def test_a_group_has_one(server: Servers, watch: Watch) -> None:
    server((0, 1))
    command = [*SERVER, "--target", "null", "--run-dir="]
    supervisor = watch({}, cared(command, 0, 1, more='standby = true\ngroup = "both"'))
    standby = waiting(supervisor)
    assert waiting(supervisor, dev_id=1) == standby
    befores = [supervisor.watching(dev_id) for dev_id in (0, 1)]
    supervisor.kill_server()
    assert [recovered_by(supervisor, before) for before in befores] == [standby] * 2
    supervisor.until_tagged(standby, waiting(supervisor, standby))
