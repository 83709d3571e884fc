"""A Gaussian update that is stored: what it leaves unchanged, and how long it was before.

Here is what counts decide in closed form; what needs a drawn update is in `offprincipal.geometry.gaussian`.
Knows nothing of files, models or layers.
"""

import math

import numpy as np
from numpy.typing import NDArray

from offprincipal.geometry.bits import CODES, Array, Counts, values_of_codes
from offprincipal.geometry.compiled import compiled

_SHEPPARD_FROM = 4  # σ of so many spacings and more, where rounding adds ulp²/12 to within 1e-30


def unchanged_isotropic(entries: Counts, sigma: float) -> float | None:
    """Expected share of bfloat16 values that a Gaussian update leaves as they are; None if there are none.

    The mean of Φ(out/σ) − Φ(−in/σ) over the entries, `out` and `in` being the distances to where rounding changes.

    Args:
        entries: (32768,), entries of each magnitude code, all bfloat16 numbers.
        sigma: standard deviation of each entry of the update, before it is stored.

    Source: ours; the normal distribution function at bfloat16's rounding boundaries.

    >>> entries = np.zeros(CODES, np.int64)
    >>> entries[0x3F80] = 4  # of 1.0
    >>> round(unchanged_isotropic(entries, 0.00390625), 4)  # half the spacing up, the spacing down
    0.5328
    """
    total = int(entries.sum())
    if total == 0:
        return None
    if sigma == 0:
        return 1.0
    occur = np.flatnonzero(entries)
    return float(entries[occur] @ _stay(occur, np.zeros(len(occur)), sigma)) / total


def unchanged_isotropic_off_grid(codes: NDArray[np.uint16], values: Array, sigma: float) -> float:
    """Expected number of values that a Gaussian update leaves in their bfloat16 rounding cells.

    Args:
        codes: of the values rounded; values: float32 or float64, as many, not bfloat16 numbers themselves; sigma > 0.

    Source: as `unchanged_isotropic`; where in its cell a value lies counts too.

    >>> round(unchanged_isotropic_off_grid(np.array([0x3F80], np.uint16), np.array([1.0]), 0.00390625), 4)
    0.5328
    """
    magnitudes = codes.reshape(-1) & np.uint16(CODES - 1)
    offsets = np.abs(values.reshape(-1)).astype(np.float64) - values_of_codes(magnitudes)
    return float(_stay(magnitudes, offsets, sigma).sum())


def gaussian_scale(entries: Counts, stored_norm: float) -> float:
    """The σ of the Gaussian update whose *stored* size is expected to be a given norm.

    A bfloat16 weight moves in whole spacings, so a small update that is stored has a larger norm than it had before:
    σ solves Σ E[round(σz)²] = norm², with E[round(δ)²] = ulp² Σ_j (2j + 1) P(|δ| > (j + ½) ulp).

    Args:
        entries: (512,), entries of each exponent class.
        stored_norm: Frobenius norm of the stored update.

    Returns:
        σ; norm/√numel if nothing is lost in storing.

    Source: ours; summation by parts, and Sheppard's correction where σ is several spacings.

    >>> entries = np.zeros(512, np.int64)
    >>> entries[122] = 100  # of about 1e-20
    >>> round(gaussian_scale(entries, 2.0), 6)
    0.2
    """
    if stored_norm == 0 or not entries.any():
        return 0.0
    occur = np.flatnonzero(entries)
    ulp = np.exp2(np.maximum(occur // 2, 1) - 134.0)
    return float(_solve_scale(entries[occur].astype(np.float64), ulp, stored_norm))


@compiled()
def _stay(codes, offsets, sigma):  # type: ignore[no-untyped-def] # pragma: no cover
    """P(a Gaussian step leaves each value in its rounding cell); the cell is half as deep inwards at a power of two."""
    found = np.empty(len(codes))
    for i in range(len(codes)):
        exponent, mantissa = codes[i] >> 7, codes[i] & 127
        ulp = 2.0 ** (max(exponent, 1) - 134.0)
        inwards = ulp / 4 if mantissa == 0 and exponent > 1 else ulp / 2
        root = sigma * math.sqrt(2.0)
        found[i] = (math.erf((ulp / 2 - offsets[i]) / root) + math.erf((inwards + offsets[i]) / root)) / 2
    return found


@compiled()
def _stored_square(entries, ulp, sigma):  # type: ignore[no-untyped-def] # pragma: no cover
    total = 0.0
    for e in range(len(entries)):
        if sigma > _SHEPPARD_FROM * ulp[e]:
            total += entries[e] * (sigma**2 + ulp[e] ** 2 / 12)
            continue
        summed = 0.0
        for j in range(_SHEPPARD_FROM * 8):
            beyond = math.erfc((j + 0.5) * ulp[e] / (sigma * math.sqrt(2.0)))
            if beyond == 0:
                break
            summed += (2 * j + 1) * beyond
        total += entries[e] * ulp[e] ** 2 * summed
    return total


@compiled()
def _solve_scale(entries, ulp, norm):  # type: ignore[no-untyped-def] # pragma: no cover
    """Bisection for the magnitude, then the secant, on logarithms, kept inside its bracket."""
    target = 2 * math.log(norm)
    low, high = math.log(norm) - 12 * math.log(10.0), math.log(norm)
    above, below = math.inf, -math.inf
    for step in range(100):
        middle = (low + high) / 2
        if step > 8 and math.isfinite(below) and math.isfinite(above):
            middle = low + (high - low) * min(max(-below / (above - below), 0.001), 0.999)
        square = _stored_square(entries, ulp, math.exp(middle))
        error = math.log(square) - target if square > 0 else -math.inf
        if error < 0:
            low, below = middle, error
            above = above / 2 if step > 8 else above
        else:
            high, above = middle, error
            below = below / 2 if step > 8 else below
        if high - low < 1e-15 * max(abs(low), 1.0) or error == 0:
            break
    return math.exp((low + high) / 2)
