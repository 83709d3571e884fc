"""Trajectories: figures from the inner products of displacements, compared with a random walk of the same steps.

Everything follows from the Gram matrix G[s, t] = ⟨D_s, D_t⟩ of the displacements D_t = W_t − W_0, t = 1…T, which is a
sum over entries. The random walk takes independent steps of the measured lengths:
G[s, t] = Σ_{u ≤ min(s, t)} ‖d_u‖², in closed form. Knows nothing of files, models or layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offprincipal.geometry.students_t import t_quantile

Floats = NDArray[np.float64]
Array = NDArray[Any]
BLOCKS = 8  # of steps, which the interval of the drift leaves out in turn
LEAST_STEPS = 6  # fewer cannot tell a walk from anything
SMALL = 0.05  # mean cosine of far steps up to which there is no drift worth the name
BALLISTIC = 0.5  # and above which they go one way
_HALVINGS = 40
WIDE = 0.5  # an interval of it that is wider tells nothing


@dataclass(frozen=True)
class Walk:
    """What one Gram matrix says.

    Args:
        norms: (T,), ‖D_t‖; increments: (T,), ‖d_t‖ of the steps d_t = D_t − D_{t−1}.
        cosines: (T, T), of the steps; NaN if one has no length.
        path_length: Σ‖d_t‖; straightness: ‖D_T‖ over it.
        rank1_share, rank2_share: of the largest eigenvalues in the trace of G.
        linearity_r2: of D_t regressed on the step, the base counted as a point.
        None if nothing moved.
    """

    norms: Floats
    increments: Floats
    cosines: Floats
    path_length: float
    straightness: float | None
    rank1_share: float | None
    rank2_share: float | None
    linearity_r2: float | None


@dataclass(frozen=True)
class Drift:
    """Mean cosine of steps that are far apart: 0 in a random walk, 1 on a straight line.

    Args:
        value: Σ⟨d_s, d_t⟩/Σ‖d_s‖‖d_t‖ over pairs at least `lag` steps apart; low, high: 95 % interval, by leaving out
            blocks of steps in turn. None if it is undefined.
    """

    value: float | None
    low: float | None
    high: float | None
    lag: int


def increment_gram(G: Floats) -> Floats:
    """⟨d_s, d_t⟩ of the steps, from ⟨D_s, D_t⟩.

    >>> increment_gram(np.array([[1.0, 2.0], [2.0, 4.0]]))
    array([[1., 1.],
           [1., 1.]])
    """
    padded = np.pad(np.asarray(G, np.float64), ((1, 0), (1, 0)))
    found: Floats = np.diff(np.diff(padded, axis=0), axis=1)
    return found


def random_walk_gram(increments: Floats) -> Floats:
    """What G is on the average for independent steps of given lengths.

    >>> random_walk_gram(np.ones(3))
    array([[1., 1., 1.],
           [1., 2., 2.],
           [1., 2., 3.]])
    """
    reached = np.cumsum(np.square(increments))
    found: Floats = np.minimum.outer(reached, reached)
    return found


def walk_of(G: Floats, steps: Sequence[float]) -> Walk:
    """The figures of a Gram matrix.

    Args:
        G: (T, T), float64, symmetric; steps: T numbers, rising, above that of the base.

    Raises:
        ValueError: the shapes differ.

    >>> line = walk_of(np.outer([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), [10, 20, 30])
    >>> line.straightness, round(line.rank1_share, 6), round(line.linearity_r2, 6)
    (1.0, 1.0, 1.0)
    """
    G = np.asarray(G, np.float64)
    if G.shape != (len(steps), len(steps)):
        raise ValueError(f"a Gram matrix of shape {G.shape} for {len(steps)} steps")
    products = increment_gram(G)
    increments = np.sqrt(np.clip(np.diag(products), 0.0, None))
    lengths = np.outer(increments, increments)
    cosines = np.divide(products, lengths, out=np.full_like(products, np.nan), where=lengths > 0)
    norms, path = np.sqrt(np.clip(np.diag(G), 0.0, None)), float(increments.sum())
    if path == 0:
        return Walk(norms, increments, cosines, 0.0, None, None, None, None)
    values = np.linalg.eigvalsh(G)[::-1]
    trace = float(np.trace(G))
    shares = [float(values[:count].sum()) / trace if trace > 0 else None for count in (1, 2)]
    return Walk(norms, increments, cosines, path, float(norms[-1]) / path, shares[0], shares[1], _linearity(G, steps))


def components_of(G: Floats, count: int = 2) -> Floats:
    """Coordinates of the checkpoints along their leading principal components about the base.

    Args:
        G: (T, T); count: components.

    Returns:
        (T, count), zeros if there are fewer; the last checkpoint lies on the positive side of each.

    >>> components_of(np.outer([1.0, 3.0], [1.0, 3.0])).round(6).tolist()
    [[1.0, 0.0], [3.0, 0.0]]
    """
    values, vectors = np.linalg.eigh(np.asarray(G, np.float64))
    found = np.zeros((len(values), count))
    some = min(count, len(values))
    kept = np.clip(values[::-1][:some], 0.0, None)
    found[:, :some] = vectors[:, ::-1][:, :some] * np.sqrt(np.where(kept > 1e-12 * max(kept.max(), 0.0), kept, 0.0))
    return np.where(found[-1] < 0, -found, found) + 0.0


def shares_of(G: Floats, count: int = 8) -> Floats:
    """The largest eigenvalues in the trace, from the largest down: how many directions hold the displacements.

    Returns:
        (min(count, T),), NaN if nothing moved.

    >>> shares_of(random_walk_gram(np.ones(100)), 3).round(3).tolist()
    [0.811, 0.09, 0.032]
    """
    values = np.clip(np.linalg.eigvalsh(np.asarray(G, np.float64))[::-1][:count], 0.0, None)
    trace = float(np.trace(G))
    return values / trace if trace > 0 else np.full(len(values), np.nan)


def drift_of(G: Floats) -> Drift:
    """Whether steps that are far apart go the same way.

    Steps next to each other do so in any smooth training, whose optimizer has momentum, and in a walk with inertia;
    therefore pairs closer than half of the steps do not count.

    Args:
        G: (T, T), float64.

    Source: the jackknife over blocks (Künsch 1989), with Student's t.

    >>> drift_of(random_walk_gram(np.ones(12))).value
    0.0
    """
    products = increment_gram(G)
    count = len(products)
    lag = max(1, math.ceil(count / 2))
    lengths = np.sqrt(np.clip(np.diag(products), 0.0, None))
    far = np.subtract.outer(np.arange(count), np.arange(count)) >= lag
    known = np.outer(lengths, lengths) * far
    if not known.sum() > 0:
        return Drift(None, None, None, lag)
    value = float((products * far).sum() / known.sum())
    blocks = np.array_split(np.arange(count), min(BLOCKS, count))
    without = []
    for block in blocks:
        kept = np.ones(count, np.bool_)
        kept[block] = False
        left = known[np.ix_(kept, kept)].sum()
        if left > 0:
            without.append(float((products * far)[np.ix_(kept, kept)].sum() / left))
    if count < LEAST_STEPS or len(without) < 3:
        return Drift(value, None, None, lag)
    error = math.sqrt((len(without) - 1) / len(without) * sum((x - np.mean(without)) ** 2 for x in without))
    half = t_quantile(len(without) - 1) * error
    return Drift(value, value - half, value + half, lag)


def verdict_of(drift: Drift, line: float | None = 1.0) -> str:
    """`ballistic`, `diffusive with drift`, `diffusive` or `cannot tell`.

    All is over the mean cosine that a straight line would show: 1, or less once it is stored. Steps far apart go one
    way where the interval of their mean cosine lies above a half of that; they have a drift where it lies above .05 of
    it; else they are a random walk's. It cannot tell with fewer than six checkpoints, where the interval is wider than
    a half, or where far steps go back, as on an orbit; nor can it tell a drift from inertia that lasts for half of the
    checkpoints.

    Args:
        line: the `drift_of` a straight line that is stored as the checkpoints are.

    >>> verdict_of(Drift(0.01, -0.02, 0.04, 5)), verdict_of(Drift(0.9, 0.8, 1.0, 5))
    ('diffusive', 'ballistic')
    >>> verdict_of(Drift(0.01, -0.02, 0.04, 5), line=0.08)
    'cannot tell'
    """
    if drift.low is None or drift.high is None or line is None or line <= 0:
        return "cannot tell"
    low, high = drift.low / line, drift.high / line
    if high - low > WIDE or high < -SMALL:
        return "cannot tell"
    if low > BALLISTIC:
        return "ballistic"
    return "diffusive with drift" if low > SMALL else "diffusive"


def stored_walk_gram(base: Array, updates: Array, dtype: np.dtype[Any], rng: np.random.Generator) -> Floats:
    """G of a walk that takes the measured steps, each dealt out anew to entries of which it knows nothing, and stored.

    What storing rounds away of one step it may release with the next, so that stored steps are not independent.

    Args:
        base: (b,), some entries; updates: (T, b), float32, the steps d_t there; dtype: what checkpoints are stored in.

    Returns:
        (T, T), of these entries.

    >>> updates, rng = np.eye(2, 4, dtype=np.float32), np.random.default_rng(0)
    >>> stored_walk_gram(np.zeros(4, np.float32), updates, np.dtype(np.float32), rng).shape
    (2, 2)
    """
    start = base.astype(np.float32)
    now, found = start, np.empty(updates.shape, np.float32)
    for t, update in enumerate(updates):
        signs = rng.choice(np.array([-1.0, 1.0], np.float32), len(update))
        now = (now + signs * rng.permutation(update)).astype(dtype).astype(np.float32)
        found[t] = now - start
    wide = found.astype(np.float64)
    return wide @ wide.T


def stored_line_gram(
    base: Array, last: Array, shares: Sequence[float], dtype: np.dtype[Any], rng: np.random.Generator
) -> Floats:
    """G of a straight line that knows nothing of the weights, as long as the run once it is stored.

    Rounding lets a weight wait and then jump, each at a time of its own, so that steps of a straight line share little
    direction once they are stored.

    Args:
        base: (b,), some entries; last: (b,), float32, their displacement at the last checkpoint.
        shares: (T,), how much of the way has been gone at each, the last of them 1.
        dtype: what checkpoints are stored in.

    Returns:
        (T, T), of these entries. The line's displacements before storing are Gaussian, in proportion to `shares`.

    >>> rng, dtype = np.random.default_rng(0), np.dtype(np.float32)
    >>> found = stored_line_gram(np.zeros(2, np.float32), np.full(2, 3.0), [0.5, 1.0], dtype, rng)
    >>> found.round(3).tolist()
    [[4.5, 9.0], [9.0, 18.0]]
    """
    start, direction = base.astype(np.float32), rng.standard_normal(len(base), np.float32)

    def stored(length: float) -> NDArray[np.float32]:
        moved: NDArray[np.float32] = (start + np.float32(length) * direction).astype(dtype).astype(np.float32)
        return moved - start

    wanted, reach = float(np.linalg.norm(last)), float(np.linalg.norm(direction))
    low, high = 0.0, 2 * wanted / reach if reach > 0 else 0.0
    while high > 0 and np.linalg.norm(stored(high)) < wanted:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(stored(middle)) < wanted else (low, middle)
    wide = np.stack([stored(share * high) for share in shares]).astype(np.float64)
    return wide @ wide.T


def _linearity(G: Floats, steps: Sequence[float]) -> float | None:
    """R² of the least-squares line through the base and all checkpoints, over all entries."""
    padded = np.pad(G, ((1, 0), (1, 0)))
    at = np.concatenate([[0.0], np.asarray(steps, np.float64)])
    centred = at - at.mean()
    middle = np.eye(len(at)) - 1 / len(at)
    total = float(np.trace(middle @ padded @ middle))
    return float(centred @ padded @ centred / (centred @ centred)) / total if total > 0 else None
