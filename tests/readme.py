"""The README's own lines, for the tests that run them as they are."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def lines(start: str) -> list[str]:
    """Return the one block of lines for a shell that starts like this."""
    blocks = re.findall(r"(?:^    .*\n)+", README.read_text(), re.MULTILINE)
    (found,) = (block for block in map(textwrap.dedent, blocks) if block.startswith(start))
    return str(found).splitlines()
