"""The margin null: a logistic model of classes, rows and columns, and masks held against it."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from offprincipal.assets import embedded_base
from offprincipal.geometry import bits, nulls, scan, synthetic
from offprincipal.geometry.nulls import MarginModel, ScoreTest

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Fitted:
    """Weights before and after, with the model of what changed."""

    slots: NDArray[np.uint16]
    changed: Bools
    model: MarginModel

    def test(self, *masks: Bools) -> list[ScoreTest]:
        cells = sum((mask.astype(np.uint8) << place for place, mask in enumerate(masks)), np.uint8(0))
        members = (np.arange(1 << len(masks))[:, None] >> np.arange(len(masks))) & 1
        return nulls.score_tests(self.model, self.slots, self.changed, np.asarray(cells, np.uint8), members == 1)


def fitted(base: NDArray[np.float32], tuned: NDArray[np.float32], deficit: float | None = None) -> Fitted:
    codes, after = bits.bf16_codes(base), bits.bf16_codes(tuned)
    counted = scan.scan(codes, after)
    classes, rows, columns = scan.classes_of_lines(codes)
    slots, changed = nulls.class_slots(codes, classes), scan.mark_changed(codes, after)
    hits = (counted.rows, counted.columns, scan.count_by_class(counted.changed)[classes])
    more = {} if deficit is None else {"deficit": deficit}
    return Fitted(slots, changed, nulls.fit_margins(slots, changed, hits, (rows, columns), **more))


def reference(slots: NDArray[np.uint16], changed: Bools, masks: list[Bools]) -> list[tuple[float, float]]:
    """Score and information of each mask by Newton's method on a dense design, written from the definition alone."""
    (n, m), K = slots.shape, int(slots.max()) + 1
    lines = [np.repeat(np.arange(n), m), n + np.tile(np.arange(m), n), n + m + slots.reshape(-1)]
    y, open_ = changed.reshape(-1).astype(float), np.ones(n * m, bool)
    while True:
        size, hit = (sum(np.bincount(line[open_], w, n + m + K) for line in lines) for w in (None, y[open_]))
        certain = (hit == 0) | (hit == size)
        left = open_ & ~np.any([certain[line] for line in lines], axis=0)
        if (left == open_).all():
            break
        open_ = left
    design = np.zeros((int(open_.sum()), n + m + K))
    for line in lines:
        design[np.arange(len(design)), line[open_]] = 1
    theta, target = np.zeros(n + m + K), y[open_]
    for _ in range(60):
        p = 1 / (1 + np.exp(-design @ theta))
        w = p * (1 - p)
        step = np.linalg.pinv(design.T @ (w[:, None] * design), hermitian=True) @ (design.T @ (target - p))
        theta = theta + np.clip(step, -2, 2)
    inverse = np.linalg.pinv(design.T @ (w[:, None] * design), hermitian=True)

    def beyond(x: Floats) -> Floats:
        return x - design @ (inverse @ (design.T @ (w * x)))

    link, found = beyond((design @ theta) ** 2), []
    for mask in masks:
        rest = beyond(mask.reshape(-1)[open_].astype(float))
        if (w * link**2).sum() > 1e-9:
            rest = rest - (w * rest * link).sum() / (w * link**2).sum() * link
        found.append((float(((target - p) * rest).sum()), float((w * rest**2).sum())))
    return found


def largest(scores: NDArray[np.float32], share: float) -> Bools:
    return scores >= np.quantile(scores, 1 - share)


def principal(base: NDArray[np.float32], share: float = 0.3) -> Bools:
    U, S, Vh = np.linalg.svd(base.astype(float), full_matrices=False)
    k = max(1, round(min(base.shape) / 8))
    return largest(np.abs((U[:, :k] * S[:k]) @ Vh[:k]), share)


def real_weights() -> dict[str, NDArray[np.float32]]:
    """A corner of each of two real matrices: as they are, a dense reference would take minutes."""
    stored = load_file(embedded_base() / "model.safetensors")
    names = ("model.layers.1.self_attn.q_proj.weight", "model.layers.3.mlp.down_proj.weight")
    return {name: stored[name][:48, :64].astype(np.float32) for name in names}


@pytest.mark.parametrize("kind", ["iid", "rows", "both", "low_rank", "row_sparse", "row_norm"])
@pytest.mark.parametrize("base", real_weights().values(), ids=real_weights().keys())
def test_a_rough_fit_gives_the_z_of_the_converged_one_on_real_weights(kind: str, base: NDArray[np.float32]) -> None:
    tuned = synthetic.stored(base, synthetic.example_update(kind, base, 0.004, np.random.default_rng(1)))
    found, masks = fitted(base, tuned), [principal(base), principal(base, 0.5), largest(-np.abs(base), 0.4)]
    for test, (score, information) in zip(
        found.test(*masks), reference(found.slots, found.changed, masks), strict=True
    ):
        if information >= 2:
            assert test.z == pytest.approx(score / math.sqrt(information), abs=0.05)
            assert test.information == pytest.approx(information, rel=0.02)
            assert test.expected == pytest.approx(test.count - score, abs=0.05 * math.sqrt(information))


def test_the_fitted_changes_of_every_class_row_and_column_are_the_measured_ones() -> None:
    rng = np.random.default_rng(0)
    base = synthetic.example_weights("scaled", (60, 80), rng)
    found = fitted(base, synthetic.stored(base, synthetic.example_update("both", base, 0.004, rng)), deficit=1e-8)
    p = nulls.expected_rates(found.model, found.slots, found.changed).astype(float)
    np.testing.assert_allclose(p.sum(axis=0), found.changed.sum(axis=0), atol=0.01)
    np.testing.assert_allclose(p.sum(axis=1), found.changed.sum(axis=1), atol=0.01)
    by_class = np.bincount(found.slots.reshape(-1), found.changed.reshape(-1))
    np.testing.assert_allclose(np.bincount(found.slots.reshape(-1), p.reshape(-1)), by_class, atol=0.01)
    same = nulls.expected_in_common((found.model,) * 2, found.slots, (found.changed,) * 2)
    assert same == pytest.approx((p**2).sum(), rel=1e-5)


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.sampled_from([0.0, 0.7]), st.integers(0, 10**6))
def test_whatever_changed_nothing_is_expected_that_cannot_be(
    n: int, m: int, share: float, zeros: float, seed: int
) -> None:
    """One row, one column, one class, none or all changed: numbers or None, never NaN, never more than there are."""
    rng = np.random.default_rng(seed)
    base = (rng.standard_normal((n, m)) * (rng.random((n, m)) >= zeros)).astype(np.float32)
    base = synthetic.stored(base, np.zeros((n, m)))
    found = fitted(base, np.where(rng.random((n, m)) < share, base + 3, base).astype(np.float32))
    mask = rng.random((n, m)) < 0.5
    (test,) = found.test(mask)
    assert test.count == (found.changed & mask).sum()
    assert -1e-3 <= test.expected <= mask.sum() + 1e-3
    assert test.z is None or math.isfinite(test.z)
    p = nulls.expected_rates(found.model, found.slots, found.changed)
    assert ((p >= 0) & (p <= 1)).all()
    assert p.sum() == pytest.approx(found.changed.sum(), abs=0.3)


def test_where_the_margins_decide_everything_nothing_is_said() -> None:
    """Steps of one size change all weights of small spacings and none of large ones."""
    rng = np.random.default_rng(0)
    base = synthetic.example_weights("scaled", (96, 128), rng)
    found = fitted(base, synthetic.stored(base, synthetic.example_update("sign", base, 0.003, rng)))
    (test,) = found.test(principal(base))
    assert 0 < found.changed.mean() < 1
    assert test.z is test.log_odds is test.log_odds_se is None
    assert test.expected == pytest.approx(test.count, abs=1)


@pytest.mark.parametrize("log_odds", [0.1, 0.3])
@pytest.mark.parametrize("kind", ["iid", "rows", "columns", "both"])
def test_a_planted_preference_is_found_with_its_size_under_scales_of_rows_and_columns(
    kind: str, log_odds: float
) -> None:
    """Entries of the mask change with odds raised by e^log_odds, whatever their class, row or column."""
    rng = np.random.default_rng(3)
    base = synthetic.example_weights("scaled", (320, 400) if log_odds > 0.2 else (640, 800), rng)
    blind = fitted(base, synthetic.stored(base, synthetic.example_update(kind, base, 0.003, rng)))
    mask = principal(base)
    p = nulls.expected_rates(blind.model, blind.slots, blind.changed).astype(float)
    odds = np.exp(log_odds * mask) * p / np.maximum(1 - p, 1e-12)
    drawn = rng.random(base.shape) < np.where((p > 0) & (p < 1), odds / (1 + odds), p)
    planted = fitted(base, np.where(drawn, base * 2 + 1, base).astype(np.float32))
    (test,) = planted.test(mask)
    assert test.z is not None and test.log_odds is not None and test.log_odds_se is not None
    assert test.z > 5
    assert test.log_odds == pytest.approx(log_odds, abs=4 * test.log_odds_se + 0.02)  # the score test is of first order


def test_steps_as_long_as_their_rows_weights_are_no_preference() -> None:
    """Their log-odds do not add up: without the link, z lies half a standard deviation too high on the average."""
    z = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        base = synthetic.example_weights("scaled", (128, 192), rng)
        tuned, other = (synthetic.stored(base, synthetic.example_update("row_norm", base, 0.004, rng)) for _ in "ab")
        found = fitted(base, tuned)
        z += [test.z for test in found.test(principal(base), fitted(base, other).changed) if test.z is not None]
    assert len(z) == 120
    assert abs(np.mean(z)) < 0.3  # .09 is one standard error; without the link .5


def test_updates_that_know_nothing_are_found_to_know_nothing() -> None:
    """Over eight kinds and two of weights, |z| exceeds 1.96 one time in twenty or so; by spacings alone far more."""
    z, by_spacing = [], []
    for weights, kind, seed in itertools.product(synthetic.WEIGHTS, synthetic.KINDS, range(24)):
        rng = np.random.default_rng([seed, synthetic.KINDS.index(kind), len(weights)])
        base = synthetic.example_weights(weights, (64, 96), rng)
        tuned, other = (synthetic.stored(base, synthetic.example_update(kind, base, 0.003, rng)) for _ in range(2))
        mask, found = principal(base), fitted(base, tuned)
        z += [test.z for test in found.test(mask, fitted(base, other).changed) if test.z is not None]
        entries, changed, inside = (
            np.bincount(found.slots[chosen], minlength=int(found.slots.max()) + 1)
            for chosen in (np.ones_like(mask), found.changed, mask)
        )
        told = nulls.overlap_null(entries, changed, inside).z(float((found.changed & mask).sum()))
        by_spacing.append(0.0 if told is None else told)
    assert len(z) > 600
    assert 0.02 <= np.mean(np.abs(z) > 1.96) <= 0.08
    assert np.mean(np.abs(by_spacing) > 1.96) > 0.1
