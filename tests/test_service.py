"""What install-systemd writes, runs and refuses; tests/kernel/systemd tries the unit itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkwatch.service import (
    NAME,
    OURS,
    Service,
    ServiceError,
    Step,
    own_command,
    systemctl,
    unit,
)

SHIPPED = Path(__file__).parents[1] / "deploy/systemd" / NAME
PROGRAM = "/bin/true"


class Place:
    """A host's directories, and what systemctl was told."""

    def __init__(self, home: Path) -> None:
        self.told: list[tuple[str, ...]] = []
        self.packaged = home / "packaged"
        self.directory = home / "etc"
        self.directory.mkdir()
        self.packaged.mkdir()
        self.service = Service(
            self.directory, (self.packaged,), lambda *words: self.told.append(words)
        )

    def install(self, *, now: bool = False, program: str = PROGRAM) -> list[str]:
        return done(self.service.install([program], None, now=now))

    def remove(self) -> list[str]:
        return done(self.service.remove())


def done(steps: Iterator[Step]) -> list[str]:
    """Do them, each before the next is asked for; return what they are."""
    found = []
    for what, do in steps:
        do()
        found.append(what)
    return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_it_is_written_enabled_and_taken_back(place: Place) -> None:
    path = place.directory / NAME
    assert place.install() == [
        f"{path} is written",
        "systemctl daemon-reload",
        f"systemctl enable {NAME}",
    ]
    assert path.stat().st_mode & 0o777 == 0o644
    assert place.install(now=True)[-1] == f"systemctl restart {NAME}"  # an upgrade is no other way
    assert place.told[-1] == ("restart", NAME)
    place.told.clear()
    place.remove()
    assert place.told == [("disable", "--now", NAME), ("daemon-reload",)]
    assert list(place.directory.iterdir()) == []
    with pytest.raises(ServiceError, match="is not there"):
        place.remove()


def test_it_is_the_unit_that_ships_for_this_program_and_configuration() -> None:
    text = unit(["/opt/it's/ublkwatch", "run", "--config", "/etc/100%/a $b"])
    shipped = SHIPPED.read_text()
    assert shipped.count("ExecStart=/usr/bin/ublkwatch run\n") == 1
    ours = shipped.replace(
        "/usr/bin/ublkwatch run",
        '"/opt/it\'s/ublkwatch" run --config "/etc/100%%/a $$b"',
    )
    assert text == f"{OURS}\n{ours}"


def test_what_others_have_written_is_left_alone(place: Place) -> None:
    theirs = place.directory / NAME
    theirs.write_text("[Service]\nExecStart=/bin/false\n")
    for act in (place.install, place.remove):
        with pytest.raises(ServiceError, match="was not written by this verb"):
            act()
    assert theirs.read_text().endswith("/bin/false\n")
    theirs.unlink()
    (place.packaged / NAME).write_text("")
    with pytest.raises(ServiceError, match="by a package; `systemctl enable --now ublkwatch`"):
        place.install()
    assert place.told == []


def test_what_root_must_not_run_at_every_boot_is_no_service(place: Place, tmp_path: Path) -> None:
    theirs = tmp_path / "ublkwatch"
    theirs.write_bytes(Path(PROGRAM).read_bytes())
    theirs.chmod(0o777)
    with pytest.raises(ServiceError, match=f"root would run it at every boot: {theirs}: .*chmod"):
        place.install(program=str(theirs))
    with pytest.raises(ServiceError, match=f"{tmp_path}/none: "):
        place.install(program=f"{tmp_path}/none")
    assert list(place.directory.iterdir()) == []


def test_systemctls_own_words_are_passed_on() -> None:
    with pytest.raises(ServiceError, match=r"systemctl no-such-verb: .*no-such-verb"):
        systemctl("no-such-verb")


def test_its_own_command_is_found_from_everywhere() -> None:
    script = "import sys; sys.argv = ['./bin/ublkwatch']; from ublkwatch import service\n"
    done = subprocess.run(
        [sys.executable, "-c", script + "print(*service.own_command())"],
        cwd="/usr",
        env={"PYTHONPATH": str(SHIPPED.parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "/usr/bin/ublkwatch\n"
    assert own_command() == [sys.executable, "-m", "ublkwatch"]
