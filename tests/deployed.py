"""``python tests/deployed.py``: writes what in deploy/ is made from something else.

The PrometheusRule, for Kubernetes, from the rules, and Grafana's dashboard from its description;
tests hold them to be current.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from dashboard import ROWS
from grafana import dashboard

DEPLOY = Path(__file__).parent.parent / "deploy"
RULES = DEPLOY / "prometheus/ublkwatch.rules.yaml"

PROMETHEUS_RULE = """\
# Made by `make docs` from ublkwatch.rules.yaml: edit that.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ublkwatch
  labels:
    app.kubernetes.io/name: ublkwatch
spec:
"""


def pages() -> dict[Path, str]:
    """Return all files."""
    groups = RULES.read_text().partition("groups:\n")
    return {
        DEPLOY / "prometheus/prometheusrule.yaml": PROMETHEUS_RULE
        + textwrap.indent(groups[1] + groups[2], "  "),
        DEPLOY / "grafana/ublkwatch.json": json.dumps(dashboard(ROWS), indent=2) + "\n",
    }


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
