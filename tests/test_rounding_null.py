"""The rounding null: blind steps, stored; from masters exactly, from stored weights by small ones as the ruler."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from offprincipal.geometry import bits, nulls, scan, synthetic
from offprincipal.geometry.bits import Counts
from offprincipal.geometry.nulls.rounding import LEAST_RULER, RULER_BINADES


def counted(base: NDArray[np.float32], tuned: NDArray[np.float32]) -> tuple[Counts, Counts]:
    found = scan.scan(bits.bf16_codes(base), bits.bf16_codes(tuned))
    return scan.count_by_class(found.entries), scan.count_by_class(found.changed)


def null_of(base: NDArray[np.float32], tuned: NDArray[np.float32], masters: bool = False) -> nulls.RoundingNull:
    after = tuned if masters else bits.bf16_codes(tuned)
    found = nulls.rounding_null(*counted(base, tuned), nulls.count_steps(bits.bf16_codes(base), after), masters)
    assert found is not None
    return found


def changes(value: float, step: float) -> float:
    """How often ±step changes a stored number, worked out by rounding."""
    ends = np.array([value + step, value - step]).astype(ml_dtypes.bfloat16)
    return float((ends != ml_dtypes.bfloat16(value)).mean())


@given(st.lists(st.integers(-4000, 4000), min_size=1, max_size=30), st.integers(0, 3))
def test_from_masters_the_rate_of_a_class_is_that_of_all_steps_dealt_out_to_it(steps: list[int], binade: int) -> None:
    """Steps in units of 2⁻¹⁶, so that many end half-way; on a power of two, and on odd and even mantissas above it."""
    base = np.full((1, len(steps)), 2.0**binade, np.float32)
    masters = (base + np.array(steps, np.float64) * 2.0**-16).astype(np.float32)
    taken = np.abs(masters.astype(np.float64) - base)[0]
    table = nulls.count_steps(bits.bf16_codes(base), masters)
    entries, _ = counted(base, base)
    found = nulls.rounding_null(entries, np.minimum(entries, 1), table, known=True)
    assert found is not None and found.judged == 1
    for e in range(-2, 5):
        power, odd, even = 2.0**e, 2.0**e * (1 + 2.0**-7), 2.0**e * (1 + 2.0**-6)
        place = 2 * (127 + e)
        assert found.rates[place + 1] == pytest.approx(np.mean([changes(power, step) for step in taken]))
        dealt = np.mean([(changes(odd, step) + changes(even, step)) / 2 for step in taken])
        assert found.rates[place] == pytest.approx(dealt)


def low_magnitude(base: NDArray[np.float32]) -> NDArray[np.bool_]:
    mask = np.zeros(base.size, np.bool_)
    mask[np.argsort(np.abs(base).reshape(-1), kind="stable")[: base.size // 2]] = True
    return mask.reshape(base.shape)


def overlaps(base: NDArray[np.float32], change: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """The low-magnitude overlap: measured, by the ruler, by masters, and what the same steps dealt out anew give."""
    mask, tuned = low_magnitude(base), synthetic.stored(base, change)
    entries, changed = counted(base, tuned)
    inside, _ = counted(base[mask][None], base[mask][None])
    masters = (base + change).astype(np.float32)
    by_ruler, known = (
        null_of(base, tuned).overlap(entries, inside),
        null_of(base, masters, True).overlap(entries, inside),
    )
    dealt = np.random.default_rng(0).permutation(change.reshape(-1)).reshape(base.shape)
    moved = synthetic.stored(base, dealt) != base
    assert by_ruler is not None and known is not None
    return float((tuned != base)[mask].sum() / changed.sum()), by_ruler, known, float(moved[mask].sum() / moved.sum())


@pytest.mark.parametrize("kind", ["iid", "sign", "rows", "both", "low_rank"])
def test_blind_steps_are_explained_by_rounding(kind: str) -> None:
    rng = np.random.default_rng(0)
    base = synthetic.example_weights("plain", (400, 500), rng)
    measured, by_ruler, known, dealt = overlaps(base, synthetic.example_update(kind, base, 0.003, rng))
    assert known == pytest.approx(dealt, abs=0.004)
    assert by_ruler == pytest.approx(measured, abs=0.01)


@pytest.mark.parametrize("power", [-0.25, -1.0])
def test_steps_that_prefer_small_weights_are_told_from_rounding_by_stored_weights_alone(power: float) -> None:
    """The spacing null could not: it takes how many of each spacing changed as given."""
    rng = np.random.default_rng(0)
    base = synthetic.example_weights("plain", (400, 500), rng)
    scale = np.maximum(np.abs(base), 1e-4).astype(np.float64) ** power
    change = rng.standard_normal(base.shape) * scale
    change *= 0.006 * np.linalg.norm(base) / np.linalg.norm(change)
    measured, by_ruler, known, dealt = overlaps(base, change)
    assert known == pytest.approx(dealt, abs=0.004)
    assert measured - known > 0.02
    assert measured - by_ruler > 0.02


def test_where_too_little_has_a_ruler_nothing_is_said() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(1, 2, (64, 64)).astype(ml_dtypes.bfloat16).astype(np.float32)
    entries, _ = counted(base, base)
    found = null_of(base, synthetic.stored(base, 0.01 * rng.standard_normal(base.shape)))
    assert found.judged == 0 and found.overlap(entries, entries) is None
    small = base.copy()
    small.reshape(-1)[:LEAST_RULER] *= np.float32(2.0 ** -(RULER_BINADES + 1))
    judged = null_of(small, synthetic.stored(small, 0.01 * rng.standard_normal(base.shape)))
    assert judged.judged > 0.9


def test_no_change_has_no_null() -> None:
    base = synthetic.example_weights("plain", (8, 8), np.random.default_rng(0))
    steps = nulls.count_steps(bits.bf16_codes(base), bits.bf16_codes(base))
    assert nulls.rounding_null(*counted(base, base), steps, known=False) is None


def test_two_blind_runs_agree_as_rounding_says() -> None:
    rng = np.random.default_rng(0)
    base = synthetic.example_weights("plain", (400, 500), rng)
    runs = [synthetic.stored(base, synthetic.example_update("iid", base, step, rng)) for step in (0.002, 0.004)]
    (entries, _), moved = counted(base, base), [run != base for run in runs]
    counts = (int(moved[0].sum()), int(moved[1].sum()))
    expected = nulls.rounding_intersection(entries, (null_of(base, runs[0]), null_of(base, runs[1])), counts)
    both = int((moved[0] & moved[1]).sum())
    assert expected == pytest.approx(both, rel=0.02)
    assert abs(both / expected - 1) < 0.3 * abs(both / (counts[0] * counts[1] / base.size) - 1)
