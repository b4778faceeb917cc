"""Two kinds of pictures, as SVG. Pure; they need no library, and no colour has to be seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from bench import stats

WIDTH, LEFT, RIGHT, ROW = 760, 150, 30, 34
TOP, BOTTOM = 46, 34
HEIGHT = 300  # of lines()
COLOURS = ("#1f6feb", "#444444", "#999999", "#8250df", "#bc4c00", "#bf8700", "#cf222e")


def ranges(title: str, series: Mapping[str, Sequence[float]], unit: str = "ms") -> str:
    """Draw a row for each series, on a logarithmic axis: all samples, median and p99."""
    drawn = {name: values for name, values in series.items() if values}
    lowest = min((min(values) for values in drawn.values()), default=1.0)
    highest = max((max(values) for values in drawn.values()), default=10.0)
    axis = _Axis(lowest, highest, LEFT, WIDTH - RIGHT)
    height = TOP + ROW * len(drawn) + BOTTOM
    parts = [_text(12, 22, title, size=15)]
    for tick in axis.ticks():
        at = axis.at(tick)
        parts.append(f'<path d="M{at:.1f} {TOP - 8}V{height - BOTTOM}" stroke="#ddd"/>')
        parts.append(_text(at, height - 12, f"{tick:g} {unit}", anchor="middle"))
    for row, (name, values) in enumerate(drawn.items()):
        y, told = TOP + ROW * row + ROW / 2, stats.figures(values)
        colour = COLOURS[row % len(COLOURS)]
        low, median, p99, high = (axis.at(told[key]) for key in ("min", "median", "p99", "max"))
        parts += [
            _text(LEFT - 10, y + 4, name, anchor="end"),
            f'<path d="M{low:.1f} {y}H{high:.1f}" stroke="{colour}" stroke-width="1.5"/>',
            f'<path d="M{p99:.1f} {y - 7}v14" stroke="{colour}" stroke-width="2"/>',
            f'<circle cx="{median:.1f}" cy="{y}" r="5" fill="{colour}"/>',
            _text(median, y - 8, f"{told['median']:.0f}", anchor="middle"),
        ]
    parts.append(_text(WIDTH - RIGHT, 22, "● median  | p99  — min to max", anchor="end"))
    return _svg(height, parts)


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Draw a line for each series of (x, y), on two axes that are logarithmic."""
    points = [point for each in series.values() for point in each] or [(1.0, 1.0)]
    across = _Axis(min(x for x, _ in points), max(x for x, _ in points), LEFT / 2, WIDTH - LEFT)
    up = _Axis(min(y for _, y in points), max(y for _, y in points), HEIGHT - BOTTOM, TOP)
    parts = [_text(12, 22, title, size=15)]
    for tick in up.ticks():
        y = up.at(tick)
        parts.append(f'<path d="M{LEFT / 2} {y:.1f}H{WIDTH - LEFT}" stroke="#ddd"/>')
        parts.append(_text(LEFT / 2 - 8, y + 4, f"{tick:g} s", anchor="end"))
    found = sorted({x for x, _ in points})
    parts += [_text(across.at(x), HEIGHT - 12, f"{x:g}", anchor="middle") for x in found]
    ends: list[float] = []
    for number, (name, each) in enumerate(series.items()):
        colour, places = COLOURS[number % len(COLOURS)], [(across.at(x), up.at(y)) for x, y in each]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places]
        end = places[-1][1]
        while any(abs(end - other) < 14 for other in ends):
            end += 14  # names do not lie on each other
        ends.append(end)
        parts.append(_text(places[-1][0] + 10, end + 4, name, colour=colour))
    return _svg(HEIGHT, parts)


class _Axis:
    """A logarithmic axis from one place to another."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._high = math.log10(low * 0.9), math.log10(high * 1.1)
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Return 1, 2 and 5 of each decade that is in sight, or more where that is too few."""
        decades = range(math.floor(self._low), math.ceil(self._high) + 1)
        found: list[float] = []
        for steps in ((1, 2, 5), range(1, 10), [step / 10 for step in range(10, 100, 2)]):
            ticks = (step * 10.0**decade for decade in decades for step in steps)
            found = [tick for tick in ticks if self._low <= math.log10(tick) <= self._high]
            if len(found) >= 3:
                break
        return found


def _text(  # noqa: PLR0913 - a place, the words, and how they look
    x: float, y: float, words: str, *, size: int = 12, anchor: str = "start", colour: str = "#222"
) -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, ground, *parts, "</svg>"]) + "\n"
