"""Figures of trajectories against their definitions on whole displacements, laws, and planted walks."""

import math
from collections import Counter
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from offprincipal.geometry.walks import (
    Drift,
    drift_of,
    increment_gram,
    random_walk_gram,
    stored_line_gram,
    stored_walk_gram,
    verdict_of,
    walk_of,
)

Floats = NDArray[np.float64]
SIZE = 400


def gram(D: Floats) -> Floats:
    return D @ D.T


def planted(kind: str, steps: int, rng: np.random.Generator, size: int = SIZE) -> Floats:
    """Displacements of a walk that is known."""
    noise = rng.standard_normal((steps, size)) / math.sqrt(size)
    direction = rng.standard_normal(size)
    direction /= np.linalg.norm(direction)
    angles = np.linspace(0, 2 * math.pi, steps + 1)
    sides = np.linalg.qr(rng.standard_normal((size, 2)))[0].T
    moves: dict[str, Callable[[], Floats]] = {
        "walk": lambda: noise,
        "decaying walk": lambda: noise * np.linspace(1, 0.05, steps)[:, None],
        "uneven walk": lambda: noise * rng.uniform(0.2, 3, (steps, 1)),
        "walk with inertia": lambda: np.array([sum(0.6**k * noise[t - k] for k in range(t + 1)) for t in range(steps)]),
        "line": lambda: np.tile(direction, (steps, 1)),
        "noisy line": lambda: direction + 0.3 * noise,
        "drift": lambda: noise + 0.6 * direction,
        "orbit": lambda: np.diff(np.stack([np.cos(angles), np.sin(angles)], 1) @ sides, axis=0) + 0.01 * noise,
    }
    return np.cumsum(moves[kind](), axis=0)


@given(st.integers(2, 12), st.integers(0, 2**31))
def test_figures_are_those_of_the_displacements(steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    D = np.cumsum(rng.standard_normal((steps, 30)) * rng.uniform(0, 2, (steps, 1)), axis=0)
    at = np.sort(rng.choice(np.arange(1, 1000), steps, replace=False)).astype(float)
    found = walk_of(gram(D), list(at))
    d = np.diff(D, axis=0, prepend=0)
    np.testing.assert_allclose(increment_gram(gram(D)), d @ d.T, atol=1e-9)
    lengths = np.linalg.norm(d, axis=1)
    np.testing.assert_allclose(found.norms, np.linalg.norm(D, axis=1), rtol=1e-9)
    np.testing.assert_allclose(found.increments, lengths, atol=1e-6)
    assert found.path_length == pytest.approx(lengths.sum(), rel=1e-6)
    assert found.straightness == pytest.approx(np.linalg.norm(D[-1]) / lengths.sum(), rel=1e-6)
    values = np.linalg.svd(D, compute_uv=False) ** 2
    assert found.rank1_share == pytest.approx(values[0] / values.sum(), rel=1e-9)
    assert found.rank2_share == pytest.approx(values[:2].sum() / values.sum(), rel=1e-9)
    points, times = np.vstack([np.zeros(30), D]), np.stack([np.ones(steps + 1), np.concatenate([[0], at])], 1)
    rest = points - times @ np.linalg.lstsq(times, points, rcond=None)[0]
    assert found.linearity_r2 == pytest.approx(
        1 - (rest**2).sum() / ((points - points.mean(0)) ** 2).sum(), rel=1e-9, abs=1e-9
    )


@given(st.integers(2, 40), st.floats(1e-6, 1e6), st.integers(0, 2**31))
def test_laws(steps: int, scale: float, seed: int) -> None:
    G = gram(planted("walk", steps, np.random.default_rng(seed), 50))
    one, two = walk_of(G, range(1, steps + 1)), walk_of(scale**2 * G, range(10, 10 * steps + 1, 10))
    for name in ("straightness", "rank1_share", "rank2_share", "linearity_r2"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-6), name  # of length, and of time's unit
    assert 0 < one.straightness <= 1 + 1e-9  # type: ignore[operator]
    assert one.rank1_share <= one.rank2_share <= 1 + 1e-9  # type: ignore[operator]
    lengths = one.increments
    null = walk_of(random_walk_gram(lengths), range(1, steps + 1))
    np.testing.assert_allclose(null.increments, lengths, rtol=1e-6)
    assert null.straightness == pytest.approx(np.sqrt((lengths**2).sum()) / lengths.sum(), rel=1e-9)
    np.testing.assert_allclose(null.cosines, np.eye(steps), atol=1e-6)


def test_a_walk_of_equal_steps_has_a_share_of_eight_over_pi_squared_on_one_axis() -> None:
    """The eigenvalues of min(s, t) go as 1/((2j − 1)²π²/4) (Karhunen and Loève): the first has 8/π² = .81 of them."""
    found = walk_of(random_walk_gram(np.ones(400)), range(1, 401))
    assert found.rank1_share == pytest.approx(8 / math.pi**2, abs=2e-3)
    assert found.rank2_share == pytest.approx(8 / math.pi**2 * (1 + 1 / 9), abs=2e-3)


def test_walks_are_what_the_closed_form_says() -> None:
    rng, steps = np.random.default_rng(0), 20
    scales = rng.uniform(0.2, 3, steps)
    noise = rng.standard_normal((steps, 40_000)) / 200 * scales[:, None]
    found = walk_of(gram(np.cumsum(noise, axis=0)), range(1, steps + 1))
    null = walk_of(random_walk_gram(scales), range(1, steps + 1))
    for name in ("straightness", "rank1_share", "rank2_share", "linearity_r2"):
        assert getattr(found, name) == pytest.approx(getattr(null, name), rel=0.03), name


def test_nothing_moved_and_one_step() -> None:
    still = walk_of(np.zeros((3, 3)), [1, 2, 3])
    assert (still.path_length, still.straightness, still.rank1_share, still.linearity_r2) == (0.0, None, None, None)
    assert drift_of(np.zeros((3, 3))) == Drift(None, None, None, 2)
    one = walk_of(np.array([[4.0]]), [7])
    assert (one.straightness, one.rank1_share, one.linearity_r2) == (1.0, 1.0, pytest.approx(1.0))
    assert verdict_of(drift_of(np.array([[4.0]]))) == "cannot tell"
    back = walk_of(np.array([[1.0, 0.0], [0.0, 0.0]]), [1, 2])  # there and back again
    assert (back.straightness, back.path_length) == (0.0, 2.0)
    with pytest.raises(ValueError, match="for 2 steps"):
        walk_of(np.eye(3), [1, 2])


EXPECTED = {
    "walk": {"diffusive"},
    "decaying walk": {"diffusive"},
    "uneven walk": {"diffusive"},
    "walk with inertia": {"diffusive"},
    "line": {"ballistic"},
    "noisy line": {"ballistic"},
    "drift": {"diffusive with drift"},
    "orbit": {"cannot tell"},
}


@pytest.mark.parametrize("steps", [12, 24])
@pytest.mark.parametrize("kind", EXPECTED)
def test_planted_walks_are_told_apart(kind: str, steps: int) -> None:
    """At most one in twenty gets a verdict that it should not have; `cannot tell` is none."""
    rng = np.random.default_rng(steps)
    found = Counter(verdict_of(drift_of(gram(planted(kind, steps, rng)))) for _ in range(100))
    wrong = found.total() - found["cannot tell"] - sum(found[verdict] for verdict in EXPECTED[kind])
    assert wrong <= 5, found
    assert sum(found[verdict] for verdict in EXPECTED[kind]) >= 80, found


def test_a_stored_walk_in_float32_is_a_random_walk_and_in_bfloat16_hides_short_steps() -> None:
    rng = np.random.default_rng(0)
    base, steps = rng.standard_normal(20_000).astype(np.float32), 12
    updates = (1e-4 * rng.standard_normal((steps, base.size))).astype(np.float32)
    wide = stored_walk_gram(base, updates, base.dtype, np.random.default_rng(1))
    lengths = np.linalg.norm(updates, axis=1)
    np.testing.assert_allclose(wide, random_walk_gram(lengths), rtol=0.1)
    narrow = stored_walk_gram(base, updates, np.dtype(ml_dtypes.bfloat16), np.random.default_rng(1))
    assert 0 < np.trace(narrow) < 0.9 * np.trace(wide) or np.trace(narrow) > 1.1 * np.trace(wide)


def stored_run(kind: str, steps: int, length: float, rng: np.random.Generator) -> str:
    """The verdict on a planted run of 4,096 weights in bfloat16, whose steps are so many times their usual spacing."""
    base = (0.03 * rng.standard_normal(4096)).astype(ml_dtypes.bfloat16)
    direction = rng.standard_normal(4096)
    moves = np.tile(direction, (steps, 1)) if kind == "line" else rng.standard_normal((steps, 4096))
    start, lengths = base.astype(np.float32), length * 2e-4
    now = (start + lengths * moves.cumsum(axis=0)).astype(np.float32).astype(ml_dtypes.bfloat16)
    D = now.astype(np.float64) - start
    line = stored_line_gram(base, D[-1].astype(np.float32), np.arange(1, steps + 1) / steps, base.dtype, rng)
    return verdict_of(drift_of(gram(D)), drift_of(line).value)


@pytest.mark.parametrize("length", [0.03, 0.3, 1.0])
@pytest.mark.parametrize(("kind", "right"), [("line", "ballistic"), ("walk", "diffusive")])
def test_storing_makes_no_walk_of_a_line_and_no_line_of_a_walk(kind: str, right: str, length: float) -> None:
    rng = np.random.default_rng(0)
    found = Counter(stored_run(kind, steps, length, rng) for steps in (12, 24) for _ in range(50))
    assert found.total() - found[right] - found["cannot tell"] <= 5, found
    assert length < 0.3 or found[right] >= 90, found


def test_a_stored_line_is_as_long_as_the_run_and_in_float32_is_a_line() -> None:
    rng = np.random.default_rng(0)
    base, last = rng.standard_normal((2, 5000)).astype(np.float32)
    for dtype, straight in ((np.float32, 0.999), (ml_dtypes.bfloat16, 0.0)):
        G = stored_line_gram(base.astype(dtype), 1e-3 * last, [0.25, 0.5, 0.75, 1.0], np.dtype(dtype), rng)
        assert G[-1, -1] == pytest.approx(1e-6 * float(last @ last), rel=1e-3)
        found = walk_of(G, [1, 2, 3, 4]).straightness
        assert found is not None and found > straight and (dtype is np.float32) == (found > 0.99)
    assert not stored_line_gram(base, np.zeros(5000, np.float32), [0.5, 1.0], base.dtype, rng).any()
    assert np.isfinite(stored_line_gram(base[:1], last[:1], [1.0], base.dtype, rng)).all()
