"""Blind updates: as long as the one they are matched to, and knowing nothing of it or the weights but what they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offprincipal.geometry.synthetic import BLIND, blind_update


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from(BLIND))
def test_a_blind_update_has_the_length_of_the_one_it_is_matched_to(n: int, m: int, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    update = rng.standard_normal((n, m)) * np.exp(rng.standard_normal((n, 1)))
    found = blind_update(kind, update, rng)
    assert found.shape == update.shape
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(update))


def test_a_turned_update_keeps_its_singular_values_and_loses_its_place() -> None:
    rng = np.random.default_rng(0)
    update = np.outer(rng.standard_normal(60), rng.standard_normal(40)) + 0.1 * rng.standard_normal((60, 40))
    turned = blind_update("turned", update, rng)
    np.testing.assert_allclose(
        np.linalg.svd(turned, compute_uv=False), np.linalg.svd(update, compute_uv=False), rtol=1e-9
    )
    assert abs((turned * update).sum()) < 0.5 * (update**2).sum()


def test_a_scaled_update_has_the_row_and_column_norms_in_another_order() -> None:
    rng = np.random.default_rng(0)
    update = rng.standard_normal((400, 300)) * np.exp(rng.standard_normal((400, 1))) * np.exp(rng.standard_normal(300))
    found = blind_update("scaled", update, rng)
    for axis in (0, 1):
        one, two = (np.linalg.norm(x, axis=axis) for x in (update, found))
        np.testing.assert_allclose(np.sort(np.log(one)), np.sort(np.log(two)), atol=0.35)
        assert abs(np.corrcoef(np.log(one), np.log(two))[0, 1]) < 0.25


@pytest.mark.parametrize("kind", BLIND)
def test_no_update_stays_none(kind: str) -> None:
    assert not blind_update(kind, np.zeros((3, 4)), np.random.default_rng(0)).any()
