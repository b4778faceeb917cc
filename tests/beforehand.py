"""What a daemon does from a crash to the line, with nothing behind it: `beforehand.py DIRECTORY`.

Everything that ublkwatch brings is imported first, as `ublkwatch run` does. What is imported or
opened from then on is printed, a line each.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from ublkwatch import cli, daemon, discover, log, server, status, threads
from ublkwatch.apart import Apart
from ublkwatch.care import Job, Origin, Run, Spec
from ublkwatch.ctrl import CtrlError
from ublkwatch.ctrl_worker import Workers
from ublkwatch.identity import Judge
from ublkwatch.launch import Launcher, start_worker
from ublkwatch.metrics import Metrics
from ublkwatch.model import Generation, Phase, Policy, QueueConfig, Record
from ublkwatch.news import News
from ublkwatch.store import Store

T = TypeVar("T")
SERVER = """
import os, socket, sys, time
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
input()
"""
_HARMLESS = ("/proc/", "/sys/", "/dev/null")
_log = logging.getLogger("ublkwatch")


def note(event: str, arguments: tuple[object, ...]) -> None:
    """Print what is imported, opened or looked up; a hook is for ever."""
    if event == "import":
        print("import", arguments[0])
    elif event == "open" and isinstance(arguments[0], str | bytes):
        path = os.fsdecode(arguments[0])
        if not path.startswith((*_HARMLESS, sys.argv[1])):
            print("open", path)


async def within(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, 60)


async def followed() -> asyncio.Task[None]:
    """Follow uevents, and return by what when that has begun."""
    discover.load_uevents()
    heard = asyncio.Event()
    following = asyncio.create_task(discover.follow_uevents(heard.set))
    await within(heard.wait())
    return following


async def look(servers: server.Servers) -> None:
    """Look at all that is looked at when a server is lost, and with every poll."""
    discover.dev_ids()
    discover.instance(0, "boot")
    discover.traffic(0)
    threads.alive(os.getpid())
    threads.look(os.getpid())
    server.origin(os.getpid())
    await within(servers.tagged("0-1-1"))
    await within(servers.holders("/dev/ublkc0"))


async def main(home: Path) -> None:  # noqa: PLR0915 - a recovery has as many steps
    (home / "run").mkdir()
    ready = asyncio.Event()
    asyncio.get_running_loop().set_default_executor(Apart())
    judge = Judge()
    judge.meet("nobody")
    launcher = Launcher(home / "run", lambda _: ready.set(), judge=judge)
    metrics = Metrics(clock=time.monotonic, wall=time.time)
    workers = Workers(start_worker, metrics)
    await launcher.prepare()
    await workers.prepare()
    following = await followed()
    store = Store(home / "run", home / "state")
    news = News(home / "run", store, metrics)
    lines = log.Log()
    exited = asyncio.Event()
    servers = server.Servers(server.read_boot_id(), lambda _, __: exited.set())
    lost = subprocess.Popen(["/bin/sleep", "600"])  # noqa: ASYNC220 - it takes no time
    known = servers.identify(lost.pid)
    assert known is not None
    servers.watch(known)
    record = Record(dev_id=0, instance="boot/1", phase=Phase.WATCHING)

    sys.addaudithook(note)
    lost.kill()
    await within(exited.wait())
    store.save_record(record)
    metrics.stepped(record, 1.0)
    await asyncio.to_thread(store.save_spec, Spec(0, "boot/1", QueueConfig(1, 16, 4096, 0, {})))
    await look(servers)
    assert await within(launcher.shutting_down()) is False
    assert (await within(launcher.decide(("/bin/true",), {"A": "b"}, 50)))[1] == 0
    job = Job("test", (sys.executable, "-c", SERVER), Run(env=(("A", "b"),)), Origin())
    pid = await within(launcher.start("0-1-1", job))
    new = servers.identify(pid)
    assert new is not None
    servers.watch(new)
    await within(ready.wait())
    try:
        await within(workers.call("START_USER_RECOVERY", 1 << 19, "key", timeout_s=30, busy_s=0))
    except CtrlError as error:
        _log.info("%s", error)
    exited.clear()
    launcher.write_line("0-1-1", json.dumps({"dev_id": 0}))
    document = status.document(
        [record], lambda _: Policy(), wall=1.0, now=1.0, pid=1, generation=Generation.G3
    )
    await asyncio.to_thread(store.write_status, json.dumps(document))
    news.tell("recovery", "it is back")
    assert b"process_open_fds" in await within(metrics.page())
    await within(news.finish())
    await within(exited.wait())
    launcher.how_ended(pid)
    launcher.last_words("0-1-1")
    await within(launcher.end("0-1-1"))
    launcher.keep_only(set())
    _log.warning("an error: %s", OSError(5, "why"))
    print("done", flush=True)

    following.cancel()
    for each in (launcher, workers, servers, lines, store):
        each.close()


if __name__ == "__main__":
    assert cli
    assert daemon
    asyncio.run(main(Path(sys.argv[1])))
