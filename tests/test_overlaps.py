"""Overlaps of leading subspaces: against LAPACK, and their nulls against walks that know nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from offprincipal.geometry.overlaps import subspace_overlaps

K, COUNT = 4, 9


def uneven(n: int, m: int, generator: torch.Generator) -> Tensor:
    """Sizes of entries whose rows and columns are of different lengths, as those of weights' updates are."""
    return torch.exp(0.7 * torch.randn(n, 1, generator=generator) + 0.7 * torch.randn(1, m, generator=generator))


def noise(sizes: Tensor, generator: torch.Generator) -> Tensor:
    return sizes * torch.randn(sizes.shape, generator=generator)


def walk(drift: float, low_rank: float = 0.0) -> Callable[[Tensor, torch.Generator], list[Tensor]]:
    def steps(sizes: Tensor, generator: torch.Generator) -> list[Tensor]:
        direction = noise(sizes, generator)
        rows, columns = (torch.randn(n, 2, generator=generator) for n in sizes.shape)
        now, found = torch.zeros(sizes.shape), []
        for _ in range(COUNT):
            now = now + noise(sizes, generator) + drift * direction + low_rank * rows @ columns.T
            found.append(now)
        return found

    return steps


def overlaps_of(D: list[Tensor], k: int, seed: int = 0) -> tuple[NDArray[np.float64], float]:
    flat = torch.stack([one.double().flatten() for one in D])
    return subspace_overlaps(D.__getitem__, (flat @ flat.T).numpy(), k, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 90), (300, 280)])
def test_overlaps_are_those_of_lapacks_subspaces(shape: tuple[int, int]) -> None:
    """300 × 280 is iterated; its spectrum is nearly flat, the hardest there is."""
    generator = torch.Generator().manual_seed(1)
    D = walk(0.3)(torch.ones(shape), generator)
    found, error = overlaps_of(D, K)
    svds = [torch.linalg.svd(one.double(), full_matrices=False) for one in D]
    for t, svd in enumerate(svds):
        for side, (one, last) in enumerate(((svd.U[:, :K].T, svds[-1].U[:, :K]), (svd.Vh[:K], svds[-1].Vh[:K].T))):
            assert found[0, side, t] == pytest.approx(float((one @ last).square().sum()) / K, abs=0.01)
    assert 0 <= error <= 5


@pytest.mark.parametrize("drift", [0.0, 0.5, 20.0])
def test_displacements_without_structure_share_what_the_null_of_their_cosines_says(drift: float) -> None:
    """And of a walk without drift, what that of the walk says: over 12 draws, with uneven rows and columns."""
    ours = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        D = walk(drift)(uneven(48, 80, generator), generator)
        ours.append(overlaps_of(D, K, seed)[0][:, :, :-1])
    measured, of_walk, own = np.mean(ours, axis=0)
    spread = np.std([one[0].mean() - one[2].mean() for one in ours], ddof=1) / len(ours) ** 0.5
    assert abs(measured.mean() - own.mean()) < 0.03 + 4 * spread
    if drift == 0:
        assert abs(measured.mean() - of_walk.mean()) < 0.03 + 4 * spread
    else:
        assert measured.mean() > of_walk.mean() + 0.05


def test_steps_of_low_rank_share_more_than_either_null() -> None:
    drawn = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        drawn.append(overlaps_of(walk(0.0, low_rank=1.0)(torch.ones(60, 80), generator), 2, seed)[0][:, :, :3])
    measured, of_walk, own = (found.mean() for found in np.mean(drawn, axis=0))
    assert measured > 0.95 and own < 0.85 and of_walk < 0.5


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e20]), k=st.integers(1, 5))
def test_laws(seed: int, scale: float, k: int) -> None:
    """Shares lie in [0, 1], are 1 at the end, and depend neither on scale nor on which side is called left."""
    generator = torch.Generator().manual_seed(seed)
    D = [torch.randn(7, 12, generator=generator) for _ in range(3)]
    (measured, *nulls), error = overlaps_of(D, k, seed)
    assert error == 0  # LAPACK's
    for values in (measured, *nulls):
        assert ((values >= 0) & (values <= 1)).all() and values[:, -1] == pytest.approx(1, abs=1e-6)
    (scaled, *_), _ = overlaps_of([scale * one for one in D], k, seed)
    np.testing.assert_allclose(scaled, measured, atol=1e-4)
    (turned, *_), _ = overlaps_of([one.T for one in D], k, seed)
    np.testing.assert_allclose(turned, measured[::-1], atol=1e-4)


def rank_one(n: int, m: int) -> Tensor:
    return torch.outer(torch.arange(1.0, n + 1), torch.arange(1.0, m + 1))


@pytest.mark.parametrize(
    ("D", "k", "known"),
    [
        pytest.param([torch.zeros(5, 6)] * 2, 2, [False, False], id="nothing moved"),
        pytest.param([torch.zeros(5, 6), rank_one(5, 6)], 1, [False, True], id="not yet"),
        pytest.param([rank_one(5, 6)] * 2, 2, [False, False], id="of lower rank"),
        pytest.param([torch.eye(5)] * 2, 2, [False, False], id="repeated singular values"),
        pytest.param([torch.randn(5, 6)] * 2, 5, [False, False], id="all directions"),
        pytest.param([torch.ones(1, 6)] * 2, 1, [False, False], id="one row"),
        pytest.param([rank_one(5, 6), torch.zeros(5, 6)], 1, [False, False], id="went back"),
    ],
)
def test_what_is_not_defined_is_not_told(D: list[Tensor], k: int, known: list[bool]) -> None:
    found: Any = overlaps_of(D, k)[0]
    assert (np.isfinite(found[0]) == known).all()
