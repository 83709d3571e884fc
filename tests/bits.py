"""Torch tensors as the numpy arrays and bfloat16 bits that are counted, and counts by class from the definitions."""

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offprincipal.geometry.bits import Counts, bf16_codes
from offprincipal.geometry.nulls import dispersion, line_null
from offprincipal.geometry.precision import EXPONENT_CLASSES, exponent_class
from offprincipal.geometry.scan import classes_of_lines

Array = NDArray[Any]


def as_array(tensor: Tensor) -> Array:
    """The same numbers in the same type."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def codes_of(tensor: Tensor) -> NDArray[np.uint16]:
    """bfloat16 bits, the shape of the tensor."""
    return bf16_codes(as_array(tensor))


def class_counts(classes: Tensor, mask: Tensor | None = None) -> Counts:
    """Entries of each exponent class, of those in the mask where one is given."""
    chosen = classes if mask is None else classes[mask]
    return torch.bincount(chosen.flatten(), minlength=EXPONENT_CLASSES).numpy()


def line_moments(base: Tensor, moved: Tensor, dim: int) -> tuple[Counts, Array, Array]:
    """Change counts of rows (dim 0) or columns (dim 1), with their mean and variance under the precision null."""
    occur, *sides = classes_of_lines(codes_of(base))
    classes = exponent_class(base)
    totals = class_counts(classes)[occur], class_counts(classes, moved)[occur]
    return moved.sum(dim=1 - dim).numpy(), *line_null(sides[dim], *totals)


def line_dispersion(base: Tensor, moved: Tensor, dim: int) -> float | None:
    return dispersion(*line_moments(base, moved, dim))
