"""The operator's socket, asked over real sockets: what is taken, and what harms nobody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import stat
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ublkwatch import wire
from ublkwatch.admin import Admin, Peer
from ublkwatch.client import Client
from ublkwatch.model import Order
from ublkwatch.wire import Answer, Change, Deed, Question, Request, RequestError, Wish

CLIENTS_MAX = 16
PATIENCE_S = 60.0
KEYS = ("for_s", "reason", "dry_run", "force", "name", "table")
VERBS = [*(order.value for order in Order), "stop", "drill", "register", "reload", "version"]
HOLD = {"version": 1, "order": "hold", "dev_id": 3}

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class World:
    """A socket that takes whatever it is told, and remembers it."""

    def __init__(self, runtime_dir: Path) -> None:
        self.runtime_dir = runtime_dir
        self.path = runtime_dir / "admin.sock"
        self.taken: list[tuple[Wish, Peer]] = []
        self.refusal = ""
        self.said: tuple[str, ...] = ()
        self.stuck = False
        self.slow_s = 0.0
        self._opened: list[asyncio.StreamWriter] = []

    async def take(self, request: Wish, peer: Peer) -> Answer:
        if self.stuck:
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(self.slow_s)
        self.taken.append((request, peer))
        return Answer(self.refusal, self.said)

    async def connect(self) -> Streams:
        streams = await asyncio.open_unix_connection(str(self.path))
        self._opened.append(streams[1])
        return streams

    async def say(self, raw: bytes) -> list[dict[str, Any]]:
        """Write it, and return all answers until the socket is closed."""
        return await asyncio.to_thread(say, self.path, raw)

    def close(self) -> None:
        for writer in self._opened:
            writer.transport.abort()


def say(path: Path, raw: bytes) -> list[dict[str, Any]]:
    answers = []
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE_S)
        client.connect(str(path))
        with contextlib.suppress(BrokenPipeError):  # it did not want to hear all of it
            client.sendall(raw)
            client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as lines, contextlib.suppress(ConnectionResetError):
            for line in lines:
                answers.append(json.loads(line))  # noqa: PERF401 - what came before a reset
    return answers


def serve(
    tmp_path: Path,
    story: Callable[[World], Awaitable[None]],
    group: int | None = None,
    *,
    client_s: float = PATIENCE_S,
    take_s: float = PATIENCE_S,
) -> World:
    """Tell a story to a socket; whatever reaches the loop unhandled fails it."""
    unhandled: list[dict[str, Any]] = []
    world = World(tmp_path)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: unhandled.append(what))
        door = Admin(tmp_path, world.take, group=group, client_s=client_s, take_s=take_s)
        await door.start()
        try:
            await asyncio.wait_for(story(world), PATIENCE_S)
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
            door.close()
            world.close()

    asyncio.run(main())
    assert unhandled == []
    return world


def line(**changes: object) -> bytes:
    return json.dumps(HOLD | changes).encode() + b"\n"


# --- what is taken -------------------------------------------------------------------------------


def test_an_order_arrives_with_who_asked_and_its_refusal_goes_back(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        assert await world.say(line(for_s=600, reason="new disk")) == [{"version": 1, "ok": True}]
        world.refusal = "it is not held"
        refused = {"version": 1, "ok": False, "why": "it is not held"}
        assert await world.say(line(order="release")) == [refused]

    (first, peer), (second, _) = serve(tmp_path, story).taken
    assert first == Request(Order.HOLD, 3, 600.0, "new disk")
    assert second == Request(Order.RELEASE, 3)
    assert (peer.uid, peer.pid) == (os.geteuid(), os.getpid())
    assert peer.exe.startswith("python")


def test_a_client_may_go_on_asking(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        answers = await world.say(line() + line(order="retry", dev_id=4))
        assert [answer["ok"] for answer in answers] == [True, True]

    taken = [request for request, _ in serve(tmp_path, story).taken]
    assert taken == [Request(Order.HOLD, 3), Request(Order.RETRY, 4)]


@pytest.mark.parametrize("order", Order)
def test_the_command_lines_side_is_understood(tmp_path: Path, order: Order) -> None:
    async def story(world: World) -> None:
        world.refusal = "no" if order is Order.RETRY else ""
        world.said = ("this", "and that")
        answer = await asyncio.to_thread(Client(tmp_path).ask, Request(order, 7, reason="why"))
        assert answer == Answer(world.refusal, world.said)

    assert [request for request, _ in serve(tmp_path, story).taken] == [
        Request(order, 7, reason="why")
    ]


def test_who_asks_is_named_for_people() -> None:
    assert str(Peer(0, 123, "python3")) == "uid 0 (root), pid 123"
    assert Peer(7, 8, "").saying("new disk") == "uid 7, pid 8: new disk"
    assert Peer(7, 8, "").saying("") == "uid 7, pid 8"


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["socket", "file", "nothing"])
def test_what_a_former_life_left_is_replaced_by_a_socket_for_root_alone(
    tmp_path: Path, left: str
) -> None:
    path = tmp_path / "admin.sock"
    stale = socket.socket(socket.AF_UNIX)
    if left == "socket":
        stale.bind(str(path))
        path.chmod(0o777)
    elif left == "file":
        path.write_text("no socket")
    umask = os.umask(0)

    async def story(world: World) -> None:
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        assert (await world.say(line()))[0]["ok"]

    try:
        serve(tmp_path, story)
    finally:
        os.umask(umask)
        stale.close()
    assert not path.exists()


def test_a_directory_whose_path_is_too_long_is_an_error_that_says_so(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()

    async def main() -> None:
        await Admin(deep, World(deep).take).start()

    with pytest.raises(OSError, match="path too long"):
        asyncio.run(main())


def test_nobody_there_is_told_from_nobody_listening(tmp_path: Path) -> None:
    request = Request(Order.RETRY, 0)
    with pytest.raises(FileNotFoundError):
        Client(tmp_path).ask(request)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "admin.sock"))
    with pytest.raises(ConnectionRefusedError):
        Client(tmp_path).ask(request)


@pytest.mark.parametrize("answer", [b"", b"[]\n", b"{}\n", b"\xff\n", b'{"ok": false}\n'])
def test_an_answer_that_is_none_is_an_error_and_no_success(tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "admin.sock"))
        listener.listen()

        def serve_once() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(1000)
                client.sendall(answer)

        thread = threading.Thread(target=serve_once)
        thread.start()
        with pytest.raises(ConnectionError, match="the answer was"):
            Client(tmp_path).ask(Request(Order.RETRY, 0))
        thread.join()


@contextlib.contextmanager
def nobody() -> Iterator[Path]:
    """Be root again afterwards; until then a directory that everybody may look into."""
    before = os.getgroups()
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        try:
            yield Path(name)
        finally:
            os.seteuid(0)
            os.setgroups(before)


GROUP = 4711


@pytest.mark.skipif(os.geteuid() != 0, reason="for root, which can be nobody for a while")
@pytest.mark.parametrize("how", ["supplementary", "none", "very many"])
def test_a_member_of_the_group_may_give_orders_but_not_say_what_root_runs(how: str) -> None:
    groups = {"supplementary": [1, GROUP], "none": [1], "very many": [*range(5000, 5400), GROUP]}
    asked = Change("register", "x", {"dev_id": 3, "command": ["/bin/sh"]})

    async def story(world: World) -> None:
        mode = world.path.stat()
        assert (stat.S_IMODE(mode.st_mode), mode.st_gid) == (0o660, GROUP)
        if how != "supplementary":
            world.path.chmod(0o666)  # whatever becomes of the file
        os.setgroups(groups[how])
        os.seteuid(65534)
        (answer,) = await world.say(line())
        if how == "supplementary":
            assert answer == {"version": 1, "ok": True}
            (answer,) = await world.say(asked.line())
            assert answer["why"] == "only root may say what root runs"
            (answer,) = await world.say(Change("reload").line())
            assert answer["ok"]
        else:
            assert answer["why"] == "only root, or a member of admin_group, may ask for anything"

    with nobody() as home:
        world = serve(home, story, group=GROUP)
    if how == "supplementary":
        assert [peer.uid for _, peer in world.taken] == [65534, 65534]
        assert [wish for wish, _ in world.taken] == [Request(Order.HOLD, 3), Change("reload")]
    else:
        assert world.taken == []


@pytest.mark.skipif(os.geteuid() != 0, reason="for root, which can be nobody for a while")
def test_members_of_the_group_cannot_keep_root_out() -> None:
    async def story(world: World) -> None:
        os.setgroups([GROUP])
        os.seteuid(65534)
        silent = [await world.connect() for _ in range(CLIENTS_MAX)]
        for reader, _ in silent[CLIENTS_MAX // 2 :]:
            assert b"too many clients" in await reader.readline()
        os.seteuid(0)
        assert (await world.say(line()))[0]["ok"]

    with nobody() as home:
        serve(home, story, group=GROUP)


def test_a_stop_may_take_long_and_the_clients_own_time_waits(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.slow_s = 2.5
        stop = Deed("stop", 3).line()
        answers = await world.say(stop + line())
        assert [each["ok"] for each in answers] == [True, False]
        assert "not taken in time" in answers[1]["why"]

    serve(tmp_path, story, client_s=2, take_s=0.2)


@pytest.mark.skipif(os.geteuid() != 0, reason="for root, which can be nobody for a while")
def test_a_socket_that_somebody_opened_to_all_is_still_for_root_alone() -> None:
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        home.chmod(0o755)

        async def story(world: World) -> None:
            world.path.chmod(0o666)
            os.seteuid(65534)
            try:
                (answer,) = await world.say(line())
            finally:
                os.seteuid(0)
            assert answer == {"version": 1, "ok": False, "why": "only root may ask for anything"}

        assert serve(home, story).taken == []


# --- what is no order ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"\n", "not a line of JSON"),
        (b"hold 3\n", "not a line of JSON"),
        (b"\xff\xfe\n", "not a line of JSON"),
        (b"[" * 60_000 + b"\n", "not a line of JSON"),
        (b'{"version": 1' + b"0" * 5000 + b"}\n", "not a line of JSON"),
        (b"[]\n", "not a JSON object"),
        (b"{}\n", "version None, where 1 is spoken"),
        (line(version=2), "version 2, where 1 is spoken"),
        (line(force=True), "'force': unknown key; known are dev_id, dry_run, for_s, order"),
        (line(dry_run=1), "dry_run: 1 is neither true nor false"),
        (line(order="stop", force="yes"), "force: 'yes' is neither true nor false"),
        (line(order="stop", for_s=3), "'for_s': unknown key; known are dev_id, dry_run, force"),
        (line(order="version"), "'dev_id': unknown key; known are order, version"),
        (line(order="halt"), "order: 'halt' is none of hold, release, retry, recover, forget"),
        (line(order=["hold"]), "order: a list is none of"),
        (line(dev_id="3"), "dev_id: '3' is no number of a device"),
        (line(dev_id=True), "dev_id: True is no number of a device"),
        (line(dev_id=-1), "dev_id: -1 is no number of a device"),
        (line(dev_id=1 << 20), "dev_id: 1048576 is no number of a device"),
        (line(order="retry", for_s=1), "for_s: only a hold has an end"),
        (line(for_s=0), "for_s: 0 is no number of seconds above 0 and up to 2592000"),
        (line(for_s=2592001), "for_s: 2592001 is no number of seconds"),
        (line(for_s=float("nan")), "for_s: nan is no number of seconds"),
        (line(for_s=float("inf")), "for_s: inf is no number of seconds"),
        (line(for_s=10**400), "for_s: 1000000000000000000000000000000000000000... is no number"),
        (line(for_s="30m"), "for_s: '30m' is no number of seconds"),
        (line(for_s=True), "for_s: True is no number of seconds"),
        (line(reason=3), "reason: must be a text of at most 500 characters"),
        (line(reason="x" * 501), "reason: must be a text of at most 500 characters"),
        (line()[:-1], "a line that does not end"),
        (line(reason="x" * 70_000), "longer than 65536 bytes"),
        (b"x" * 1_000_000, "longer than 65536 bytes"),
    ],
)
def test_what_is_no_order_is_refused_by_name_and_ends_the_conversation(
    tmp_path: Path, raw: bytes, says: str
) -> None:
    async def story(world: World) -> None:
        (answer,) = await world.say(raw + line() if raw.endswith(b"\n") else raw)
        assert answer["ok"] is False
        assert says in answer["why"]
        assert len(answer["why"]) < 200
        assert answer["why"].isascii()

    assert serve(tmp_path, story).taken == []


def test_what_is_said_cannot_forge_a_line_of_a_log() -> None:
    reason = "a\nublk 0: recovered\x1b[2J\u202e\ud800 b\u00e9 "
    parsed = wire.parse(line(reason=reason))
    assert parsed == Request(Order.HOLD, 3, reason="a ublk 0: recovered [2J   b\u00e9")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=3,
)


# Near to a wish of every kind: what is wrong with it is a key, or a value.
near_values = json_values | st.sampled_from([True, False, 3, "x", "vms", {"dev_id": 3}, 0.5])
near_wishes = st.builds(
    lambda verb, values: json.dumps({"version": 1, "order": verb} | values).encode() + b"\n",
    st.sampled_from(VERBS),
    st.dictionaries(st.sampled_from(["dev_id", *KEYS]), near_values, max_size=4),
)


@settings(max_examples=400, deadline=None)
@given(
    st.binary(max_size=200)
    | st.dictionaries(st.sampled_from([*HOLD, *KEYS, "x"]), json_values).map(
        lambda changes: line(**changes)
    )
    | near_wishes
)
def test_whatever_is_written_is_an_order_or_refused_with_words(raw: bytes) -> None:
    try:
        request = wire.parse(raw)
    except RequestError as error:
        said = str(error)
    else:
        said = ""
        assert wire.parse(request.line()) == request
    assert said.isascii()
    assert len(said) < 200


@pytest.mark.parametrize(
    "wish",
    [
        Request(Order.RECOVER, 3, dry_run=True),
        Deed("stop", 0, force=True, reason="old disk"),
        Deed("drill", 4, dry_run=True),
        Change("register", "a", {"dev_id": 3}, dry_run=True),
        Question("version"),
    ],
)
def test_every_kind_of_wish_passes_unchanged(wish: Wish) -> None:
    assert wire.parse(wish.line()) == wish
    assert len(wish.line()) < 200


@settings(max_examples=100, deadline=None)
@given(st.text(), st.lists(st.text(), max_size=300), st.text())
def test_an_answer_passes_bounded(why: str, said: list[str], harm: str) -> None:
    raw = Answer(why, tuple(said), harm).line()
    answer = wire.understood(raw)
    assert (answer.why, answer.harm) == (why[:1000], harm[:1000])
    assert answer.said[:100] == tuple(each[:300] for each in said[:100])
    assert len(answer.said) <= 101
    for letter in ("x", "ä", "\x00", "\U0001f525"):
        long = Answer(letter * 50_000, (letter * 5000,) * 5000, letter * 50_000).line()
        assert len(long) < wire.MESSAGE_MAX
        assert wire.understood(long).said[-1].endswith(" more")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | json_values.map(lambda each: json.dumps(each).encode()))
def test_whatever_answers_is_an_answer_or_an_error(raw: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        assert isinstance(wire.understood(raw), Answer)


def test_changes_of_the_rules_are_taken_too(tmp_path: Path) -> None:
    changes = [
        Change("register", "ublkb3", {"dev_id": 3, "command": ["/s"]}, "new"),
        Change("unregister", "vm.disks-1"),
        Change("reload"),
    ]

    async def story(_world: World) -> None:
        for change in changes:
            assert await asyncio.to_thread(Client(tmp_path).ask, change) == Answer()

    assert [change for change, _ in serve(tmp_path, story).taken] == changes
    said = ["register ublkb3", "unregister vm.disks-1", "reload"]
    assert [str(change) for change in changes] == said
    assert [change.dev_id for change in changes] == [3, None, None]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"order": "register", "table": {}}, "name: '': 1 to 64 letters"),
        ({"order": "register", "name": "../x", "table": {}}, "name: '../x': 1 to 64 letters"),
        ({"order": "unregister", "name": ".x"}, "name: '.x': 1 to 64 letters"),
        ({"order": "unregister", "name": "x", "table": {}}, "'table': unknown key; known are "),
        ({"order": "register", "name": "x", "table": 3}, "table: must be an object"),
        ({"order": "reload", "dev_id": 3}, "'dev_id': unknown key; known are dry_run, order, rea"),
    ],
)
def test_a_change_that_is_none_is_refused_with_words(content: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        wire.parse(json.dumps({"version": 1, **content}).encode() + b"\n")
    assert says in str(caught.value)


# --- clients that are no friends -----------------------------------------------------------------


def test_garbage_of_all_kinds_harms_nobody(tmp_path: Path) -> None:
    dice = random.Random(20)  # noqa: S311 - the same garbage every time

    async def story(world: World) -> None:
        good = line(reason="good")
        for _ in range(200):
            garbage = bytearray(good * dice.randint(1, 3))
            for _ in range(dice.randint(1, 20)):
                garbage[dice.randrange(len(garbage))] = dice.randrange(256)
            pieces = dice.choice([bytes(garbage), dice.randbytes(dice.randint(0, 3000))])
            for answer in await world.say(pieces):
                assert answer["ok"] or answer["why"]
        del world.taken[:]
        assert (await world.say(good))[0]["ok"]

    assert len(serve(tmp_path, story).taken) == 1


def test_silent_clients_are_bounded_in_number_and_time_and_others_are_served(
    tmp_path: Path,
) -> None:
    async def story(world: World) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        silent = [await world.connect() for _ in range(CLIENTS_MAX - 1)]
        for _, writer in silent[::2]:
            writer.write(b'{"version"')
        assert (await world.say(line()))[0]["ok"]
        silent.append(await world.connect())
        (answer,) = await world.say(b"")
        assert answer["why"] == "too many clients at once; try again"
        assert loop.time() - began < client_s
        for reader, _ in silent:
            assert await reader.read() == b""
        assert loop.time() - began >= client_s
        assert (await world.say(line()))[0]["ok"]

    client_s = 5.0  # time enough to connect them all
    serve(tmp_path, story, client_s=client_s)


def test_a_client_that_asks_and_never_reads_delays_nobody(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with socket.socket(socket.AF_UNIX) as greedy:
            greedy.setblocking(False)
            greedy.connect(str(world.path))
            sent = 0
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                while True:
                    sent += greedy.send(line() * 100)
                    await asyncio.sleep(0)
            assert sent > wire.MESSAGE_MAX
            assert (await world.say(line(dev_id=9)))[0]["ok"]

    serve(tmp_path, story)


def test_an_order_that_is_not_taken_in_time_is_answered_so(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.stuck = True
        began = asyncio.get_running_loop().time()
        (answer,) = await world.say(line())
        assert "not taken in time, and it may be taken yet" in answer["why"]
        assert asyncio.get_running_loop().time() - began >= take_s

    take_s = 0.2
    serve(tmp_path, story, take_s=take_s)


def test_a_bug_of_ours_ends_one_conversation_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(world: World) -> None:
        world.refusal = b"no text"  # type: ignore[assignment]
        assert await world.say(line()) == []
        world.refusal = ""
        assert (await world.say(line()))[0]["ok"]

    serve(tmp_path, story)
    assert "a bug in ublkwatch" in caplog.text


def test_closing_lets_go_of_clients(tmp_path: Path) -> None:
    async def main() -> None:
        door = Admin(tmp_path, World(tmp_path).take)
        await door.start()
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "admin.sock"))
        writer.write(line())
        assert b"true" in await reader.readline()
        door.close()
        assert await reader.read() == b""
        writer.close()
        with pytest.raises(FileNotFoundError):
            await asyncio.open_unix_connection(str(tmp_path / "admin.sock"))

    asyncio.run(main())
