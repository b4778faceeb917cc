"""Grafana's side of the dashboard: its kinds of panels, and the JSON that it imports.

Counters only under rate or increase, over ``$__rate_interval`` where a panel draws a line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

WIDTH = 24  # of Grafana's grid
NODE = 'job="$job", instance=~"$instance"'
DEVICE = f'{NODE}, device=~"$device"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Query:
    """One query, and how its series are called; ``now``: only the last value is asked for."""

    expr: str
    legend: str = ""
    now: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel; ``steps`` are colours by the value from which they hold."""

    kind: str
    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    width: int = 8
    height: int = 7
    steps: Sequence[tuple[float | None, str]] = ((None, "green"),)
    mappings: Sequence[Json] = ()
    custom: Json = field(default_factory=dict)
    options: Json = field(default_factory=dict)
    bounds: Json = field(default_factory=dict)  # min, max, decimals
    transformations: Sequence[Json] = ()


def number(title: str, description: str, expr: str, unit: str = "short", **more: Any) -> Panel:
    """Return a panel that is one number."""
    options = {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "value",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    query = Query(expr, now=True)
    return Panel(
        "stat", title, description, unit, [query], width=4, height=4, options=options, **more
    )


def lines(title: str, description: str, unit: str, *queries: Query, **more: Any) -> Panel:
    """Return a panel that draws lines; ``stacked`` upon each other."""
    stacked = more.pop("stacked", False)
    custom = {
        "drawStyle": "line",
        "fillOpacity": 60 if stacked else 10,
        "lineWidth": 1,
        "showPoints": "auto",
        "stacking": {"group": "A", "mode": "normal" if stacked else "none"},
    }
    options = {
        "legend": {"calcs": [], "displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    bounds = {"min": 0, **more.pop("bounds", {})}
    return Panel(
        "timeseries",
        title,
        description,
        unit,
        queries,
        custom=custom,
        options=options,
        bounds=bounds,
        **more,
    )


def timeline(title: str, description: str, metric: str, label: str, colors: Json) -> Panel:
    """Return a panel with a band for each device, coloured by which series of a state set is 1."""
    terms = " or ".join(
        f'{n} * ublkwatch_{metric}{{{DEVICE}, {label}="{name}"}}'
        for n, name in enumerate(colors, 1)
    )
    options = {
        str(n): {"color": color, "index": n, "text": name}
        for n, (name, color) in enumerate(colors.items(), 1)
    }
    return Panel(
        "state-timeline",
        title,
        description,
        "none",
        [Query(f"sum by (instance, device) ({terms})", "{{instance}} {{device}}")],
        width=WIDTH,
        height=8,
        mappings=[{"type": "value", "options": options}],
        custom={"fillOpacity": 80, "lineWidth": 0},
        options={
            "alignValue": "left",
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "mergeValues": True,
            "rowHeight": 0.8,
            "showValue": "never",
            "tooltip": {"mode": "single", "sort": "none"},
        },
    )


def quantiles(metric: str, labels: str, *by: str) -> list[Query]:
    """Return the median and the 99th percentile of a histogram."""
    legend = "".join(f"{{{{{name}}}}} " for name in by)
    groups = ", ".join((*by, "le"))
    return [
        Query(
            f"histogram_quantile({q}, sum by ({groups}) "
            f"(rate(ublkwatch_{metric}_bucket{{{labels}}}[$__rate_interval])))",
            f"{legend}p{q * 100:g}",
        )
        for q in (0.5, 0.99)
    ]


def mean(metric: str, labels: str, by: str) -> Query:
    """Return the mean of a histogram, by one of its labels."""
    total, count = (
        f"sum by ({by}) (rate(ublkwatch_{metric}_{part}{{{labels}}}[$__rate_interval]))"
        for part in ("sum", "count")
    )
    return Query(f"{total} / {count}", f"{{{{{by}}}}}")


def _variable(name: str, label: str, query: str, *, many: bool) -> Json:
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # when the time range is another
        "sort": 1,
        "multi": many,
        "includeAll": many,
        **({"allValue": ".*"} if many else {}),
        **({"current": {"selected": True, "text": ["All"], "value": ["$__all"]}} if many else {}),
        "options": [],
        "hide": 0,
        "regex": "",
        "skipUrlSync": False,
    }


def _variables() -> list[Json]:
    source = {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "query": "prometheus",
        "refresh": 1,
        "multi": False,
        "includeAll": False,
        "options": [],
        "hide": 0,
        "regex": "",
        "skipUrlSync": False,
    }
    build = "ublkwatch_build_info"
    return [
        source,
        _variable("job", "Job", f"label_values({build}, job)", many=False),
        _variable("instance", "Node", f'label_values({build}{{job="$job"}}, instance)', many=True),
        _variable(
            "device", "Device", f"label_values(ublkwatch_device_info{{{NODE}}}, device)", many=True
        ),
    ]


def _panel(panel: Panel, number: int, x: int, y: int) -> Json:
    targets = [
        {
            "refId": chr(ord("A") + n),
            "datasource": SOURCE,
            "editorMode": "code",
            "expr": query.expr,
            "legendFormat": query.legend or "__auto",
            "instant": query.now,
            "range": not query.now,
            **({"format": "table"} if panel.kind == "table" else {}),
        }
        for n, query in enumerate(panel.queries)
    ]
    drawn = panel.kind in ("timeseries", "table")
    defaults = {
        "unit": panel.unit,
        "color": {"mode": "palette-classic" if drawn else "thresholds"},
        "thresholds": {
            "mode": "absolute",
            "steps": [{"value": value, "color": color} for value, color in panel.steps],
        },
        "mappings": list(panel.mappings),
        "custom": panel.custom,
        **panel.bounds,
    }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": panel.options,
        "transformations": list(panel.transformations),
    }


def _placed(rows: Mapping[str, Sequence[Panel]]) -> Iterator[Json]:
    number, y = 0, 0
    for title, panels in rows.items():
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
            "panels": [],
        }
        x, y, height = 0, y + 1, 0
        for panel in panels:
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            number += 1
            yield _panel(panel, number, x, y)
            x, height = x + panel.width, max(height, panel.height)
        y += height


def dashboard(rows: Mapping[str, Sequence[Panel]]) -> Json:
    """Return a dashboard of these rows of panels, as Grafana imports it."""
    return {
        "uid": "ublkwatch",
        "title": "ublkwatch",
        "description": "ublk devices, and how they are kept alive: docs/monitoring.md.",
        "tags": ["ublkwatch", "ublk"],
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "schemaVersion": 41,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "links": [],
        "panels": list(_placed(rows)),
    }
