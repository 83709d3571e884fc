"""The fast solvers against LAPACK: what their error bounds promise holds, on spectra that are hard to tell apart."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import gaussian, orthogonal, seeds
from torch import Tensor

from offprincipal.geometry.spectrum import (
    Svd,
    decompose,
    decompose_by_gram,
    decompose_randomized,
    decompose_warm,
    effective_rank,
    stable_rank,
    update_spectrum,
    within,
)
from offprincipal.geometry.subspace import principal_angles

FEW = settings(max_examples=40)
TOLERANCE = 1e-3
TINY_DEG = 1e-6


def spectrum_of(kind: str, r: int, seed: int) -> Tensor:
    """(r,) singular values, from the largest down."""
    i = torch.arange(1, r + 1, dtype=torch.float64)
    near = torch.rand(r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {
        "power law": i**-0.7,
        "geometric": 0.5**i,
        "steep": 10 ** (-i / 2),
        "flat": 1 + 0.01 * near.sort(descending=True).values,
        "clustered": torch.where(i <= 3, 2 + 1e-5 * (3 - i), torch.where(i <= 8, 1.0, 0.5)),
        "low rank": (4 - i).clamp(min=0),
        "zero": 0 * i,
    }[kind]


KINDS = ("power law", "geometric", "steep", "flat", "clustered", "low rank", "zero")


def matrix_of(S: Tensor, n: int, m: int, seed: int) -> Tensor:
    """A float64 (n, m) matrix with these singular values and random vectors."""
    r = min(n, m)
    return (orthogonal(n, seed)[:, :r] * S) @ orthogonal(m, seed + 1)[:r]


@dataclass(frozen=True)
class Case:
    """A matrix of a known kind, and how many of its triplets are asked for."""

    W: Tensor
    k: int
    kind: str
    seed: int

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def moved(self, size: float) -> Tensor:
        """The matrix after a Gaussian update of a relative norm."""
        noise = gaussian(*self.W.shape, seed=self.seed + 7)
        return self.W + (size * (self.W.norm() or 1.0) * noise / noise.norm()).to(self.W.dtype)


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> Case:
    """Tall, wide and square matrices in float32 and float64."""
    n, m = draw(st.integers(20, 60)), draw(st.integers(20, 60))
    kind, seed = draw(st.sampled_from(kinds)), draw(seeds)
    W = matrix_of(spectrum_of(kind, min(n, m), seed), n, m, seed)
    return Case(W.to(draw(st.sampled_from([torch.float32, torch.float64]))), draw(st.integers(1, 8)), kind, seed)


def solved(solver: str, case: Case, W: Tensor | None = None) -> Svd:
    """By `gram`, `randomized`, or `warm` from the case's matrix, with its whole basis or its first triplets alone."""
    target = case.W if W is None else W
    if solver == "gram":
        return decompose_by_gram(target, case.k)
    if solver == "randomized":
        return decompose_randomized(target, case.k, TOLERANCE, case.generator)
    base = solved("gram" if solver == "warm" else "randomized", case)
    return decompose_warm(target, base, case.k, TOLERANCE)


def largest_angle(a: Tensor, b: Tensor) -> float:
    return principal_angles(a.double(), b.double()).max().item()


def require_bounded(found: Svd, W: Tensor, k: int) -> None:
    """Every value is as near a true one as the error bound says, and the subspaces are where they can be told apart."""
    true = decompose(W)
    assert found.singular_value_error is not None
    error = found.singular_value_error + 1e-12 * true.S[0].item()
    nearest = (found.S[:k, None] - true.S).abs().min(dim=1).values
    assert nearest.max().item() <= error
    angle_error = found.angle_error_deg(k)
    assert angle_error is not None and 0 <= angle_error <= 90
    if angle_error < 90:
        assert (found.S[:k] - true.S[:k]).abs().max().item() <= error
        for ours, theirs in ((found.U[:, :k], true.U[:, :k]), (found.Vh[:k].T, true.Vh[:k].T)):
            assert largest_angle(theirs, ours) <= angle_error + TINY_DEG


@pytest.mark.parametrize("solver", ["gram", "randomized"])
@FEW
@given(case=cases())
def test_error_bounds_hold(solver: str, case: Case) -> None:
    require_bounded(solved(solver, case), case.W, case.k)


@pytest.mark.parametrize("solver", ["warm", "warm from few"])
@FEW
@given(case=cases(), size=st.sampled_from([0.0, 1e-6, 1e-3, 0.03, 1.0]))
def test_error_bounds_of_a_warm_start_hold_however_far_the_matrix_has_moved(
    solver: str, case: Case, size: float
) -> None:
    W = case.moved(size)
    require_bounded(solved(solver, case, W), W, case.k)


@FEW
@given(cases())
def test_the_gram_matrix_gives_every_singular_value_in_its_order(case: Case) -> None:
    found, true = decompose_by_gram(case.W, case.k), decompose(case.W)
    assert len(found.S) == len(true.S) == min(case.W.shape) and found.basis is not None
    assert found.singular_value_error is not None
    top = (found.S - true.S)[: case.k].abs().max().item()
    assert top <= found.singular_value_error + 1e-12 * true.S[0].item()
    assert bool((found.S[1:] <= found.S[:-1]).all())
    beyond = math.sqrt(16 * torch.finfo(case.W.dtype).eps)  # what squares of that type resolve
    assert (found.S - true.S).abs().max().item() <= beyond * true.S[0].item()
    identity, rounding = torch.eye(len(found.S), dtype=torch.float64), 64 * torch.finfo(case.W.dtype).eps
    torch.testing.assert_close(found.basis.double().T @ found.basis.double(), identity, rtol=0, atol=rounding)


@pytest.mark.parametrize("outlier", [1.0, 1e2, 1e4])
def test_float32_squares_are_left_where_the_largest_value_drowns_the_others(outlier: float) -> None:
    """Either way the first triplets are known to float32's rounding."""
    S = torch.arange(1, 301, dtype=torch.float64) ** -0.5
    S[0] *= outlier
    W = matrix_of(S, 400, 300, 0).float()
    found = decompose_by_gram(W, 30)
    assert found.residual <= 8 * torch.finfo(torch.float32).eps * found.S[0].item()
    assert (found.S[:30] - S[:30]).abs().max().item() <= 1e-6 * found.S[0].item()
    resolved = bool((found.S - S).abs().max().item() <= 1e-7 * S[0].item())
    assert resolved or outlier < 1e4


@FEW
@given(cases(("power law", "geometric", "clustered")))
def test_where_a_gap_follows_the_error_bound_is_within_the_tolerance(case: Case) -> None:
    found = solved("randomized", case)
    assert within(found, case.k, 2 * TOLERANCE)
    assert found.solver == "randomized"


def test_a_known_matrix_is_decomposed_to_its_digits() -> None:
    W = matrix_of(spectrum_of("power law", 30, 0), 30, 50, 0)
    for side in (W, W.T):
        for solver in ("gram", "randomized"):
            case = Case(side, 4, "power law", 0)
            exact = decompose_randomized(side, 4, 1e-12, case.generator) if solver == "randomized" else None
            found = exact or decompose_by_gram(side, 4)
            torch.testing.assert_close(found.S[:4], decompose(side).S[:4], rtol=1e-9, atol=0)
            rebuilt = (found.top(4).U * found.S[:4]) @ found.top(4).Vh
            true = decompose(side).top(4)
            torch.testing.assert_close(rebuilt, (true.U * true.S) @ true.Vh, rtol=0, atol=1e-8)


@pytest.mark.parametrize("solver", ["gram", "randomized", "warm", "warm from few"])
def test_a_zero_matrix_has_no_singular_value_and_no_error(solver: str) -> None:
    found = solved(solver, Case(torch.zeros(30, 40), 3, "zero", 0))
    assert found.S.tolist() == [0.0] * len(found.S)
    assert found.singular_value_error == 0.0 and found.angle_error_deg(3) == 90.0
    assert bool(torch.isfinite(found.U).all()) and bool(torch.isfinite(found.Vh).all())


@pytest.mark.parametrize("solver", ["gram", "randomized", "warm"])
@FEW
@given(case=cases(("power law", "geometric", "clustered")), seed=seeds)
def test_a_rotation_turns_the_vectors_and_leaves_the_values(solver: str, case: Case, seed: int) -> None:
    n, m = case.W.shape
    P, Q = orthogonal(n, seed).to(case.W), orthogonal(m, seed + 1).to(case.W)
    turned = Case(P @ case.W @ Q, case.k, case.kind, case.seed)
    here, there = solved(solver, case), solved(solver, turned)
    assert here.singular_value_error is not None and there.singular_value_error is not None
    rounding = 8 * torch.finfo(case.W.dtype).eps * here.S[0].item()
    error = here.singular_value_error + there.singular_value_error + rounding
    errors = [svd.angle_error_deg(case.k) or 0.0 for svd in (here, there)]
    if max(errors) < 45:
        assert (here.S - there.S)[: case.k].abs().max().item() <= error
        gap = (here.S[case.k - 1] - here.S[case.k]).item()
        slack = sum(errors) + math.degrees(rounding / gap) * case.k + TINY_DEG
        assert largest_angle(P @ here.U[:, : case.k], there.U[:, : case.k]) <= slack
        assert largest_angle(Q.T @ here.Vh[: case.k].T, there.Vh[: case.k].T) <= slack


@FEW
@given(cases(("power law", "geometric")), st.sampled_from([1e-4, 1e-3]), st.booleans())
def test_a_warm_start_follows_a_small_update_to_second_order(case: Case, size: float, bound_errors: bool) -> None:
    """Values to one in a million, angles to one in a hundred, where the update is small beside the gap."""
    W = matrix_of(spectrum_of(case.kind, min(case.W.shape), case.seed), *case.W.shape, case.seed)
    k = min(case.k, 4)
    case = Case(W, k, case.kind, case.seed)
    moved = case.moved(size)
    base, true = decompose_by_gram(W, k), decompose(moved)
    found = decompose_warm(moved, base, k, TOLERANCE, bound_errors)
    if bound_errors:
        torch.testing.assert_close(found.S[:k], true.S[:k], rtol=1e-6, atol=0)
    else:
        torch.testing.assert_close(found.S[:k], true.S[:k], rtol=1e-4, atol=0)
    for ours, theirs, start in ((found.U, true.U, base.U), (found.Vh.T, true.Vh.T, base.Vh.T)):
        measured, expected = (largest_angle(start[:, :k], end[:, :k]) for end in (ours, theirs))
        assert measured == pytest.approx(expected, rel=1e-2)


def test_a_warm_start_from_where_the_matrix_is_stays_there() -> None:
    case = Case(matrix_of(spectrum_of("power law", 40, 1), 40, 60, 1), 5, "power law", 1)
    base = decompose_by_gram(case.W, case.k)
    found = decompose_warm(case.W, base, case.k, TOLERANCE)
    torch.testing.assert_close(found.S[:5], base.S[:5], rtol=1e-12, atol=0)
    assert largest_angle(base.U[:, :5], found.U[:, :5]) < TINY_DEG


@pytest.mark.parametrize("solver", ["gram", "randomized", "warm", "warm from few"])
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_the_scale_decides_nothing_though_squares_would_overflow(solver: str, scale: float) -> None:
    case = Case(matrix_of(spectrum_of("power law", 50, 4), 50, 60, 4).float(), 5, "power law", 4)
    scaled = Case(scale * case.W, case.k, case.kind, case.seed)
    here, there = solved(solver, case, case.moved(0.1)), solved(solver, scaled, scale * case.moved(0.1))
    torch.testing.assert_close(there.S[:5] / scale, here.S[:5], rtol=1e-6, atol=0)
    require_bounded(there, scale * case.moved(0.1), 5)


def test_a_matrix_that_was_emptied_is_followed_from_any_base() -> None:
    for kind in KINDS:
        case = Case(matrix_of(spectrum_of(kind, 30, 0), 30, 40, 0), 2, kind, 0)
        assert solved("warm", case, torch.zeros(30, 40, dtype=torch.float64)).S[:2].tolist() == [0.0, 0.0]


def test_the_start_decides_nothing_but_rounding() -> None:
    case = Case(matrix_of(spectrum_of("geometric", 40, 2), 40, 60, 2), 5, "geometric", 2)
    one, two = (decompose_randomized(case.W, 5, 1e-10, torch.Generator().manual_seed(s)) for s in (0, 1))
    torch.testing.assert_close(one.S[:5], two.S[:5], rtol=1e-9, atol=0)
    again = decompose_randomized(case.W, 5, 1e-10, torch.Generator().manual_seed(0))
    assert torch.equal(one.U, again.U) and torch.equal(one.S, again.S)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_spectrum_of_an_update_is_lapacks_to_what_its_ranks_need(kind: str, dtype: torch.dtype) -> None:
    n, m = 70, 90
    for scale in (1e-20, 1.0, 1e10):
        update = (scale * matrix_of(spectrum_of(kind, n, 3), n, m, 3)).to(dtype)
        for side in (update, update.T):
            found, true = update_spectrum(side), torch.linalg.svdvals(side.double())
            largest = true[0].item()
            assert found.shape == true.shape and found.dtype == torch.float64
            assert (found.square() - true.square()).abs().max().item() <= 1e-5 * largest**2
            assert bool((found[1:] <= found[:-1]).all())
            for rank in (stable_rank, effective_rank):
                if kind == "zero":
                    assert rank(found) is None
                else:
                    assert rank(found) == pytest.approx(rank(true), rel=1e-2)
            assert found[0].item() == pytest.approx(largest, rel=1e-5)
