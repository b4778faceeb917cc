"""What is shipped: the wheel, the sdist, and what debian/ says. test_install.py installs them."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import pytest
import readme

from ublkwatch import __version__, config, service

TOP = Path(__file__).parent.parent
DEBIAN = TOP / "debian"
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())
REQUIRED = sorted(PROJECT["project"]["dependencies"])
SHARED = {
    "man/man8/ublkwatch.8": "docs/man/ublkwatch.8",
    "man/man5/ublkwatch.toml.5": "docs/man/ublkwatch.toml.5",
    "bash-completion/completions/ublkwatch": "docs/completion/ublkwatch.bash",
    "zsh/site-functions/_ublkwatch": "docs/completion/_ublkwatch",
}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(directory)]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory


def sources(directory: str) -> set[str]:
    """Return the files of a directory, without what Python leaves there."""
    found = {path for path in (TOP / directory).rglob("*") if path.is_file()}
    return {str(path.relative_to(TOP)) for path in found if "__pycache__" not in path.parts}


def test_the_wheel_is_the_package_with_pages_and_completions(dist: Path) -> None:
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        held = set(wheel.namelist())
        info, data = (
            f"ublkwatch-{__version__}.dist-info",
            f"ublkwatch-{__version__}.data/data/share",
        )
        assert {each for each in held if each.startswith("ublkwatch/")} == sources("ublkwatch")
        for name, source in SHARED.items():
            assert wheel.read(f"{data}/{name}") == (TOP / source).read_bytes()
        about = message_from_bytes(wheel.read(f"{info}/METADATA"))
        assert f"{info}/licenses/LICENSE" in held
    others = {each for each in held if not each.startswith(("ublkwatch/", f"{info}/"))}
    assert others == {f"{data}/{name}" for name in SHARED}
    assert about["Version"] == __version__
    assert sorted(about.get_all("Requires-Dist", [])) == REQUIRED


def test_the_sdist_is_the_project_without_what_lies_around(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        held = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in sdist.getnames()}
    tops = {PurePosixPath(name).parts[0] for name in held}
    assert tops == {
        *("ARCHITECTURE.md", "CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"),
        *("bench", "debian", "deploy", "docs", "examples", "lab", "tests", "ublkwatch"),
        *(".gitignore", "PKG-INFO"),
    }
    for directory in ("debian", "deploy", "docs", "examples", "ublkwatch"):
        assert sources(directory) <= held
    assert not [
        name for name in held if re.search(r"__pycache__|\.pyc$|(^|/)\.(?!gitignore)", name)
    ]


def test_the_debs_version_is_the_programs() -> None:
    first = (DEBIAN / "changelog").read_text().splitlines()[0]
    assert first.startswith(f"ublkwatch ({__version__}) ")
    assert (DEBIAN / "source/format").read_text() == "3.0 (native)\n", "no revision of Debian's"


def test_the_debs_libraries_are_the_wheels() -> None:
    """dh_python3 makes the Depends of the wheel's; the build has them to try the program."""
    control = (DEBIAN / "control").read_text()
    needed = re.findall(r"python3-([a-z0-9-]+) \(>= ([0-9.]+)\)", control)
    assert sorted(f"{name}>={floor}" for name, floor in needed) == REQUIRED
    assert "${python3:Depends}" in control
    python = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert f"python3 (>= {python})" in control


def test_systemd_has_no_complaint_about_the_unit(tmp_path: Path) -> None:
    path = tmp_path / service.NAME  # the program that the shipped one names is not installed here
    path.write_text(service.unit(["/bin/true"]))
    command = ["systemd-analyze", "verify", "--man=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_readmes_image_has_the_programs_version() -> None:
    _, push, _ = readme.lines("make image")
    assert re.findall(r"ublkwatch[-:]([0-9][0-9.]*[0-9])", push) == [__version__] * 2


def test_the_debs_files_exist() -> None:
    lists = [*DEBIAN.glob("ublkwatch.install"), *DEBIAN.glob("ublkwatch.[de]*s")]
    assert len(lists) == 3
    for line in "".join(path.read_text() for path in lists).splitlines():
        assert (TOP / line.split()[0]).exists(), line
    for path in re.findall(r"^\tcp (\S+)", (DEBIAN / "rules").read_text(), re.MULTILINE):
        assert (TOP / path).exists(), path


def test_the_debs_configuration_says_nothing() -> None:
    """A conffile that never changes is one about which an upgrade never asks."""
    text = (TOP / "deploy/ublkwatch.toml").read_bytes()
    assert config.parse(text, "ublkwatch.toml") == config.parse(b"", "ublkwatch.toml")
    assert all(line.startswith(b"#") for line in text.splitlines())
