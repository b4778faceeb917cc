"""Whose care a device is in: which rule fits, and which comes first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ublkwatch.care import Care, Origin
from ublkwatch.model import DevInfo, Reason
from ublkwatch.rules import Book, Match, Rule, Unmanaged, ordered
from ublkwatch.uapi import DevFlags, DevState

INFO = DevInfo(3, DevState.LIVE, DevFlags.USER_RECOVERY, 1, 64, 4096, 100, ublksrv_flags=0x70001)
ORIGIN = Origin("/usr/sbin/ublk.loop", "ublk.loop", 5, 6)


def care(word: str) -> Care:
    return Care((word,))


@pytest.mark.parametrize(
    ("match", "origin", "fits"),
    [
        (Match(dev_id=3), None, True),
        (Match(dev_id=4), ORIGIN, False),
        (Match(exe="/usr/sbin/ublk.loop"), ORIGIN, True),
        (Match(exe="/usr/sbin/ublk.*"), ORIGIN, True),
        (Match(exe="/usr/sbin/ublk.*"), replace(ORIGIN, exe="/usr/sbin/ublk.loop (deleted)"), True),
        (Match(exe="/usr/sbin/ublk"), ORIGIN, False),
        (Match(exe="/usr/sbin/ublk.*"), None, False),
        (Match(exe="/usr/sbin/ublk.*"), replace(ORIGIN, exe=""), False),
        (Match(process="ublk.loop"), ORIGIN, True),
        (Match(process="ublk.*", exe="/usr/bin/*"), ORIGIN, False),
        (Match(process="rublk"), ORIGIN, False),
        (Match(tag=0x70001), None, True),
        (Match(tag=0x70000, tag_mask=0xFFFF0000), ORIGIN, True),
        (Match(tag=0x70000), ORIGIN, False),
        (Match(tag=0x70001, process="rublk"), ORIGIN, False),
    ],
)
def test_all_that_a_match_gives_must_be_true(
    match: Match, origin: Origin | None, *, fits: bool
) -> None:
    assert match.fits(INFO, origin) is fits


def test_who_names_the_device_comes_before_who_describes_its_server() -> None:
    rules = ordered(
        [
            Rule(Match(process="ublk.*"), care("/described")),
            Rule(Match(dev_id=3), care("/named")),
            Rule(Match(dev_id=3), care("/named later")),
            Rule(Match(exe="*"), care("/described later")),
        ]
    )
    book = Book(rules, lambda _info, _origin: care("/profile"))
    assert book.find(INFO, ORIGIN) == care("/named")
    assert book.find(replace(INFO, dev_id=4), ORIGIN) == care("/described")
    stranger = replace(ORIGIN, name="x")
    assert book.find(replace(INFO, dev_id=4), stranger) == care("/described later")
    nobody = replace(stranger, exe="")
    assert Book(rules[:3], book.profiles).find(replace(INFO, dev_id=4), nobody) == care("/profile")


def test_a_device_in_nobodys_care_says_why() -> None:
    assert Book(()).find(INFO, ORIGIN) == Unmanaged(Reason.NO_SPEC, "")
    elsewhere = Unmanaged(Reason.FOREIGN, "docker")
    assert Book((), lambda _info, _origin: elsewhere).find(INFO, ORIGIN) == elsewhere
    asked: list[Origin] = []
    Book((), lambda _info, origin: asked.append(origin)).find(INFO, None)
    assert asked == [], "profiles are asked about servers that were seen"


@pytest.mark.parametrize(
    ("match", "said"),
    [
        (Match(dev_id=3), "ublkb3"),
        (Match(exe="/s", process="p"), "exe /s, process p"),
        (Match(tag=16), "tag 0x10"),
        (Match(tag=16, tag_mask=0xFF), "tag 0x10/0xff"),
    ],
)
def test_a_match_can_be_read(match: Match, said: str) -> None:
    assert str(match) == said
