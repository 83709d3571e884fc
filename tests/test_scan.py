"""The compiled scan counts what the definitions say, entry by entry, on any bits and any shape."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from bits import Array, as_array, class_counts, codes_of
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian, seeds
from numpy.typing import NDArray
from torch import Tensor

from offprincipal.errors import NonFiniteTensor
from offprincipal.geometry import bits, cuts, precision, scan
from offprincipal.geometry.masks import entry_ranks, low_magnitude_ranks, mask_size

BFLOAT16 = ml_dtypes.bfloat16
FINITE = np.concatenate([np.arange(0x7F80), 0x8000 + np.arange(0x7F80)]).astype(np.uint16)
# Both zeros, the smallest and the largest subnormal, the smallest normal, powers of two, their neighbours, the largest.
NOTABLE = np.array(
    [*(0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3F81), *(0xBF80, 0x4000, 0x7F7F, 0xFF7F)],
    np.uint16,
)
ZERO = 1  # its exponent class, which lies below that of the subnormals
Bits = NDArray[np.uint16]


@st.composite
def bit_matrices(draw: st.DrawFn, least: int = 0) -> tuple[Bits, Bits]:
    """A base and a tuned matrix of finite bits: any numbers at all, a few notable ones, or bits of real weights."""
    n, m = draw(st.integers(least, 9)), draw(st.integers(least, 9))
    rng = np.random.default_rng(draw(seeds))
    kind = draw(st.sampled_from(["any", "notable", "weights"]))
    if kind == "weights":
        base = bits.bf16_codes(0.02 * rng.standard_normal((n, m)))
        other = bits.bf16_codes(0.02 * rng.standard_normal((n, m)))
    else:
        base, other = (rng.choice(FINITE if kind == "any" else NOTABLE, (n, m)) for _ in range(2))
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    return base, np.where(rng.random((n, m)) < share, other, base)


@st.composite
def off_grid(draw: st.DrawFn) -> NDArray[np.float32]:
    """float32 numbers close together, so that many round to one bfloat16 number, and some repeat."""
    n, m = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(seeds))
    values = (1 + 0.02 * rng.standard_normal((n, m))).astype(np.float32) * rng.choice([-1, 1], (n, m))
    return np.where(rng.random((n, m)) < 0.3, np.float32(1.001), values).astype(np.float32)


def as_tensor(codes: Bits) -> Tensor:
    return torch.from_numpy(codes.view(np.int16).copy()).view(torch.bfloat16)


def differs(base: Bits, tuned: Bits) -> NDArray[np.bool_]:
    return precision.changed(as_tensor(base), as_tensor(tuned)).numpy()


def smallest(values: Tensor, size: int) -> NDArray[np.bool_]:
    """The low-magnitude mask by its definition."""
    return (low_magnitude_ranks(values) < size).numpy()


def require_definition(base: Bits, tuned: Bits) -> None:
    """Every count of a scan is that of a loop over entries."""
    found, moved = scan.scan(base, tuned), differs(base, tuned)
    magnitudes = (base & 0x7FFF).reshape(-1)
    np.testing.assert_array_equal(found.entries, np.bincount(magnitudes, minlength=bits.CODES))
    np.testing.assert_array_equal(found.changed, np.bincount(magnitudes[moved.reshape(-1)], minlength=bits.CODES))
    np.testing.assert_array_equal(found.rows, moved.sum(axis=1))
    np.testing.assert_array_equal(found.columns, moved.sum(axis=0))
    assert found.changed_count == int(moved.sum())


def require_line_classes(base: Bits) -> None:
    """Every count of a class in a line is that of a loop over entries."""
    occur, rows, columns = scan.classes_of_lines(base)
    classes = precision.exponent_class(as_tensor(base)).numpy()
    assert occur.tolist() == sorted(set(classes.flat), key=lambda name: -1 if name == ZERO else name)
    for found, axis in ((rows, 1), (columns, 0)):
        expected = np.stack([(classes == name).sum(axis=axis) for name in occur])
        np.testing.assert_array_equal(found, expected)


@given(bit_matrices())
def test_a_scan_counts_by_magnitude_row_and_column(pair: tuple[Bits, Bits]) -> None:
    require_definition(*pair)


@given(bit_matrices())
def test_counts_by_class_are_those_of_the_exponent_class(pair: tuple[Bits, Bits]) -> None:
    base, tuned = pair
    found, classes = scan.scan(base, tuned), precision.exponent_class(as_tensor(base))
    moved = torch.from_numpy(differs(base, tuned))
    np.testing.assert_array_equal(scan.count_by_class(found.entries), class_counts(classes))
    np.testing.assert_array_equal(scan.count_by_class(found.changed), class_counts(classes, moved))


def test_every_magnitude_code_falls_into_its_exponent_class() -> None:
    classes = precision.exponent_class(as_tensor(FINITE))
    counted = scan.count_by_class(scan.count_codes(FINITE))
    np.testing.assert_array_equal(counted, class_counts(classes))


@given(bit_matrices(least=1))
def test_classes_of_lines_are_counted_line_by_line(pair: tuple[Bits, Bits]) -> None:
    require_line_classes(pair[0])


@pytest.mark.parametrize(
    ("n", "m"),
    [(3, 4095), (3, 4096), (3, 4097), (1, 8193), (4097, 1), (40_000, 3), (3, 70_000), (65_537, 2), (32_768, 2)],
)
@pytest.mark.parametrize("everything", [True, False])
def test_blocks_and_narrow_counters_leave_no_seam(n: int, m: int, everything: bool) -> None:
    rng = np.random.default_rng(n + m)
    base = rng.choice(NOTABLE, (n, m)) if not everything else np.full((n, m), 0x3F80, np.uint16)
    tuned = base ^ np.uint16(1) if everything else np.where(rng.random((n, m)) < 0.5, rng.choice(NOTABLE, (n, m)), base)
    require_definition(base, tuned)
    require_line_classes(base)
    sizes = np.array([mask_size(n * m, alpha) for alpha in (0.05, 0.5, 1.0)])
    require_low_magnitude_masks(base, sizes)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_an_empty_matrix_has_nothing_to_count(shape: tuple[int, int]) -> None:
    empty = np.zeros(shape, np.uint16)
    require_definition(empty, empty)
    assert scan.mark_changed(empty, empty).shape == shape and len(bits.pack(empty == 1)) == 0


@given(bit_matrices())
def test_equal_matrices_have_no_change_whatever_their_bits(pair: tuple[Bits, Bits]) -> None:
    base, _ = pair
    found = scan.scan(base, base)
    assert found.changed_count == 0 and not found.rows.any() and not found.columns.any()
    assert not scan.mark_changed(base, base).any()


def test_zeros_of_either_sign_are_equal_and_other_signs_are_not() -> None:
    base, tuned = np.array([[0x0000, 0x8000, 0x3F80, 0x0001]], np.uint16), np.array([[0x8000, 0, 0xBF80, 0x8001]])
    assert scan.scan(base, tuned.astype(np.uint16)).columns.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7FFF, 0xFFFF, 0x7F81])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_found_on_either_side(bad: int, side: int) -> None:
    pair = [np.full((3, 5000), 0x3F80, np.uint16) for _ in range(2)]
    pair[side][2, 4999] = bad
    with pytest.raises(NonFiniteTensor):
        scan.scan(*pair)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16, np.float32, np.float64])
def test_not_a_number_is_named_with_its_place(dtype: type) -> None:
    values = np.zeros((2, 3), dtype)
    bits.require_storable(values)
    values[1, 2] = np.nan
    with pytest.raises(NonFiniteTensor, match=r"1 of 6 entries are NaN or infinite, the first at \[1, 2\]"):
        bits.require_storable(values)
    values[0, 1] = -np.inf
    with pytest.raises(NonFiniteTensor, match=r"2 of 6 entries.*\[0, 1\]"):
        bits.require_storable(values)


@pytest.mark.parametrize("largest", [np.float32(-3.4e38), np.float64(1e300)])
def test_a_number_beyond_bfloat16_is_named_with_its_size(largest: np.floating) -> None:
    with pytest.raises(NonFiniteTensor, match=r"an entry of size (3\.4e\+38|1e\+300) is beyond bfloat16"):
        bits.require_storable(np.array([1.0, largest], dtype=largest.dtype))
    with pytest.raises(NonFiniteTensor):
        scan.scan(*[bits.bf16_codes(np.array([[largest]], dtype=largest.dtype))] * 2)


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=20))
def test_rounding_to_bits_is_that_of_torch(values: list[float]) -> None:
    array = np.array(values, np.float32)
    expected = torch.tensor(values, dtype=torch.float32).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bits.bf16_codes(array), expected)
    np.testing.assert_array_equal(bits.bf16_codes(array.astype(BFLOAT16)), expected)
    np.testing.assert_array_equal(bits.bf16_codes(array.astype(np.float64)), expected)


def test_bits_of_bfloat16_are_no_copy() -> None:
    values = np.ones((2, 3), BFLOAT16)
    assert np.shares_memory(bits.bf16_codes(values), values)


@given(bit_matrices(), st.data())
def test_counting_codes_of_chosen_entries(pair: tuple[Bits, Bits], data: st.DataObject) -> None:
    codes, rng = pair[0], np.random.default_rng(data.draw(seeds))
    chosen = rng.random(codes.shape) < 0.5
    for mask in (chosen, np.ones_like(chosen), np.zeros_like(chosen)):
        expected = np.bincount(codes[mask] & 0x7FFF, minlength=bits.CODES)
        np.testing.assert_array_equal(scan.count_codes(codes, mask), expected)
    np.testing.assert_array_equal(scan.count_codes(codes), scan.count_codes(codes, np.ones_like(chosen)))


@st.composite
def mask_sizes(draw: st.DrawFn, size: int) -> Array:
    """Of nested masks, from the smallest up."""
    return np.array(sorted(draw(st.lists(st.integers(0, size), min_size=1, max_size=4))))


def require_low_magnitude_masks(base: Bits, sizes: Array) -> None:
    """Cuts and ties give the mask of the smallest magnitudes, ties by index."""
    levels = cuts.low_magnitude_levels(base.view(BFLOAT16), *cuts.low_magnitude_cuts(scan.count_codes(base), sizes))
    for a, size in enumerate(sizes):
        mask = smallest(as_tensor(base).float(), size)
        assert mask.sum() == size
        np.testing.assert_array_equal(levels <= a, mask)


@given(bit_matrices(least=1), st.data())
def test_the_low_magnitude_mask_by_counts_is_that_by_sorting(pair: tuple[Bits, Bits], data: st.DataObject) -> None:
    require_low_magnitude_masks(pair[0], data.draw(mask_sizes(pair[0].size)))


@given(off_grid(), st.data())
def test_off_the_grid_the_low_magnitude_mask_sorts_within_a_rounding_cell(
    values: NDArray[np.float32], data: st.DataObject
) -> None:
    sizes = data.draw(mask_sizes(values.size))
    for stored in (values, values.astype(np.float64)):
        ends = cuts.low_magnitude_cuts(scan.count_codes(bits.bf16_codes(stored)), sizes)
        levels = cuts.low_magnitude_levels(stored, *ends)
        for a, size in enumerate(sizes):
            np.testing.assert_array_equal(levels <= a, smallest(torch.from_numpy(stored), size))


@given(
    st.integers(1, 8),
    st.integers(1, 8),
    seeds,
    st.sampled_from(["ties", "zeros", "normal", "one half"]),
    st.data(),
)
def test_masks_of_the_largest_scores_are_those_by_sorting(
    n: int, m: int, seed: int, kind: str, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    scores = {
        "ties": rng.choice([0.5, 1.0, 2.0], (n, m)),
        "zeros": rng.choice([0.0, 0.0, 1e-45, 3e38], (n, m)),
        "normal": np.abs(rng.standard_normal((n, m))),
        "one half": 1 + rng.integers(0, 4, (n, m)) * 2.0**-23,  # the upper sixteen bits are all the same
    }[kind].astype(np.float32)
    sizes = data.draw(mask_sizes(n * m))
    ranks = entry_ranks(torch.from_numpy(scores)).numpy()
    levels = cuts.largest_levels(scores, *cuts.largest_cuts(scores, sizes))
    for a, size in enumerate(sizes):
        np.testing.assert_array_equal(levels <= a, ranks < size)


@given(bit_matrices(least=1), seeds)
def test_classes_by_levels_are_those_of_the_masks_together(pair: tuple[Bits, Bits], seed: int) -> None:
    codes, rng = pair[0], np.random.default_rng(seed)
    one, two = (rng.integers(0, 4, codes.shape).astype(np.uint8) for _ in range(2))
    counts = cuts.classes_by_levels(codes, one, two, 3)
    classes = precision.exponent_class(as_tensor(codes))
    for a, b in itertools.product(range(4), repeat=2):
        chosen = torch.from_numpy((one == a) & (two == b))
        np.testing.assert_array_equal(counts[a, b], class_counts(classes, chosen))


@given(st.integers(0, 200), seeds)
def test_packed_masks_come_back(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = [rng.random(size) < 0.6 for _ in range(3)]
    packed = [bits.pack(mask) for mask in masks]
    for mask, words in zip(masks, packed, strict=True):
        assert len(words) == -(-size // 64)
        np.testing.assert_array_equal(bits.unpack(words, size), mask)


@given(bit_matrices())
def test_what_changed_is_marked(pair: tuple[Bits, Bits]) -> None:
    np.testing.assert_array_equal(scan.mark_changed(*pair), differs(*pair))


@given(
    st.integers(0, 7), st.integers(0, 7), seeds, *[st.sampled_from([BFLOAT16, np.float16, np.float32, np.float64])] * 2
)
def test_norms_are_those_in_float64(n: int, m: int, seed: int, of_base: type, of_tuned: type) -> None:
    base, tuned = (gaussian(n, m, seed=seed + i).numpy().astype(dtype) for i, dtype in enumerate((of_base, of_tuned)))
    wide = [side.astype(np.float64) for side in (base, tuned)]
    assert scan.update_square(base, tuned) == pytest.approx(np.square(wide[1] - wide[0]).sum(), rel=1e-13)
    assert scan.square(base) == pytest.approx(np.square(wide[0]).sum(), rel=1e-13)
    codes = bits.bf16_codes(base)
    rounded = codes.view(BFLOAT16).astype(np.float64)
    assert scan.square_of_codes(scan.count_codes(codes)) == pytest.approx(np.square(rounded).sum(), rel=1e-13)


def test_norms_of_subnormals_and_of_the_largest_numbers_neither_vanish_nor_overflow() -> None:
    for code in (0x0001, 0x7F7F):
        one = np.array([[code, code | 0x8000]], np.uint16).view(BFLOAT16)
        value = float(one[0, 0])
        assert scan.update_square(np.zeros_like(one), one) == pytest.approx(2 * value**2, rel=1e-15)
        assert scan.square_of_codes(scan.count_codes(bits.bf16_codes(one))) == pytest.approx(2 * value**2, rel=1e-15)


@given(off_grid(), st.booleans())
def test_the_grid_holds_bfloat16_numbers_alone(values: NDArray[np.float32], rounded: bool) -> None:
    stored = values.astype(BFLOAT16).astype(np.float32) if rounded else values
    expected = bool((stored.astype(BFLOAT16).astype(np.float32) == stored).all())
    assert bits.on_bf16_grid(stored) == bits.on_bf16_grid(stored.astype(np.float64)) == expected
    assert bits.on_bf16_grid(values.astype(BFLOAT16))


@given(bit_matrices(least=2))
def test_strided_matrices_count_as_their_copies(pair: tuple[Bits, Bits]) -> None:
    base, tuned = (side[:, ::2] for side in pair)
    require_definition(base, tuned)
    require_definition(base.T, tuned.T)
    require_line_classes(base.T)


def test_torch_and_numpy_agree_on_all_finite_bits() -> None:
    np.testing.assert_array_equal(codes_of(as_tensor(FINITE)), FINITE)
    np.testing.assert_array_equal(as_array(as_tensor(FINITE)).view(np.uint16), FINITE)
