"""The conformance table against the driver of this machine.

Rows that wedge a kernel have a boot of their own: tests/conformance_own_boot.py boots them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import pytest
from conformance import check
from conformance_own_boot import OWN_BOOT
from conformance_rows import ROWS
from conformance_steps import Row
from conftest import DIFFERENCES, Control, KernelLog
from real_stage import Puppets, RealStage, puppets

from ublkwatch.model import Generation

DEV_IDS = itertools.count()
TABLE = [
    pytest.param(row, id=row.name, marks=[pytest.mark.own_boot] if row.own_boot else [])
    for row in (*ROWS, *OWN_BOOT)
]


@pytest.fixture(scope="module")
def troupe(driver: None) -> Iterator[Puppets]:  # noqa: ARG001 - ordered behind it
    with puppets() as made:
        yield made


@pytest.fixture(scope="module")
def dialect() -> Generation:
    return Generation.of(Control().run(lambda ctrl: ctrl.get_features()))


@pytest.mark.parametrize("row", TABLE)
def test_the_driver_answers_as_the_table_says(
    row: Row,
    troupe: Puppets,
    dialect: Generation,
    kernel_log: KernelLog,
    request: pytest.FixtureRequest,
) -> None:
    if dialect not in row.generations:
        return  # a skipped test would count as one that should have run
    if row.complains:
        kernel_log.expect(row.complains)

    async def play() -> str:
        stage = RealStage(troupe, next(DEV_IDS), dialect)
        try:
            return await check(row, stage)
        finally:
            await stage.clear()

    if difference := asyncio.run(play()):
        request.config.stash[DIFFERENCES].append(difference)
