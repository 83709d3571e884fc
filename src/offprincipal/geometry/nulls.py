"""Nulls: what an update that ignores the weights would show.

The *precision null* is exact and in closed form: given how many entries of each exponent class changed, which of the
class they were is a draw without replacement. The *isotropic null* is a Gaussian update of equal norm, step length
without direction; the *stored null* is such an update rounded as the tuned weights were.
Knows nothing of files, models or layers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offprincipal.geometry.precision import EXPONENT_CLASSES, exponent_class, half_cells

_SHEPPARD_FROM = 4  # σ of so many spacings and more, where rounding adds ulp²/12 to within 1e-30


@dataclass(frozen=True)
class CountNull:
    """Mean and variance of a count of entries under a null hypothesis."""

    expected: float
    variance: float

    def z(self, observed: float) -> float | None:
        """(observed − expected)/sd; None where the null leaves nothing to chance.

        >>> CountNull(10.0, 4.0).z(14)
        2.0
        """
        return (observed - self.expected) / math.sqrt(self.variance) if self.variance > 0 else None


def class_counts(classes: Tensor, mask: Tensor | None = None) -> Tensor:
    """Entries of each exponent class, all of them or those in a mask.

    Args:
        classes: int64, from `exponent_class`.
        mask: bool, the shape of `classes`.

    Returns:
        float64, (512,).

    >>> class_counts(torch.tensor([3, 3, 5]), torch.tensor([True, False, True]))[[3, 5]]
    tensor([1., 1.], dtype=torch.float64)
    """
    chosen = classes.flatten() if mask is None else classes[mask]
    return torch.bincount(chosen, minlength=EXPONENT_CLASSES).double()


def overlap_null(entries: Tensor, changed: Tensor, in_mask: Tensor) -> CountNull:
    """The precision null of |mask ∩ changed|.

    Args:
        entries, changed, in_mask: per class, how many entries there are, changed, and are in the mask; (classes,).

    Returns:
        Σ C·M/N, and the hypergeometric variance Σ C (M/N)(1 − M/N)(N − C)/(N − 1).

    Source: the hypergeometric distribution, class by class.

    >>> overlap_null(torch.tensor([9.0]), torch.tensor([3.0]), torch.tensor([6.0]))
    CountNull(expected=2.0, variance=0.5)
    """
    N, C, M = _occupied(entries, changed, in_mask)
    share = M / N
    variance = C * share * (1 - share) * (N - C) / (N - 1).clamp(min=1)
    return CountNull((C * share).sum().item(), variance.sum().item())


def intersection_null(entries: Tensor, changed_a: Tensor, changed_b: Tensor) -> CountNull:
    """The precision null of |C_a ∩ C_b| of two runs.

    Args:
        entries, changed_a, changed_b: per class, how many entries there are, and how many each run changed; (classes,).

    Returns:
        Σ C_a C_b/N, and Σ C_a C_b (N − C_a)(N − C_b)/(N²(N − 1)).

    Source: the hypergeometric distribution, class by class.

    >>> intersection_null(torch.tensor([9.0]), torch.tensor([3.0]), torch.tensor([6.0]))
    CountNull(expected=2.0, variance=0.5)
    """
    N, A, B = _occupied(entries, changed_a, changed_b)
    variance = A * B * (N - A) * (N - B) / (N**2 * (N - 1).clamp(min=1))
    return CountNull((A * B / N).sum().item(), variance.sum().item())


def jaccard(intersection: float, count_a: float, count_b: float) -> float | None:
    """|A ∩ B| / |A ∪ B| from the counts; None where the union is empty.

    >>> jaccard(2, 4, 4)
    0.3333333333333333
    """
    union = count_a + count_b - intersection
    return intersection / union if union > 0 else None


def dispersion(changed: Tensor, classes: Tensor, dim: int) -> float | None:
    """How far the change counts of rows (dim 0) or columns (dim 1) scatter beyond the precision null.

    mean_i (c_i − E_i)²/V_i over the rows with V_i > 0, with E_i = Σ_e C_e n_ie/N_e and
    V_i = Σ_e n_ie (C_e/N_e)(1 − C_e/N_e)(N_e − n_ie)/(N_e − 1).

    Args:
        changed: bool, (n, m).
        classes: int64, (n, m), from `exponent_class`.
        dim: 0 for rows, 1 for columns.

    Returns:
        About 1 for a weight-blind update without structure, large for stripes; None where nothing is left to chance.

    Source: Pearson's statistic with the hypergeometric mean and variance.

    >>> stripes = torch.zeros(8, 8, dtype=torch.bool)
    >>> stripes[:4] = True
    >>> round(dispersion(stripes, torch.zeros(8, 8, dtype=torch.int64), dim=0), 3)
    9.0
    """
    counts, expected, variance = line_null(changed, classes, dim)
    left = variance > 0
    if not bool(left.any()):
        return None
    return ((counts - expected)[left] ** 2 / variance[left]).mean().item()


def line_null(changed: Tensor, classes: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Change counts of every row (dim 0) or column (dim 1), with mean and variance under the precision null.

    Args:
        changed: bool, (n, m); classes: int64, (n, m); dim: 0 or 1.

    Returns:
        counts, expected, variance: float64, (n,) or (m,).

    >>> counts, expected, _ = line_null(torch.eye(2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.int64), dim=0)
    >>> counts.tolist(), expected.tolist()
    ([1.0, 1.0], [1.0, 1.0])
    """
    if dim == 1:
        changed, classes = changed.T, classes.T
    occupied, compact = torch.unique(classes, return_inverse=True)
    lines = classes.shape[0]
    index = (torch.arange(lines, device=classes.device)[:, None] * len(occupied) + compact).flatten()
    n = torch.bincount(index, minlength=lines * len(occupied)).view(lines, -1).double()  # (lines, classes)
    N = n.sum(dim=0)
    C = torch.bincount(compact[changed], minlength=len(occupied)).double()
    rate = C / N
    variance = (n * rate * (1 - rate) * (N - n) / (N - 1).clamp(min=1)).sum(dim=1)
    return changed.sum(dim=1).double(), n @ rate, variance


def gini(rates: Tensor) -> float | None:
    """Gini coefficient of non-negative rates: 0 where all are equal, towards 1 where one has all; None if all are 0.

    Args:
        rates: (n,), non-negative.

    Source: the mean absolute difference over twice the mean.

    >>> gini(torch.tensor([1.0, 1.0])), gini(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    (0.0, 0.75)
    """
    ordered = rates.double().sort().values
    total = ordered.sum().item()
    if total == 0:
        return None
    n = ordered.numel()
    index = torch.arange(1, n + 1, dtype=torch.float64, device=ordered.device)
    return ((2 * index - n - 1) @ ordered).item() / (n * total)


def isotropic_update(shape: torch.Size, norm: float, generator: torch.Generator) -> Tensor:
    """A Gaussian update of a given Frobenius norm: step length without direction.

    Args:
        shape: of the result; norm: its Frobenius norm; generator: its randomness.

    Returns:
        float64.

    >>> update = isotropic_update(torch.Size([3, 4]), 2.0, torch.Generator().manual_seed(0))
    >>> round(update.norm().item(), 12)
    2.0
    """
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    update: Tensor = noise * (norm / noise.norm())
    return update


def stored_update(base: Tensor, update: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left of an update once the updated weights are stored.

    Args:
        base: as stored; update: float64, its shape; dtype: what the updated weights are stored in.

    Returns:
        float64.

    >>> stored_update(torch.ones(2), torch.tensor([0.001, 0.01]).double(), torch.bfloat16)
    tensor([0.0000, 0.0078], dtype=torch.float64)
    """
    return (base.double() + update).to(dtype).double() - base.double()


def unchanged_isotropic(base: Tensor, sigma: float) -> float | None:
    """Expected share of bfloat16 values that a Gaussian update leaves as they are; None if empty.

    The mean of Φ(out/σ) − Φ(−in/σ) over the entries, `out` and `in` being the distances to where rounding changes.

    Args:
        base: float tensor; it need not be stored in bfloat16.
        sigma: standard deviation of each entry of the update, before it is stored.

    Source: ours; the normal distribution function at bfloat16's rounding boundaries.

    >>> round(unchanged_isotropic(torch.ones(4), 0.00390625), 4)  # half the spacing up, the spacing down
    0.5328
    """
    if base.numel() == 0:
        return None
    if sigma == 0:
        return 1.0
    outwards, inwards = half_cells(base)
    stay = torch.special.ndtr(outwards / sigma) - torch.special.ndtr(-inwards / sigma)
    return float(stay.mean())


def gaussian_scale(base: Tensor, stored_norm: float) -> float:
    """The σ of the Gaussian update whose *stored* size is expected to be a given norm.

    A bfloat16 weight moves in whole spacings, so a small update that is stored has a larger norm than it had before:
    σ solves Σ E[round(σz)²] = norm², with E[round(δ)²] = ulp² Σ_j (2j + 1) P(|δ| > (j + ½) ulp).

    Args:
        base: bfloat16 numbers, any float type.
        stored_norm: Frobenius norm of the stored update.

    Returns:
        σ; norm/√numel where nothing is lost in storing.

    Source: ours; summation by parts, and Sheppard's correction where σ is several spacings.

    >>> round(gaussian_scale(torch.full((100,), 1e-20), 2.0), 6)
    0.2
    """
    if stored_norm == 0 or base.numel() == 0:
        return 0.0
    entries = class_counts(exponent_class(base))
    exponent = (torch.arange(EXPONENT_CLASSES, dtype=torch.float64) // 2).clamp(min=1)
    ulp = torch.exp2(exponent - 134)[entries > 0]
    entries = entries[entries > 0]
    steps = torch.arange(_SHEPPARD_FROM * 8, dtype=torch.float64)

    def stored_square(sigma: float) -> float:
        beyond = torch.special.erfc((steps + 0.5) * ulp[:, None] / (sigma * math.sqrt(2)))  # (classes, steps)
        summed = ulp**2 * ((2 * steps + 1) * beyond).sum(dim=1)
        each = torch.where(sigma > _SHEPPARD_FROM * ulp, sigma**2 + ulp**2 / 12, summed)
        return float(entries @ each)

    high = stored_norm
    low = high * 1e-12
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if stored_square(middle) < stored_norm**2 else (low, middle)
    return math.sqrt(low * high)


def _occupied(entries: Tensor, *counts: Tensor) -> tuple[Tensor, ...]:
    keep = entries > 0
    return tuple(count[keep].double() for count in (entries, *counts))
