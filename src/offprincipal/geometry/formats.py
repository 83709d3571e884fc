"""Storage formats: what float32, bfloat16, float16 and float8 (e4m3) leave of an update, and where.

The precision null of `offprincipal.geometry.nulls`, with each format's own classes of equal spacing in place of
bfloat16's. Knows nothing of files, models or layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offprincipal.errors import NonFiniteTensor
from offprincipal.geometry.nulls import overlap_null
from offprincipal.geometry.precision import require_finite


@dataclass(frozen=True)
class StorageFormat:
    """How a tensor is stored.

    Args:
        name: what tables call it.
        dtype: torch's type.
        least_exponent: of the smallest normal number; below twice that number every spacing is the same.
        scaled: whether a tensor is divided by a scale of its own, so that the base's largest entry becomes the format's
            largest number, as serving engines do for float8. The tuned tensor is stored with the base's scale, and
            saturates: another scale would move every entry.
    """

    name: str
    dtype: torch.dtype
    least_exponent: int
    scaled: bool = False

    def scale_of(self, base: Tensor) -> float:
        """What tensors trained from `base` are divided by.

        >>> FORMATS["fp8"].scale_of(torch.tensor([-3.5, 1.0])), FORMATS["bf16"].scale_of(torch.tensor([7.0]))
        (0.0078125, 1.0)
        """
        largest = base.abs().max().item() if self.scaled and base.numel() else 0.0
        return largest / torch.finfo(self.dtype).max if largest else 1.0

    def store(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """`x` rounded to float32 and then to this format, in units of `scale`; float32, the shape of `x`.

        Raises:
            NonFiniteTensor: `x` holds NaN or infinity, or a format without a scale cannot hold an entry.

        >>> FORMATS["fp8"].store(torch.tensor([1.06, 1.07, 1e6])).tolist()
        [1.0, 1.125, 448.0]
        """
        limit = torch.finfo(self.dtype).max
        in_units = (require_finite(x) / scale).float()
        rounded = (in_units.clamp(-limit, limit) if self.scaled else in_units).to(self.dtype).float()
        if not bool(torch.isfinite(rounded).all()):
            largest = x.abs().max().item()
            raise NonFiniteTensor(f"an entry of size {largest:.4g} is beyond {self.name}'s largest number, {limit:.4g}")
        return rounded

    def classes(self, stored: Tensor) -> Tensor:
        """The class of entries that an update which ignores the weights treats alike once it is stored.

        Entries of one class have the same spacing; a power of two is a class of its own, since its lower neighbour is
        half as far away.

        Args:
            stored: from `store`.

        Returns:
            int64, the shape of `stored`, from 0.

        >>> FORMATS["bf16"].classes(torch.tensor([1.0, 1.5, -1.75, 2.0])).unique().numel()
        3
        """
        fraction, exponent = torch.frexp(stored.abs())
        above = (exponent.long() - 1 - self.least_exponent).clamp(min=0)
        above[stored == 0] = 0
        return 2 * above + ((fraction == 0.5) & (above > 0))


FORMATS = {
    found.name: found
    for found in (
        StorageFormat("fp32", torch.float32, -126),
        StorageFormat("bf16", torch.bfloat16, -126),
        StorageFormat("fp16", torch.float16, -14),
        StorageFormat("fp8", torch.float8_e4m3fn, -6, scaled=True),
    )
}


@dataclass(frozen=True)
class MaskChange:
    """What an update left in one mask, once stored; numbers that add over matrices.

    Args:
        entries: of the mask.
        changed, changed_null, changed_variance: its changed entries; their mean and variance under the precision null.
        distance, distance_null: the sum of |stored change| over it, and the mean of that under the precision null.
    """

    entries: int
    changed: int
    changed_null: float
    changed_variance: float
    distance: float
    distance_null: float


@dataclass(frozen=True)
class StoredChange:
    """What an update left of itself, once stored; numbers that add over matrices.

    Args:
        entries, changed: of the matrix.
        distance: the sum of |stored change|, in units of the weights.
        masks: name -> what of that is in the mask.
    """

    entries: int
    changed: int
    distance: float
    masks: dict[str, MaskChange]


class StoredBase:
    """A base as one format stores it, with its classes of equal spacing.

    Args:
        base: (n, m), float; storage: the format.
    """

    def __init__(self, base: Tensor, storage: StorageFormat) -> None:
        self.storage = storage
        self.scale = storage.scale_of(base)
        self.values = storage.store(base, self.scale)
        self.classes = storage.classes(self.values).flatten()
        self.entries = torch.bincount(self.classes)
        self._counted: dict[str, tuple[Tensor, Tensor]] = {}

    def change_by(self, update: Tensor, masks: Mapping[str, Tensor]) -> StoredChange:
        """What is left of an update once it is added to the stored base and the sum is stored again.

        The base lies on the format's grid, as training from a checkpoint in that format would find it; so entries of
        one class are equally far from where their rounding changes, and the precision null is exact.

        Args:
            update: (n, m), float; masks: name -> bool, (n, m).

        Raises:
            NonFiniteTensor: the sum holds NaN or infinity, or what the format cannot hold.

        Source: the precision null class by class; the mean of a sum over a draw without replacement for the distance.

        >>> base = StoredBase(torch.full((1, 4), 1.5), FORMATS["bf16"])
        >>> update = torch.tensor([[0.5, 0.0, 0.0, 0.001]])
        >>> found = base.change_by(update, {"left": torch.tensor([[True, True, False, False]])})
        >>> found.changed, found.masks["left"].changed, found.masks["left"].changed_null
        (1, 1, 0.5)
        """
        tuned = self.values.double() * self.scale + update
        step = (self.storage.store(tuned, self.scale) - self.values).abs().flatten().double() * self.scale
        moved = step > 0
        changed, distance = self._by_class(moved), self._by_class(step)
        found = {}
        for name, mask in masks.items():
            inside = mask.flatten()
            in_mask = self._entries_in(name, inside)
            null = overlap_null(*(counts.numpy() for counts in (self.entries, changed, in_mask)))
            found[name] = MaskChange(
                entries=int(inside.sum()),
                changed=int((moved & inside).sum()),
                changed_null=null.expected,
                changed_variance=null.variance,
                distance=float(step[inside].sum()),
                distance_null=float((distance * in_mask / self.entries.clamp(min=1)).sum()),
            )
        return StoredChange(step.numel(), int(moved.sum()), float(step.sum()), found)

    def _entries_in(self, name: str, inside: Tensor) -> Tensor:
        """Of a mask, by class; counted once, however many updates are stored."""
        known = self._counted.get(name)
        if known is None or not torch.equal(known[0], inside):
            known = self._counted[name] = (inside, self._by_class(inside))
        return known[1]

    def _by_class(self, values: Tensor) -> Tensor:
        """Sums of values, or counts of true ones, by class."""
        if values.dtype == torch.bool:
            return torch.bincount(self.classes[values], minlength=len(self.entries))
        return torch.bincount(self.classes, weights=values, minlength=len(self.entries))


def joint_classes(classes_a: Tensor, classes_b: Tensor) -> np.ndarray:
    """One class for every pair of classes that occurs: of entries that two runs from two bases each treat alike.

    Args:
        classes_a, classes_b: int64, of one shape, below 2**20.

    Returns:
        int64, (numel,), numbered from 0.

    >>> joint_classes(torch.tensor([0, 0, 1]), torch.tensor([5, 6, 5])).tolist()
    [0, 1, 2]
    """
    pairs = classes_a.flatten() * (1 << 20) + classes_b.flatten()
    return np.unique(pairs.numpy(), return_inverse=True)[1].astype(np.int64)
