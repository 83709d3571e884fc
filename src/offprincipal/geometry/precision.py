"""Precision: what bfloat16 storage lets an update show.

Knows nothing of files, models or layers: tensors in, tensors and numbers out.
"""

import torch
from torch import Tensor

from offprincipal.errors import NonFiniteTensor

EXPONENT_CLASSES = 512
_MANTISSA_BITS = 7
_SIGNLESS = 0x7FFF


def require_finite(x: Tensor) -> Tensor:
    """`x` itself.

    Raises:
        NonFiniteTensor: it holds NaN or infinity; the message says how many entries and where the first is.

    >>> require_finite(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        bad = (~finite).flatten().nonzero()[:, 0]
        first = [int(i) for i in torch.unravel_index(bad[0], x.shape)]
        raise NonFiniteTensor(f"{len(bad):,} of {x.numel():,} entries are NaN or infinite, the first at {first}")
    return x


def to_bf16(x: Tensor) -> Tensor:
    """`x` rounded to the nearest bfloat16, ties to even; the shape of `x`.

    Raises:
        NonFiniteTensor: `x` holds NaN or infinity, or a value that overflows bfloat16.

    >>> to_bf16(torch.tensor([1.003, 1.005])).tolist()
    [1.0, 1.0078125]
    """
    rounded = require_finite(x).to(torch.bfloat16)
    if not bool(torch.isfinite(rounded).all()):
        largest = x.abs().max().item()
        raise NonFiniteTensor(f"an entry of size {largest:.4g} is beyond bfloat16's largest number, 3.39e38")
    return rounded


def bf16_ulp(x: Tensor) -> Tensor:
    """Spacing of bfloat16 at each |x|: the smallest step that a stored weight can make.

    Args:
        x: any float tensor, any shape; rounded to bfloat16 first.

    Returns:
        float32, the shape of `x`, in the units of `x`; 2**-133 at zero and for subnormals. Below a power of two the
        spacing is half of what is returned there.

    Raises:
        NonFiniteTensor: `x` holds NaN or infinity.

    Source: IEEE 754 spacing with 8 significant bits; Gate III of arXiv 2511.08567, corollary 3.6.

    >>> bf16_ulp(torch.tensor([1.0, 1.5, 2.0]))
    tensor([0.0078, 0.0078, 0.0156])
    """
    exponent = (_magnitude_bits(x) >> _MANTISSA_BITS).clamp(min=1)  # subnormals share the smallest normals' spacing
    one = torch.ones_like(exponent, dtype=torch.float64)
    return torch.ldexp(one, exponent - 127 - _MANTISSA_BITS).float()


def half_cells(x: Tensor) -> tuple[Tensor, Tensor]:
    """How far each |x| is from where its bfloat16 rounding would change: outwards, and inwards towards zero.

    Args:
        x: any float tensor, any shape; it need not be a bfloat16 number itself.

    Returns:
        outwards, inwards: float64, the shape of `x`, in its units; half a spacing each for a bfloat16 number, but a
        quarter inwards at a power of two.

    Source: IEEE 754 rounding to nearest.

    >>> half_cells(torch.tensor([1.5, 2.0]))
    (tensor([0.0039, 0.0078], dtype=torch.float64), tensor([0.0039, 0.0039], dtype=torch.float64))
    """
    rounded, ulp = to_bf16(x), bf16_ulp(x).double()
    classes = exponent_class(x)
    at_power = (classes % 2 == 1) & (classes > 3)  # zero and the smallest normal have the same spacing on both sides
    offset = x.double().abs() - rounded.double().abs()
    return ulp / 2 - offset, torch.where(at_power, ulp / 4, ulp / 2) + offset


def exponent_class(x: Tensor) -> Tensor:
    """The class of entries that an update which ignores the weights treats alike.

    Whether a bfloat16 weight moves under a given step depends on its spacing, that is on its exponent; a power of two
    is a class of its own, because its lower neighbour is half as far away.

    Args:
        x: any float tensor, any shape; rounded to bfloat16 first.

    Returns:
        int64, the shape of `x`: 2·(biased exponent) + (1 for a power of two or zero), from 0 to 511.

    Raises:
        NonFiniteTensor: `x` holds NaN or infinity.

    Source: the precision null of `offprincipal.geometry.nulls`.

    >>> exponent_class(torch.tensor([1.0, -1.5, 2.0, 0.0]))
    tensor([255, 254, 257,   1])
    """
    bits = _magnitude_bits(x)
    power_of_two = (bits & ((1 << _MANTISSA_BITS) - 1)) == 0
    return 2 * (bits >> _MANTISSA_BITS) + power_of_two


def changed(base: Tensor, tuned: Tensor) -> Tensor:
    """Which entries differ once both are stored in bfloat16; +0 and -0 are equal.

    For weights stored in bfloat16 this is the paper's probe |a − b| > 1e-3·max(|a|, |b|), because two different
    normal bfloat16 numbers are at least 2**-8 apart, relatively.

    Args:
        base, tuned: float tensors of one shape.

    Returns:
        bool, that shape.

    Raises:
        NonFiniteTensor: one of them holds NaN or infinity.

    Source: arXiv 2511.08567, definition of update sparsity.

    >>> changed(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.001, 1.01, -0.0]))
    tensor([False,  True, False])
    """
    return to_bf16(base) != to_bf16(tuned)


def unchanged_fraction(base: Tensor, tuned: Tensor) -> float | None:
    """Share of the entries whose bfloat16 value is the same before and after; None for an empty tensor.

    Source: the *sparsity* of arXiv 2511.08567 (claim C1).

    >>> unchanged_fraction(torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 2.0]))
    0.75
    """
    return None if base.numel() == 0 else 1 - changed(base, tuned).sum().item() / base.numel()


def hidden_fraction(base_master: Tensor, tuned_master: Tensor) -> float | None:
    """Share of the entries whose float32 master weight moved while the bfloat16 value did not; None if empty.

    Source: Gate III of arXiv 2511.08567.

    >>> hidden_fraction(torch.ones(2), torch.tensor([1.0, 1.001]))
    0.5
    """
    if base_master.numel() == 0:
        return None
    hidden = (base_master != tuned_master) & ~changed(base_master, tuned_master)
    return hidden.sum().item() / base_master.numel()


def _magnitude_bits(x: Tensor) -> Tensor:
    return to_bf16(x).view(torch.int16).to(torch.int64) & _SIGNLESS
