"""The nulls against simulation, and against the hypergeometric distribution that they claim to be."""

import math

import numpy as np
import pytest
import torch
from bits import as_array, class_counts, codes_of, line_dispersion, line_moments
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian, orthogonal, seeds
from torch import Tensor

from offprincipal.geometry.gaussian import isotropic_update, moved_isotropically
from offprincipal.geometry.masks import low_magnitude_ranks
from offprincipal.geometry.nulls import (
    bernoulli_overlap,
    dispersion,
    gaussian_scale,
    gini,
    intersection_null,
    jaccard,
    overlap_null,
    unchanged_isotropic,
    unchanged_isotropic_off_grid,
)
from offprincipal.geometry.precision import changed, exponent_class
from offprincipal.geometry.principal import principal_ranks
from offprincipal.geometry.scan import count_codes
from offprincipal.geometry.spectrum import Svd, decompose, spectral_shift
from offprincipal.geometry.subspace import principal_angles


def weight_blind(base: Tensor, size: float, seed: int) -> Tensor:
    """`base` after an update that does not look at it, stored in bfloat16."""
    return (base.double() + size * gaussian(*base.shape, seed=seed)).bfloat16()


def structured_base() -> Tensor:
    """Heavy-tailed weights with strong rows and a few large singular values, as trained matrices have."""
    strong = torch.exp(0.7 * gaussian(96, 1, seed=1))
    low_rank = gaussian(96, 4, seed=2) @ gaussian(4, 128, seed=3)
    return (0.02 * strong * gaussian(96, 128, seed=4) + 0.03 * low_rank).bfloat16()


def z_scores(mask_of: str, draws: int) -> Tensor:
    base = structured_base()
    svd = decompose(base).top(12)
    ranks = {
        "principal": principal_ranks(svd.U, svd.S, svd.Vh),
        "low_magnitude": low_magnitude_ranks(base),
    }[mask_of]
    mask = ranks < base.numel() // 2
    classes = exponent_class(base)
    entries, in_mask = class_counts(classes), class_counts(classes, mask)
    found = []
    for seed in range(draws):
        moved = changed(base, weight_blind(base, 1e-4, 1000 + seed))
        z = overlap_null(entries, class_counts(classes, moved), in_mask).z(int((mask & moved).sum()))
        assert z is not None
        found.append(z)
    return torch.tensor(found)


@pytest.mark.parametrize("mask", ["principal", "low_magnitude"])
def test_the_overlap_of_a_weight_blind_update_scatters_about_its_null_with_unit_variance(mask: str) -> None:
    z = z_scores(mask, 300)
    assert abs(z.mean().item()) < 5 / 300**0.5
    assert abs(z.var().item() - 1) < 5 * (2 / 299) ** 0.5


def test_the_random_null_would_not_do() -> None:
    """Why the precision null is needed: the same updates lie far from a mask's density."""
    base = structured_base()
    mask = low_magnitude_ranks(base) < base.numel() // 2
    moved = changed(base, weight_blind(base, 1e-4, 0))
    assert (mask & moved).sum().item() / moved.sum().item() > 0.7


def test_the_agreement_of_two_weight_blind_updates_scatters_about_its_null_with_unit_variance() -> None:
    base = structured_base()
    classes = exponent_class(base)
    found = []
    for seed in range(300):
        a = changed(base, weight_blind(base, 1e-4, 2 * seed))
        b = changed(base, weight_blind(base, 3e-4, 2 * seed + 1))
        null = intersection_null(class_counts(classes), class_counts(classes, a), class_counts(classes, b))
        found.append(null.z(int((a & b).sum())))
    z = torch.tensor(found)
    assert abs(z.mean().item()) < 5 / 300**0.5
    assert abs(z.var().item() - 1) < 5 * (2 / 299) ** 0.5


def test_an_update_that_looks_at_the_weights_is_found() -> None:
    base = structured_base()
    svd = decompose(base).top(12)
    mask = principal_ranks(svd.U, svd.S, svd.Vh) < base.numel() // 2
    tuned = torch.where(mask, weight_blind(base, 2e-4, 0).double(), weight_blind(base, 1e-4, 0).double())
    moved, classes = changed(base, tuned), exponent_class(base)
    null = overlap_null(class_counts(classes), class_counts(classes, moved), class_counts(classes, mask))
    z = null.z(int((mask & moved).sum()))
    assert z is not None and z > 10


@given(st.integers(1, 60), st.data())
def test_one_class_is_the_hypergeometric_distribution(N: int, data: st.DataObject) -> None:
    C, M = data.draw(st.integers(0, N)), data.draw(st.integers(0, N))
    null = overlap_null(*(np.array([x]) for x in (N, C, M)))
    ways = {x: math.comb(M, x) * math.comb(N - M, C - x) for x in range(max(0, C + M - N), min(C, M) + 1)}
    total = sum(ways.values())
    mean = sum(x * w for x, w in ways.items()) / total
    variance = sum((x - mean) ** 2 * w for x, w in ways.items()) / total
    assert null.expected == pytest.approx(mean, abs=1e-9)
    assert null.variance == pytest.approx(variance, abs=1e-9)
    other = intersection_null(*(np.array([x]) for x in (N, C, M)))
    assert (other.expected, other.variance) == pytest.approx((null.expected, null.variance), abs=1e-9)


def test_classes_add_and_empty_ones_do_not_count() -> None:
    parts = [overlap_null(*(np.array([x]) for x in row)) for row in ((10, 4, 5), (20, 6, 3))]
    both = overlap_null(np.array([10, 0, 20]), np.array([4, 0, 6]), np.array([5, 0, 3]))
    assert both.expected == pytest.approx(sum(part.expected for part in parts))
    assert both.variance == pytest.approx(sum(part.variance for part in parts))


def test_where_all_or_none_of_a_class_changed_nothing_is_left_to_chance() -> None:
    N, M = np.array([10]), np.array([4])
    for C in (np.array([0]), N):
        assert overlap_null(N, C, M).z(C.item() * 0.4) is None


def test_jaccard_of_nothing_is_undefined() -> None:
    assert jaccard(0, 0, 0) is None
    assert jaccard(0, 3, 3) == 0.0


def test_rows_of_a_weight_blind_update_scatter_as_the_null_says() -> None:
    base = structured_base()
    for dim in (0, 1):
        found = [line_dispersion(base, changed(base, weight_blind(base, 1e-4, s)), dim) for s in range(60)]
        values = torch.tensor([x for x in found if x is not None])
        assert abs(values.mean().item() - 1) < 5 * values.std().item() / 60**0.5


def test_stripes_are_found_and_strong_rows_alone_are_none() -> None:
    """A strong row changes less because of its exponents: its rate is low, its dispersion is not high."""
    base = structured_base()
    blind = changed(base, weight_blind(base, 1e-4, 0))
    assert (gini(blind.double().mean(dim=1).numpy()) or 0) > 0.1
    assert (line_dispersion(base, blind, 0) or 9) < 2
    factor = torch.where(torch.arange(96) % 8 == 0, 3.0, 1.0).double()[:, None]
    striped = changed(base, base.double() + factor * 1e-4 * gaussian(96, 128, seed=0))
    assert (line_dispersion(base, striped, 0) or 0) > 5


def test_line_nulls_keep_the_totals() -> None:
    base = structured_base()
    moved = changed(base, weight_blind(base, 1e-4, 0))
    for dim in (0, 1):
        counts, expected, _ = line_moments(base, moved, dim)
        assert counts.sum().item() == pytest.approx(expected.sum().item()) == int(moved.sum())


def test_dispersion_is_undefined_where_nothing_or_everything_changed() -> None:
    base = torch.ones(3, 4)
    assert line_dispersion(base, torch.zeros(3, 4, dtype=torch.bool), 0) is None
    assert line_dispersion(base, torch.ones(3, 4, dtype=torch.bool), 1) is None
    assert dispersion(np.zeros(0), np.zeros(0), np.zeros(0)) is None


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20).filter(lambda rates: sum(rates) > 0.01))
def test_gini_is_half_the_mean_absolute_difference_over_the_mean(rates: list[float]) -> None:
    n, mean = len(rates), sum(rates) / len(rates)
    expected = sum(abs(a - b) for a in rates for b in rates) / (2 * n * n * mean)
    assert gini(np.array(rates)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("relative", [1e-4, 1e-3, 1e-2, 1.0])
def test_what_a_gaussian_update_leaves_unchanged_is_in_closed_form(relative: float) -> None:
    base = torch.cat([structured_base().flatten(), torch.tensor([1.0, -2.0, 0.0, 0.5] * 500).bfloat16()])
    norm = relative * base.double().norm().item()
    expected = unchanged_isotropic(count_codes(codes_of(base)), norm / base.numel() ** 0.5)
    assert expected is not None
    shares = []
    for seed in range(40):
        noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        moved = changed(base, base.double() + noise * norm / base.numel() ** 0.5)
        shares.append(1 - moved.double().mean().item())
    found = torch.tensor(shares, dtype=torch.float64)
    assert abs(found.mean().item() - expected) < 5 * found.std().item() / 40**0.5 + 1e-9


@pytest.mark.parametrize("relative", [1e-4, 1e-3, 1e-2])
def test_off_the_bfloat16_grid_the_closed_form_still_holds(relative: float) -> None:
    base = 0.02 * gaussian(100, 100, seed=9)
    sigma = relative * base.std().item()
    shares = torch.tensor(
        [1 - changed(base, base + sigma * gaussian(100, 100, seed=s)).double().mean() for s in range(40)]
    )
    expected = unchanged_isotropic_off_grid(codes_of(base), as_array(base), sigma) / base.numel()
    assert abs(shares.mean().item() - expected) < 5 * shares.std().item() / 40**0.5


@pytest.mark.parametrize("sigma", [1e-6, 3e-5, 1e-4, 1e-3, 1.0])
def test_the_length_before_storing_is_found_from_the_stored_one(sigma: float) -> None:
    """A stored update is longer than it was: 8 times, for the smallest one here."""
    base = structured_base()
    norms = [(weight_blind(base, sigma, s).double() - base.double()).norm().item() for s in range(20)]
    norm = (sum(x * x for x in norms) / len(norms)) ** 0.5
    assert gaussian_scale(class_counts(exponent_class(base)), norm) == pytest.approx(sigma, rel=0.02)


def test_the_length_of_nothing_is_nothing() -> None:
    assert gaussian_scale(class_counts(exponent_class(torch.ones(3))), 0.0) == 0.0
    assert gaussian_scale(class_counts(exponent_class(torch.empty(0))), 1.0) == 0.0


def test_a_zero_update_leaves_everything_unchanged() -> None:
    assert unchanged_isotropic(count_codes(codes_of(torch.ones(3))), 0.0) == 1.0
    assert unchanged_isotropic(count_codes(codes_of(torch.empty(0))), 1.0) is None


def test_on_the_bfloat16_grid_both_closed_forms_are_one() -> None:
    base = torch.cat([structured_base().flatten(), torch.tensor([1.0, -2.0, 0.0, 2.0**-126, 2.0**-133]).bfloat16()])
    codes = codes_of(base)
    for sigma in (1e-39, 1e-6, 1e-4, 1.0):
        one_by_one = unchanged_isotropic_off_grid(codes, as_array(base.float()), sigma)
        assert unchanged_isotropic(count_codes(codes), sigma) == pytest.approx(one_by_one / base.numel(), rel=1e-12)


@given(seeds, st.sampled_from([0.05, 0.3, 0.5, 1.0]))
def test_a_random_mask_by_counts_holds_no_more_than_there_is(seed: int, alpha: float) -> None:
    entries = np.array([0, 1, 7, 100])
    changed_entries = np.array([0, 1, 0, 30])
    in_mask, overlap = bernoulli_overlap(entries, changed_entries, alpha, np.random.default_rng(seed))
    assert bool((in_mask <= entries).all()) and 0 <= overlap <= min(31, int(in_mask.sum()))
    assert alpha < 1 or (in_mask.tolist(), overlap) == (entries.tolist(), 31)


def test_a_random_mask_by_counts_is_that_of_independent_entries() -> None:
    """Sizes are binomial, and the overlap scatters about the null of the mask's own counts with unit variance."""
    classes = exponent_class(structured_base())
    moved = changed(structured_base(), weight_blind(structured_base(), 1e-4, 0))
    entries, changed_entries = class_counts(classes), class_counts(classes, moved)
    rng = np.random.default_rng(0)
    sizes, scores = [], []
    for _ in range(400):
        in_mask, overlap = bernoulli_overlap(entries, changed_entries, 0.3, rng)
        sizes.append(in_mask.sum())
        scores.append(overlap_null(entries, changed_entries, in_mask).z(overlap))
    for found, mean, variance in (
        (np.array(sizes), 0.3 * entries.sum(), 0.21 * entries.sum()),
        (np.array(scores, np.float64), 0, 1),
    ):
        assert abs(found.mean() - mean) < 5 * (variance / 400) ** 0.5
        assert abs(found.var() / variance - 1) < 5 * (2 / 399) ** 0.5


@given(seeds, st.floats(1e-20, 1e20))
def test_an_isotropic_update_has_its_norm(seed: int, norm: float) -> None:
    update = isotropic_update(torch.Size([5, 7]), norm, torch.Generator().manual_seed(seed))
    assert update.norm().item() == pytest.approx(norm)


def test_an_isotropic_update_prefers_no_direction() -> None:
    frame = orthogonal(6, 0)
    generator = torch.Generator().manual_seed(0)
    shares = [(frame.T @ isotropic_update(torch.Size([6, 6]), 1.0, generator)).square().sum(dim=1) for _ in range(3000)]
    mean = torch.stack(shares).mean(dim=0)
    assert bool(((mean - 1 / 6).abs() < 0.01).all())


@pytest.mark.parametrize("shape", [(64, 40), (40, 40), (50, 40), (40, 120)])
def test_a_gaussian_update_need_not_be_drawn_to_know_what_it_does(shape: tuple[int, int]) -> None:
    """Shift and angles of moved spectra have the law that they have under updates that are drawn and decomposed."""
    (n, m), r, k, sigma, draws = shape, min(shape), 5, 1e-6, 400
    S = torch.arange(1.0, r + 1, dtype=torch.float64) ** -0.5
    W = orthogonal(n, 0)[:, :r] * S @ orthogonal(m, 1)[:r]
    base, rng = decompose(W), np.random.default_rng(0)

    def shown(moved: Svd, left: Tensor, right: Tensor) -> list[float]:
        sides = (principal_angles(left, moved.U[:, :k]), principal_angles(right, moved.Vh[:k].T))
        shift = spectral_shift(S[:k], moved.S[:k])
        assert shift is not None
        return [shift, *(x.item() for side in sides for x in (side.max(), side.mean()))]

    drawn, in_law = [], []
    for seed in range(draws):
        drawn.append(shown(decompose(W + sigma * gaussian(n, m, seed=seed)), base.U[:, :k], base.Vh[:k].T))
        moved = moved_isotropically(S, torch.Size(shape), k, sigma, rng)
        in_law.append(shown(moved, *(torch.eye(len(side), k).double() for side in (moved.U, moved.Vh.T))))
    one, two = np.array(drawn), np.array(in_law)
    z = (one.mean(axis=0) - two.mean(axis=0)) / np.sqrt((one.var(axis=0) + two.var(axis=0)) / draws)
    assert np.abs(z).max() < 4
    assert np.abs(np.log(one.std(axis=0) / two.std(axis=0))).max() < 5 / (2 * draws) ** 0.5
