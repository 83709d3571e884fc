"""Updates in units of the spacing that they have to get past: |ΔW|/ULP(W0), and what of it bfloat16 hides.

Beside what was measured stand two updates that ignore the weights: a Gaussian one of equal norm, and the measured one
with its entries dealt out anew. Both in closed form: nothing is drawn. Knows nothing of files, models or layers.
"""

import math
from dataclasses import dataclass, fields
from functools import reduce

import torch
from torch import Tensor

from offprincipal.geometry.precision import bf16_ulp, changed, half_cells, to_bf16

LEAST_OCTAVE, MOST_OCTAVE = -12, 4  # 2**-12 to 2**4 spacings, an octave a bin; one bin below, one above, one for none
BINS = MOST_OCTAVE - LEAST_OCTAVE + 3
_LEAST_ULP = -133  # log2 of bfloat16's smallest spacing
_ULPS = 254
_LEAST_STEP = -160  # log2 below any float32
_STEPS = 300


@dataclass(frozen=True)
class UlpHistogram:
    """Counts of |ΔW|/ULP(W0), by the spacing of the weight: what adds over matrices, and two nulls.

    Args:
        octaves: (254, 19), entries by spacing 2**-133 … 2**120 and by size of the step: none, below 2**-12 spacings,
            then an octave each, and from 2**4 on; octaves_gaussian_null, octaves_permuted_null: their expectation.
        changed: (254,), entries whose bfloat16 value moved.
        hidden: (254,), entries whose float32 master moved while the bfloat16 value did not; hidden_gaussian_null,
            hidden_permuted_null: their expectation.
    """

    octaves: Tensor
    octaves_gaussian_null: Tensor
    octaves_permuted_null: Tensor
    changed: Tensor
    hidden: Tensor
    hidden_gaussian_null: Tensor
    hidden_permuted_null: Tensor

    def __add__(self, other: "UlpHistogram") -> "UlpHistogram":
        return UlpHistogram(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def entries(self) -> int:
        return int(self.octaves.sum())

    def rows(self) -> list[dict[str, object]]:
        """One row a spacing that occurs: JSON, from the smallest up; `exponent` is that of the weight."""
        found: list[dict[str, object]] = []
        for ulp in self.octaves.sum(1).nonzero()[:, 0].tolist():
            row = {f.name: getattr(self, f.name)[ulp].tolist() for f in fields(self)}
            found.append({"exponent": ulp + _LEAST_ULP + 7, "entries": int(self.octaves[ulp].sum())} | row)
        return found


def ulp_histogram(base: Tensor, masters: Tensor) -> UlpHistogram:
    """The histogram of |ΔW|/ULP(W0) by spacing, what bfloat16 hides of the update, and what two nulls expect of both.

    The Gaussian null is an update of equal Frobenius norm. The permuted null deals the measured steps out over the
    weights at random: independent of the weights, with the same distribution.

    Args:
        base: (n, m), float, usually bfloat16 numbers; masters: (n, m), float32, after training.

    Raises:
        NonFiniteTensor: one of them holds NaN or infinity.

    Source: Gate III of arXiv 2511.08567; the nulls are ours.

    >>> found = ulp_histogram(torch.tensor([1.0, 1.5, 2.0]), torch.tensor([1.0, 1.501, 2.5]))
    >>> [(row["exponent"], row["entries"], row["hidden"], row["changed"]) for row in found.rows()]
    [(0, 2, 1, 0), (1, 1, 0, 1)]
    """
    update = (masters.double() - base.double()).flatten()
    ulp = torch.frexp(bf16_ulp(base).flatten())[1].long() - 1 - _LEAST_ULP
    weights = base.flatten()
    kept = ~changed(weights, masters.flatten())
    stay_gaussian, stay_permuted = _stay_gaussian(weights, update), _stay_permuted(weights, update)
    entries = torch.bincount(ulp, minlength=_ULPS)
    step = _octave(update)
    return UlpHistogram(
        octaves=_by_bin(ulp, _bin(step, ulp)),
        octaves_gaussian_null=entries[:, None] * _gaussian_bins(update),
        octaves_permuted_null=entries[:, None] * _permuted_bins(step),
        changed=torch.bincount(ulp[~kept], minlength=_ULPS),
        hidden=torch.bincount(ulp[kept & (update != 0)], minlength=_ULPS),
        hidden_gaussian_null=torch.bincount(ulp, weights=stay_gaussian, minlength=_ULPS),
        hidden_permuted_null=torch.bincount(ulp, weights=stay_permuted, minlength=_ULPS),
    )


def total(histograms: list[UlpHistogram]) -> UlpHistogram:
    """The sum over matrices; at least one."""
    return reduce(UlpHistogram.__add__, histograms)


def _octave(update: Tensor) -> Tensor:
    """floor(log2 |Δ|), from 0 for the smallest; −1 if nothing moved."""
    exponent = torch.frexp(update.abs())[1].long() - 1 - _LEAST_STEP
    return torch.where(update == 0, -1, exponent.clamp(0, _STEPS - 1))


def _bin(step: Tensor, ulp: Tensor) -> Tensor:
    """The bin of steps in units of spacings; a spacing is a power of two, so octaves are shifted and stay whole."""
    in_spacings = (step + _LEAST_STEP) - (ulp + _LEAST_ULP)
    return torch.where(step < 0, 0, (in_spacings - LEAST_OCTAVE).clamp(-1, MOST_OCTAVE - LEAST_OCTAVE) + 2)


def _by_bin(ulp: Tensor, bins: Tensor) -> Tensor:
    return torch.bincount(ulp * BINS + bins, minlength=_ULPS * BINS).view(_ULPS, BINS)


def _permuted_bins(step: Tensor) -> Tensor:
    """(254, 19): for each spacing, the shares of all measured steps that would fall in each bin there."""
    steps = torch.bincount(step + 1, minlength=_STEPS + 1).double() / len(step)  # (301,)
    ulp = torch.arange(_ULPS)[:, None].expand(-1, _STEPS + 1)
    bins = _bin(torch.arange(-1, _STEPS)[None].expand(_ULPS, -1), ulp)
    return torch.zeros(_ULPS, BINS, dtype=torch.float64).scatter_add_(1, bins, steps.expand(_ULPS, -1))


def _gaussian_bins(update: Tensor) -> Tensor:
    """(254, 19): for each spacing, the chance that a Gaussian step of the update's size falls in each bin."""
    sigma = update.square().mean().sqrt()
    if sigma == 0:
        return torch.nn.functional.one_hot(torch.zeros(_ULPS, dtype=torch.long), BINS).double()
    spacing = torch.exp2(torch.arange(_ULPS, dtype=torch.float64) + _LEAST_ULP)
    edges = torch.exp2(torch.arange(LEAST_OCTAVE, MOST_OCTAVE + 1, dtype=torch.float64))
    below = torch.erf(edges * spacing[:, None] / (sigma * math.sqrt(2)))  # (254, 17)
    ends = torch.zeros(_ULPS, 1, dtype=torch.float64), torch.ones(_ULPS, 1, dtype=torch.float64)
    return torch.cat([ends[0], torch.cat([ends[0], below, ends[1]], 1).diff(dim=1)], 1)


def _stay_gaussian(weights: Tensor, update: Tensor) -> Tensor:
    """The chance that a Gaussian step of the update's size moves each weight, yet not out of its rounding cell."""
    sigma = update.square().mean().sqrt()
    if sigma == 0:
        return torch.zeros_like(update)
    outwards, inwards = half_cells(weights)
    return (torch.erf(outwards / (sigma * math.sqrt(2))) + torch.erf(inwards / (sigma * math.sqrt(2)))) / 2


def _stay_permuted(weights: Tensor, update: Tensor) -> Tensor:
    """The share of the measured steps that would move each weight, yet not out of its rounding cell.

    A step to the very edge of the cell stays where the weight's mantissa is even, as rounding to even has it.
    """
    outwards, inwards = half_cells(weights)
    negative = weights < 0
    low = -torch.where(negative, outwards, inwards)
    high = torch.where(negative, inwards, outwards)
    odd = (to_bf16(weights).view(torch.int16) & 1).bool()
    low = torch.where(odd, torch.nextafter(low, torch.zeros_like(low)), low)
    high = torch.where(odd, torch.nextafter(high, torch.zeros_like(high)), high)
    steps = update.sort().values
    inside = torch.searchsorted(steps, high, right=True) - torch.searchsorted(steps, low)
    return (inside - (update == 0).sum()).double() / len(steps)
