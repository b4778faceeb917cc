"""An order's whole way: command line, socket, machine; over the monitor's small world."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from patience import until
from test_monitor import FIRST, World, phase

from ublkwatch import cli, config, status
from ublkwatch.admin import Admin, Peer
from ublkwatch.care import Care, Job, Origin
from ublkwatch.ctrl import CtrlError
from ublkwatch.desk import Desk
from ublkwatch.events import Asked, ServerAils
from ublkwatch.host import check_programs
from ublkwatch.library import Library
from ublkwatch.model import (
    Ailment,
    DevInfo,
    Exhausted,
    Generation,
    Order,
    Phase,
    Policy,
    Reason,
    Record,
    Remedy,
)
from ublkwatch.monitor import Monitor
from ublkwatch.rules import Unmanaged
from ublkwatch.stopping import Stopper
from ublkwatch.store import Store
from ublkwatch.uapi import DevFlags, DevState
from ublkwatch.usage import Usage
from ublkwatch.verbs import Exit
from ublkwatch.wire import Answer, Deed

PEER = Peer(0, 1, "")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Place(World):
    """The monitor's world, with real directories, a real socket and a real command line."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self.runtime_dir = home / "run"
        self.config = home / "ublkwatch.toml"
        self.config.write_text(
            f'runtime_dir = "{home}/run"\nstate_dir = "{home}/state"\n'
            '[[device]]\ndev_id = 0\ncommand = ["/bin/server"]\n'
        )
        self.store = Store(home / "run", home / "state")
        self.history: list[dict[str, Any]] = []
        self.failing_starts = 0
        self.jobs: list[Job] = []
        self.unmanaged = False  # but for what is registered
        self.uses = Usage()
        self.features = DevFlags.SAFE_STOP_DEV
        self.stop_error = 0

    def save_record(self, record: Record) -> None:
        super().save_record(record)
        self.store.save_record(replace(record, instance=f"{BOOT_ID}/1"))

    async def care_of(self, info: DevInfo, origin: Origin | None) -> Care | Unmanaged:
        if not self.unmanaged:
            return await super().care_of(info, origin)
        return self.library.find(info, origin)

    async def start(self, tag: str, job: Job) -> int:
        if self.failing_starts:
            self.failing_starts -= 1
            raise OSError(2, "No such file or directory", job.command[0])
        self.jobs.append(job)
        return await super().start(tag, job)

    def desk(self, monitor: Monitor) -> Desk:
        self.library = Library(
            config.load(self.config),
            self.store,
            lambda _: lambda _info, _origin: None,
            check_programs,
            Generation.G3,
        )
        stopper = Stopper(self, self, self.features, lambda _: self.uses)
        load = partial(config.load, self.config)
        return Desk(monitor, self.library, load, stopper, self.history.append, self.notes)

    async def call(
        self, command: str, dev_id: int, key: str, *, timeout_s: float, **arguments: float
    ) -> dict[str, Any]:
        if "STOP" in command:
            self.diary.append(command)
            if self.stop_error:
                raise CtrlError(self.stop_error, command, dev_id)
            assert self.info
            self.info = replace(self.info, state=DevState.DEAD, ublksrv_pid=-1)
            self.seen.server_exited(self.alive.pop(FIRST.pid))  # which sees its disk go
            return {}
        return await super().call(command, dev_id, key, timeout_s=timeout_s, **arguments)

    def show(self) -> dict[str, Any]:
        """Write the status document, and return what it says of the device."""
        document = status.document(
            self.seen.records(),
            self.seen.policy,
            wall=time.time(),
            now=time.monotonic(),
            pid=1,
            generation=Generation.G3,
        )
        self.store.write_status(json.dumps(document))
        found: dict[str, Any] = document["devices"][0]
        return found

    async def run(self, *arguments: str) -> int:
        """Call the command line as `ublkwatch ...` does, in a thread of its own."""
        verb, *rest = arguments
        return await asyncio.to_thread(cli.main, [verb, "--config", str(self.config), *rest])


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    with contextlib.suppress(OSError):
        place.store.close()


async def until_recovered(place: Place) -> Record:
    def recovered() -> bool:
        (record,) = place.seen.records()
        return record.phase is Phase.WATCHING and record.recoveries > 0

    await until(recovered, f"recovered: {place.diary}")
    return place.seen.records()[0]


def play(
    place: Place,
    story: Callable[[], Awaitable[None]],
    first: Phase = Phase.WATCHING,
    **policy: Any,
) -> None:
    """Run monitor and socket while the story is told."""

    async def run() -> None:
        monitor = place.monitor(**policy)
        door = Admin(place.runtime_dir, place.desk(monitor).take)
        await door.start()
        task = asyncio.create_task(monitor.run(0.05))
        try:
            await phase(place, first)
            await story()
        finally:
            door.close()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(run())


# --- orders --------------------------------------------------------------------------------------


def test_a_held_device_waits_and_a_released_one_is_recovered(
    place: Place, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ublkwatch")

    async def story() -> None:
        assert await place.run("hold", "/dev/ublkb0", "--reason", "new disk") == Exit.OK
        told = place.show()
        assert told["held"] is True
        assert told["held_until"] is None
        me = f"uid {os.geteuid()}" + (" (root)" if os.geteuid() == 0 else "")
        assert told["held_by"] == f"{me}, pid {os.getpid()}: new disk"
        place.crash()
        record = await phase(place, Phase.HELD)
        assert record.reason is Reason.HELD
        looks = place.seen.polls
        await until(lambda: place.seen.polls > looks + 3, "it looks on")
        assert "spawn 0-1-1" not in place.diary
        assert await place.run("release", "ublkb0") == Exit.OK
        assert (await phase(place, Phase.WATCHING)).recoveries == 1

    play(place, story)
    assert capsys.readouterr().out == "hold ublkb0: done\nrelease ublkb0: done\n"
    assert [(e["kind"], e["order"], e["result"]) for e in place.history] == [
        ("order", "hold", "taken"),
        ("order", "release", "taken"),
    ]
    assert place.history[0]["reason"] == "new disk"
    assert place.history[0]["uid"] == os.geteuid()
    assert f"ublk 0: hold, asked by uid {os.geteuid()}" in caplog.text


def test_a_hold_for_a_time_ends_by_itself(place: Place) -> None:
    async def story() -> None:
        began = time.monotonic()
        assert await place.run("hold", "0", "--for", "3s") == Exit.OK
        place.crash()
        await phase(place, Phase.HELD)
        record = await phase(place, Phase.WATCHING)
        assert time.monotonic() - began >= 3
        assert (record.recoveries, record.held) == (1, False)

    play(place, story)


def test_a_device_that_was_given_up_is_tried_again_when_asked(place: Place) -> None:
    async def story() -> None:
        place.failing_starts = 2
        place.crash()
        record = await phase(place, Phase.FAILED)
        assert record.reason is Reason.SPAWN_FAILED
        assert await place.run("retry", "0") == Exit.OK
        assert (await phase(place, Phase.WATCHING)).recoveries == 1

    play(place, story, attempts_max=2, backoff_base_s=0.01)


def test_a_device_that_was_lost_before_we_came_is_recovered_when_asked(place: Place) -> None:
    async def story() -> None:
        place.crash()
        await phase(place, Phase.GRACE)
        assert await place.run("recover", "ublkc0") == Exit.OK
        await phase(place, Phase.WATCHING)
        assert await place.run("forget", "0", "--yes", "--reason", "mine") == Exit.OK
        record = await phase(place, Phase.OBSERVED)
        assert record.reason is Reason.FORGOTTEN
        assert record.detail.endswith(": mine")

    play(place, story, grace_s=3600)


def test_a_refusal_has_words_a_code_and_a_way_out(
    place: Place, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        assert await place.run("retry", "0") == Exit.REFUSED
        assert await place.run("hold", "9") == Exit.REFUSED

    play(place, story)
    assert capsys.readouterr().err == (
        "ublkwatch: retry ublkb0: refused: it was not given up: it is watching; "
        "`ublkwatch explain 0` says what can be done\n"
        "ublkwatch: hold ublkb9: refused: no such device is known; "
        "`ublkwatch explain 9` says what can be done\n"
    )
    refused = "refused: it was not given up: it is watching"
    assert [entry["result"] for entry in place.history] == [
        refused,
        "refused: no such device is known",
    ]
    assert refused in caplog.text


def test_an_order_is_done_when_it_is_recorded_and_not_before(place: Place) -> None:
    async def story() -> None:
        place.disk_full = True
        asked = asyncio.create_task(place.seen.order(0, Asked(Order.HOLD, "me")))
        looks = place.seen.polls
        await until(lambda: place.seen.polls > looks + 3, "time passes")
        assert not asked.done()
        assert not place.seen.records()[0].held
        place.disk_full = False
        assert await asked == ""
        assert place.saved[0].held

    play(place, story)


def test_what_the_machine_refuses_at_the_last_moment_is_no_success(place: Place) -> None:
    async def story() -> None:
        place.crash()
        await phase(place, Phase.GRACE)
        assert place.info
        place.info = replace(place.info, state=DevState.DEAD)
        first = asyncio.create_task(place.seen.order(0, Asked(Order.RECOVER)))
        second = asyncio.create_task(place.seen.order(0, Asked(Order.RECOVER)))
        assert await first == ""
        assert await second == "it is draining already"
        await until(lambda: not place.seen.records(), "the device is gone")
        assert await place.seen.order(0, Asked(Order.HOLD)) == "no such device is known"

    play(place, story, grace_s=3600)


# --- explain -------------------------------------------------------------------------------------


def test_explain_says_what_is_and_when_nobody_is_there_to_act(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story() -> None:
        assert await place.run("hold", "0", "--for", "2h", "--reason", "new disk") == Exit.OK
        place.crash()
        await phase(place, Phase.HELD)
        await until(lambda: place.show()["state"] == "QUIESCED", "the state was read")
        capsys.readouterr()
        assert await place.run("explain", "0") == Exit.OK

    play(place, story, on_exhausted=Exhausted.FAIL)
    told = capsys.readouterr().out
    assert told.startswith("ublkb0: held, QUIESCED, for ")
    assert "ublkwatch is running\n" in told
    assert "new disk, until " in told
    assert "(in 120 min)" in told
    assert "ublkwatch release 0 " in told
    assert "is sent again to the new server" in told
    place.store.close()
    code = cli.main(["explain", "0", "--config", str(place.config)])
    told = capsys.readouterr().out
    assert code == Exit.NOT_RUNNING
    assert "ublkwatch is NOT RUNNING since 20" in told
    assert "new disk, until " in told


def test_explain_knows_what_only_the_status_says(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story() -> None:
        assert place.info
        place.crash()
        await phase(place, Phase.GRACE)
        place.seen.quarantine(0, ValueError("odd"))
        await until(lambda: place.show()["state"] == "QUIESCED", "the state was read")
        assert await place.run("explain", "0") == Exit.OK

    play(place, story, grace_s=3600)
    told = capsys.readouterr().out
    assert told.startswith("ublkb0: failed, QUIESCED")
    assert "a bug in ublkwatch; the log has the details (ValueError('odd'))" in told
    assert "restart ublkwatch" in told


def test_explain_of_an_unknown_device_and_of_another_boots_record(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["explain", "5", "--config", str(place.config)]
    assert cli.main(arguments) == Exit.REFUSED
    assert "ublkb5: no such device is known; `ublkwatch status` shows" in capsys.readouterr().err
    place.store.save_record(Record(dev_id=5, instance="another-boot/1"))
    assert cli.main(arguments) == Exit.REFUSED
    (place.runtime_dir / "records/5.json").write_text("{")
    assert cli.main(arguments) == Exit.FAILED
    assert "records/5.json cannot be understood" in capsys.readouterr().err
    assert (place.runtime_dir / "records/5.json").exists()
    place.store.close()
    place.store.drop_record(5)
    assert cli.main(arguments) == Exit.NOT_RUNNING
    assert "unknown, and ublkwatch is not running" in capsys.readouterr().err


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [order.value for order in Order])
def test_without_a_daemon_every_order_says_so(
    place: Place, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([verb, "3", "--config", str(place.config)]) == Exit.NOT_RUNNING
    assert capsys.readouterr().err == (
        f"ublkwatch: {verb} ublkb3: ublkwatch is not running; start it, then ask again\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["hold"],
        ["hold", "sda"],
        ["hold", "-1"],
        ["hold", "/dev/sda0"],
        ["hold", "ublkb"],
        ["hold", "0", "--for", "30"],
        ["hold", "0", "--for", "0s"],
        ["hold", "0", "--for", "31d"],
        ["hold", "0", "--for", "-5m"],
        ["retry", "0", "--for", "5m"],
        ["explain"],
    ],
)
def test_wrong_usage_is_refused_before_anything_is_done(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == Exit.USAGE


def test_a_reason_without_end_is_wrong_usage(place: Place) -> None:
    arguments = ["hold", "0", "--reason", "x" * 501, "--config", str(place.config)]
    assert cli.main(arguments) == Exit.USAGE


@pytest.mark.skipif(os.geteuid() != 0, reason="for root, which can be nobody for a while")
@pytest.mark.parametrize("verb", ["hold", "explain", "registered"])
def test_who_is_not_root_is_told_so(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        home.chmod(0o755)
        place = Place(home)

        async def listen() -> None:
            door = Admin(place.runtime_dir, place.desk(place.monitor()).take)
            await door.start()
            os.seteuid(65534)
            try:
                what = () if verb == "registered" else ("0",)
                assert await place.run(verb, *what) == Exit.NO_PERMISSION
            finally:
                os.seteuid(0)
                door.close()

        asyncio.run(listen())
        place.store.close()
    assert "try sudo" in capsys.readouterr().err


# --- rules ---------------------------------------------------------------------------------------

REGISTER = ("register", "ublkb3", "--handoff", "delegated", "--policy", "grace_s=4")


def test_what_is_registered_is_kept_shown_and_undone(
    place: Place, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ublkwatch")
    command = ("--reason", "new disk", "--", "/bin/true", "recover", "-n", "{dev_id}")

    async def story() -> None:
        assert await place.run(*REGISTER, *command) == Exit.OK
        assert await place.run("registered") == Exit.OK
        table = {
            "dev_id": 3,
            "handoff": "delegated",
            "grace_s": 4,
            "command": ["/bin/true", "recover", "-n", "{dev_id}"],
        }
        assert place.library.registered() == {"ublkb3": table}
        assert await place.run("unregister", "ublkb3") == Exit.OK
        assert await place.run("unregister", "ublkb3") == Exit.REFUSED
        assert await place.run("registered", "--json") == Exit.OK

    play(place, story)
    said = capsys.readouterr()
    assert said.out == (
        "register ublkb3: done\n  ublkb3: a new rule (registration ublkb3: device)\n"
        "ublkb3: ublkb3: delegated: /bin/true recover -n {dev_id}\n"
        "unregister ublkb3: done\n  ublkb3: no rule any more (registration ublkb3: device)\n{}\n"
    )
    assert "refused: ublkb3: nothing is registered by this name" in said.err
    assert f"register ublkb3, asked by uid {os.geteuid()}" in caplog.text
    entry = place.history[0]
    assert (entry["order"], entry["name"], entry["dev_id"]) == ("register", "ublkb3", 3)
    assert (entry["reason"], entry["result"]) == ("new disk", "taken")


def test_a_registered_command_is_the_one_that_is_started(place: Place) -> None:
    place.config.write_text(f'runtime_dir = "{place.runtime_dir}"\n'
                            f'state_dir = "{place.runtime_dir.parent}/state"\n')  # fmt: skip
    place.unmanaged = True

    async def story() -> None:
        await until(lambda: place.show()["reason"] == "NO_SPEC", "nobody cares for it")
        assert await place.run("register", "0", "--", "/bin/true", "{queues}") == Exit.OK
        await phase(place, Phase.WATCHING)
        place.crash()
        assert (await until_recovered(place)).recoveries == 1
        assert [job.command for job in place.jobs] == [("/bin/true", "1")]
        assert await place.run("forget", "0", "--yes") == Exit.OK
        assert place.library.registered() == {}

    play(place, story, first=Phase.OBSERVED)


def test_a_registration_that_is_wrong_is_refused_with_words(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story() -> None:
        for words in (
            ("--", "true"),
            ("--attach", "late", "--", "/bin/true"),
            ("--limit", "core", "--", "/bin/true"),
            ("--policy", "user=me", "--", "/bin/true"),
            ("--exe", "/x", "--", "/bin/true"),
            ("--", "/bin/no such"),
            ("--profile", "kublk", "--", "/bin/true"),
        ):
            code = await place.run("register", "3", *words)
            assert code in (Exit.REFUSED, Exit.CONFIG), words
        assert await place.run("register", "0", "--", "/bin/true") == Exit.REFUSED
        assert await place.run("register", "--process", "x", "--", "/bin/true") == Exit.CONFIG
        assert place.library.registered() == {}

    play(place, story)
    said = capsys.readouterr().err
    for words in (
        "registration ublkb3: device.command: 'true' must be an absolute path",
        "registration ublkb3: device.attach: must be",
        "--limit: 'core' is not KEY=VALUE",
        "--policy user: unknown key; known are ",
        "--exe: says nothing beside a device",
        "No such file or directory",
        "device.accept_delete_on_failure: must be true: `kublk recover` removes the device",
        "device[1] names ublkb0 already, and comes first; change it there",
        "--name: is missing; a rule for many devices needs one",
    ):
        assert words in said, words


def test_without_a_daemon_a_registration_is_kept_for_the_next_one(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.store.close()
    rule = ("register", "--name", "vms", "--process", "vm-*", "--tag", "0x10")
    options = ("--env", "A=b=c", "--limit", "nofile=10:20", "--set", "cpus=[1, 2]")
    for _ in range(2):  # the second takes the place of the first
        arguments = [*rule, "--config", str(place.config), *options, "--", "/bin/true"]
        assert cli.main(arguments) == Exit.OK
    for words, code in (
        (("registered",), Exit.OK),
        (("reload",), Exit.NOT_RUNNING),
        (("unregister", "other"), Exit.REFUSED),
        (("unregister", "../registered/vms"), Exit.REFUSED),
        (("unregister", "vms"), Exit.OK),
        (("registered",), Exit.OK),
    ):
        assert cli.main([*words, "--config", str(place.config)]) == code, words
    out = capsys.readouterr().out
    assert "register vms: done; ublkwatch is not running, and will know when it is" in out
    assert "vms: process vm-*, tag 0x10: managed: /bin/true\n" in out
    assert out.endswith("nothing is registered\n")


def test_a_reload_says_what_is_other_and_applies_it(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    top, device = place.config.read_text().split("[[device]]")
    server = '[[server]]\nprocess = "x"\ncommand = ["/bin/true"]\n'

    async def story() -> None:
        assert await place.run("reload") == Exit.OK
        place.config.write_text(
            f"poll_interval_s = 2\n{top}[recovery]\ngrace_s = 4\n"
            f"[[device]]\nattempts_max = 7{device}{server}"
        )
        assert await place.run("reload", "--dry-run") == Exit.OK
        assert place.library.settings.rules[0].care.policy.attempts_max == 5
        assert await place.run("reload") == Exit.OK
        policy = place.library.settings.rules[0].care.policy
        assert (policy.attempts_max, policy.grace_s) == (7, 4)
        assert await place.run("reload") == Exit.OK

    play(place, story)
    same = "reload: done\n  nothing is other\n"
    other = (
        "  poll_interval_s: 1.0 -> 2.0, when ublkwatch is restarted\n"
        "  recovery.grace_s: 0 -> 4\n"
        "  ublkb0: attempts_max: 5 -> 7\n"
        f"  process x: a new rule ({place.config}: server[1])\n"
    )
    dry = f"reload: dry run, nothing is done\n{other}"
    assert capsys.readouterr().out == f"{same}{dry}reload: done\n{other}{same}"
    assert [entry["order"] for entry in place.history] == ["reload"] * 3
    assert place.notes.reloads == [True] * 3


def test_a_reload_of_a_bad_file_changes_nothing_and_says_why(place: Place) -> None:
    async def story() -> None:
        desk = place.desk(place.seen)
        place.config.write_text("runtime = 1\n")
        for dry_run in (True, False):
            answer = await desk.reload(dry_run=dry_run)
            assert f"{place.config}: runtime: unknown key" in answer.why
        assert desk.library.settings.rules

    play(place, story)
    assert place.notes.reloads == [False]


# --- what would be done --------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done_and_does_nothing(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story() -> None:
        for words in (
            ("hold", "0"),
            ("release", "0"),
            ("forget", "0"),
            ("stop", "0"),
            ("drill", "0", "--rounds", "2", "--scratch"),
            ("register", "3", "--", "/bin/true"),
            ("unregister", "ublkb3"),
        ):
            code = Exit.REFUSED if words[0] in ("release", "unregister") else Exit.OK
            assert await place.run(*words[:1], "--dry-run", *words[1:]) == code, words
        assert not place.seen.records()[0].held
        assert place.library.registered() == {}
        assert not [line for line in place.diary if "STOP" in line]
        assert FIRST.pid in place.alive
        place.crash()
        await phase(place, Phase.GRACE)
        assert await place.run("recover", "0", "--dry-run") == Exit.OK
        assert (await phase(place, Phase.GRACE)).attempts == 0

    play(place, story, grace_s=3600)
    said = capsys.readouterr()
    nothing = "dry run, nothing is done\n"
    for words in (
        f"hold ublkb0: {nothing}  it would stay watching\n  a crash would not be recovered",
        f"forget ublkb0: {nothing}  it would go from watching to observed\n",
        f"stop ublkb0: {nothing}  TRY_STOP_DEV would be sent, and /dev/ublkb0 removed\n",
        f"drill ublkb0: {nothing}  the server of ublkb0, process 100, would be killed, 2 times; ",
        f"register ublkb3: {nothing}  ublkb3: a new rule (registration ublkb3: device)\n",
        f"recover ublkb0: {nothing}  it would go from grace to draining\n  a new server would be",
    ):
        assert words in said.out, words
    assert "release ublkb0: refused: it is not held" in said.err
    assert "unregister ublkb3: refused: ublkb3: nothing is registered by this name" in said.err
    assert place.history == []


def test_what_cannot_be_undone_is_not_done_without_a_yes(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    async def story() -> None:
        assert place.library
        await place.run("register", "3", "--", "/bin/true")
        for verb in ("forget", "stop", "drill"):
            assert await place.run(verb, "0") == Exit.REFUSED
            monkeypatch.setattr("sys.stdin", Terminal("n\n"))
            assert await place.run(verb, "0") == Exit.REFUSED
            monkeypatch.undo()
        assert place.seen.records()[0].phase is Phase.WATCHING
        monkeypatch.setattr("sys.stdin", Terminal("y\n"))
        assert await place.run("forget", "3") == Exit.OK
        assert place.library.registered() == {}

    play(place, story)
    said = capsys.readouterr().err
    lost = "ublkwatch keeps its hands off it for the rest of its life"
    assert f"forget ublkb0: refused: {lost}; --yes has it done, --dry-run says more\n" in said
    assert f"forget ublkb0: {lost}. Go on? [y/N] ublkwatch: forget ublkb0: nothing was" in said
    assert "registration ublkb3 would be removed. Go on?" in said
    assert [entry["order"] for entry in place.history] == ["register", "forget"]


def test_to_recover_what_ails_wants_a_yes_since_it_kills(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story() -> None:
        place.seen.post(0, ServerAils(FIRST, Ailment.DEAD_QUEUE, "thread 7", time.monotonic()))
        await until(lambda: bool(place.seen.records()[0].ill), "it ails")
        assert await place.run("drill", "0", "--yes") == Exit.REFUSED
        assert await place.run("recover", "0") == Exit.REFUSED
        assert FIRST.pid in place.alive
        assert await place.run("recover", "0", "--yes") == Exit.OK
        await until(lambda: FIRST.pid not in place.alive, "it was killed")

    play(place, story, on_dead_queue=Remedy.ALERT)
    said = capsys.readouterr().err
    killed = "its server, process 100, would be ended by SIGKILL"
    assert f"recover ublkb0: refused: {killed}; --yes has it done" in said
    assert "drill ublkb0: refused: its server ails: thread 7" in said


# --- stop ----------------------------------------------------------------------------------------


def test_a_stopped_device_is_gone_and_no_crash(place: Place) -> None:
    async def story() -> None:
        assert await place.run("stop", "0", "--yes") == Exit.OK
        await until(lambda: not place.seen.records(), "it is gone")

    play(place, story)
    assert [line for line in place.diary if "spawn" in line or "STOP" in line] == ["TRY_STOP_DEV"]
    (entry,) = place.history
    assert (entry["order"], entry["dev_id"], entry["result"]) == ("stop", 0, "taken")


@pytest.mark.parametrize("error", [errno.EBUSY, errno.EPERM])
def test_a_device_that_could_not_be_stopped_is_watched_as_before(
    place: Place, error: int, capsys: pytest.CaptureFixture[str]
) -> None:
    place.stop_error = error

    async def story() -> None:
        assert await place.run("stop", "0", "--yes") == Exit.REFUSED
        record = place.seen.records()[0]
        assert (record.phase, record.held) == (Phase.WATCHING, False)
        place.crash()
        assert (await until_recovered(place)).recoveries == 1

    play(place, story)
    said = "somebody has just opened it" if error == errno.EBUSY else "no CAP_SYS_ADMIN"
    assert said in capsys.readouterr().err


def test_a_stop_that_hangs_leaves_the_device_held(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.stop_error = errno.ETIMEDOUT

    async def story() -> None:
        assert await place.run("stop", "0", "--yes") == Exit.REFUSED
        place.crash()  # the server is ended, and the kernel goes on with STOP_DEV
        assert (await phase(place, Phase.HELD)).held

    play(place, story)
    said = "TRY_STOP_DEV was not answered within 60 s: its server has requests and does not"
    assert said in capsys.readouterr().err


def test_a_device_in_use_is_stopped_by_force_alone(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.uses = Usage(("mounted on /mnt (process 7 sees it)", "/dev/ublkb0 is open in process 9"))

    async def story() -> None:
        assert await place.run("stop", "0", "--yes") == Exit.REFUSED
        assert await place.run("drill", "0", "--yes") == Exit.REFUSED
        place.uses = Usage((), 3)
        assert await place.run("stop", "0", "--yes") == Exit.REFUSED
        assert await place.run("stop", "0", "--yes", "--force") == Exit.OK

    play(place, story)
    assert "STOP_DEV" in place.diary
    said = capsys.readouterr().err
    used = "it is in use: mounted on /mnt (process 7 sees it); /dev/ublkb0 is open in process 9"
    assert f"stop ublkb0: refused: {used}; nothing was done\n" in said
    assert f"drill ublkb0: refused: {used}; " in said
    assert "who uses it cannot be seen: of 3 processes we may not look" in said


def test_a_device_that_is_being_recovered_is_not_stopped_amid_it(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.start_hangs = True

    async def story() -> None:
        place.crash()
        await phase(place, Phase.STARTING)
        assert await place.run("stop", "0", "--yes", "--force") == Exit.REFUSED
        place.start_hangs = False
        await phase(place, Phase.WATCHING)
        assert place.info
        place.info = replace(place.info, state=DevState.DEAD)
        assert await place.run("stop", "0", "--yes") == Exit.REFUSED

    play(place, story)
    said = capsys.readouterr().err
    assert "ublkwatch is at work on it (starting); hold it first, or wait" in said
    assert "it has no disk that could be stopped: its state is DEAD" in said


# --- drill ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "says"),
    [
        (("hold", "0"), "it is held by uid"),
        (("forget", "0", "--yes"), "it is in nobody's care, so nobody would bring it back"),
    ],
)
def test_a_device_that_nobody_would_bring_back_is_not_drilled(
    place: Place, before: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story() -> None:
        assert await place.run(*before) == Exit.OK
        assert await place.run("drill", "0", "--yes", "--although-in-use") == Exit.REFUSED
        assert await place.run("drill", "5", "--yes") == Exit.REFUSED
        assert FIRST.pid in place.alive

    play(place, story)
    said = capsys.readouterr().err
    assert f"drill ublkb0: refused: {says}" in said
    assert "drill ublkb5: refused: no such device is known" in said


def test_all_devices_of_a_server_must_be_fit_for_its_drill(place: Place) -> None:
    class TwoDevices:
        """A monitor as far as it is asked."""

        def __init__(self, *records: Record) -> None:
            self._records = records

        def records(self) -> list[Record]:
            return list(self._records)

        def policy(self, dev_id: int) -> Policy:
            return Policy(has_spec=dev_id != 2)

    records = [Record(n, "i", phase=Phase.WATCHING, server=FIRST) for n in (0, 1, 2)]
    other = replace(records[1], server=replace(FIRST, pid=7))

    async def asked(*devices: Record) -> Answer:
        place.seen = cast("Monitor", TwoDevices(*devices))
        return await place.desk(place.seen).take(Deed("drill", 0, dry_run=True), PEER)

    both = asyncio.run(asked(*records[:2]))
    assert both.said == ("the server of ublkb0, ublkb1, process 100, would be killed",)
    assert asyncio.run(asked(records[0], other)).harm.startswith("the server of ublkb0, process")
    held = replace(records[1], held=True, held_by="me")
    assert asyncio.run(asked(records[0], held)).why == "ublkb1: it is held by me; release it first"
    assert asyncio.run(asked(records[0], records[2])).why.startswith("ublkb2: it is in nobody's")
    place.uses = Usage(("swapped on",))
    assert asyncio.run(asked(*records[:2])).why == "it is in use: swapped on"


def test_a_drill_of_a_server_that_has_ended_says_so_and_writes_its_report(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"

    async def story() -> None:
        await until((place.runtime_dir / "records/0.json").exists, "the record is there")
        place.show()
        words = ("drill", "0", "--yes", "--report", str(report))
        assert await place.run(*words) == Exit.FAILED

    play(place, story)
    told = json.loads(report.read_text())
    assert (told["schema_version"], told["ok"], told["rounds"]) == (1, False, [])
    assert told["trouble"] == "its server, process 100, has ended by itself"
    assert "0 of 3 kills recovered: its server, process 100" in capsys.readouterr().out
    (entry,) = place.history
    assert (entry["order"], entry["reason"], entry["result"]) == ("drill", "3 rounds", "taken")
