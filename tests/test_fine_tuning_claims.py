"""The rules of C11 and C12 on rows whose truth is known by construction, and the interval that they rest on."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outcome_rows import Row, curve_rows, masked, matched_row, sweep, write_outcomes

from offprincipal.geometry.students_t import student, t_quantile
from offprincipal.outcomes.curves import area_between, areas_between_seeds, areas_to_full, curves_by_run, runs_by_mask
from offprincipal.paper.claims import Evidence, judge
from offprincipal.paper.claims.units import OverUnits

NONE = "no effect beyond the control"
FULL_CURVE = (1.0, 2.0, 3.0, 4.0)
SEEDS = (1, 2, 3, 4)
WOBBLE = {1: 0.9, 2: 1.05, 3: 1.0, 4: 1.1}  # what seeds differ by


def judged(tmp_path: Path, id: str, outcomes: Sequence[Row], curves: Sequence[Row] = ()) -> Mapping[str, Any]:
    folder = write_outcomes(tmp_path / "outcomes", outcomes, curves)
    sources = {"outcomes": [folder], "kl_curves": [folder]}
    (entry,) = judge(id, Evidence({}, [], ("full",), {}, "comparison", sources=sources))
    return entry


def verdicts(entry: Mapping[str, Any]) -> tuple[str, str]:
    return entry["as_published"]["verdict"], entry["controlled"]["verdict"]


# C11


def under_masks(
    areas: Mapping[tuple[str, float | None], float],
    accuracies: Mapping[str, float] | None = None,
    seeds: Sequence[int] = SEEDS,
) -> tuple[list[Row], list[Row]]:
    """Runs whose curves lie below that of the full run of their seed by an area, which seeds let wobble."""
    accuracies = {"principal": 0.5} | dict(accuracies or {})
    outcomes, curves = [], []
    for seed in seeds:
        for (mask, density), area in {("full", None): 0.0, **areas}.items():
            row = masked(mask, density, seed, accuracies.get(mask, 0.6) + 0.01 * WOBBLE[seed])
            outcomes.append(row)
            curves += curve_rows(row["run"], [seed * kl * (1 - area * WOBBLE[seed]) for kl in FULL_CURVE])
    return outcomes, curves


TRUE = {("safe", None): 0.1, ("safe", 0.5): 0.2, ("principal", 0.5): 0.6, ("random", 0.5): 0.4}


def test_masks_that_are_as_published_beyond_density_and_chance_are_supported(tmp_path: Path) -> None:
    entry = judged(tmp_path, "C11", *under_masks(TRUE))
    assert verdicts(entry) == ("supported", "supported")
    assert entry["as_published"]["effect"] == pytest.approx(6)  # at the densities that were published
    assert entry["controlled"]["effect"] == pytest.approx(3)


def test_a_safe_mask_that_is_no_nearer_than_a_random_one_is_not_beyond_the_control(tmp_path: Path) -> None:
    entry = judged(tmp_path, "C11", *under_masks(TRUE | {("random", 0.5): 0.2}))
    assert verdicts(entry) == ("supported", NONE)


def test_masks_of_one_density_that_are_equally_far_show_nothing_beyond_density(tmp_path: Path) -> None:
    equal = {("safe", None): 0.1, ("safe", 0.5): 0.5, ("principal", 0.5): 0.5, ("random", 0.5): 0.5}
    assert verdicts(judged(tmp_path, "C11", *under_masks(equal))) == ("supported", NONE)


def test_principal_weights_that_are_nearest_contradict_both(tmp_path: Path) -> None:
    turned = {("safe", None): 0.2, ("safe", 0.5): 0.6, ("principal", 0.5): 0.1, ("random", 0.5): 0.4}
    assert verdicts(judged(tmp_path, "C11", *under_masks(turned))) == ("contradicted", "contradicted")


def test_a_safe_mask_that_does_not_follow_contradicts_what_was_published(tmp_path: Path) -> None:
    far = under_masks(TRUE | {("safe", None): 0.3})
    assert verdicts(judged(tmp_path, "C11", *far))[0] == "contradicted"


def test_what_freezing_all_but_projections_costs_is_not_the_masks(tmp_path: Path) -> None:
    areas = TRUE | {("safe", None): 0.3, ("random", 1.0): 0.2}
    assert verdicts(judged(tmp_path, "C11", *under_masks(areas)))[0] == "supported"


def test_principal_weights_that_end_as_accurate_contradict_what_was_published(tmp_path: Path) -> None:
    assert verdicts(judged(tmp_path, "C11", *under_masks(TRUE, {"principal": 0.6})))[0] == "contradicted"


def test_two_seeds_decide_nothing_about_masks(tmp_path: Path) -> None:
    entry = judged(tmp_path, "C11", *under_masks(TRUE, seeds=(1, 2)))
    assert verdicts(entry) == ("inconclusive", "inconclusive")
    assert "not judged" in entry["controlled"]["sentence"]


def test_seeds_that_disagree_decide_nothing_about_masks(tmp_path: Path) -> None:
    outcomes, curves = under_masks(TRUE)
    swapped = {"safe_0.5_s1": "principal_0.5_s1", "principal_0.5_s1": "safe_0.5_s1"}
    mixed = [row | {"run": swapped.get(row["run"], row["run"])} for row in curves]
    assert verdicts(judged(tmp_path, "C11", outcomes, mixed))[1] == "inconclusive"


def test_without_a_full_run_or_principal_weights_masks_are_not_judged(tmp_path: Path) -> None:
    outcomes, curves = under_masks(TRUE)
    for gone in ("full", "principal"):
        kept = [row for row in outcomes if (row["mask"] or row["method"]) != gone]
        assert verdicts(judged(tmp_path / gone, "C11", kept, curves)) == ("inconclusive", "inconclusive")


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.floats(0, 5))
def test_the_area_to_a_curve_scaled_is_what_it_was_scaled_by_less_one(curve: list[float], factor: float) -> None:
    own = dict(enumerate(curve))
    assert area_between({step: factor * kl for step, kl in own.items()}, own) == pytest.approx(abs(factor - 1))


def test_areas_are_between_runs_of_one_seed_over_common_steps() -> None:
    outcomes = [masked(mask, density, seed) for mask, density in (("full", None), ("safe", 0.5)) for seed in (2, 1)]
    rows = (
        curve_rows("full_None_s1", [1, 2, 9]) + curve_rows("full_None_s2", [2, 2]) + curve_rows("safe_0.5_s1", [1, 1])
    )
    rows.append({"run": "safe_0.5_s2", "step": 1, "kl_cumulative": None, "relative_update_norm": 0.0})
    runs, curves = runs_by_mask(outcomes), curves_by_run(rows)
    assert areas_to_full(runs["safe", 0.5], runs["full", None], curves) == {1: pytest.approx(1 / 3)}
    assert areas_between_seeds(runs["full", None], curves) == [pytest.approx(1 / 4)]
    assert area_between({1: 1.0}, {2: 1.0}) is None


# C12

STABLE_TO_3 = {1e-3: 0.6, 3e-3: 0.62, 1e-2: 0.2}
STABLE_TO_1 = {3e-4: 0.58, 1e-3: 0.61, 3e-3: 0.2}
PAIRS = [(rank, seed) for rank in (4, 16) for seed in (1, 2, 3)]


def low_rank(
    lora: Mapping[float, float] = STABLE_TO_3,
    pissa: Mapping[float, float] = STABLE_TO_1,
    lost: Mapping[str, float] | None = None,
    pairs: Sequence[tuple[int, int]] = PAIRS,
    ratio: float = 1.0,
) -> list[Row]:
    """Sweeps of both for each rank and seed, and either at the other's highest stable step, LoRA ahead by `lost`."""
    lost = {"update_norm": 0.0, "kl_to_base": 0.0} | dict(lost or {})
    rows = []
    for rank, seed in pairs:
        own = sweep("lora", rank, seed, lora)
        other = sweep("pissa", rank, seed, pissa)
        rows += own + other
        for by, less in lost.items():
            for of_sweep, ahead, method in ((own, -1, "pissa"), (other, 1, "lora")):
                stable = [row for row in of_sweep if row["sampled_accuracy"] >= row["base_accuracy"]]
                like = stable[-1] if stable else of_sweep[0]
                accuracy = like["sampled_accuracy"] + ahead * (less + 0.001 * seed)
                rows.append(matched_row(by, like, accuracy, ratio, method))
    return rows


def test_pissa_that_collapses_first_for_its_longer_step_alone_fails_the_control(tmp_path: Path) -> None:
    entry = judged(tmp_path, "C12", low_rank())
    assert verdicts(entry) == ("supported", NONE)
    assert entry["as_published"]["effect"] == pytest.approx(3)
    assert "Rates were tried a factor of 3 to 3.33 apart" in entry["as_published"]["sentence"]


def test_pissa_that_loses_at_equal_step_too_passes_the_control(tmp_path: Path) -> None:
    lost = {"update_norm": 0.2, "kl_to_base": 0.1}
    assert verdicts(judged(tmp_path, "C12", low_rank(lost=lost))) == ("supported", "supported")


def test_a_loss_at_equal_norm_that_equal_kl_takes_away_is_none(tmp_path: Path) -> None:
    assert verdicts(judged(tmp_path, "C12", low_rank(lost={"update_norm": 0.2})))[1] == NONE


def test_pissa_that_wins_at_equal_step_contradicts_the_control(tmp_path: Path) -> None:
    lost = {"update_norm": -0.2, "kl_to_base": -0.2}
    assert verdicts(judged(tmp_path, "C12", low_rank(lost=lost)))[1] == "contradicted"


def test_lora_that_collapses_first_contradicts_what_was_published(tmp_path: Path) -> None:
    assert verdicts(judged(tmp_path, "C12", low_rank(STABLE_TO_1, STABLE_TO_3)))[0] == "contradicted"


def test_pissa_that_gains_contradicts_what_was_published(tmp_path: Path) -> None:
    better = {rate: accuracy + 0.1 for rate, accuracy in STABLE_TO_1.items() if accuracy > 0.5} | {3e-3: 0.2}
    assert verdicts(judged(tmp_path, "C12", low_rank(pissa=better)))[0] == "contradicted"


def test_two_seeds_decide_nothing_about_sweeps_however_many_ranks_they_have(tmp_path: Path) -> None:
    lost = {"update_norm": 0.2, "kl_to_base": 0.2}
    entry = judged(tmp_path, "C12", low_rank(lost=lost, pairs=[pair for pair in PAIRS if pair[1] < 3]))
    assert verdicts(entry) == ("inconclusive", "inconclusive")


def test_a_lead_at_the_rate_that_was_chosen_for_it_is_weighed_against_that_of_the_other(tmp_path: Path) -> None:
    """Noise in what decides the highest stable rate favours whose rate it is, by as much either way."""
    rows = low_rank()
    for row in rows:
        if row["matched_by"]:
            row["sampled_accuracy"] -= 0.1  # against LoRA at its best, and against PiSSA at its best
    assert verdicts(judged(tmp_path, "C12", rows))[1] == NONE
    one_sided = [row for row in rows if not (row["matched_by"] and row["method"] == "lora")]
    assert verdicts(judged(tmp_path, "C12", one_sided))[1] == "inconclusive"


NO_COLLAPSE_OF_PISSA = {3e-4: 0.58, 1e-3: 0.61}
NO_COLLAPSE_OF_LORA = {1e-3: 0.6, 3e-3: 0.62}


def test_sweeps_that_end_before_pissa_collapses_say_nothing_however_high_lora_was_tried(tmp_path: Path) -> None:
    entry = judged(tmp_path, "C12", low_rank(STABLE_TO_3, NO_COLLAPSE_OF_PISSA))
    assert entry["as_published"]["verdict"] == "inconclusive"
    assert "6 of 6 ratios are only known to be at most as large" in entry["as_published"]["sentence"]


def test_sweeps_that_end_before_lora_collapses_can_only_raise_its_lead(tmp_path: Path) -> None:
    entry = judged(tmp_path, "C12", low_rank(NO_COLLAPSE_OF_LORA, STABLE_TO_1))
    assert entry["as_published"]["verdict"] == "supported"
    assert "at least as large" in entry["as_published"]["sentence"]


@pytest.mark.parametrize(
    ("lora", "pissa", "verdict"),
    [
        (NO_COLLAPSE_OF_LORA, NO_COLLAPSE_OF_PISSA, "inconclusive"),  # nobody collapsed
        ({3e-3: 0.2, 1e-2: 0.62}, {1e-3: 0.6, 3e-3: 0.1}, "inconclusive"),  # LoRA did at its lowest, above PiSSA's
        ({1e-3: 0.6, 3e-3: 0.62, 1e-2: 0.1}, {1e-3: 0.2}, "supported"),  # PiSSA at its lowest
        ({3e-4: 0.6, 1e-3: 0.1}, {1e-3: 0.6, 3e-3: 0.6}, "contradicted"),  # PiSSA never, at higher rates
        ({3e-4: 0.6, 1e-3: 0.6}, {1e-3: 0.6, 3e-3: 0.61, 1e-2: 0.1}, "inconclusive"),  # LoRA never, at lower ones
        ({1e-3: 0.6, 3e-3: 0.6}, {1e-3: 0.6, 3e-3: 0.6}, "inconclusive"),  # equal as far as it was tried
        ({1e-3: 0.6, 3e-3: 0.1}, {1e-3: 0.6, 3e-3: 0.1}, "contradicted"),  # truly equal: not as claimed
    ],
)
def test_a_bound_decides_only_what_it_can(
    tmp_path: Path, lora: dict[float, float], pissa: dict[float, float], verdict: str
) -> None:
    assert judged(tmp_path, "C12", low_rank(lora, pissa))["as_published"]["verdict"] == verdict


def test_runs_that_missed_their_step_are_left_out_and_counted(tmp_path: Path) -> None:
    lost = {"update_norm": 0.2, "kl_to_base": 0.2}
    rows = low_rank(lost=lost)
    missed = next(row for row in rows if row["matched_by"] == "update_norm")
    missed["matched_ratio"], missed["sampled_accuracy"] = 2.0, 0.0
    entry = judged(tmp_path, "C12", rows)["controlled"]
    assert entry["verdict"] == "supported" and entry["effect"] == pytest.approx(0.2, abs=0.01)
    assert "1 left out, having missed it by more than 25%" in entry["sentence"]
    assert judged(tmp_path, "C12", low_rank(lost=lost, ratio=2.0))["controlled"]["verdict"] == "inconclusive"


def test_only_pissa_beside_lora_is_the_control(tmp_path: Path) -> None:
    rows = low_rank()
    for row in list(rows):
        if row["matched_by"]:
            rows.append(row | {"run": f"other_{row['run']}", "method": "milora", "sampled_accuracy": 0.0})
    assert verdicts(judged(tmp_path, "C12", rows))[1] == NONE


def test_without_both_methods_sweeps_are_not_judged(tmp_path: Path) -> None:
    only = [row for row in low_rank() if row["method"] == "lora"]
    assert verdicts(judged(tmp_path, "C12", only)) == ("inconclusive", "inconclusive")


# The interval over pairs


@pytest.mark.parametrize(
    ("degrees", "known"),  # of a table of Student's t, two-sided 95 %
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (10, 2.2281), (120, 1.9799), (10000, 1.9602)],
)
def test_the_quantile_of_student_is_that_of_tables(degrees: int, known: float) -> None:
    assert t_quantile(degrees) == pytest.approx(known, abs=6e-5)


@pytest.mark.parametrize("pairs", [2, 3, 4, 8])
def test_the_interval_covers_the_mean_as_often_as_it_says(pairs: int) -> None:
    draws = np.random.default_rng(pairs).normal(0.3, 2.0, (4000, pairs))
    covered = np.mean([low <= 0.3 <= high for _, low, high in map(student, draws.tolist())])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(-3, 3), st.floats(0.1, 4))
def test_the_interval_moves_and_stretches_with_what_it_is_of(values: list[float], shift: float, scale: float) -> None:
    moved = student([scale * value + shift for value in values])
    assert moved == pytest.approx([scale * end + shift for end in student(values)], abs=1e-6)


def test_ratios_are_pooled_as_logarithms() -> None:
    pooled = OverUnits({"a": 4.0, "b": 1.0}, geometric=True).interval()
    turned = OverUnits({"a": 1 / 4.0, "b": 1.0}, geometric=True).interval()
    assert pooled.value == pytest.approx(2)
    assert (pooled.low, pooled.high) == (pytest.approx(1 / turned.high), pytest.approx(1 / turned.low))


def test_one_pair_has_no_interval_and_none_no_value() -> None:
    alone, none = OverUnits({"a": 2.0}).interval(), OverUnits({}).interval()
    assert (alone.value, alone.low, alone.high) == (2.0, None, None)
    assert none.value is None and none.units == 0
    assert OverUnits({"a": 2.0, "b": 0.0}, geometric=True).interval().value is None
