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
            rows = (rows - left[here] @ right).astype(stored).astype(np.float32)
        return np.asarray(rows + np.float32(self.scale) * (self.left[here] @ self.right))


@dataclass(frozen=True)
class Directed:
    """DoRA: m · V/‖V‖, where V is the low-rank change's result and norms go over the inputs of each output.

    Args:
        norms: of every output, where outputs are columns; None where they are rows.
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
