"""bfloat16's spacing, classes and changes, on every bit pattern there is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offprincipal.errors import NonFiniteTensor
from offprincipal.geometry.precision import (
    bf16_ulp,
    changed,
    exponent_class,
    hidden_fraction,
    require_finite,
    unchanged_fraction,
)

ALL_BITS = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
ALL_FINITE = ALL_BITS[torch.isfinite(ALL_BITS)]
POSITIVE = ALL_FINITE[(ALL_FINITE > 0)].sort().values
SMALLEST = 2.0**-133


def test_the_spacing_is_the_distance_to_the_next_bfloat16_away_from_zero() -> None:
    gaps = POSITIVE[1:].double() - POSITIVE[:-1].double()
    assert torch.equal(bf16_ulp(POSITIVE[:-1]).double(), gaps)


def test_the_spacing_ignores_the_sign_and_is_smallest_at_zero() -> None:
    assert torch.equal(bf16_ulp(-POSITIVE), bf16_ulp(POSITIVE))
    assert bf16_ulp(torch.tensor([0.0, -0.0, SMALLEST])).tolist() == [SMALLEST] * 3


def test_entries_of_one_class_have_the_same_neighbours_at_the_same_distances() -> None:
    inner = POSITIVE[1:-1]
    up = POSITIVE[2:].double() - inner.double()
    down = inner.double() - POSITIVE[:-2].double()
    for name in exponent_class(inner).unique():
        members = exponent_class(inner) == name
        assert len(up[members].unique()) == len(down[members].unique()) == 1


def test_a_power_of_two_is_a_class_of_its_own() -> None:
    assert exponent_class(torch.tensor([2.0])).item() not in exponent_class(torch.tensor([1.99, 2.02, 3.0])).tolist()


def test_classes_fit_their_table_and_ignore_the_sign() -> None:
    classes = exponent_class(ALL_FINITE)
    assert classes.min() >= 0 and classes.max() < 512
    assert torch.equal(classes, exponent_class(-ALL_FINITE))


def test_zeros_of_either_sign_are_equal() -> None:
    assert not changed(torch.tensor([0.0, -0.0]), torch.tensor([-0.0, 0.0])).any()


def test_subnormals_count_as_different_numbers() -> None:
    assert changed(torch.tensor([0.0]), torch.tensor([SMALLEST])).item()


@given(st.integers(1, len(POSITIVE) - 2), st.floats(-1, 1))
def test_a_weight_moves_exactly_past_half_its_spacing(index: int, step: float) -> None:
    """The paper's Gate III: up past half a ULP, down past half the gap to the lower neighbour."""
    weight = POSITIVE[index].double()
    up = (POSITIVE[index + 1].double() - weight).item()
    down = (weight - POSITIVE[index - 1].double()).item()
    moved = weight + step * up
    if abs(step * up - up / 2) < 1e-6 * up or abs(step * up + down / 2) < 1e-6 * down:
        return  # a tie, decided by the even mantissa
    expected = step * up > up / 2 or -step * up > down / 2
    # float64 to bfloat16 rounds once here: the sum is exact in float64.
    assert changed(weight[None], moved[None]).item() == expected


def test_for_normal_numbers_changed_is_the_papers_probe() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(10_000, generator=generator).bfloat16()
    b = (a.float() * (1 + 0.01 * torch.randn(10_000, generator=generator))).bfloat16()
    probe = (a.double() - b.double()).abs() > 1e-3 * torch.maximum(a.double().abs(), b.double().abs())
    assert torch.equal(changed(a, b), probe)


def test_fractions_of_known_updates() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    tuned = torch.tensor([1.0, 1.001, 1.0078125, 2.0])
    assert unchanged_fraction(base, tuned) == 0.5
    assert hidden_fraction(base, tuned) == 0.25


def test_fractions_of_nothing_are_undefined() -> None:
    assert unchanged_fraction(torch.empty(0, 3), torch.empty(0, 3)) is None
    assert hidden_fraction(torch.empty(0), torch.empty(0)) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_a_number_is_refused_with_its_place(bad: float) -> None:
    x = torch.zeros(2, 3)
    x[1, 2] = bad
    with pytest.raises(NonFiniteTensor, match=r"1 of 6 entries.*\[1, 2\]"):
        require_finite(x)
    with pytest.raises(NonFiniteTensor):
        changed(torch.zeros(2, 3), x)


def test_a_float32_beyond_bfloat16_is_refused() -> None:
    with pytest.raises(NonFiniteTensor):
        bf16_ulp(torch.tensor([3.4028235e38]))
