"""What of ours lies on ublk devices: refused, or warned of."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path

import pytest
from test_placement import Host

from ublkwatch import config
from ublkwatch.care import Care
from ublkwatch.siting import PlacementError, Siting, check_own, own

FILE = Path("/etc/ublkwatch/ublkwatch.toml")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def settings(**changes: object) -> config.Config:
    return dataclasses.replace(config.parse(b"", "nothing"), **changes)  # type: ignore[arg-type]


def test_where_all_is_elsewhere_nothing_is_said(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host.plain()
    check_own(settings(), FILE, host.root)
    check_own(settings(placement="warn"), FILE, host.root)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("/var/lib", "the state directory /var/lib/ublkwatch"),
        ("/run/ublkwatch", "the runtime directory /run/ublkwatch"),
        ("/etc/ublkwatch", f"the configuration {FILE}"),
        (str(Path(sys.executable).parent), f"the interpreter {sys.executable}"),
        (str(Path(config.__file__).parent), f"the program {Path(config.__file__).parent}"),
    ],
)
def test_each_of_our_files_is_asked_about(host: Host, place: str, what: str) -> None:
    host.plain()
    host.mount(place, host.disk("ublkb0"))
    assert f"{what} is on ext4, on ublkb0" in [
        str(each) for each in own(settings(), FILE, host.root)
    ]
    with pytest.raises(PlacementError, match="try: move it to another disk") as caught:
        check_own(settings(), FILE, host.root)
    assert f"{what} is on ext4, on ublkb0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_root_on_ublk_has_the_interpreter_and_its_library_on_it(host: Host) -> None:
    host.mount("/", host.disk("ublkb0"))
    found = {each.what for each in own(settings(), FILE, host.root)}
    assert {"the interpreter", "the interpreter's library", "the packages"} <= found


def test_where_it_is_meant_it_is_warned_of(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.plain()
    host.disk("ublkb3")
    host.swap("/dev/ublkb3")
    with pytest.raises(PlacementError, match=r"^swap /dev/ublkb3 is on ublkb3: when that device"):
        check_own(settings(), FILE, host.root)
    check_own(settings(placement="warn"), FILE, host.root)
    (record,) = caplog.records
    assert record.message.startswith("swap /dev/ublkb3 is on ublkb3: should that device's server")


def test_a_program_on_a_device_is_warned_of_once_for_each_device(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    host.plain()
    host.mount("/srv", host.disk("ublkb0"))
    siting = Siting(host.root)
    care = Care(("/srv/server", "x"), hook=("/srv/hook",), decider=("/usr/bin/decide",))
    for dev_id in (0, 0, 1):
        siting.warn(dev_id, care)
    siting.warn(2, Care(("/usr/bin/server",)))
    siting.warn(2, Care(()))  # a unit's
    assert [record.message.partition(": while")[0] for record in caplog.records] == [
        "ublk 0: its server's program /srv/server is on ext4, on ublkb0, this very device",
        "ublk 0: pre_recover /srv/hook is on ext4, on ublkb0, this very device",
        "ublk 1: its server's program /srv/server is on ext4, on ublkb0",
        "ublk 1: pre_recover /srv/hook is on ext4, on ublkb0",
    ]
