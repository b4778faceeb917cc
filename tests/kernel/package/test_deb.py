"""The Debian package, from its installation to its purge, under systemd and over the real driver.

make deb && lab/lab.py run --init systemd -- .venv/bin/python -m pytest tests/kernel/package

The guest's root is the host's under an overlay: what dpkg does here is gone with the guest.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import readme
from installed import CONFIG, STATE, TOP, alive, main_pid, patience, run, watched

if TYPE_CHECKING:
    from conftest import Servers


@pytest.fixture
def deb() -> Path:
    """Return the package that the README's first line has left: emulated, that takes minutes."""
    found = sorted(TOP.glob("build/deb/*.deb"))
    assert len(found) == 1, "make deb"
    return found[0]


def install_line() -> str:
    """Return the README's second line."""
    first, second = readme.lines("make deb")
    assert first == "make deb"
    return second


def later(deb: Path, directory: Path) -> Path:
    """Return the same package as a higher version, which its program knows, too."""
    tree = directory / "tree"
    run("dpkg-deb", "-R", deb, tree)
    for path, pattern in (
        (tree / "DEBIAN/control", r"(?m)^(Version: ).*$"),
        (tree / "usr/lib/python3/dist-packages/ublkwatch/__init__.py", r'(__version__ = ").*(?=")'),
    ):
        text, count = re.subn(pattern, r"\g<1>99.0", path.read_text())
        assert count == 1
        path.write_text(text)
    run("dpkg-deb", "-b", "-Znone", tree, directory / "later.deb")
    return directory / "later.deb"


@pytest.fixture
def dpkg() -> Iterator[Callable[..., str]]:
    """Run dpkg as on a machine whose administrator lets services start, and is not so slow."""
    Path("/usr/sbin/policy-rc.d").unlink(missing_ok=True)  # a container's has one that forbids it
    with patience():
        yield lambda *words: run("dpkg", "--force-unsafe-io", *words)
        run("dpkg", "--purge", "ublkwatch")


@pytest.mark.timeout(1500)
def test_the_package_from_its_installation_to_its_purge(
    server: Servers, attach: Path, deb: Path, dpkg: Callable[..., str], tmp_path: Path
) -> None:
    program = shutil.copy(attach, "/usr/local/sbin/attach")
    creator = server(0)

    run("sh", "-c", install_line())
    assert run("systemctl", "is-active", "ublkwatch") == "active"
    assert run("systemctl", "is-enabled", "ublkwatch") == "enabled"
    before = run("ublkwatch", "--version")
    for page in ("ublkwatch", "ublkwatch.toml"):
        assert run("man", "--where", page).startswith("/usr/share/man/")
    run("ublkwatch", "check-config")
    CONFIG.write_text(f'[[device]]\ndev_id = 0\ncommand = ["{program}"]\n')
    run("systemctl", "reload", "ublkwatch")
    watched(recoveries=0)

    creator.kill()
    kept = watched(recoveries=1)
    first = main_pid()

    dpkg("--install", later(deb, tmp_path))
    assert run("ublkwatch", "--version") == "ublkwatch 99.0" != before
    assert main_pid() not in (0, first), "the new version runs"
    assert "99.0" in run("ublkwatch", "version")
    assert watched(recoveries=1) == kept, "by the same server, and with what was known of it"
    assert "attach" in CONFIG.read_text()
    history = run("ublkwatch", "history")
    assert "ublkb0" in history

    dpkg("--remove", "ublkwatch")
    assert run("systemctl", "show", "--value", "-p", "ActiveState", "ublkwatch") == "inactive"
    assert alive(kept)
    assert any(STATE.iterdir())
    assert CONFIG.exists()

    dpkg("--install", deb)
    assert watched(recoveries=1) == kept
    assert run("ublkwatch", "history") == history

    dpkg("--purge", "ublkwatch")
    assert alive(kept)
    assert not STATE.exists()
    assert not CONFIG.parent.exists()
