"""What the twins' launchers have in common: no cgroups, no groups, no threads."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ublkwatch.perform import Threads

NO_THREADS = Threads(lambda _: set(), lambda _: {}, lambda _: (), lambda _server, _tids: None)


class PlainLauncher(ABC):
    """Each attempt has a home of its own, and its processes are our children or unknown."""

    @abstractmethod
    def how_ended(self, pid: int) -> tuple[str, int | None]: ...

    @abstractmethod
    def last_words(self, tag: str) -> str: ...

    def root(self, tag: str) -> str:
        return tag

    def join(self, tag: str, root: str) -> None:
        raise AssertionError(f"no groups here: {tag}, {root}")

    def must_ask(self, pid: int) -> bool:
        del pid
        return False

    async def autopsy(self, tag: str, pid: int) -> tuple[str, int | None, str]:
        return *self.how_ended(pid), self.last_words(tag)

    def pids(self, tag: str) -> set[int]:
        del tag
        return set()

    async def end(self, tag: str) -> None:
        del tag
