"""What a PromQL expression asks for, as far as our own metrics go."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ublkwatch.measures import MEASURES, Kind

# Prometheus adds them, or the recording rules keep them; a histogram's buckets have le.
_OTHERS = frozenset({"job", "instance"})
_SELECTOR = re.compile(r"\b(ublkwatch_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
_SUFFIXES = {
    Kind.COUNTER: ("_total",),
    Kind.INFO: ("_info",),
    Kind.GAUGE: ("",),
    Kind.HISTOGRAM: ("_bucket", "_sum", "_count"),
}
SERIES = {
    f"ublkwatch_{each.name}{suffix}": each
    for each in MEASURES.values()
    for suffix in _SUFFIXES[each.kind]
}


def errors(expr: str) -> Iterable[str]:
    """Yield what an expression asks of metrics, labels or values that there are not."""
    for name, matchers in _SELECTOR.findall(re.sub(r"\w+:ublkwatch_\w+:\w+", "0", expr)):
        if name not in SERIES:
            yield f"no metric {name}"
            continue
        labels = {label.name: label.values for label in SERIES[name].labels}
        for label, how, value in _MATCHER.findall(matchers):
            if label in _OTHERS:
                continue
            if label not in labels:
                yield f"{name} has no label {label}"
            elif labels[label] and not set(value.split("|")) <= set(labels[label]):
                yield f"{name}: {label} is never {value}"
            elif "|" in value and not how.endswith("~"):
                yield f"{name}: {label}{how} takes no alternatives"


def counters_bare(expr: str) -> list[str]:
    """Return the counters and buckets that are not under rate or increase, over a range."""
    counted = re.compile(r"\b(?:rate|increase)\(\s*\w+(?:\{[^}]*\})?\[[^]]+\]\s*\)")
    return re.findall(r"\b\w+_(?:total|bucket|sum|count)\b(?!:)", counted.sub("0", expr))
