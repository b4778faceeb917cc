"""Which devices a poll leaves alone: only those of which nothing at all has changed, and can."""

from __future__ import annotations

from dataclasses import replace

import pytest
from stories import INFO, OLD

from ublkwatch.atrest import AtRest, Sight
from ublkwatch.care import Care
from ublkwatch.ctrl import CtrlError
from ublkwatch.model import Phase, Policy, Record
from ublkwatch.rules import Unmanaged
from ublkwatch.uapi import DevState

CARE = Care(("/bin/server",), Policy())
RECORD = Record(dev_id=0, instance="boot/1", phase=Phase.WATCHING, info=INFO, server=OLD)
SIGHT = Sight(INFO, 41, RECORD, CARE)


def looked_at(*sights: Sight) -> list[bool]:
    rest = AtRest()
    return [list(rest.restless([(0, sight)])) == [0] for sight in sights]


def test_what_is_as_it_was_is_not_looked_at_again() -> None:
    assert looked_at(*[SIGHT] * 4) == [True, False, False, False]
    equal = Sight(replace(INFO), 41, replace(RECORD), replace(CARE))
    assert looked_at(SIGHT, equal, SIGHT) == [True, False, False]


@pytest.mark.parametrize(
    "other",
    [
        SIGHT._replace(info=replace(INFO, ublksrv_pid=7)),
        SIGHT._replace(disk=42),
        SIGHT._replace(record=replace(RECORD, recoveries=1)),
        SIGHT._replace(rules=Unmanaged()),
    ],
    ids=["answer", "disk", "record", "rules"],
)
def test_what_is_other_is_looked_at(other: Sight) -> None:
    assert looked_at(SIGHT, SIGHT, other) == [True, False, True]


@pytest.mark.parametrize(
    "sight",
    [
        SIGHT._replace(info=None),
        SIGHT._replace(info=CtrlError(5, "GET_DEV_INFO", 0)),
        SIGHT._replace(disk=None),
        SIGHT._replace(record=None),
        SIGHT._replace(rules=None),
        SIGHT._replace(record=replace(RECORD, info=None)),
        SIGHT._replace(record=replace(RECORD, server=None)),
        SIGHT._replace(record=replace(RECORD, phase=Phase.PROBATION)),
        SIGHT._replace(
            info=replace(INFO, state=DevState.QUIESCED),
            record=replace(RECORD, info=replace(INFO, state=DevState.QUIESCED)),
        ),
    ],
    ids=["no answer", "error", "no disk", "new", "rules", "not stepped", "server", "phase", "down"],
)
def test_where_something_is_not_settled_every_poll_looks(sight: Sight) -> None:
    assert looked_at(sight, sight, sight) == [True, True, True]


def test_who_was_gone_is_looked_at_when_it_comes_again() -> None:
    rest = AtRest()
    assert list(rest.restless([(0, SIGHT), (1, SIGHT)])) == [0, 1]
    assert list(rest.restless([(0, SIGHT)])) == []
    assert list(rest.restless([(0, SIGHT), (1, SIGHT)])) == [1]
