"""One tensor of every checkpoint, read once and in blocks: inner products of displacements, and what changed when."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offprincipal.checkpoints import Array
from offprincipal.errors import NonFiniteTensor
from offprincipal.geometry import bits, scan, walks
from offprincipal.geometry.draws import seed_of

Floats = NDArray[np.float64]
HELD = 1 << 22  # entries of all checkpoints together that are held at once
SAMPLE = 1 << 14  # entries of a tensor that the stored walk is drawn on
BLIND_SAMPLE = 1 << 12  # and each of many blind ones
Read = Callable[[int, int], Array]  # entries from one to another, flat


@dataclass(frozen=True)
class Moved:
    """How one tensor moved over T checkpoints.

    Args:
        gram: (T, T), ⟨D_s, D_t⟩ of the displacements from the base; stored_gram, line_gram: those of the stored walk
            and of the stored line, on a sample and scaled to the whole.
        base_square: ‖W_0‖²; entries: how many it has.
        changed: (T,), entries that differ from the base once both are stored in bfloat16; since_last: from the
            checkpoint before; reverted: that differed before, and are the base's again.
        overlaps: (3, 2, T), as `subspace_overlaps` gives them, times the entries of the matrices where they are known,
            which `overlapping` (3, 2, T) counts; zeros if none was asked for. angle_error: the largest, degrees.
    """

    gram: Floats
    stored_gram: Floats
    line_gram: Floats
    base_square: float
    entries: int
    changed: NDArray[np.int64]
    since_last: NDArray[np.int64]
    reverted: NDArray[np.int64]
    overlaps: Floats
    overlapping: Floats
    angle_error: float = 0.0

    def __add__(self, other: "Moved") -> "Moved":
        summed = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return Moved(**(summed | {"angle_error": max(self.angle_error, other.angle_error)}))

    def with_overlaps(self, found: Floats, angle_error: float) -> "Moved":
        """The same with overlaps of its leading subspaces, (3, 2, T), NaN if they are not defined."""
        known = np.isfinite(found)
        weighted = np.where(known, found, 0.0) * self.entries
        return replace(self, overlaps=weighted, overlapping=known * float(self.entries), angle_error=angle_error)


def restored(kept: dict[str, Any]) -> Moved:
    """What was measured, from its attributes as a journal keeps them: arrays flat, and in float64.

    Raises:
        ValueError: they are something else's.
    """
    count = len(kept["changed"])
    grams = {name: np.array(kept[name]).reshape(count, count) for name in ("gram", "stored_gram", "line_gram")}
    counts = {name: np.array(kept[name]).astype(np.int64) for name in ("changed", "since_last", "reverted")}
    overlaps = {name: np.array(kept[name]).reshape(3, 2, count) for name in ("overlaps", "overlapping")}
    return Moved(**(kept | grams | counts | overlaps))


def in_float64(moves: NDArray[np.float32]) -> Floats:
    """(T, T), the inner products of rows (T, b)."""
    wide = moves.astype(np.float64)
    return wide @ wide.T


def measure(
    name: str,
    base: Read,
    checkpoints: Sequence[Read],
    start: int,
    stop: int,
    steps: Sequence[float],
    products: Callable[[NDArray[np.float32]], Floats] = in_float64,
) -> Moved:
    """Stream a tensor's entries `start` to `stop` of a base and of every checkpoint.

    Args:
        name: seeds the sample that the stored walk and line are drawn on; steps: of the checkpoints, which the line
            goes along evenly.
        products: of the displacements in a block, (T, b), one with another, summed in float64.

    Raises:
        NonFiniteTensor: one holds NaN or infinity.
    """
    count = len(checkpoints)
    gram = np.zeros((count, count))
    changed, since_last, reverted = (np.zeros(count, np.int64) for _ in range(3))
    square, sampled = 0.0, _Sample(name, start, stop)
    block = max(HELD // count, 1 << 12)
    for first in range(start, stop, block):
        last = min(first + block, stop)
        origin = base(first, last)
        start_codes = bits.bf16_codes(origin).reshape(1, -1)
        wide = _finite(origin)
        square += float(np.dot(wide.astype(np.float64), wide))
        moves = np.empty((count, last - first), np.float32)
        codes_before, ever = start_codes, np.zeros(start_codes.shape, np.bool_)
        for t, read in enumerate(checkpoints):
            stored = read(first, last)
            moves[t] = _finite(stored) - wide
            codes = bits.bf16_codes(stored).reshape(1, -1)
            differs = scan.mark_changed(start_codes, codes)
            changed[t] += np.count_nonzero(differs)
            since_last[t] += np.count_nonzero(scan.mark_changed(codes_before, codes))
            reverted[t] += np.count_nonzero(ever & ~differs)
            codes_before, ever = codes, ever | differs
        gram += products(moves)
        sampled.take(first, origin, moves, stored.dtype)
    stored, line = sampled.walk(sampled.rng), sampled.line([step / steps[-1] for step in steps])
    none = np.zeros((3, 2, count))
    return Moved(gram, stored, line, square, stop - start, changed, since_last, reverted, none, none)


def walk_blindly(name: str, base: Read, checkpoints: Sequence[Read], start: int, stop: int, draws: int) -> Floats:
    """Inner products of walks with the steps of a tensor, each shuffled over entries, stored as the checkpoints are.

    Args:
        name: chooses the sample that walks are drawn on, and their randomness.

    Returns:
        (draws, T, T), scaled to the whole tensor.
    """
    sampled = _Sample(name, start, stop, BLIND_SAMPLE)
    origin, stored = base(sampled.first, sampled.last), [read(sampled.first, sampled.last) for read in checkpoints]
    wide = _finite(origin)
    sampled.take(sampled.first, origin, np.stack([_finite(one) - wide for one in stored]), stored[-1].dtype)
    rng = np.random.default_rng(seed_of(0, "blind walk", name))  # others than those of its own null
    return np.stack([sampled.walk(rng) for _ in range(draws)])


class _Sample:
    """Some contiguous entries of a tensor, on which a walk is drawn anew; chosen by its name."""

    def __init__(self, name: str, start: int, stop: int, most: int = SAMPLE) -> None:
        self.rng = np.random.default_rng(seed_of(0, "walk", name))
        size = min(most, stop - start)
        self.first = start + int(self.rng.integers(0, stop - start - size + 1))
        self.last, self.entries = self.first + size, stop - start
        self.base: list[Array] = []
        self.moves: list[NDArray[np.float32]] = []

    def take(self, first: int, base: Array, moves: NDArray[np.float32], dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        low, high = max(self.first, first), min(self.last, first + len(base))
        if low < high:
            self.base.append(base[low - first : high - first].copy())
            self.moves.append(moves[:, low - first : high - first].copy())

    def walk(self, rng: np.random.Generator) -> Floats:
        """Of a stored walk."""
        base, moves = self._whole()
        steps = np.diff(moves, axis=0, prepend=np.zeros((1, moves.shape[1]), np.float32))
        return walks.stored_walk_gram(base, steps, self.dtype, rng) * (self.entries / len(base))

    def line(self, shares: Sequence[float]) -> Floats:
        """Of a stored line."""
        base, moves = self._whole()
        return walks.stored_line_gram(base, moves[-1], shares, self.dtype, self.rng) * (self.entries / len(base))

    def _whole(self) -> tuple[Array, NDArray[np.float32]]:
        return np.concatenate(self.base), np.concatenate(self.moves, axis=1)


def _finite(values: Array) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        wide = values.astype(np.float32)
    if not np.isfinite(wide).all():
        raise NonFiniteTensor(f"{np.count_nonzero(~np.isfinite(wide))} entries are NaN or infinite in float32")
    return wide
