"""The scaled rounding null: steps that know rows and columns, not weights; what is left is the entries' own."""

import numpy as np
import pytest
from numpy.typing import NDArray
from test_benchmarks import REPOSITORY, module_at
from test_rounding_null import low_magnitude, null_of

from offprincipal.geometry import bits, nulls, scan, synthetic
from offprincipal.geometry.bits import Floats

SHAPE = (400, 500)


def shares(base: NDArray[np.float32], change: Floats, mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """What changed of all entries, measured and expected; what of that lies in a mask, measured and expected."""
    masters = (base + change).astype(np.float32)
    codes = bits.bf16_codes(base)
    changed = scan.mark_changed(codes, bits.bf16_codes(masters))
    null = nulls.scaled_null(codes, masters)
    assert null is not None
    outside, inside = null.expected_changes(codes, mask.view(np.uint8), 2)
    total = outside + inside
    return changed.mean(), total / base.size, changed[mask].sum() / changed.sum(), inside / total


@pytest.mark.parametrize("weights", synthetic.WEIGHTS)
@pytest.mark.parametrize("kind", [kind for kind in synthetic.KINDS if kind != "low_rank"])
@pytest.mark.parametrize("seed", range(3))
def test_it_explains_steps_that_know_rows_and_columns_alone(weights: str, kind: str, seed: int) -> None:
    """Blind ones, and `row_norm`, whose rows step as far as their weights are long."""
    rng = np.random.default_rng(seed)
    base = synthetic.example_weights(weights, SHAPE, rng)
    change = synthetic.example_update(kind, base, 0.003, rng)
    changed, expected, measured, null = shares(base, change, low_magnitude(base))
    assert expected == pytest.approx(changed, abs=0.006)
    assert null == pytest.approx(measured, abs=0.008)


def test_what_rows_explain_the_rounding_null_takes_for_an_effect() -> None:
    rng = np.random.default_rng(0)
    base = synthetic.example_weights("scaled", SHAPE, rng)
    change, mask = synthetic.example_update("row_norm", base, 0.003, rng), low_magnitude(base)
    _, _, measured, scaled = shares(base, change, mask)
    entries, inside = (scan.count_by_class(scan.count_codes(bits.bf16_codes(x))) for x in (base, base[mask][None]))
    blind = null_of(base, (base + change).astype(np.float32), True).overlap(entries, inside)
    assert blind is not None and blind - measured > 0.02 > 5 * abs(scaled - measured)


@pytest.mark.parametrize("power", [-0.25, -1.0])
@pytest.mark.parametrize("weights", synthetic.WEIGHTS)
def test_it_does_not_explain_steps_that_prefer_small_weights(weights: str, power: float) -> None:
    rng = np.random.default_rng(0)
    base = synthetic.example_weights(weights, SHAPE, rng)
    change = rng.standard_normal(SHAPE) * np.maximum(np.abs(base), 1e-4).astype(np.float64) ** power
    change *= 0.006 * np.linalg.norm(base) / np.linalg.norm(change)
    _, _, measured, null = shares(base, change, low_magnitude(base))
    assert measured - null > 0.015 * abs(power) ** 0.5


def test_signs_of_one_length_change_what_is_finer_than_twice_that() -> None:
    """Closed form: a step of .003 passes half of every spacing up to 2⁻⁸, below a power of two a quarter of 2⁻⁷."""
    base = np.array([[0.75, 1.0, 1.5, 3.0], [0.375, 0.5, 1.25, 5.0]], np.float32)
    masters = (base + np.float32(0.003) * np.array([[1, -1, 1, -1], [1, 1, -1, 1]])).astype(np.float32)
    codes = bits.bf16_codes(base)
    null = nulls.scaled_null(codes, masters)
    assert null is not None
    cells = np.arange(8, dtype=np.uint8).reshape(2, 4)
    assert null.expected_changes(codes, cells, 8) == pytest.approx([1, 0.5, 0, 0, 1, 1, 0, 0])


def test_of_steps_that_end_half_way_half_change() -> None:
    """Every step is half a spacing of [1, 2): even mantissas stay, and odd ones move."""
    base = np.float32(1) + np.arange(1, 127, dtype=np.float32).reshape(2, 63) / 128
    masters = base + np.float32(2.0**-8)
    codes = bits.bf16_codes(base)
    null = nulls.scaled_null(codes, masters)
    assert null is not None
    changed = (bits.bf16_codes(masters) != codes).sum()
    assert changed == 63
    (expected,) = null.expected_changes(codes, np.zeros(base.shape, np.uint8), 1)
    assert expected == pytest.approx(63)


@pytest.mark.parametrize("shape", [(20_000, 4), (4, 20_000), (3000, 40)])
def test_short_lines_are_not_taken_at_their_word(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    base = synthetic.example_weights("plain", shape, rng)
    changed, expected, measured, null = shares(base, 0.0005 * rng.standard_normal(shape), low_magnitude(base))
    assert expected == pytest.approx(changed, abs=0.006)
    assert null == pytest.approx(measured, abs=0.008)


def test_rows_that_do_not_step_do_not_change() -> None:
    rng = np.random.default_rng(0)
    base = synthetic.example_weights("plain", (60, 80), rng)
    change = 0.01 * rng.standard_normal((60, 80)) * (np.arange(60) % 3 == 0)[:, None]
    codes, masters = bits.bf16_codes(base), (base + change).astype(np.float32)
    null = nulls.scaled_null(codes, masters)
    assert null is not None
    rows = np.repeat(np.arange(60, dtype=np.uint8)[:, None], 80, axis=1)
    expected = null.expected_changes(codes, rows, 60)
    assert not expected[np.arange(60) % 3 != 0].any()
    changed = (base != synthetic.stored(base, change)).sum(axis=1)
    assert expected.sum() == pytest.approx(changed.sum(), rel=0.02)


def test_nothing_that_moves_has_no_null() -> None:
    base = synthetic.example_weights("plain", (5, 6), np.random.default_rng(0))
    assert nulls.scaled_null(bits.bf16_codes(base), base) is None


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1)])
def test_single_lines_are_their_own_lengths(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    base = synthetic.example_weights("plain", shape, rng)
    codes, masters = bits.bf16_codes(base), (base + 0.01 * rng.standard_normal(shape)).astype(np.float32)
    null = nulls.scaled_null(codes, masters)
    assert null is not None
    expected = null.expected_changes(codes, np.zeros(shape, np.uint8), 1)
    assert 0 <= expected[0] <= base.size


def test_claims_decide_little_about_updates_that_know_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short form of the calibration: of 90 verdicts 4 or 5 may be decided by chance, and 10 hardly ever."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    calibration = module_at(REPOSITORY / "benchmarks" / "calibration.py")
    cases = [
        ("plain", "iid"),
        ("plain", "row_sparse"),
        ("scaled", "both"),
        ("scaled", "low_rank"),
        ("scaled", "row_norm"),
    ]
    decided = [id for case in cases for seed in range(3) for id in calibration.false_verdicts(*case, seed)]
    assert len(decided) <= 10
