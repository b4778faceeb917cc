"""Processes as the twins need them: a number, a parent, a tag, and files that their end closes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ublkwatch.model import ServerId

BOOT = "boot"
FIRST_PID = 100


class File(Protocol):
    """An open character device: of one process, or shared with what it forked."""

    def closed_by(self, process: Process, *, dying: bool) -> None: ...


@dataclass(eq=False)
class Process:
    pid: int
    name: str
    tag: str = ""
    alive: bool = True
    silent: bool = False  # it has requests, and answers none
    how: str = ""  # "exit status 3", "SIGKILL"
    dies_in_s: float = 0.0  # how long it sleeps uninterruptibly before it takes a SIGKILL
    dying: bool = False
    files: list[File] = field(default_factory=list)
    on_end: list[Callable[[], None]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None  # what it does with its life

    @property
    def code(self) -> int | None:
        """Its exit code, if it ended by itself."""
        what, _, number = self.how.rpartition(" ")
        return int(number) if what == "exit status" else None

    @property
    def id(self) -> ServerId:
        return ServerId(self.pid, self.pid * 7, BOOT)

    def __str__(self) -> str:
        return f"{self.name} {self.pid}"

    def end(self, how: str = "SIGKILL") -> None:
        """End it: first nobody can find it any more, then its files are closed."""
        if not self.alive:
            return
        if self.dies_in_s and how == "SIGKILL":
            if not self.dying:
                self.dying = True
                asyncio.get_running_loop().call_later(self.dies_in_s, self.end, "SIGKILL, at last")
            return
        self.alive, self.how = False, how
        if self.task is not None:
            self.task.cancel()
        for file in list(self.files):
            file.closed_by(self, dying=True)
        for tell in self.on_end:
            tell()


class Processes:
    """All of them, also those that have ended: a pid is never used twice here."""

    def __init__(self) -> None:
        self._all: dict[int, Process] = {}

    def start(self, name: str, tag: str = "") -> Process:
        process = Process(FIRST_PID + len(self._all), name, tag)
        self._all[process.pid] = process
        return process

    def get(self, pid: int) -> Process | None:
        return self._all.get(pid)

    def alive(self) -> list[Process]:
        return [process for process in self._all.values() if process.alive]
