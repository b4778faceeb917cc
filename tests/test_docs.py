"""Documents that lie are bugs: what they list is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from draw import redrawn

from ublkwatch import cli, config, recovery
from ublkwatch.model import Order, Phase, Reason

TOP = Path(__file__).parent.parent
RECOVERY = (TOP / "docs/recovery.md").read_text()
README = (TOP / "README.md").read_text()
ARCHITECTURE = (TOP / "ARCHITECTURE.md").read_text()


def test_every_reason_has_its_section_and_no_other_is_there() -> None:
    headings = re.findall(r"^### (\w+)$", RECOVERY, re.MULTILINE)
    assert sorted(headings) == sorted(reason.name for reason in Reason)


def test_every_phase_is_explained() -> None:
    table = RECOVERY.split("## Phases")[1].split("Failed attempts")[0]
    assert re.findall(r"^\| ([a-z_]+) \|", table, re.MULTILINE)[1:] == [p.value for p in Phase]


@pytest.mark.timeout(600)
def test_the_diagram_is_the_machine() -> None:
    assert redrawn(RECOVERY) == RECOVERY, "python -m tests.draw draws it anew"


def test_every_rule_of_the_machine_has_its_stories() -> None:
    rules = set(re.findall(r"^ ?(\d+)\. ", recovery.__doc__ or "", re.MULTILINE))
    heads = [path.read_text().splitlines()[0] for path in (TOP / "tests").glob("test_recovery*.py")]
    told = {rule for head in heads for rule in re.findall(r"\b\d+", head)}
    assert rules == told == {str(number) for number in range(1, 13)}


def test_every_setting_that_the_documents_name_exists() -> None:
    known = {*config.TOP, *config.METRICS, *config.RECOVERY, *config.DEVICE}
    named = set(re.findall(r"`([a-z]+_[a-z_]*(?:_s|_max))`", RECOVERY + README + ARCHITECTURE))
    assert named
    assert named <= known


def test_the_readmes_configuration_is_one() -> None:
    text = README.split("# /etc/ublkwatch/ublkwatch.toml")[1].partition("\n")[2]
    example = "\n".join(
        line.strip() for line in text.split("\nWith `handoff")[0].splitlines() if line
    )
    parsed = config.parse(example.encode(), "README.md")
    assert parsed.cares.keys() == {0, 1}
    assert parsed.cares[1].policy.attach_timeout_s == config.DELEGATED_ATTACH_TIMEOUT_S


def test_every_verb_is_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    verbs = set(re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, re.MULTILINE))
    assert {order.value for order in Order} < verbs
    assert verbs == set(re.findall(r"^    ublkwatch ([a-z]+)", README, re.MULTILINE))


def test_every_exit_code_is_in_the_readme() -> None:
    codes = {value for name, value in vars(cli).items() if name.startswith("EXIT_")}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)} == codes


def test_every_module_is_in_the_architecture() -> None:
    modules = {path.stem for path in (TOP / "ublkwatch").glob("[a-z]*.py")}
    rooms = set(re.findall(r"^\|[^|]*\| `(\w+)` \|", ARCHITECTURE, re.MULTILINE))
    assert rooms == modules
