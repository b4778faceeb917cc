"""The manual pages and the completions are what the code is; real shells take the latter."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from manual import TOP_DIR, options_of, pages, verbs_of
from patience import PATIENCE_S

from ublkwatch import cli
from ublkwatch.settings import DEVICE, METRICS, RECOVERY, SERVER, TOP
from ublkwatch.verbs import Exit

PAGES = pages()
BASH = TOP_DIR / "docs/completion/ublkwatch.bash"
ZSH = TOP_DIR / "docs/completion/_ublkwatch"
MACROS = {"TH", "SH", "SS", "TP", "PP", "B", "I", "BR", "nh", '\\"'}


@pytest.mark.parametrize("name", PAGES)
def test_what_is_stored_is_what_the_code_says(name: str) -> None:
    assert (TOP_DIR / "docs" / name).read_text() == PAGES[name], "`make docs` writes it anew"


def test_nothing_else_is_stored() -> None:
    homes = (TOP_DIR / "docs/man", TOP_DIR / "docs/completion")
    assert {f"{home.name}/{file.name}" for home in homes for file in home.iterdir()} | {
        "metrics.md"
    } == set(PAGES)


@pytest.mark.parametrize("name", ["man/ublkwatch.8", "man/ublkwatch.toml.5"])
def test_a_page_uses_no_macro_that_it_does_not_mean(name: str) -> None:
    for line in PAGES[name].splitlines():
        assert line
        if line.startswith((".", "'")):
            assert line[1:].split()[0] in MACROS, line
        assert not re.search(r"(?<!\\)-", re.sub(r'^\.(TH|\\").*', "", line)), line


def test_the_pages_have_every_exit_code_and_every_key() -> None:
    codes = re.findall(r"^\.B (\d+)$", PAGES["man/ublkwatch.8"], re.MULTILINE)
    assert {int(code) for code in codes} == {int(code) for code in Exit}
    keys = set(re.findall(r"^\\fB(\w+)\\fR \(", PAGES["man/ublkwatch.toml.5"], re.MULTILINE))
    assert keys == {*TOP, *METRICS, *RECOVERY, *DEVICE, *SERVER}


def test_zsh_is_told_every_option_with_quotes_that_close() -> None:
    words = shlex.split(PAGES["completion/_ublkwatch"], comments=True)
    assert words[-2:] == ["_ublkwatch", "$@"]
    specs = {word.partition("[")[0].lstrip("*") for word in words if "[" in word}
    for parser in verbs_of(cli.parser())[0].values():
        for action in options_of(parser):
            assert set(action.option_strings) <= specs
    assert any("server's executable" in word for word in words)


@pytest.fixture
def sys_home(tmp_path: Path) -> Path:
    for number in (0, 1, 12):
        (tmp_path / f"class/ublk-char/ublkc{number}").mkdir(parents=True)
    (tmp_path / "file.toml").touch()
    command = tmp_path / "ublkwatch"
    command.write_text("#!/bin/sh\necho 'vms: process x: managed: /bin/x'\necho 'ublkb3: y'\n")
    command.chmod(0o755)
    return tmp_path


COMPLETIONS = pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("ho", {"hold"}),
        ("re", {"register", "reload", "registered", "release", "retry", "recover"}),
        ("hold ", {"ublkb0", "ublkb1", "ublkb12"}),
        ("hold ublkb1", {"ublkb1", "ublkb12"}),
        ("hold --d", {"--dry-run"}),
        ("hold --for ", set()),
        ("hold --for 30m ublkb0", {"ublkb0"}),
        ("drill ublkb0 --al", {"--although-in-use"}),
        ("unregister ", {"vms", "ublkb3"}),
        ("status --config fi", {"file.toml"}),
        ("check-config fi", {"file.toml"}),
        ("register 0 -- fi", {"file.toml"}),
        ("register --exe /bin/x -- fi", {"file.toml"}),
        ("nonsense ", set()),
    ],
)


@COMPLETIONS
def test_bash_completes(sys_home: Path, words: str, wanted: set[str]) -> None:
    script = f"""
        source {BASH}
        COMP_WORDS=("$0" "$@") COMP_CWORD=$#
        _ublkwatch
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    command = ["bash", "--norc", "-euc", script, str(sys_home / "ublkwatch"), *words.split(" ")]
    environment = {"PATH": os.environ["PATH"], "_UBLKWATCH_SYS": str(sys_home)}
    done = subprocess.run(
        command, cwd=sys_home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert set(filter(None, done.stdout.split("\n"))) == wanted


SHELLS = {
    "bash": (["--norc", "--noprofile", "-i"], f"source {BASH}"),
    "zsh": (
        ["-f", "-i"],
        f"fpath=({ZSH.parent} $fpath) LISTMAX=999; autoload -Uz compinit; compinit -D -u",
    ),
}


@contextlib.contextmanager
def at_a_terminal(shell: str, home: Path) -> Iterator[int]:
    """Have a shell with its completion at a terminal."""
    options, prepare = SHELLS[shell]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(home)
        path = f"{home}:{os.environ['PATH']}"
        environment = {"PATH": path, "TERM": "dumb", "_UBLKWATCH_SYS": str(home)}
        os.execvpe(shell, [shell, *options], environment)  # noqa: S606
    try:
        # What is typed before a prompt is the terminal's to edit, and not yet the shell's.
        os.write(terminal, f"{prepare}; PS1='rea''dy> '\n".encode())
        hear(terminal, "ready> ")
        yield terminal
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def hear(terminal: int, wanted: str) -> str:
    heard, deadline = "", time.monotonic() + PATIENCE_S
    while wanted not in heard:
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, heard
        heard += os.read(terminal, 4096).decode(errors="replace")
    return heard


@pytest.mark.parametrize("shell", SHELLS)
def test_somebody_at_a_terminal_presses_tab(shell: str, sys_home: Path) -> None:
    with at_a_terminal(shell, sys_home) as terminal:
        os.write(terminal, b"echo ublkwatch; ublkwatch exp\t")
        hear(terminal, "explain ")
        os.write(terminal, b"ublkb12\t--con\t")
        hear(terminal, "--config ")


# Writes down what would be offered, and has it offered; calls that only ask for matches pass.
TOLD = """\
compadd() {
    if [[ ${@[1,(i)(-|--)]} != *-(O|A|D)\\ * ]]; then
        local -a offered; builtin compadd -O offered "$@"; print -rl -- $offered >>offered
    fi
    builtin compadd "$@"
}
"""


@COMPLETIONS
def test_zsh_completes(sys_home: Path, words: str, wanted: set[str]) -> None:
    (sys_home / "told").write_text(TOLD)
    with at_a_terminal("zsh", sys_home) as terminal:
        os.write(terminal, b"source ./told; PS1='se''t> '\n")
        hear(terminal, "set> ")
        os.write(terminal, f"ublkwatch {words}\t\x15: >>offered; echo do''ne\n".encode())
        hear(terminal, "done")
    assert set(filter(None, (sys_home / "offered").read_text().split("\n"))) == wanted
