"""The dashboard: what Grafana's own library makes of it, and what its people advise."""

from __future__ import annotations

import json
from typing import Any

import dashboard
import deployed
import grafana
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from promql import counters_bare, errors

from ublkwatch.measures import PHASES, STATES

MADE: grafana.Json = json.loads((deployed.DEPLOY / "grafana/ublkwatch.json").read_text())
PANELS: dict[str, grafana.Json] = {
    panel["title"]: panel for panel in MADE["panels"] if panel["type"] != "row"
}


def queries(panel: grafana.Json) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def lost(given: Any, got: Any, path: str = "") -> list[str]:
    """Return the places in which ``got`` lacks what ``given`` has, or has it otherwise."""
    if isinstance(given, dict) and isinstance(got, dict):
        return [each for key in given for each in lost(given[key], got.get(key), f"{path}/{key}")]
    if isinstance(given, list) and isinstance(got, list) and len(given) == len(got):
        pairs = enumerate(zip(given, got, strict=True))
        return [each for n, (one, other) in pairs for each in lost(one, other, f"{path}/{n}")]
    return [] if given == got else [path]


def test_grafanas_library_understands_all_of_it() -> None:
    register_default_plugins()
    back = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(MADE)))
    assert lost(MADE, back) == []


def test_what_grafanas_library_does_not_know_would_be_seen() -> None:
    assert lost({"a": [{"b": 1, "c": None}]}, {"a": [{"b": 2}], "d": 3}) == ["/a/0/b"]
    register_default_plugins()
    odd = {**MADE, "panels": [{**MADE["panels"][1], "tittle": "Nodes"}]}
    back = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(odd)))
    assert lost(odd, back) == ["/panels/0/tittle"]


def test_panels_are_placed_beside_each_other_and_numbered() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in MADE["panels"]:
        at = panel["gridPos"]
        own = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert max(x for x, _ in own) < grafana.WIDTH
        assert not own & cells, panel["title"]
        cells |= own
    numbers = [panel["id"] for panel in MADE["panels"]]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(PANELS) + len(dashboard.ROWS) == len(numbers)  # no title is there twice


def test_the_data_source_job_node_and_device_are_chosen() -> None:
    variables = {each["name"]: each for each in MADE["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance", "device"]
    assert [each["multi"] for each in variables.values()] == [False, False, True, True]
    for name, each in variables.items():
        if name != "datasource":
            assert each["datasource"]["uid"] == "${datasource}"
            assert not list(errors(each["query"]["query"]))


@pytest.mark.parametrize("title", PANELS)
def test_a_panel_says_what_it_shows_and_asks_for_what_there_is(title: str) -> None:
    panel = PANELS[title]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"]["uid"] == "${datasource}"
    assert queries(panel)
    for target in panel["targets"]:
        expr = target["expr"]
        assert not list(errors(expr))
        assert not counters_bare(expr)
        assert expr.count('job="$job"') == expr.count('instance=~"$instance"') == expr.count("{")
        if target["range"]:
            assert "[" not in expr or "[$__rate_interval]" in expr


def test_the_timelines_know_every_state_and_phase() -> None:
    assert tuple(dashboard.STATES) == STATES
    assert tuple(dashboard.PHASES) == PHASES
    for title, names in (("Kernel state", STATES), ("Phase", PHASES)):
        (mapping,) = PANELS[title]["fieldConfig"]["defaults"]["mappings"]
        (expr,) = queries(PANELS[title])
        for value, option in mapping["options"].items():
            assert f'="{option["text"]}"}}' in expr.split(f"{value} * ")[1].split(" or ")[0]
        assert [option["text"] for option in mapping["options"].values()] == list(names)


@pytest.mark.parametrize(
    ("expr", "bare"),
    [
        ("increase(a_total[5m])", []),
        ('sum by (x) (rate(a_bucket{x="1"}[5m])) / a_total', ["a_total"]),
        ("a_sum / rate(a_count[5m])", ["a_sum"]),
    ],
)
def test_a_counter_that_is_not_under_rate_would_be_seen(expr: str, bare: list[str]) -> None:
    assert counters_bare(expr) == bare


@pytest.mark.parametrize(
    "expr",
    [
        "ublkwatch_nothing",
        'ublkwatch_devices{device="ublkb0"}',
        'ublkwatch_devices{state="alive"}',
        'ublkwatch_devices{state="live|dead"}',
    ],
)
def test_what_there_is_not_would_be_seen(expr: str) -> None:
    assert list(errors(expr))
