"""What attempts leave in the runtime directory: output, and its bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from patience import until
from test_launch import TAG, Home, at_home

MIB = 1 << 20
FULL = 64
# Prints numbered lines of 64 KiB until told to stop, and pauses while the file holds FULL of them.
CHATTER = f"""
import os, sys
number = 0
while not os.path.exists(sys.argv[1]):
    if os.fstat(1).st_size < {FULL} << 16:
        os.write(1, b"%065535d\\n" % number)
        number += 1
os.write(1, b"end\\n")
"""


@pytest.mark.parametrize(
    ("printed", "words"),
    [
        ("for n in range(9): print(n); print(' ')", "6 | 7 | 8"),
        ("print('\\x1b[31mred\\x07')", "?[31mred?"),
        ("import os; os.write(1, b'bad \\xff\\n')", "bad \N{REPLACEMENT CHARACTER}"),
        ("print('w' * 9000)", "w" * 200),
        ("raise SystemExit('no backing file')", "no backing file"),
        ("pass", ""),
    ],
)
def test_last_words_are_three_lines_harmless_and_bounded(
    tmp_path: Path, printed: str, words: str
) -> None:
    async def work(home: Home) -> None:
        await home.exited(await home.start(printed))
        assert home.launcher.last_words(TAG) == words

    at_home(tmp_path, work)


def test_who_never_printed_has_no_last_words(tmp_path: Path) -> None:
    async def work(home: Home) -> None:
        assert home.launcher.last_words("never-started") == ""

    at_home(tmp_path, work)


def test_output_is_bounded_while_the_server_goes_on_writing(tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    output = tmp_path / "attempts" / TAG / "output"

    async def work(home: Home) -> None:
        pid = await home.start(CHATTER, str(stop))
        await until(lambda: output.stat().st_size > 3 * MIB, "the server printed much")
        for _ in range(3):  # it goes on where the file was cut, without a hole
            home.launcher.trim()
            kept = output.with_name("output.old").read_bytes()
            assert 0 < len(kept) <= 64 << 10
            assert b"\0" not in kept
            await until(lambda: output.stat().st_size > 2 * MIB, "it writes on")
        stop.touch()
        await home.exited(pid)
        *_, number, end = output.read_bytes().split(b"\n")[:-1]
        assert end == b"end"
        assert int(number.lstrip(b"0")) > FULL

    at_home(tmp_path, work)


def test_short_output_is_left_alone(tmp_path: Path) -> None:
    async def work(home: Home) -> None:
        await home.exited(await home.start("print('short')"))
        home.launcher.trim()
        assert home.printed() == "short\n"

    at_home(tmp_path, work)


def test_keep_only_removes_what_is_over_and_nothing_else(tmp_path: Path) -> None:
    async def work(home: Home) -> None:
        for tag in ("over", "kept"):
            await home.exited(await home.start("print('words')", tag=tag))
        home.launcher.keep_only({"kept", "not-yet-there"})
        assert [path.name for path in (tmp_path / "attempts").iterdir()] == ["kept"]
        assert home.launcher.last_words("kept") == "words"

    at_home(tmp_path, work)


def test_an_attempt_whose_group_we_died_writing_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "not ours").mkdir(parents=True)
    monkeypatch.chdir(here)

    async def work(home: Home) -> None:
        await home.exited(await home.start("pass"))
        (tmp_path / "attempts" / TAG / "cgroup").write_text("")
        assert home.launcher.pids(TAG) == set()
        home.launcher.keep_only(set())
        assert (here / "not ours").exists()

    at_home(tmp_path, work)
