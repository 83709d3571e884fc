"""Singular values, angles and energies: invariances, closed forms, and bounds that no update breaks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian, orthogonal, seeds, sizes, updates
from torch import Tensor

from offprincipal.geometry.bounds import ky_fan_tightness, mirsky_tightness, wedin_tightness, weyl_tightness
from offprincipal.geometry.principal import principal_rank
from offprincipal.geometry.spectrum import decompose, effective_rank, spectral_shift, stable_rank
from offprincipal.geometry.subspace import principal_angles, principal_energies
from offprincipal.measures.pair import BaseMatrix
from offprincipal.measures.settings import MatrixSettings

SLACK = 1 + 1e-9


@given(sizes, sizes, seeds)
def test_the_decomposition_gives_the_matrix_back(n: int, m: int, seed: int) -> None:
    W = gaussian(n, m, seed=seed)
    svd = decompose(W)
    torch.testing.assert_close((svd.U * svd.S) @ svd.Vh, W, rtol=0, atol=1e-12)


@given(updates(), seeds)
def test_the_shift_is_the_same_in_every_orthonormal_basis(pair: tuple[Tensor, Tensor], seed: int) -> None:
    base, tuned = pair
    P, Q = orthogonal(base.shape[0], seed), orthogonal(base.shape[1], seed + 1)
    here = spectral_shift(decompose(base).S, decompose(tuned).S)
    there = spectral_shift(decompose(P @ base @ Q).S, decompose(P @ tuned @ Q).S)
    assert (here is None) == (there is None)
    if here is not None and there is not None:
        assert here == pytest.approx(there, rel=1e-9, abs=1e-13)


def test_scaling_a_matrix_shifts_its_spectrum_by_the_factor() -> None:
    S = decompose(gaussian(7, 5, seed=3)).S
    assert spectral_shift(S, 1.25 * S) == pytest.approx(0.25)


def test_nothing_is_defined_where_the_base_or_the_update_is_zero() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert spectral_shift(zero, zero + 1) is None
    assert stable_rank(zero) is None
    assert effective_rank(zero) is None
    assert principal_energies(torch.eye(3)[:, :1].double(), torch.eye(3)[:, :1].double(), torch.zeros(3, 3)) is None


@given(st.integers(1, 10), st.floats(1e-30, 1e30))
def test_ranks_of_a_flat_spectrum_are_its_length_at_any_scale(r: int, scale: float) -> None:
    S = torch.full((r,), scale, dtype=torch.float64)
    assert stable_rank(S) == pytest.approx(r)
    assert effective_rank(S) == pytest.approx(r)


@pytest.mark.parametrize(("shape", "k"), [((1, 1), 1), ((4, 100), 1), ((96, 192), 12), ((192, 512), 24)])
def test_the_principal_rank_is_an_eighth_and_at_least_one(shape: tuple[int, int], k: int) -> None:
    assert principal_rank(torch.Size(shape), 0.125) == k
    assert BaseMatrix("W", np.zeros(shape, np.float32), MatrixSettings()).spectral.k == k


@given(st.floats(1e-12, math.pi / 2), st.integers(2, 8), seeds)
def test_a_turn_by_a_known_angle_is_found_to_all_its_digits(angle: float, n: int, seed: int) -> None:
    frame = orthogonal(n, seed)
    start, turned = frame[:, :1], (math.cos(angle) * frame[:, :1] + math.sin(angle) * frame[:, 1:2])
    found = math.radians(principal_angles(start, turned).item())
    assert found == pytest.approx(angle, rel=1e-7, abs=1e-15)


@given(st.integers(2, 10), st.data(), seeds)
def test_angles_are_those_of_the_subspace_not_of_its_basis(n: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, n))
    A, B = orthogonal(n, seed)[:, :k], orthogonal(n, seed + 1)[:, :k]
    P, R = orthogonal(n, seed + 2), orthogonal(k, seed + 3)
    angles = principal_angles(A, B)
    torch.testing.assert_close(principal_angles(P @ A, P @ B @ R), angles, rtol=0, atol=1e-6)
    torch.testing.assert_close(principal_angles(B, A), angles, rtol=0, atol=1e-6)
    assert float(principal_angles(A, A @ R).max()) < 1e-6
    assert bool((angles[1:] >= angles[:-1] - 1e-6).all())


def test_several_known_angles_come_back_in_order() -> None:
    known = torch.tensor([1e-7, 0.5, 30.0, 90.0], dtype=torch.float64)
    theta, frame = torch.deg2rad(known), torch.eye(8, dtype=torch.float64)
    turned = frame[:, :4] * torch.cos(theta) + frame[:, 4:] * torch.sin(theta)
    torch.testing.assert_close(principal_angles(frame[:, :4], turned @ orthogonal(4, 0)), known, rtol=1e-6, atol=1e-9)


@given(sizes, sizes, seeds)
def test_energies_are_shares_and_the_joint_one_is_the_smallest(n: int, m: int, seed: int) -> None:
    k = principal_rank(torch.Size([n, m]), 0.5)
    U, V = orthogonal(n, seed)[:, :k], orthogonal(m, seed + 1)[:, :k]
    both, left, right = principal_energies(U, V, gaussian(n, m, seed=seed + 2)) or (0, 0, 0)
    assert 0 <= both <= min(left, right) + 1e-12 <= 1 + 1e-12
    inside = principal_energies(U, V, U @ gaussian(k, k, seed=seed + 3) @ V.T)
    assert inside == pytest.approx((1, 1, 1))


def test_an_isotropic_update_has_the_energies_that_counting_dimensions_gives() -> None:
    n, m, k, draws = 12, 20, 3, 4000
    U, V = orthogonal(n, 0)[:, :k], orthogonal(m, 1)[:, :k]
    found = torch.tensor([principal_energies(U, V, gaussian(n, m, seed=s)) for s in range(draws)])
    mean, error = found.mean(dim=0), found.std(dim=0) / draws**0.5
    expected = torch.tensor([k * k / (n * m), k / n, k / m])
    assert bool(((mean - expected).abs() < 5 * error).all())


@given(updates(), st.sampled_from([0.125, 0.25, 0.5, 1.0]))
def test_no_update_breaks_weyl_mirsky_ky_fan_or_wedin(pair: tuple[Tensor, Tensor], fraction: float) -> None:
    base, tuned = pair
    update = decompose(tuned - base).S
    norm_2, norm = update[0].item(), update.norm().item()
    a, b, k = decompose(base), decompose(tuned), principal_rank(base.shape, fraction)
    floor = 1e-7 * max(a.S[0].item(), b.S[0].item())  # rounding of the decompositions themselves
    if norm_2 <= floor:
        return
    left = principal_angles(a.U[:, :k], b.U[:, :k]).max().item()
    right = principal_angles(a.Vh[:k].T, b.Vh[:k].T).max().item()
    tightness = (
        weyl_tightness(a.S, b.S, norm_2),
        mirsky_tightness(a.S, b.S, norm),
        ky_fan_tightness(a.S, b.S, k, norm_2),
        wedin_tightness(a.S[k - 1].item(), b.S[k].item() if k < len(b.S) else 0.0, norm_2, (left, right)),
    )
    assert all(value is None or value <= SLACK + 1e-6 for value in tightness)


def test_weyl_and_mirsky_are_attained_where_the_update_is_along_the_top_pair() -> None:
    base = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    tuned = torch.diag(torch.tensor([3.5, 1.0], dtype=torch.float64))
    S0, S1 = decompose(base).S, decompose(tuned).S
    assert weyl_tightness(S0, S1, 0.5) == mirsky_tightness(S0, S1, 0.5) == ky_fan_tightness(S0, S1, 1, 0.5) == 1.0


def test_wedin_says_nothing_without_a_gap() -> None:
    S = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert wedin_tightness(S[0].item(), S[1].item(), 0.1, (5.0, 5.0)) is None


def test_bounds_are_undefined_where_nothing_moved() -> None:
    S = torch.tensor([2.0, 1.0], dtype=torch.float64)
    assert (weyl_tightness(S, S, 0.0), mirsky_tightness(S, S, 0.0), ky_fan_tightness(S, S, 1, 0.0)) == (None,) * 3
