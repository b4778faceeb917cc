"""What several test files share."""

from __future__ import annotations

import pytest
from stories import Story

from ublkwatch.model import Generation


@pytest.fixture(params=[Generation.G2, Generation.G3], ids=["G2", "G3"])
def story(request: pytest.FixtureRequest) -> Story:
    return Story(request.param)
