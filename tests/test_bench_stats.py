"""The benchmark's arithmetic."""

from __future__ import annotations

import pytest

from bench import stats


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1), (1, 1), (50, 50), (99, 99), (99.5, 100), (100, 100)]
)
def test_percentile_is_a_sample(percent: float, expected: float) -> None:
    assert stats.percentile(list(range(100, 0, -1)), percent) == expected


def test_p99_of_few_samples_is_the_largest() -> None:
    assert stats.percentile([3.0, 9.0, 1.0], 99) == 9.0


def test_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        stats.percentile([], 50)


def test_figures() -> None:
    assert stats.figures([4.0, 1.0, 3.0, 2.0]) == {
        "samples": 4, "median": 2.5, "p99": 4.0, "min": 1.0, "max": 4.0,
    }  # fmt: skip


def test_the_two_ratios_differ_where_the_machine_was_disturbed() -> None:
    ours, theirs = [1.1, 2.2, 9.9], [1.0, 2.0, 3.0]
    assert stats.ratio_of_medians(ours, theirs) == pytest.approx(1.1)
    assert stats.median_of_ratios(ours, theirs) == pytest.approx(1.1)
    assert stats.ratio_of_medians([1.1, 9.9, 9.9], theirs) == pytest.approx(4.95)
    assert stats.median_of_ratios([1.1, 2.0, 9.9], theirs) == pytest.approx(1.1)


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="shorter"):
        stats.median_of_ratios([1.0, 2.0], [1.0])
