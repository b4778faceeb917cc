"""What the systemd of Debian 12, or this host's, and that of Debian 13 say of our units.

A part of `full` only: Debian 13's is in build/trixie, which make brings.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
UNITS = TOP / "deploy/systemd"
NAME = "ublkwatch.service"
PATH, CHROOT = "/usr/sbin:/usr/bin", "/usr/sbin/chroot"
HOST, TRIXIE = Path("/"), TOP / "build/trixie"
LOOSE = ("early-boot", "children")
# Of a hundred; below fifty systemd calls it OK. What is left is what the driver asks for.
EXPOSURE_MAX = 40


class Installed:
    """A root with our unit in a directory of it."""

    def __init__(self, root: Path, directory: Path) -> None:
        self._root, self._directory = root, directory
        unit = (UNITS / NAME).read_text()
        # That program is not there, and it is no question of the unit.
        (directory / NAME).write_text(unit.replace("/usr/bin/ublkwatch run", "/bin/true"))
        (directory / f"{NAME}.d").mkdir()

    def add(self, *drop_ins: str) -> None:
        for name in drop_ins:
            shutil.copy(UNITS / f"drop-ins/{name}.conf", self._directory / f"{NAME}.d")

    def analyze(self, verb: str, *options: str) -> subprocess.CompletedProcess[str]:
        seen = Path("/") / self._directory.relative_to(self._root)
        return subprocess.run(
            [CHROOT, str(self._root), "systemd-analyze", verb, *options, str(seen / NAME)],
            capture_output=True,
            text=True,
            env={"PATH": PATH, "SYSTEMD_COLORS": "0"},
            check=False,
        )

    def version(self) -> int:
        command = [CHROOT, str(self._root), "systemd-analyze", "--version"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.match(r"systemd (\d+)", said)
        assert found, said
        return int(found[1])


@pytest.fixture(params=[HOST, TRIXIE], ids=["this host's", "Debian 13's"])
def installed(request: pytest.FixtureRequest) -> Iterator[Installed]:
    assert request.param.is_dir(), "make build/trixie"
    with tempfile.TemporaryDirectory(prefix="ublkwatch-", dir=request.param / "tmp") as name:
        Path(name).chmod(0o755)
        yield Installed(request.param, Path(name))


@pytest.mark.parametrize("drop_ins", [(), ("children",), LOOSE, ("newer-systemd",)])
def test_it_is_understood(installed: Installed, drop_ins: tuple[str, ...]) -> None:
    installed.add(*drop_ins)
    done = installed.analyze("verify", "--man=no")
    if "newer-systemd" in drop_ins and installed.version() < 254:
        assert "FileDescriptorStorePreserve" in done.stderr, "else it could go to every host"
        return
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_it_has_few_rights(installed: Installed) -> None:
    for drop_ins in ((), ("newer-systemd",)):
        installed.add(*drop_ins)
        options = ("--offline=true", f"--threshold={EXPOSURE_MAX}")
        done = installed.analyze("security", *options)
        assert done.returncode == 0, done.stdout + done.stderr


def test_children_have_no_sandbox_of_ours(installed: Installed) -> None:
    """What a child could miss is named by the unit; the drop-in takes back each line of it."""
    unit = (UNITS / NAME).read_text().partition("# Servers are units of their own")[2]
    loose = (UNITS / "drop-ins/children.conf").read_text()
    names = set(re.findall(r"^(\w+)=", unit.partition("[Install]")[0], re.MULTILINE))
    taken = set(re.findall(r"^(\w+)=", loose, re.MULTILINE))
    assert len(names) > 10
    assert names - taken <= {"ReadWritePaths", "SystemCallErrorNumber"}
    installed.add("children")
    assert installed.analyze("security", "--offline=true", "--threshold=90").returncode
