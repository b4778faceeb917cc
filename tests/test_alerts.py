"""The alerts: each has its trials, its runbook, its form in Kubernetes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import deployed
import pytest
import yaml
from programs import prometheus
from promql import counters_bare, errors

TOP = Path(__file__).parent.parent
RUNBOOKS = "https://ublkwatch.example/docs/recovery.md"
GROUPS = yaml.safe_load(deployed.RULES.read_text())["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
TRIALS = deployed.DEPLOY / "prometheus/tests.yaml"


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        [prometheus("promtool"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_ones() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", deployed.RULES)


@pytest.mark.parametrize("expr", [rule["expr"] for rule in RULES])
def test_a_rule_asks_for_what_there_is(expr: str) -> None:
    assert not list(errors(expr))
    assert not counters_bare(expr)


def test_rules_that_rest_on_others_rest_on_those_that_there_are() -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    assert {name for rule in RULES for name in re.findall(r"\w+:\w+:\w+", rule["expr"])} <= recorded


def test_the_alerts_fire_and_resolve_as_tried() -> None:
    promtool("test", "rules", TRIALS)


def test_every_alert_is_tried_before_while_and_after_it_fires() -> None:
    groups = {group["name"]: group for group in yaml.safe_load(TRIALS.read_text())["tests"]}
    assert groups.keys() == ALERTS.keys()
    for name, group in groups.items():
        looks = group["alert_rule_test"]
        assert {look["alertname"] for look in looks} == {name}
        assert [bool(look.get("exp_alerts")) for look in looks] == [False, True, False], name


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_is_wrong_and_where_to_read_on(name: str) -> None:
    alert = ALERTS[name]
    assert re.fullmatch(r"Ublk([A-Z][a-z]+|watch)([A-Z][a-z]+)*", name)
    assert alert["labels"].keys() == {"severity"}
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"{RUNBOOKS}#{name.lower()}"


def test_every_alert_has_its_runbook_and_its_line_in_the_list() -> None:
    recovery, monitoring = (
        (TOP / "docs" / name).read_text() for name in ("recovery.md", "monitoring.md")
    )
    assert re.findall(r"^### (Ublk\w+)$", recovery, re.MULTILINE) == list(ALERTS)
    listed = re.findall(r"^\| \[(\w+)\]\((\S+)\) \| (\w+) \|", monitoring, re.MULTILINE)
    assert listed == [
        (name, f"recovery.md#{name.lower()}", alert["labels"]["severity"])
        for name, alert in ALERTS.items()
    ]


def test_what_is_made_is_current() -> None:
    for path, text in deployed.pages().items():
        assert path.read_text() == text, "`make docs` makes it anew"


def test_kubernetes_gets_the_same_rules() -> None:
    made = yaml.safe_load((deployed.DEPLOY / "prometheus/prometheusrule.yaml").read_text())
    assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert made["spec"] == {"groups": GROUPS}
