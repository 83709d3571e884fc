"""One principal subspace for tables, masks, gates and adapters: its bounds are kept, whichever solver finds it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import seeds
from test_solvers import KINDS, matrix_of, spectrum_of
from torch import nn

from offprincipal.adapters import make_masks
from offprincipal.adapters.off_principal import principal_subspaces
from offprincipal.comparison import CompareSettings, compare
from offprincipal.errors import AdapterError
from offprincipal.gates.directions import PrincipalSpace
from offprincipal.geometry import principal
from offprincipal.geometry.principal import PrincipalSubspace, principal_triplets
from offprincipal.geometry.spectrum import decompose, rounding_floor
from offprincipal.geometry.subspace import principal_angles


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), seeds, st.integers(1, 9), st.sampled_from([(40, 60), (60, 40), (48, 48)]))
@pytest.mark.parametrize("way", ["lapack", "gram", "iterated"])
def test_what_is_found_is_within_its_bounds(way: str, kind: str, seed: int, k: int, shape: tuple[int, int]) -> None:
    W = matrix_of(spectrum_of(kind, min(shape), seed), *shape, seed=seed)
    truth = decompose(W)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(principal, "EXACT_UP_TO", 256 if way == "lapack" else 0)
        patch.setattr(principal, "WHOLE_UP_TO", 0 if way == "iterated" else 256)
        found = principal_triplets(W, k, 1e-6, angle_deg=1e-3)
    assert (found.S[:k] - truth.S[:k]).abs().max() <= 1e-6 * truth.S[k - 1] + rounding_floor(truth, W.shape)
    error = found.angle_error_deg(k)
    assert error is None or error <= 1e-3
    if truth.S[k - 1] - truth.S[k] > 1e-3 * truth.S[0]:
        assert principal_angles(found.U[:, :k], truth.U[:, :k]).max() <= (error or 0) + 1e-4


def test_equal_matrices_are_decomposed_alike_however_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(principal, "EXACT_UP_TO", 0)
    monkeypatch.setattr(principal, "WHOLE_UP_TO", 0)
    W = matrix_of(spectrum_of("power law", 40, 0), 40, 60, seed=0)
    one, two = (principal_triplets(W.clone(), 5) for _ in range(2))
    assert one.solver == "randomized" and torch.equal(one.U, two.U) and torch.equal(one.S, two.S)


class OneMatrix(nn.Module):
    def __init__(self, W: torch.Tensor) -> None:
        super().__init__()
        self.q_proj = nn.Linear(W.shape[1], W.shape[0], bias=False)
        self.q_proj.weight.data.copy_(W)


def test_all_rooms_speak_of_the_same_subspace(tmp_path: Path) -> None:
    """Above the size that LAPACK takes: the mask of a table, of a training run and of the gates."""
    from checkpoint_folders import write_model

    W = matrix_of(spectrum_of("power law", 300, 1), 300, 320, seed=1).bfloat16()
    k = principal.principal_rank(W.shape, 0.125)
    space = PrincipalSpace.of(W.double(), 0.125, 0.5)
    subspace = PrincipalSubspace.of(W, k)
    assert space is not None and subspace is not None
    assert torch.equal(space.U, subspace.U)
    U, V = principal_subspaces(W, k)
    assert principal_angles(U, subspace.U).max() < 1e-4 and principal_angles(V, subspace.V).max() < 1e-4
    (mask,) = make_masks(OneMatrix(W.float()), "principal", density=0.5).values()
    assert (mask != space.mask).float().mean() < 1e-4
    name = "model.layers.0.self_attn.q_proj.weight"
    base = write_model(tmp_path / "base", {name: W})
    changed = torch.where(space.mask, W.double() * 1.05, W.double()).bfloat16()
    tuned = write_model(tmp_path / "tuned", {name: changed})
    (row,) = compare(base, [tuned], CompareSettings(), cache=False).matrices
    assert row["principal_overlap"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("W", [torch.zeros(6, 8), torch.eye(6)], ids=["zero", "flat"])
def test_a_subspace_that_is_not_defined_is_nowhere(W: torch.Tensor) -> None:
    assert PrincipalSubspace.of(W, 2) is None
    assert PrincipalSpace.of(W, 0.34, 0.5) is None
    with pytest.raises(AdapterError, match="no principal subspace of rank 2"):
        principal_subspaces(W, 2)


def test_scores_are_those_of_the_matrix_of_rank_k() -> None:
    W = matrix_of(spectrum_of("power law", 12, 3), 12, 20, seed=3)
    found = PrincipalSubspace.of(W, 4)
    assert found is not None
    U, S, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    np.testing.assert_allclose(found.scores(), np.abs((U[:, :4] * S[:4]) @ Vh[:4]), atol=1e-12)
    assert math.isclose(float(found.S[0]), S[0])
