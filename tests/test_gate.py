"""The gate of forked servers: its bytes are its source's, and it opens once and for one byte."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import PATIENCE_S

from ublkwatch import gate

SOURCE = Path(gate.__file__).with_name("gate.S")
SHOW = """
import os, sys
print(sorted(os.listdir("/proc/self/fd")), sys.argv[1:], os.environ, file=sys.stderr)
print("out")
raise SystemExit(7)
"""


@pytest.fixture(params=["memory", "shell"])
def each(request: pytest.FixtureRequest) -> Iterator[gate.Gate]:
    """Either gate, whatever this machine is."""
    made = gate.shell() if request.param == "shell" else gate.in_memory()
    assert made is not None
    yield made
    made.close()


class Waiting:
    """A program behind the gate."""

    def __init__(self, closed: gate.Gate, *command: str) -> None:
        reading, self.opener = os.pipe2(os.O_CLOEXEC)
        self.process = closed.started(
            command,
            stdin=subprocess.DEVNULL,
            stdout=reading,
            stderr=subprocess.PIPE,
            env={"ONLY": "this"},
        )
        os.close(reading)

    def opened(self) -> tuple[int, str]:
        os.write(self.opener, b"\n")
        return self.ended()

    def ended(self) -> tuple[int, str]:
        os.close(self.opener)
        _, words = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, words.decode()


def test_the_bytes_are_those_of_the_source(tmp_path: Path) -> None:
    assert os.uname().machine == "x86_64", "the gate's source is for x86-64; so are these tests"
    built = tmp_path / "gate.o"
    subprocess.run(["cc", "-c", "-x", "assembler", SOURCE, "-o", built], check=True)
    code = tmp_path / "code"
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", built, code], check=True)
    assert code.read_bytes() == gate.CODE


def test_the_program_runs_when_the_gate_opens_and_has_nothing_of_it(each: gate.Gate) -> None:
    waiting = Waiting(each, sys.executable, "-c", SHOW, "a", "b c", "")
    code, words = waiting.opened()
    assert code == 7
    assert words.startswith("['0', '1', '2', '3'] ['a', 'b c', '']")  # 3: the directory itself
    assert "'ONLY': 'this'" in words
    assert not {"'go'", "'PWD'", "'SHLVL'"} & set(words.split())
    assert words.endswith("\nout\n"), "its standard output is its standard error"


def test_it_waits_until_then(each: gate.Gate) -> None:
    waiting = Waiting(each, "/bin/true")
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.process.wait(0.3)
    exe = Path(f"/proc/{waiting.process.pid}/exe").readlink().name
    assert exe.startswith("memfd:") or exe == Path("/bin/sh").resolve().name
    assert waiting.opened()[0] == 0


def test_a_gate_whose_owner_is_gone_never_opens(each: gate.Gate, tmp_path: Path) -> None:
    waiting = Waiting(each, "/bin/touch", str(tmp_path / "ran"))
    code, _ = waiting.ended()
    assert code != 0
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_executed_says_so(each: gate.Gate) -> None:
    code, words = Waiting(each, "/").opened()
    assert code == 126
    assert words.count("\n") == 1


def test_one_that_does_not_open_is_not_used() -> None:
    illegal_instruction = b"\x0f\x0b"
    assert gate.in_memory(illegal_instruction) is None
    exit_0 = bytes.fromhex("31ffb83c0000000f05")
    assert gate.in_memory(exit_0) is None


def test_the_files_of_a_shell_are_kept_in_memory() -> None:
    made = gate.shell()
    try:
        assert made.executable == str(Path("/bin/sh").resolve())
        assert made.executable in Path("/proc/self/maps").read_text()
        assert len(made.kept) > 1, "its libraries, too"
    finally:
        made.close()


def test_where_it_can_be_it_is_in_memory_and_nobody_can_change_it() -> None:
    made = gate.make()
    try:
        assert made.descriptor is not None
        with pytest.raises(PermissionError):
            Path(made.executable).write_bytes(b"else")
    finally:
        made.close()
