"""How people write durations. Pure."""

from __future__ import annotations

_UNITS = ((172800, 86400, "days"), (7200, 3600, "h"), (120, 60, "min"))


def span(seconds: float) -> str:
    """Write a duration as people say it: "3.2 s", "12 min", "3 days"."""
    seconds = max(0.0, seconds)
    for above, unit, word in _UNITS:
        if seconds >= above:
            return f"{seconds / unit:.0f} {word}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def brief(seconds: float) -> str:
    """Write it for a narrow column: "3.2s", "12m", "3d"."""
    number, unit = span(seconds).split()
    return f"{number}{unit[0]}"


def milliseconds(seconds: float) -> str:
    """Write it to the millisecond: "42 ms", "1,203 ms"."""
    return f"{seconds * 1000:,.0f} ms"
