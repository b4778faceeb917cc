"""The declarations are what is exposed, to the last label; and Prometheus' own linter agrees."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest
from programs import prometheus as program
from prometheus_client.parser import text_string_to_metric_families
from test_metrics import BACKING_OFF, LOST, PROBATION, RECOVERED, STALLED, WATCHED, Scraped

from ublkwatch.measures import MEASURES, Kind
from ublkwatch.model import Phase

DEVICES = 3


def populated() -> Scraped:
    """Return metrics in which each that there is has a value."""
    scraped = Scraped(*(replace(RECOVERED, dev_id=dev_id) for dev_id in range(DEVICES)))
    records = scraped.records
    for before, after in (
        (WATCHED, STALLED),
        (WATCHED, LOST),
        (LOST, BACKING_OFF),
        (PROBATION, RECOVERED),
        (LOST, replace(LOST, phase=Phase.FAILED)),
    ):
        scraped.move(before, after)
    scraped.metrics.command("START_USER_RECOVERY", 0, 0.003)
    scraped.metrics.polled(0.01, failed=True)
    scraped.metrics.dropped("status")
    scraped.metrics.cause("signal")
    scraped.records = [*records, replace(STALLED, dev_id=7), replace(LOST, dev_id=8)]
    return scraped


@pytest.fixture(name="text", scope="module")
def _text() -> str:
    return populated().metrics.text().decode()


def samples(text: str) -> Iterator[tuple[str, str, str, dict[str, str], float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            yield family.name, family.type, sample.name, labels, sample.value


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_what_is_declared_is_exposed_with_its_type_labels_and_values(
    text: str, measure: object
) -> None:
    declared = next(each for each in MEASURES.values() if each is measure)
    kind = "gauge" if declared.kind is Kind.INFO else declared.kind.value
    assert f"# TYPE {declared.exposed} {kind}\n" in text
    assert f"# HELP {declared.exposed} {declared.meaning}\n" in text
    tails = ("_bucket", "_sum", "_count") if declared.kind is Kind.HISTOGRAM else ("",)
    names = {declared.exposed + tail for tail in tails}
    found = [(labels, name) for _, _, name, labels, _ in samples(text) if name in names]
    assert found
    closed = {label.name: label.values for label in declared.labels}
    for labels, name in found:
        if name.endswith("_bucket"):
            assert float(labels.pop("le")) in (*declared.buckets, math.inf)
        assert set(labels) == set(closed)
        for label, value in labels.items():
            assert not closed[label] or value in closed[label], (label, value)


def test_nothing_else_is_exposed(text: str) -> None:
    declared = {each.exposed.removesuffix("_total") for each in MEASURES.values()}
    found = {family for family, *_ in samples(text)}
    assert {name for name in found if not name.startswith("process_")} == declared
    assert {name for name in found if name.startswith("process_")}


def test_no_label_has_a_pid_a_path_or_words(text: str) -> None:
    for _, _, name, labels, _ in samples(text):
        if name != "ublkwatch_kernel_info":
            assert not any(" " in value or "/" in value for value in labels.values()), name


def test_a_name_says_its_unit_and_its_type_as_prometheus_wants_it() -> None:
    for measure in MEASURES.values():
        assert not measure.name.endswith(("_total", "_info", "_ms", "_minutes"))
        assert measure.kind is not Kind.HISTOGRAM or measure.name.endswith("_seconds")
        assert bool(measure.buckets) == (measure.kind is Kind.HISTOGRAM)
        assert list(measure.buckets) == sorted(measure.buckets)
        assert measure.kind is not Kind.HISTOGRAM or not measure.of_devices
        assert measure.meaning.endswith(".")


def test_promtool_has_nothing_to_say(text: str) -> None:
    command = [str(program("promtool")), "check", "metrics"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
