"""Masks have exact sizes, break ties by index, nest, and move with the weights."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian, orthogonal, seeds

from offprincipal.geometry.masks import ALPHAS, entry_ranks, low_magnitude_ranks, mask_size, masks_at, random_ranks
from offprincipal.geometry.principal import principal_ranks
from offprincipal.geometry.spectrum import decompose


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=30))
def test_ranks_sort_by_score_then_by_index(scores: list[float]) -> None:
    ranks = entry_ranks(torch.tensor(scores)).tolist()
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert [ranks[i] for i in expected] == list(range(len(scores)))


@given(st.integers(1, 9), st.integers(1, 9), seeds, st.sampled_from(ALPHAS))
def test_every_mask_has_exactly_its_size(n: int, m: int, seed: int, alpha: float) -> None:
    W = gaussian(n, m, seed=seed)
    svd = decompose(W).top(1)
    ranks = {
        "principal": principal_ranks(svd.U, svd.S, svd.Vh),
        "low_magnitude": low_magnitude_ranks(W),
        "random": random_ranks(W.shape, torch.Generator().manual_seed(seed)),
    }
    masks = masks_at(alpha, ranks)
    for name in ranks:
        assert int(masks[name].sum()) == mask_size(n * m, alpha) == round(alpha * (n * m))
    assert torch.equal(masks["safe"], masks["low_magnitude"] | ~masks["principal"])


def test_a_denser_mask_holds_a_sparser_one() -> None:
    ranks = {"low_magnitude": low_magnitude_ranks(gaussian(20, 30, seed=0))}
    masks = [masks_at(alpha, ranks)["low_magnitude"] for alpha in ALPHAS]
    for sparse, dense in itertools.pairwise(masks):
        assert bool((dense | ~sparse).all())


@given(seeds)
def test_masks_follow_a_permutation_of_rows_and_columns(seed: int) -> None:
    W = gaussian(8, 6, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(8, generator=generator), torch.randperm(6, generator=generator)
    moved = W[rows][:, columns]

    def principal(W: torch.Tensor) -> torch.Tensor:
        svd = decompose(W).top(2)
        return principal_ranks(svd.U, svd.S, svd.Vh) < 24

    assert torch.equal(principal(moved), principal(W)[rows][:, columns])
    assert torch.equal(low_magnitude_ranks(moved), low_magnitude_ranks(W)[rows][:, columns])


def test_the_principal_mask_of_a_rank_one_matrix_is_its_largest_entries() -> None:
    W = torch.outer(torch.tensor([4.0, 2.0, 1.0]), torch.tensor([1.0, -3.0])).double()
    svd = decompose(W).top(1)
    mask = principal_ranks(svd.U, svd.S, svd.Vh) < 2
    assert mask.tolist() == [[False, True], [False, True], [False, False]]


def test_the_principal_mask_ignores_what_lies_outside_the_top_subspace() -> None:
    U, V = orthogonal(6, seed=1), orthogonal(5, seed=2)
    strong = 10 * torch.outer(U[:, 0], V[0])
    weak = torch.outer(U[:, 1], V[1])
    for W in (strong, strong + weak):
        svd = decompose(W).top(1)
        assert torch.equal(principal_ranks(svd.U, svd.S, svd.Vh) < 15, entry_ranks(strong.abs()) < 15)


def test_a_constant_matrix_fills_its_masks_by_index() -> None:
    assert (low_magnitude_ranks(torch.ones(2, 3)) < 4).tolist() == [[True, True, True], [True, False, False]]
    assert (low_magnitude_ranks(torch.tensor([[0.0, -0.0]])) < 1).tolist() == [[True, False]]


def test_a_random_mask_is_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = sum((random_ranks(torch.Size([4, 5]), generator) < 5).double() for _ in range(2000))
    assert isinstance(hits, torch.Tensor)
    sd = (2000 * 0.25 * 0.75) ** 0.5
    assert float((hits - 500).abs().max()) < 5 * sd
