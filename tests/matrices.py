"""Hypothesis strategies for matrices, shared by the tests of the mathematics."""

import hypothesis.strategies as st
import torch
from torch import Tensor


def gaussian(*shape: int, seed: int) -> Tensor:
    """A float64 Gaussian matrix."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n: int, seed: int) -> Tensor:
    """A Haar-distributed orthogonal matrix, float64."""
    Q, R = torch.linalg.qr(gaussian(n, n, seed=seed))
    return Q * R.diagonal().sign()


seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 12)
scales = st.sampled_from([1e-9, 1e-4, 1e-2, 1.0, 100.0])


@st.composite
def updates(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A base matrix and a tuned one, from no change at all to one that drowns the base; some are of low rank."""
    n, m = draw(sizes), draw(sizes)
    base = gaussian(n, m, seed=draw(seeds))
    if draw(st.booleans()):
        base = gaussian(n, 1, seed=draw(seeds)) @ gaussian(1, m, seed=draw(seeds))
    if draw(st.integers(0, 9)) == 0:
        base = torch.zeros(n, m, dtype=torch.float64)
    scale = draw(st.one_of(st.just(0.0), scales))
    return base, base + scale * gaussian(n, m, seed=draw(seeds))
