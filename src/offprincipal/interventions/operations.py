"""Invertible linear maps along one axis of a tensor: block rotations, permutations and scalings.

Tensors in, tensors out; knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Operation(Protocol):
    """An invertible linear map along one axis."""

    def along(self, x: Tensor, axis: int) -> Tensor:
        """The tensor with the map applied to every vector along an axis; same shape."""
        ...

    @property
    def inverse(self) -> "Operation":
        """The inverse map."""
        ...


@dataclass(frozen=True)
class Rotation:
    """Multiplication by a block-diagonal orthogonal matrix.

    Args:
        blocks: float64, (g, d, d), each orthogonal; entries b·d to (b + 1)·d − 1 of the axis are
            multiplied by block b from the left.

    >>> quarter = Rotation(torch.tensor([[[0.0, -1.0], [1.0, 0.0]]], dtype=torch.float64))
    >>> quarter.along(torch.tensor([1.0, 0.0, ], dtype=torch.float64), 0)
    tensor([0., 1.], dtype=torch.float64)
    """

    blocks: Tensor

    def along(self, x: Tensor, axis: int) -> Tensor:
        count, size, _ = self.blocks.shape
        last = x.movedim(axis, -1)
        parted = last.reshape(*last.shape[:-1], count, size)  # (…, g, d)
        turned = torch.einsum("...gd,ged->...ge", parted, self.blocks)
        return turned.flatten(-2).movedim(-1, axis).contiguous()

    @property
    def inverse(self) -> "Rotation":
        return Rotation(self.blocks.mT)


@dataclass(frozen=True)
class Permutation:
    """A reordering.

    Args:
        order: int64, (n,): entry i of the result is entry order[i] of the input.

    >>> Permutation(torch.tensor([2, 0, 1])).along(torch.tensor([10.0, 20.0, 30.0]), 0)
    tensor([30., 10., 20.])
    """

    order: Tensor

    def along(self, x: Tensor, axis: int) -> Tensor:
        return x.index_select(axis, self.order)

    @property
    def inverse(self) -> "Permutation":
        return Permutation(self.order.argsort())


@dataclass(frozen=True)
class Scaling:
    """Multiplication by a diagonal matrix.

    Args:
        factors: float64, (n,); not zero if the inverse is used.

    >>> Scaling(torch.tensor([2.0, 4.0])).inverse.along(torch.tensor([1.0, 1.0]), 0)
    tensor([0.5000, 0.2500])
    """

    factors: Tensor

    def along(self, x: Tensor, axis: int) -> Tensor:
        return x * self.factors.reshape(-1, *(1,) * (x.dim() - 1 - axis % x.dim()))

    @property
    def inverse(self) -> "Scaling":
        return Scaling(1 / self.factors)


@dataclass(frozen=True)
class Step:
    """One operation on one axis of a tensor."""

    axis: int
    operation: Operation


def applied(steps: Sequence[Step], x: Tensor) -> Tensor:
    """The tensor after all steps, in order."""
    for step in steps:
        x = step.operation.along(x, step.axis)
    return x


def taken_back(steps: Sequence[Step], x: Tensor) -> Tensor:
    """The tensor from which the steps give this one: their inverses in reverse order."""
    for step in reversed(steps):
        x = step.operation.inverse.along(x, step.axis)
    return x


def by_heads(order: Tensor, size: int) -> Permutation:
    """A permutation of heads as a permutation of entries.

    Args:
        order: int64, (heads,).
        size: entries per head.

    >>> by_heads(torch.tensor([1, 0]), 2).order
    tensor([2, 3, 0, 1])
    """
    return Permutation((order[:, None] * size + torch.arange(size)).flatten())
