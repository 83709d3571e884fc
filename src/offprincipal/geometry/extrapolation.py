"""Where a run's weights would be at another step, as combinations of its checkpoints, and how far off that is.

A prediction is D̂(s) = Σ_t c_t D_t of the displacements D_t = W_t − W_0, so that how far it misses a checkpoint follows
from their Gram matrix. Knows nothing of files, models or layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Method = Literal["linear", "rank1"]
METHODS: tuple[Method, ...] = get_args(Method)
LEAST = 3  # checkpoints: two to fit, one to hold out


@dataclass(frozen=True)
class HeldOut:
    """How far predictions of one checkpoint miss it, over how far it is from the base.

    Args:
        place: of the checkpoint, 0 … T − 1; linear, rank1: from the checkpoints before those that are held out; last:
            if the last of those is kept. None if the checkpoint is the base.
    """

    place: int
    linear: float | None
    rank1: float | None
    last: float | None


def coefficients_of(G: Floats, steps: Sequence[float], at: float, method: Method) -> Floats:
    """The combination of displacements that predicts the displacement at a step.

    `linear` is the least-squares line of every weight in the step, through the base and all checkpoints; `rank1` the
    same line of the coordinate along the first principal component of the displacements, all else left at the base.

    Args:
        G: (T, T), their inner products; steps: T numbers, rising, above that of the base; at: any number.

    Returns:
        (T,).

    Source: RLVR-Linearity, arXiv 2601.04537, for the line of weights; Alpha-RL, arXiv 2510.00553, and RELEX, arXiv
    2605.21468, for that along one direction.

    >>> line = np.outer([1.0, 2.0], [1.0, 2.0])
    >>> [round(float(coefficients_of(line, [10, 20], 40, method) @ [1.0, 2.0]), 6) for method in METHODS]
    [4.0, 4.0]
    """
    line = _line(steps, at)
    if method == "linear":
        return line
    values, vectors = np.linalg.eigh(np.asarray(G, np.float64))
    first = vectors[:, -1]  # coordinates along the direction Σ_t first_t D_t/√λ are √λ first
    return (line @ first) * first if values[-1] > 0 else np.zeros(len(first))


def held_out(G: Floats, steps: Sequence[float]) -> list[HeldOut]:
    """Predict the last quarter of the checkpoints, at least one, from those before, and see how far that misses.

    Args:
        G: (T, T), of the displacements, or of a walk on the average; T at least 3.

    Returns:
        One a checkpoint that is held out; of a walk, roots of mean squares.

    Raises:
        ValueError: there are too few checkpoints.

    >>> found = held_out(np.outer([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]), [10, 20, 30, 40])[0]
    >>> found.place, round(found.linear, 6), round(found.last, 6)
    (3, 0.0, 0.25)
    """
    count = len(steps)
    if count < LEAST:
        raise ValueError(f"{count} checkpoints: two are needed to predict from, and one to hold out")
    fitted = count - max(1, count // 4)
    kept = np.eye(fitted)[-1]
    found = []
    for place in range(fitted, count):
        line, rank1 = (coefficients_of(G[:fitted, :fitted], steps[:fitted], steps[place], m) for m in METHODS)
        found.append(HeldOut(place, *(_missed(G, c, place) for c in (line, rank1, kept))))
    return found


def _line(steps: Sequence[float], at: float) -> Floats:
    """What each checkpoint weighs in the value at a step of the least-squares line through the base, at 0, and all."""
    x = np.concatenate([[0.0], np.asarray(steps, np.float64)])
    centred = x - x.mean()
    found: Floats = (1 / len(x) + (at - x.mean()) * centred / (centred @ centred))[1:]
    return found


def _missed(G: Floats, coefficients: Floats, place: int) -> float | None:
    square = float(G[place, place])
    c = np.pad(coefficients, (0, len(G) - len(coefficients)))
    c[place] -= 1.0
    return float(np.sqrt(max(float(c @ G @ c), 0.0) / square)) if square > 0 else None
