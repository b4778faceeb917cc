"""The time in which a device was down is a counter: not even rounding takes any of it back."""

from __future__ import annotations

from dataclasses import replace

from test_metrics import LOST, WATCHED

from ublkwatch.downtime import Downtime


def test_it_never_becomes_less_while_the_device_is_up() -> None:
    downtime = Downtime()
    downtime.note(replace(LOST, dev_id=0), 100.1)
    downtime.note(replace(WATCHED, dev_id=0), 120.222732472)
    seen = [downtime.seconds(0, 120.3 + n * 0.7919) for n in range(1000)]
    assert len(set(seen)) == 1
    downtime.note(replace(LOST, dev_id=0), 1000.3)
    assert downtime.seconds(0, 1000.3) >= seen[-1]
