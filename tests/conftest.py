"""What several test files share."""

from __future__ import annotations

import signal

import pytest
from stories import Story

from ublkwatch.model import Generation

# A shell ignores it for what runs in the background, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=[Generation.G2, Generation.G3], ids=["G2", "G3"])
def story(request: pytest.FixtureRequest) -> Story:
    return Story(request.param)
