"""Sweeps of learning rates: the highest stable rate, and the rate that gives a size."""

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from outcome_rows import BASE, matched_row, sweep

from offprincipal.outcomes.sweeps import (
    STABLE_LOSS,
    TriedRate,
    at_equal_size,
    best_accuracy,
    highest_stable,
    open_end,
    rate_for,
    stable_run,
    sweeps_of,
)

RATES = st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=6, unique=True).map(sorted)


def far_apart(rates: list[float]) -> bool:
    return all(high > 1.01 * low for low, high in pairwise(rates))


@given(RATES, st.floats(0.1, 4.0), st.floats(1e-3, 1e3), st.floats(1e-7, 10.0))
def test_the_rate_of_a_power_law_is_recovered_within_the_sweep_and_beyond(
    rates: list[float], power: float, factor: float, rate: float
) -> None:
    assume(far_apart(rates))
    sizes = [factor * rate**power for rate in rates]
    assert rate_for(factor * rate**power, rates, sizes) == pytest.approx(rate, rel=1e-6)


@given(RATES, st.data())
def test_a_rate_that_was_tried_is_found_again(rates: list[float], data: st.DataObject) -> None:
    assume(far_apart(rates))
    sizes = sorted(data.draw(st.lists(st.floats(1e-6, 1e3), min_size=len(rates), max_size=len(rates), unique=True)))
    assume(far_apart(sizes))
    place = data.draw(st.integers(0, len(rates) - 1))
    assert rate_for(sizes[place], rates, sizes) == pytest.approx(rates[place], rel=1e-9)


def test_between_two_rates_the_logarithms_are_joined_by_a_line() -> None:
    assert rate_for(2.0, [1e-3, 1e-2, 1e-1], [1.0, 4.0, 400.0]) == pytest.approx(1e-3 * math.sqrt(10))


def test_of_two_rates_that_reach_a_size_the_lower_is_taken() -> None:
    rates, sizes = [1.0, 10.0, 100.0, 1000.0], [1.0, 100.0, 1.0, 100.0]
    assert rate_for(10.0, rates, sizes) == pytest.approx(math.sqrt(10))


@pytest.mark.parametrize(
    ("wanted", "sizes"),
    [
        (20.0, [1.0, 10.0, 5.0]),  # declines where it would have to go on rising
        (0.5, [2.0, 1.0, 4.0]),
        (1.0, [0.0, -1.0, 3.0]),  # one known size
        (0.0, [1.0, 2.0, 3.0]),
        (2.0, [1.0, 1.0, 1.0]),
    ],
)
def test_where_no_rate_can_be_told_there_is_none(wanted: float, sizes: list[float]) -> None:
    assert rate_for(wanted, [1e-3, 1e-2, 1e-1], sizes) is None


def test_sizes_that_are_not_positive_are_passed_over() -> None:
    assert rate_for(100.0, [1e-4, 1e-3, 1e-2], [0.0, 1.0, 100.0]) == pytest.approx(1e-2)


def test_a_run_collapses_where_it_loses_more_than_the_limit() -> None:
    assert TriedRate("a", 1e-3, BASE, BASE - STABLE_LOSS).stable
    assert not TriedRate("a", 1e-3, BASE, BASE - STABLE_LOSS - 1e-6).stable


@given(st.dictionaries(st.integers(-60, 0), st.booleans(), min_size=1, max_size=8))
def test_at_and_below_the_highest_stable_rate_no_run_collapsed(collapsed: dict[int, bool]) -> None:
    tried = [TriedRate(str(i), 1.1**i, 0.5, 0.1 if gone else 0.6) for i, gone in collapsed.items()]
    found = highest_stable(tried)
    below = [one for one in tried if found is not None and one.learning_rate <= found.learning_rate]
    assert all(one.stable for one in below)
    above = sorted((one for one in tried if one not in below), key=lambda one: one.learning_rate)
    assert not above or not above[0].stable


def test_recovery_above_a_collapse_does_not_count() -> None:
    rows = sweep("lora", 4, 1, {1e-3: 0.6, 3e-3: 0.1, 1e-2: 0.7})
    found = stable_run(rows)
    assert found is not None and found["learning_rate"] == 1e-3
    assert best_accuracy(rows) == 0.7
    assert open_end(rows) is None


def test_a_sweep_without_a_collapse_is_open_above_and_one_of_collapses_below() -> None:
    assert open_end(sweep("lora", 4, 1, {1e-3: 0.6, 1e-2: 0.5})) == "above"
    assert open_end(sweep("lora", 4, 1, {1e-3: 0.1, 1e-2: 0.6})) == "below"
    assert stable_run(sweep("lora", 4, 1, {1e-3: 0.1})) is None


def test_sweeps_are_by_rank_and_seed_in_order_of_rate_and_without_matched_runs() -> None:
    rows = sweep("pissa", 16, 2, {1e-2: 0.5, 1e-3: 0.6}) + sweep("pissa", 4, 1, {1e-3: 0.6})
    rows += [matched_row("update_norm", rows[0], 0.6), *sweep("lora", 4, 1, {1e-3: 0.6})]
    found = sweeps_of(rows, "pissa")
    assert list(found) == [(4, 1), (16, 2)]
    assert [row["learning_rate"] for row in found[16, 2]] == [1e-3, 1e-2]


@pytest.mark.parametrize(("ratio", "equal"), [(1.0, True), (1.2, True), (0.8, True), (1.26, False), (0.79, False)])
def test_sizes_are_equal_within_a_quarter_either_way(ratio: float, equal: bool) -> None:
    like = sweep("lora", 4, 1, {1e-3: 0.6})[0]
    assert at_equal_size(matched_row("update_norm", like, 0.6, ratio)) == equal
