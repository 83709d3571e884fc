"""How far the rounding null is off where no float32 masters are there, and small weights are the ruler in their place.

    python scripts/check_rounding_null.py

Blind steps of every length on Gaussian weights: all of one size; sums of forty such, as Adam's first steps are; and
Gaussian ones. The largest difference between the null from stored weights alone and from the masters, in points of the
low-magnitude mask.
"""

import argparse

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from offprincipal.measures.pair import BaseMatrix, MatrixPair
from offprincipal.measures.settings import MatrixSettings

SETTINGS = MatrixSettings(stored_null=False, mask_tests=False)
Floats = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(512, 768), help="of the weights (512 768)")
    parser.add_argument("--lengths", type=int, default=25, help="of steps, 1e-4 to 1e-1 of the weights (%(default)s)")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    W = (0.02 * rng.standard_normal(options.shape)).astype(ml_dtypes.bfloat16)
    kinds = {
        "one size": lambda: rng.choice([-1.0, 1.0], W.shape),
        "sums of forty": lambda: rng.choice([-1.0, 1.0], (40, *W.shape)).sum(0) / np.sqrt(40),
        "Gaussian": lambda: rng.standard_normal(W.shape),
    }
    print(f"{'steps':14} {'off by':>7}  at a length of  (from stored weights, from masters, measured)")
    for kind, draw in kinds.items():
        found = [(*off_by(W, length * draw()), length) for length in np.geomspace(2e-6, 2e-3, options.lengths)]
        worst = max((one for one in found if one[0] is not None), key=lambda one: one[0])
        print(
            f"{kind:14} {100 * worst[0]:5.1f} %  {worst[-1] / 0.02:14.2g}  {', '.join(f'{x:.3f}' for x in worst[1:4])}"
        )


def off_by(W: NDArray[np.generic], step: Floats) -> tuple[float | None, float, float, float]:
    """The difference of the two nulls, and both beside what was measured."""
    masters = (W.astype(np.float32) + step).astype(np.float32)
    base, tuned = BaseMatrix("w", W, SETTINGS, False, None), masters.astype(ml_dtypes.bfloat16)
    found = [MatrixPair(base, tuned, kept).overlaps[0.5]["low_magnitude"] for kept in (None, masters)]
    ruler, known = (overlap.overlap_rounding_null for overlap in found)
    if ruler is None or known is None or found[0].overlap is None:
        return None, 0.0, 0.0, 0.0
    return abs(ruler - known), ruler, known, found[0].overlap


if __name__ == "__main__":
    main()
