"""Gaussian updates: step length without direction, as drawn, and as it would be stored.

Knows nothing of files, models or layers.
"""

import torch
from torch import Tensor


def isotropic_update(
    shape: torch.Size, norm: float, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A Gaussian update of a given Frobenius norm: step length without direction.

    Args:
        shape: of the result; norm: its Frobenius norm; generator: its randomness, on the CPU.

    Returns:
        (n, m), of `dtype`, on the CPU.

    >>> update = isotropic_update(torch.Size([3, 4]), 2.0, torch.Generator().manual_seed(0))
    >>> round(update.norm().item(), 12)
    2.0
    """
    noise = torch.randn(shape, generator=generator, dtype=dtype)
    return noise.mul_(norm / noise.norm())


def stored_update(base: Tensor, update: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left of an update once the updated weights are stored.

    Args:
        base, update: of one float type and shape; dtype: what the updated weights are stored in.

    Returns:
        Of the type of `base`.

    >>> stored_update(torch.ones(2), torch.tensor([0.001, 0.01]), torch.bfloat16)
    tensor([0.0000, 0.0078])
    """
    return (base + update).to(dtype).to(base.dtype).sub_(base)
