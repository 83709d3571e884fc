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
from offprincipal.geometry.compiled import compiled
from offprincipal.geometry.nulls import overlap_null
from offprincipal.geometry.precision import require_finite


class BeyondFormat(NonFiniteTensor):
    """An entry is beyond a storage format's largest number."""


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
            NonFiniteTensor: `x` holds NaN or infinity.
            BeyondFormat: a format without a scale cannot hold an entry.

        >>> FORMATS["fp8"].store(torch.tensor([1.06, 1.07, 1e6])).tolist()
        [1.0, 1.125, 448.0]
        """
        limit = torch.finfo(self.dtype).max
        in_units = (require_finite(x) / scale).float()
        rounded = (in_units.clamp(-limit, limit) if self.scaled else in_units).to(self.dtype).float()
        if not bool(torch.isfinite(rounded).all()):
            largest = x.abs().max().item()
            raise BeyondFormat(f"an entry of size {largest:.4g} is beyond {self.name}'s largest number, {limit:.4g}")
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


_BLOCK = 1 << 15  # entries that are stored at once

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
        self.classes = storage.classes(self.values).flatten().numpy()
        self.entries = np.bincount(self.classes)
        self._counted: dict[str, tuple[Tensor, np.ndarray]] = {}

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
        inside = np.zeros((len(masks), update.numel()), bool)
        for place, mask in enumerate(masks.values()):
            inside[place] = mask.flatten().numpy()
        changed, distance = np.zeros(len(self.entries), np.int64), np.zeros(len(self.entries))
        mask_changed, mask_distance = np.zeros(len(inside), np.int64), np.zeros(len(inside))
        rows = max(1, _BLOCK // max(1, update.shape[1]))
        for first in range(0, len(update), rows):  # so that what is in hand stays in the processor's cache
            block = slice(first, first + rows)
            tuned = self.values[block].double() * self.scale + update[block]
            try:
                stored = self.storage.store(tuned, self.scale)
            except BeyondFormat:
                raise
            except NonFiniteTensor:
                require_finite(update)  # which says where in the whole of it
                raise
            step = (stored - self.values[block]).abs().flatten().double() * self.scale
            start = first * update.shape[1]
            _add_steps(step.numpy(), self.classes, start, inside, changed, distance, mask_changed, mask_distance)
        found = {}
        for place, (name, mask) in enumerate(masks.items()):
            in_class = self._entries_in(name, mask)
            null = overlap_null(self.entries, changed, in_class)
            found[name] = MaskChange(
                entries=int(in_class.sum()),
                changed=int(mask_changed[place]),
                changed_null=null.expected,
                changed_variance=null.variance,
                distance=float(mask_distance[place]),
                distance_null=float((distance * in_class / self.entries.clip(min=1)).sum()),
            )
        return StoredChange(update.numel(), int(changed.sum()), float(distance.sum()), found)

    def _entries_in(self, name: str, mask: Tensor) -> np.ndarray:
        """Of a mask, by class; counted once, however many updates are stored."""
        known = self._counted.get(name)
        if known is None or not torch.equal(known[0], mask):
            counts = np.bincount(self.classes[mask.flatten().numpy()], minlength=len(self.entries))
            known = self._counted[name] = (mask, counts)
        return known[1]


@compiled()
def _add_steps(step, classes, start, inside, changed, distance, mask_changed, mask_distance):  # type: ignore[no-untyped-def] # pragma: no cover
    """Count the steps that are not zero, and sum them, by class and in each mask."""
    for i in range(len(step)):
        if step[i] > 0:
            place = start + i
            changed[classes[place]] += 1
            distance[classes[place]] += step[i]
            for mask in range(len(inside)):
                mask_changed[mask] += inside[mask, place]
                mask_distance[mask] += inside[mask, place] * step[i]


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
