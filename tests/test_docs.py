"""Documents that lie are bugs: what they list is what the code has."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import schema
from draw import redrawn

from ublkwatch import chronicle, cli, config, profiles, recovery, registering, settings, tables
from ublkwatch.demo.device import Geometry
from ublkwatch.model import Ailment, Order, Phase, Reason
from ublkwatch.traits import PROFILES
from ublkwatch.verbs import Exit

TOP = Path(__file__).parent.parent
RECOVERY = (TOP / "docs/recovery.md").read_text()
SERVERS = (TOP / "docs/servers.md").read_text()
README = (TOP / "README.md").read_text()
ARCHITECTURE = (TOP / "ARCHITECTURE.md").read_text()


def test_every_reason_has_its_section_and_no_other_is_there() -> None:
    headings = re.findall(r"^### ([A-Z_]+)$", RECOVERY, re.MULTILINE)
    named = [*(reason.name for reason in Reason), *(ailment.name for ailment in Ailment)]
    assert sorted(headings) == sorted(named)


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
    assert rules == told == {str(number) for number in range(1, 15)}


def test_every_setting_that_the_documents_name_exists() -> None:
    known = {*settings.TOP, *settings.METRICS, *settings.RECOVERY, *settings.DEVICE}
    named = set(re.findall(r"`([a-z]+_[a-z_]*(?:_s|_max))`", RECOVERY + README + ARCHITECTURE))
    assert named
    assert named <= known


def test_the_readmes_configuration_is_one() -> None:
    text = README.split("# /etc/ublkwatch/ublkwatch.toml")[1].partition("\n")[2]
    example = "\n".join(
        line.strip() for line in text.split("\nA server is started")[0].splitlines() if line
    )
    parsed = config.parse(example.encode(), "README.md")
    assert [rule.match.dev_id for rule in parsed.rules] == [0, 1, None]
    assert parsed.rules[1].care.policy.attach_timeout_s == tables.DELEGATED_ATTACH_TIMEOUT_S


def test_every_verb_is_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    verbs = set(re.findall(r"^    ([a-z-]+)(?: |$)", capsys.readouterr().out, re.MULTILINE))
    assert {order.value for order in Order} < verbs
    assert verbs == set(re.findall(r"^    ublkwatch ([a-z-]+)", README, re.MULTILINE))


def test_the_schemas_have_every_phase_and_reason() -> None:
    device = schema.of("status")["properties"]["devices"]["items"]["properties"]
    assert device["phase"]["enum"] == [phase.value for phase in Phase]
    assert device["reason"]["enum"] == [*(reason.name for reason in Reason), None]
    event = schema.of("event")["properties"]
    assert event["from"]["enum"] == event["to"]["enum"] == device["phase"]["enum"]
    recovery = schema.of("history")["properties"]["history"]["items"]["oneOf"][0]["properties"]
    assert recovery["phases"]["items"]["properties"]["phase"]["enum"] == device["phase"]["enum"]
    assert set(device["cause"]["enum"]) | {chronicle.OOM_KILL} == set(recovery["cause"]["enum"])


def test_every_exit_code_is_in_the_readme() -> None:
    codes = {int(code) for code in Exit}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)} == codes


def test_every_module_is_in_the_architecture() -> None:
    modules = {path.stem for path in (TOP / "ublkwatch").glob("[a-z]*.py")}
    rooms = set(re.findall(r"^\|[^|]*\| `(\w+)` \|", ARCHITECTURE, re.MULTILINE))
    assert rooms == modules


def snippets(beginning: str) -> list[str]:
    """Return the indented blocks of docs/servers.md that begin so."""
    blocks = re.findall(r"(?:^    .*\n)+", SERVERS, re.MULTILINE)
    return [text for text in map(textwrap.dedent, blocks) if text.startswith(beginning)]


def test_the_servers_tables_are_configurations() -> None:
    tables = snippets("[[")
    assert len(tables) == 2
    for text in tables:
        (rule,) = config.parse(text.encode(), "servers.md").rules
        assert rule.match.dev_id == 0


def test_the_servers_registrations_are_ones() -> None:
    lines = "".join(snippets("ublkwatch register")).splitlines()
    assert len(lines) == 7
    for line in lines:
        arguments = cli.parse(shlex.split(line)[1:])
        table = registering.change_of(arguments).table
        assert tables.rule(table, {}, "servers.md", "device.").match.dev_id in (0, 1)
        deletes = PROFILES[arguments.profile or "contract"].deletes_on_failure
        assert bool(deletes) == arguments.accept_delete_on_failure


def test_the_servers_line_and_run_file_are_ones() -> None:
    line, run_file = snippets("{")
    assert Geometry.of_line(line.encode()).queues == 2
    profiles.check_run_file(json.loads(run_file), dev_id=0, pid=4711)


def test_the_servers_c_is_the_examples() -> None:
    source = (TOP / "examples/attach.c").read_text()
    pieces = re.findall(r"^```c\n(.*?)^```$", SERVERS, re.MULTILINE | re.DOTALL)
    assert len(pieces) == 2
    assert all(piece in source for piece in pieces)


def test_every_profile_has_its_part_and_says_whether_it_is_experimental() -> None:
    titles = {"contract": "A server by the attach contract", "kublk": "kublk", "spdk": "SPDK"}
    parts = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n)*)", SERVERS, re.MULTILINE))
    for name, each in PROFILES.items():
        part = parts[titles.get(name, name)]
        assert ("**Experimental, and off**" in part) == bool(each.experimental), name
        assert bool(each.deletes_on_failure) == ("--accept-delete-on-failure" in part), name
