"""Random updates independent of the weights, for negative controls and calibrations.

Knows nothing of files, models or layers.
"""

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from offprincipal.geometry.bits import Floats

BLIND = ("gaussian", "scaled", "turned")
KINDS = ("iid", "sign", "rows", "columns", "both", "low_rank", "row_sparse", "row_norm")
WEIGHTS = ("plain", "scaled")
_UPDATE_SCALE = 0.7  # log-sd of the rows or columns of an update that has scales
_ROW_SCALE, _COLUMN_SCALE = 0.4, 0.25  # of weights: as large as in Gemma 3 270M, whose rows have .04 to .48


def blind_update(kind: str, update: Floats, rng: np.random.Generator) -> Floats:
    """An update as long as a given one that knows nothing of the weights.

    Args:
        kind: `gaussian`: independent entries. `scaled`: the same with the given update's own row and column norms,
            dealt out anew. `turned`: the given update, turned by random orthogonal matrices on both sides, so that its
            singular values stay.
        update: (n, m), float64.

    Returns:
        (n, m), of the same Frobenius norm; zero for a zero update.

    Raises:
        KeyError: the kind is none of these.

    >>> update = np.outer([3.0, 0.0], [0.0, 1.0, 0.0])
    >>> [round(float(np.linalg.norm(blind_update(kind, update, np.random.default_rng(0)))), 9) for kind in BLIND]
    [3.0, 3.0, 3.0]
    """
    norm = _norm(update)
    if norm == 0:
        return np.zeros_like(update)
    found = {"gaussian": _gaussian, "scaled": _scaled, "turned": _turned}[kind](update, rng)
    size = _norm(found)
    return found * (norm / size) if size > 0 else found


def fewer_rows(kind: str, update: Floats, rows: int, rng: np.random.Generator) -> Floats:
    """An update of so many rows whose blind updates are as some rows of those of the given one.

    Args:
        kind: of `blind_update`. Of `scaled` some rows are drawn, whose norms are dealt out; else all are added up, with
            random signs, into so many, which keeps the singular values where these are fewer than the rows.
        update: (n, m), float64.

    Returns:
        (min(rows, n), m); of as much energy a row as the update, on average.

    >>> update = np.outer(np.arange(1.0, 1001.0), [3.0, 4.0])
    >>> found = fewer_rows("turned", update, 100, np.random.default_rng(0))
    >>> found.shape, bool(abs((found**2).sum() / (update**2).sum() * 10 - 1) < 0.4), int(np.linalg.matrix_rank(found))
    ((100, 2), True, 1)
    """
    n = len(update)
    if rows >= n:
        return update
    order = rng.permutation(n)
    found: Floats
    if kind == "scaled":
        found = update[order[:rows]]
        return found
    found = np.zeros((rows, update.shape[1]))
    for start in range(0, n, rows):
        some = order[start : start + rows]
        found[: len(some)] += update[some] * rng.choice((-1.0, 1.0), len(some))[:, None]
    found *= _norm(update) * np.sqrt(rows / n) / (_norm(found) or 1.0)
    return found


def _norm(x: Floats) -> float:
    """Without BLAS, whose threads wait for each other if several matrices are at work."""
    return float(np.sqrt(np.square(x).sum()))


def example_weights(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    """Weights on the bfloat16 grid, of the kinds `WEIGHTS`: alike in scale, or with rows and columns of many scales.

    >>> example_weights("scaled", (2, 3), np.random.default_rng(0)).shape
    (2, 3)
    """
    W = 0.03 * rng.standard_normal(shape)
    if kind == "scaled":
        W *= np.exp(_ROW_SCALE * rng.standard_normal((shape[0], 1)))
        W *= np.exp(_COLUMN_SCALE * rng.standard_normal(shape[1]))
    return stored(W.astype(np.float32), np.zeros(shape))


def example_update(kind: str, W: NDArray[np.float32], step: float, rng: np.random.Generator) -> Floats:
    """An update of a relative norm, of the kinds `KINDS`; blind but for `row_norm`, which knows the norms of rows.

    >>> W = np.ones((4, 5), np.float32)
    >>> bool(np.isclose(np.linalg.norm(example_update("sign", W, 0.01, np.random.default_rng(0))), 0.2**0.5 * 0.1))
    True
    """
    n, m = W.shape
    noise = rng.standard_normal((n, m))
    rows, columns = (np.exp(_UPDATE_SCALE * rng.standard_normal(size)) for size in (n, m))
    steps: dict[str, Floats] = {
        "iid": noise,
        "sign": np.sign(noise),
        "rows": noise * rows[:, None],
        "columns": noise * columns,
        "both": noise * rows[:, None] * columns,
        "low_rank": rng.standard_normal((n, 8)) @ rng.standard_normal((8, m)),
        "row_sparse": noise * (rng.random((n, 1)) < 0.2),
        "row_norm": noise * np.linalg.norm(W, axis=1)[:, None],
    }
    found = steps[kind]
    return found * (step * np.linalg.norm(W) / np.linalg.norm(found))


def stored(W: NDArray[np.float32], change: Floats) -> NDArray[np.float32]:
    """Weights after a step, rounded to bfloat16, as float32.

    >>> stored(np.ones(2, np.float32), np.array([0.001, 0.01]))
    array([1.       , 1.0078125], dtype=float32)
    """
    return (W + change).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def _gaussian(update: Floats, rng: np.random.Generator) -> Floats:
    return rng.standard_normal(update.shape)


def _scaled(update: Floats, rng: np.random.Generator) -> Floats:
    rows, columns = (rng.permutation(np.linalg.norm(update, axis=axis)) for axis in (1, 0))
    found = rng.standard_normal(update.shape) * rows[:, None] * columns
    return found if found.any() else _gaussian(update, rng)


def _turned(update: Floats, rng: np.random.Generator) -> Floats:
    return _turned_rows(_turned_rows(update, rng).T, rng).T


def _turned_rows(x: Floats, rng: np.random.Generator) -> Floats:
    """Qx, Q being two rounds of random signs, a random order, and the orthogonal Hartley transform."""
    for _ in range(2):
        mixed = rng.permutation(x * rng.choice((-1.0, 1.0), len(x))[:, None])
        spectrum = np.fft.fft(mixed, axis=0)
        x = (spectrum.real - spectrum.imag) / np.sqrt(len(x))
    return x
