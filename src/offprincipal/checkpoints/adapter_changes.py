"""What an adapter does to one matrix, some rows at a time. Knows nothing of files and names: arrays in, arrays out."""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from offprincipal.checkpoints.checkpoint import Array


class Change(Protocol):
    """From some whole rows of the base's matrix in float32 to the tuned ones."""

    def of(self, rows: Array, first: int) -> Array:
        """The tuned rows, float32; `first` is the number of the first."""
        ...


_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class LowRank:
    """W0 + s·LR, in the orientation in which the matrix is stored; less an initial product where it was taken out.

    Args:
        left: (rows, r). right: (r, columns).
        scale: s.
        start: the factors (L0, R0) that a PiSSA-like initialisation took out of the base, and the base's stored type,
            to which PEFT rounds what is left.
    """

    left: Array
    right: Array
    scale: float
    start: tuple[Array, Array, np.dtype[np.generic]] | None = None

    def of(self, rows: Array, first: int) -> Array:
        here = slice(first, first + len(rows))
        if self.start is not None:
            left, right, stored = self.start
            rows = (rows - _product(left[here], right)).astype(stored).astype(np.float32)
        return np.asarray(rows + np.float32(self.scale) * _product(self.left[here], self.right))


def _product(left: Array, right: Array) -> Array:
    """In float32, rounded from float64: whatever rows are read together, each comes out alike on every processor."""
    found, wide = np.empty((len(left), right.shape[1]), np.float32), right.astype(np.float64)
    for first in range(0, len(left), _ROWS_AT_ONCE):
        last = first + _ROWS_AT_ONCE
        found[first:last] = left[first:last].astype(np.float64) @ wide
    return found


@dataclass(frozen=True)
class Directed:
    """DoRA: m · V/‖V‖, where V is the low-rank change's result and norms go over the inputs of each output.

    Args:
        norms: of every output, where outputs are columns; None if they are rows.
    """

    change: LowRank
    magnitude: Array
    norms: Array | None = None

    def of(self, rows: Array, first: int) -> Array:
        directions = self.change.of(rows, first)
        if self.norms is not None:
            return np.asarray(directions * (self.magnitude / self.norms))
        norms = np.linalg.norm(directions, axis=1)
        return np.asarray(directions * (self.magnitude[first : first + len(rows)] / norms)[:, None])


@dataclass(frozen=True)
class Sparse:
    """W0 plus values at some places; places that are named twice add up.

    Args:
        places: flat, in increasing order.
    """

    places: Array
    values: Array

    def of(self, rows: Array, first: int) -> Array:
        start = first * rows.shape[1]
        low, high = np.searchsorted(self.places, (start, start + rows.size))
        changed = rows.copy().reshape(-1)
        np.add.at(changed, self.places[low:high] - start, self.values[low:high])
        return changed.reshape(rows.shape)


@dataclass(frozen=True)
class Scaled:
    """IA³: every row, or every column, times a number.

    Args:
        factors: (rows, 1) or (1, columns).
    """

    factors: Array

    def of(self, rows: Array, first: int) -> Array:
        here = self.factors if len(self.factors) == 1 else self.factors[first : first + len(rows)]
        return np.asarray(rows * here)


@dataclass(frozen=True)
class Replaced:
    """Trained tokens: some rows are others.

    Args:
        places: (t,), rows; values: (t, columns).
    """

    places: Array
    values: Array

    def of(self, rows: Array, first: int) -> Array:
        here = (self.places >= first) & (self.places < first + len(rows))
        changed = rows.copy()
        changed[self.places[here] - first] = self.values[here]
        return changed


@dataclass(frozen=True)
class Experts:
    """A stack of matrices, one on top of another, each with a low-rank change of its own.

    Args:
        left: (experts, rows, r); right: (experts, r, columns), in the orientation in which the stack is stored.
    """

    left: Array
    right: Array
    scale: float

    def of(self, rows: Array, first: int) -> Array:
        height, changed = self.left.shape[1], rows.copy()
        for expert in range(first // height, -(-(first + len(rows)) // height)):
            start, stop = max(first, expert * height), min(first + len(rows), (expert + 1) * height)
            left = self.left[expert, start - expert * height : stop - expert * height]
            changed[start - first : stop - first] += np.float32(self.scale) * (left @ self.right[expert])
        return changed


@dataclass(frozen=True)
class Added:
    """W0 plus a matrix."""

    values: Array

    def of(self, rows: Array, first: int) -> Array:
        return np.asarray(rows + self.values[first : first + len(rows)])


@dataclass(frozen=True)
class Offset:
    """A bias with another added to it."""

    values: Array
    scale: float

    def of(self, rows: Array, first: int) -> Array:
        return rows + np.float32(self.scale) * self.values[first : first + len(rows), None]


def on_residual(matrix: Array, change: LowRank, init: str) -> bool:
    """Whether a matrix is what PiSSA or OLoRA left of a base, and not the base itself.

    Their start P0 is part of the base and is taken out of it. Training moves BA in directions of its own, so that
    ⟨P, BA⟩/‖P‖² stays near 1 for the start P of the matrix at hand if that is the base; for the rest it is near 0
    (PiSSA, whose start is orthogonal to what it leaves) or 1/(1 − s) (OLoRA, whose Q0 spans the rest's columns too).
    """
    left, right = _start(matrix, change, init)
    norm = float(np.sum((left.T @ left) * (right @ right.T)))
    if norm == 0.0:
        return True
    share = change.scale * float(np.sum((left.T @ change.left) * (right @ change.right.T))) / norm
    rest = 1.0 / (1.0 - change.scale) if init == "olora" and change.scale != 1.0 else 0.0
    return not abs(share - 1.0) < min(abs(share - rest), 0.5)


def sharded(block: Array, columns: int, outputs: int) -> LowRank:
    """MiSS: column j of the base gets row j mod r of a block.

    Args:
        block: (r, outputs), or fewer columns that are repeated.

    >>> sharded(np.array([[1.0, 2.0], [10.0, 20.0]]), columns=3, outputs=2).of(np.zeros((2, 3)), 0)
    array([[ 1., 10.,  1.],
           [ 2., 20.,  2.]])
    """
    whole = np.tile(block, (1, outputs // block.shape[1]))
    places = np.arange(columns) % len(block) == np.arange(len(block))[:, None]
    return LowRank(whole.T, places.astype(block.dtype), 1.0)


def with_start(matrix: Array, change: LowRank, init: str, stored: np.dtype[np.generic]) -> LowRank:
    """The change with the product taken out that PiSSA or OLoRA took out of this base before training."""
    return replace(change, start=(*_start(matrix, change, init), stored))


def _start(matrix: Array, change: LowRank, init: str) -> tuple[Array, Array]:
    """The factors of s·B0A0, in the orientation in which the matrix is stored."""
    rank = change.left.shape[1]
    if init == "olora":
        Q, R = np.linalg.qr(matrix)
        return np.float32(change.scale) * Q[:, :rank], R[:rank]
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank], Vt[:rank]
