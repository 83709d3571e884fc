"""Predicted checkpoints: how far they miss, against whole displacements, on walks and on lines."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import seeds

from offprincipal.geometry.extrapolation import coefficients_of, held_out
from offprincipal.geometry.walks import random_walk_gram


@given(seeds, st.integers(4, 12))
def test_how_far_a_prediction_misses_follows_from_the_inner_products(seed: int, count: int) -> None:
    """Against the same predictions of whole displacements: each weight's line, and that along the first direction."""
    rng = np.random.default_rng(seed)
    D = rng.standard_normal((count, 30)).cumsum(axis=0)
    steps = list(np.cumsum(rng.uniform(0.5, 3.0, count)))
    fitted = count - max(1, count // 4)
    known, x = D[:fitted], np.array([0.0, *steps[:fitted]])
    direction = np.linalg.svd(known, full_matrices=False)[2][0]
    along = np.concatenate([[0.0], known @ direction])
    lines = np.polyfit(x, np.vstack([np.zeros(30), known]), 1)
    for found in held_out(D @ D.T, steps):
        true, at = D[found.place], steps[found.place]
        predicted = {
            "linear": lines[0] * at + lines[1],
            "rank1": np.polyval(np.polyfit(x, along, 1), at) * direction,
            "last": known[-1],
        }
        for name, where in predicted.items():
            assert getattr(found, name) == pytest.approx(np.linalg.norm(where - true) / np.linalg.norm(true), rel=1e-6)


def test_of_a_random_walk_the_last_checkpoint_is_the_best_prediction_and_of_a_line_the_worst() -> None:
    steps = list(range(1, 13))
    walk = held_out(random_walk_gram(np.ones(12)), steps)
    assert all(row.last < row.linear and row.last < row.rank1 for row in walk)  # type: ignore[operator]
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(300):
        D = rng.standard_normal((12, 200)).cumsum(axis=0)
        drawn.append([row.linear**2 for row in held_out(D @ D.T, steps)])  # type: ignore[operator]
    np.testing.assert_allclose(np.sqrt(np.mean(drawn, axis=0)), [row.linear for row in walk], rtol=0.02)  # type: ignore[arg-type]
    line = held_out(np.outer(steps, steps), steps)
    assert all(row.linear < 1e-6 and row.rank1 < 1e-6 < row.last for row in line)  # type: ignore[operator]


def test_nothing_is_predicted_of_what_did_not_move_nor_from_one_checkpoint() -> None:
    assert [row.linear for row in held_out(np.zeros((4, 4)), [1, 2, 3, 4])] == [None]
    assert coefficients_of(np.zeros((2, 2)), [1, 2], 3, "rank1").tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="two are needed"):
        held_out(np.ones((2, 2)), [1, 2])
