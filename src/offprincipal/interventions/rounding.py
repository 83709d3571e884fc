"""Round float64 weights to the stored dtype, once. Knows nothing of models."""

import torch
from torch import Tensor

from offprincipal.errors import InterventionError
from offprincipal.interventions.plan import Weights


def rounded(weights: Weights, dtype: str) -> Weights:
    """The weights rounded to a dtype.

    Args:
        weights: name -> tensor.
        dtype: `float32`, `bfloat16` or `float16`.

    Raises:
        InterventionError: a value is too large for the dtype.
    """
    stored = {name: rounded_once(x, getattr(torch, dtype)) for name, x in weights.items()}
    for name, x in stored.items():
        if not bool(torch.isfinite(x).all()):
            raise InterventionError(f"{name} holds values too large for {dtype}: choose --dtype bfloat16 or float32")
    return stored


def rounded_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest value of a dtype, ties to even.

    torch converts float64 to 16-bit dtypes through float32, so values that float32 rounds to a tie are rounded twice.
    Here the intermediate float32 value is rounded to odd, which never makes a tie.

    Source: Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008, on rounding to odd.

    >>> x = torch.tensor(1 + 2**-8 + 2**-40, dtype=torch.float64)  # just above the middle of 1 and 1 + 2**-7
    >>> float(x.bfloat16()), float(rounded_once(x, torch.bfloat16))
    (1.0, 1.0078125)
    """
    if x.dtype is not torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    single = x.float()
    below = torch.where(single.double().abs() > x.abs(), single.nextafter(torch.zeros_like(single)), single)
    odd = below.view(torch.int32) | (below.double() != x).int()
    return odd.view(torch.float32).to(dtype)
