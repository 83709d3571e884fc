"""Steps in units of the spacing: the histogram, what bfloat16 hides, and both nulls."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian, seeds

from offprincipal.geometry.precision import changed, hidden_fraction
from offprincipal.geometry.ulp import BINS, LEAST_OCTAVE, total, ulp_histogram


def weights(seed: int) -> torch.Tensor:
    return (torch.exp(gaussian(60, 1, seed=seed)) * gaussian(60, 80, seed=seed + 1) / 20).bfloat16()


def test_known_steps_fall_into_known_bins() -> None:
    ulp = 2.0**-7
    steps = torch.tensor([0.0, ulp * 2**-20, ulp * 0.25, ulp * 0.3, ulp * 0.5, ulp, ulp * 100])
    found = ulp_histogram(torch.full((7,), 1.5), (1.5 + steps.double()).double())
    [row] = found.rows()
    filled = {i: count for i, count in enumerate(row["octaves"]) if count}  # type: ignore[var-annotated, arg-type]
    quarter = 2 - 2 - LEAST_OCTAVE  # bins: none, below 2**-12, then an octave each
    assert filled == {0: 1, 1: 1, quarter: 2, quarter + 1: 1, quarter + 2: 1, BINS - 1: 1}
    assert row["exponent"] == 0 and row["changed"] == 2 and row["hidden"] == 4  # half a spacing up from 1.5 is a tie


@given(seeds, st.sampled_from([1e-6, 1e-4, 1e-2]))
def test_what_is_hidden_and_what_changed_is_all_that_moved(seed: int, size: float) -> None:
    W = weights(seed % 1000)
    masters = (W.double() + size * gaussian(60, 80, seed=seed)).float()
    found = ulp_histogram(W, masters)
    assert int(found.changed.sum()) == int(changed(W, masters).sum())
    assert int(found.hidden.sum()) / W.numel() == pytest.approx(hidden_fraction(W.float(), masters))
    assert int(found.changed.sum() + found.hidden.sum()) == int((masters != W.float()).sum())
    for null in (found.octaves_gaussian_null, found.octaves_permuted_null):
        assert torch.allclose(null.sum(1), found.octaves.sum(1).double())


def test_the_permuted_null_is_the_mean_over_permutations_of_the_steps() -> None:
    W = weights(3)
    steps = 1e-3 * gaussian(60, 80, seed=4) * W.double().abs().sqrt()  # an update that knows the weights
    steps[:20] = 0
    found = ulp_histogram(W, W.double() + steps)
    generator, hidden, octaves = torch.Generator().manual_seed(0), [], []
    for _ in range(200):
        dealt = steps.flatten()[torch.randperm(steps.numel(), generator=generator)].view_as(steps)
        drawn = ulp_histogram(W, W.double() + dealt)
        hidden.append(drawn.hidden.double())
        octaves.append(drawn.octaves.double())
    for drawn_all, null in ((hidden, found.hidden_permuted_null), (octaves, found.octaves_permuted_null)):
        drawn_all = torch.stack(drawn_all)
        error = drawn_all.std(0) / len(drawn_all) ** 0.5
        common = null > 2
        assert common.any() and bool(((drawn_all.mean(0) - null).abs() <= 4.5 * error)[common].all())
    assert abs(found.hidden.sum() - found.hidden_permuted_null.sum()) > 10  # and this update is none


def test_the_gaussian_null_is_what_gaussian_updates_do() -> None:
    W = weights(3)
    runs = [ulp_histogram(W, W.double() + 1e-3 * gaussian(60, 80, seed=seed)) for seed in range(100)]
    hidden = torch.tensor([float(run.hidden.sum()) for run in runs])
    expected = torch.tensor([float(run.hidden_gaussian_null.sum()) for run in runs])
    assert abs((hidden - expected).mean()) < 4 * hidden.std() / 10
    octaves = total(runs).octaves.sum(0), total(runs).octaves_gaussian_null.sum(0)
    assert torch.allclose(octaves[0].double(), octaves[1], rtol=0.1, atol=60)


def test_a_base_off_the_grid_is_hidden_by_its_own_cell() -> None:
    base = torch.tensor([1.0 + 0.45 * 2**-7])  # rounds to 1.0, and is nearly out of its cell
    assert ulp_histogram(base, base + 0.1 * 2**-7).changed.sum() == 1
    assert ulp_histogram(base, base - 0.1 * 2**-7).hidden.sum() == 1


def test_an_update_of_nothing_hides_nothing() -> None:
    W = weights(1)
    found = ulp_histogram(W, W.float())
    for count in (found.changed, found.hidden, found.hidden_gaussian_null, found.hidden_permuted_null):
        assert count.sum() == 0
    assert torch.equal(found.octaves_gaussian_null, found.octaves.double())
