"""Debian's archive, through the apt that is here but on sources, lists and a cache of our own.

Knows suites and packages, and nothing of what they are fetched for.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from base import LabError, output_of, say

KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Names of suites that only Debian's own archives carry; tells its mirrors from other sources.
DEBIAN_SUITE: Final = re.compile(
    r"(?:(?:old)*stable|testing|unstable|sid|bookworm|trixie|forky)"
    r"(?P<security>-security)?(?:-updates|-backports|-proposed-updates)?"
)


class Archive:
    """One reading of the archive, in a directory that is thrown away afterwards.

    The machine's apt configuration (proxies, certificates) applies; its sources and lists are
    neither used nor changed, apart from asking which mirror it is set to.
    """

    def __init__(self, directory: Path) -> None:
        """Prepare the folders apt wants to find."""
        self.directory = directory
        for folder in ("lists/partial", "cache/archives/partial", "parts"):
            (directory / folder).mkdir(parents=True, exist_ok=True)
        (directory / "status").touch()

    def apt(self, *command: str, cwd: Path | None = None) -> str:
        """Run an apt program on our sources."""
        places: dict[str, str | Path] = {
            "Dir::Etc::sourcelist": self.directory / "sources.list",
            "Dir::Etc::sourceparts": self.directory / "parts",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": self.directory / "parts",
            **self.state(),
        }
        options = [f"-o{key}={value}" for key, value in places.items()]
        return output_of([command[0], *options, *command[1:]], cwd)

    def state(self) -> dict[str, str | Path]:
        """Return the options that keep apt's state here, so that nobody needs to be root."""
        return {
            "Dir::State": self.directory,
            "Dir::State::lists": self.directory / "lists",
            "Dir::State::status": self.directory / "status",
            "Dir::Cache": self.directory / "cache",
            # A container's apt is often set to keep no index, and would build it for each call.
            "Dir::Cache::pkgcache": "packages.bin",
            "Dir::Cache::srcpkgcache": "sources.bin",
            "Acquire::Languages": "none",
            # Root's downloads would otherwise be done by a user who cannot enter our folders.
            "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
        }

    def mirrors(self) -> tuple[list[str], list[str]]:
        """Return the archives and security archives that the machine's apt is set to."""
        options = [f"-o{key}={value}" for key, value in self.state().items()]
        found: tuple[list[str], list[str]] = ([], [])
        for uri in re.findall(r"^'(\S+)'", self.print_uris(options), re.MULTILINE):
            base, _, rest = uri.partition("/dists/")
            suite = DEBIAN_SUITE.fullmatch(rest.rpartition("/")[0])
            if suite and base not in found[bool(suite["security"])]:
                found[bool(suite["security"])].append(base)
        if not found[0]:
            raise LabError(
                "apt is set to no archive of Debian's; add one to /etc/apt/sources.list, then: "
                "lab/lab.py setup"
            )
        return found

    @staticmethod
    def print_uris(options: Sequence[str]) -> str:
        """Ask apt for its index addresses, whichever format its sources are written in."""
        return output_of(["apt-get", *options, "update", "--print-uris"])

    def update(self, suites: Sequence[str]) -> None:
        """Fetch the lists of these suites; a mirror may lack some, so only the result counts."""
        main, security = self.mirrors()
        entries = [
            f"deb [arch=amd64 signed-by={KEYRING}] {base} {suite} main\n"
            for suite in suites
            for base in (security if suite.endswith("-security") else main)
        ]
        (self.directory / "sources.list").write_text("".join(entries))
        say(f"reading package lists of {', '.join(suites)}")
        try:
            # Without "any", apt calls it a success when nothing could be reached.
            self.apt("apt-get", "update", "-oAcquire::Retries=3", "-oAPT::Update::Error-Mode=any")
        except LabError as error:
            if not any((self.directory / "lists").glob("*Release")):
                raise
            say(f"some package lists could not be read: {error}")

    def newest(self, pattern: str) -> tuple[str, str]:
        """Return name and version of the newest of Linux's packages whose name matches."""
        names = [
            name
            for name in self.apt("apt-cache", "pkgnames", "linux-").split()
            if re.fullmatch(pattern, name)
        ]
        if not names:
            raise LabError(f"no package matches {pattern}: is the Debian mirror reachable?")
        rows = [line.split("|") for line in self.apt("apt-cache", "madison", *names).splitlines()]
        found = [(row[0].strip(), row[1].strip()) for row in rows if len(row) > 2]
        if not found:
            raise LabError(f"no version of {names[0]} can be downloaded")
        by_version = functools.cmp_to_key(compare_versions)
        return max(found, key=lambda candidate: by_version(candidate[1]))

    def parts_of(self, package: str, version: str) -> list[str]:
        """Return the package and the parts of the same source that it needs at its version."""
        text = self.apt("apt-cache", "show", f"{package}={version}")
        depends = re.search(r"^Depends: (.*)", text, re.MULTILINE)
        exact = rf"(linux-\S+) \(= {re.escape(version)}\)"
        return [package, *re.findall(exact, depends[1] if depends else "")]

    def unpack(self, packages: Sequence[str], into: Path) -> None:
        """Download packages, verified by apt against the signed lists, and unpack them."""
        debs = into / "debs"
        debs.mkdir()
        self.apt("apt-get", "download", "-oAcquire::Retries=3", *packages, cwd=debs)
        for deb in sorted(debs.glob("*.deb")):
            output_of(["dpkg-deb", "--extract", deb, into])
        shutil.rmtree(debs)


def compare_versions(left: str, right: str) -> int:
    """Order two Debian versions as dpkg does."""
    if left == right:
        return 0
    asked = ["dpkg", "--compare-versions", left, "gt", right]
    return 1 if subprocess.run(asked, check=False).returncode == 0 else -1
