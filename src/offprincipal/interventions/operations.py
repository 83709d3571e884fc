"""What can be done to one axis of a tensor and undone again: rotate it in blocks, permute it, scale it.

Tensors in, tensors out; knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Operation(Protocol):
    """A linear map along one axis."""

    def along(self, x: Tensor, axis: int) -> Tensor:
        """The tensor with the map applied to every vector along an axis; same shape."""
        ...

    @property
    def inverse(self) -> "Operation":
        """The map that takes it back."""
        ...


@dataclass(frozen=True)
class Rotation:
    """A block-diagonal orthogonal matrix.

    Args:
        blocks: float64, (g, d, d), each orthogonal; block b turns entries b·d to (b + 1)·d of the axis.

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
        order: int64, (n,): entry i of the result is entry order[i] of what is given.

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
    """A diagonal matrix.

    Args:
        factors: float64, (n,); none is zero where the inverse is wanted.
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
    """The tensor after all steps, in their order."""
    for step in steps:
        x = step.operation.along(x, step.axis)
    return x


def taken_back(steps: Sequence[Step], x: Tensor) -> Tensor:
    """The tensor that the steps turn into this one."""
    for step in reversed(steps):
        x = step.operation.inverse.along(x, step.axis)
    return x


def by_heads(order: Tensor, size: int) -> Permutation:
    """A reordering of heads, as one of their entries.

    Args:
        order: int64, (heads,).
        size: entries a head.

    >>> by_heads(torch.tensor([1, 0]), 2).order
    tensor([2, 3, 0, 1])
    """
    return Permutation((order[:, None] * size + torch.arange(size)).flatten())
