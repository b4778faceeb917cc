"""The gate: the program that a forked server is, until all is in place for it.

It reads one byte from its standard output, makes its standard error its standard output too, and
executes its arguments; at the end of file it ends. Any shell can do that. But a shell, its loader
and its libraries are files, and to find them the kernel reads directories: on a machine whose root
file system hangs, a server that is all in memory could not be started. So where we can, the gate is
a program of 162 bytes that is in memory from the beginning (memfd_create(2)), and opens nothing.
gate.S is its source. Elsewhere it is the shell, found once and kept in memory.

The home of mmap, beside uring.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ublkwatch import armour

_log = logging.getLogger("ublkwatch")

# A server is an ELF program or a script that names its interpreter (trust.check_executable), so no
# shell ever interprets it.
_SCRIPT = 'read -r go <&1 && unset go PWD OLDPWD SHLVL && exec "$@" >&2'
_NAME = "ublkwatch"
_TRY_S = 10.0
_REFUSED = 126  # as a shell says that a program cannot be executed
CODE = bytes.fromhex(
    "4889e34883ec104889e631c0bf01000000ba010000000f054883f8fc74ec4883f8017553bf020000"
    "00be01000000b8210000000f05bf03000000beffffffff31d2b8b40100000f05488b0b488b7b1048"
    "8d7310488d54cb10b83b0000000f05bf02000000488d3518000000ba1f000000b8010000000f05bf"
    "7e000000b83c0000000f057468652070726f6772616d2063616e6e6f742062652065786563757465"
    "640a"
)
_MACHINE = ("x86_64", 62)  # as uname(2) has it, as elf(5) has it
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MFD_EXEC = 0x10  # Linux 6.3: before that all are
_BASE = 0x400000
_HEADERS = 64 + 2 * 56


def program(code: bytes) -> bytes:
    """Return the gate as an ELF file: its headers, and the code."""
    size = _HEADERS + len(code)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64 bits, little-endian
    numbers = (2, _MACHINE[1], 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, *numbers)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)  # read, execute
    stack = struct.pack("<IIQQQQQQ", 0x6474E551, 6, 0, 0, 0, 0, 0, 16)  # not executable
    return header + load + stack + code


@dataclass(frozen=True)
class Gate:
    """How the gate is started."""

    executable: str
    arguments: tuple[str, ...]
    descriptor: int | None = None
    kept: list[mmap.mmap] = field(default_factory=list)  # what is to stay in memory

    def started(self, command: tuple[str, ...], **how: Any) -> subprocess.Popen[bytes]:
        """Start a command behind the gate; ``how`` is for Popen."""
        return subprocess.Popen(
            [*self.arguments, *command],
            executable=self.executable,
            pass_fds=() if self.descriptor is None else (self.descriptor,),
            start_new_session=True,
            **how,
        )

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
        for each in self.kept:
            each.close()


def make() -> Gate:
    """Return a gate of our own where that can be, else the shell."""
    if os.uname().machine == _MACHINE[0] and (gate := in_memory()) is not None:
        return gate
    _log.info("no program of ours can be executed from memory; the gate is a shell")
    return shell()


def shell() -> Gate:
    """Return a gate for any machine."""
    path = os.path.realpath("/bin/sh")
    return Gate(path, (path, "-c", _SCRIPT, _NAME), kept=_kept(path))


def in_memory(code: bytes = CODE) -> Gate | None:
    """Return a gate that is no file, and was tried; None where it does not open."""
    try:
        descriptor = _sealed(program(code))
    except OSError:
        return None
    gate = Gate(f"/proc/self/fd/{descriptor}", (_NAME,), descriptor)
    if _opens(gate):
        return gate
    gate.close()
    return None


def _sealed(content: bytes) -> int:
    """Return a file in memory that can be executed, and never changed."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        writing = os.memfd_create("ublkwatch-gate", flags | _MFD_EXEC)
    except OSError:
        writing = os.memfd_create("ublkwatch-gate", flags)
    try:
        os.fchmod(writing, 0o755)
        os.write(writing, content)
        fcntl.fcntl(writing, fcntl.F_ADD_SEALS, _SEALS)
        # What somebody has open for writing is not executed.
        return os.open(f"/proc/self/fd/{writing}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writing)


def _opens(gate: Gate) -> bool:
    """Open it for what cannot be executed, a directory: then it has to say so."""
    reading, opener = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(opener, "wb", buffering=0) as opening, contextlib.suppress(OSError):
        with os.fdopen(reading, "rb") as closed:
            process = gate.started(
                ("/",), stdin=subprocess.DEVNULL, stdout=closed, stderr=subprocess.DEVNULL
            )
        with process:
            try:
                opening.write(b"\n")
                return process.wait(_TRY_S) == _REFUSED
            except subprocess.TimeoutExpired:
                process.kill()
    return False


def _kept(shell: str) -> list[mmap.mmap]:
    """Map the files of which a running shell is made; armour keeps what is mapped."""
    script = 'while read -r line; do echo "$line"; done </proc/self/maps'
    maps = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=False)
    kept = []
    for path in {shell, *(each.path for each in armour.file_mappings(maps.stdout))}:
        with contextlib.suppress(OSError, ValueError), Path(path).open("rb") as file:
            kept.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    return kept
