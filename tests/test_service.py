"""What install-systemd writes, runs and refuses; tests/kernel/systemd tries the unit itself."""

from __future__ import annotations

import re
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
    version,
)
from ublkwatch.traits import PROFILES

SHIPPED = Path(__file__).parents[1] / "deploy/systemd" / NAME
DROP_INS = SHIPPED.with_name("drop-ins")
PROGRAM = "/bin/true"


class Place:
    """A host's directories, and what systemctl was told."""

    def __init__(self, home: Path, version: int = 252) -> None:
        self.told: list[tuple[str, ...]] = []
        self.packaged = home / "packaged"
        self.directory = home / "etc"
        self.directory.mkdir()
        self.packaged.mkdir()
        self.service = Service(
            self.directory,
            (self.packaged,),
            lambda *words: self.told.append(words),
            lambda: version,
        )

    def install(self, *drop_ins: str, now: bool = False, program: str = PROGRAM) -> list[str]:
        return done(self.service.install([program], None, drop_ins, now=now))

    def drop_ins(self) -> set[str]:
        return {path.stem for path in self.directory.glob(f"{NAME}.d/*.conf")}

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


def test_drop_ins_are_those_asked_for_once_and_what_this_systemd_knows(tmp_path: Path) -> None:
    place = Place(tmp_path, 254)
    place.install("early-boot")
    assert place.drop_ins() == {"early-boot", "newer-systemd"}
    text = (place.directory / f"{NAME}.d/early-boot.conf").read_text()
    assert text == f"{OURS}\n{(DROP_INS / 'early-boot.conf').read_text()}"
    place.install("children")  # an upgrade, too, leaves what there is
    assert place.drop_ins() == {"children", "early-boot", "newer-systemd"}
    own = place.directory / f"{NAME}.d/own.conf"
    own.write_text("")
    place.remove()
    assert place.drop_ins() == {"own"}
    theirs = own.rename(own.with_name("children.conf"))
    with pytest.raises(ServiceError, match=r"children\.conf was not written by this verb"):
        place.install()
    assert theirs.read_text() == ""


def test_an_older_systemd_gets_nothing_that_it_would_misread(tmp_path: Path) -> None:
    place = Place(tmp_path, 253)
    place.install()
    assert place.drop_ins() == set()
    assert version() > 200


def test_what_profiles_restore_is_not_read_only_for_the_service() -> None:
    (writable,) = re.findall(r"^ReadWritePaths=(.*)$", SHIPPED.read_text(), re.MULTILINE)
    kept = [path for each in PROFILES.values() for path in each.settings.get("keep", [])]
    assert kept
    assert all(Path(path).is_relative_to(writable) for path in kept)


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
