"""Gate II: curvature per unit norm of directions, with intervals, and paired tests between directions.

Sums over batches in, entries of `gates.json` out. Knows no model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offprincipal.gates.directions import PAIRS
from offprincipal.gates.forward import Array
from offprincipal.gates.statistics import batches_wanted, interval, resampled_means, sign_test, standard_errors


@dataclass(frozen=True)
class Curvature:
    """DᵀFD/‖D‖_F² of one kind of direction, by draw and batch.

    Args:
        direction: its name; layer, role: of the matrices it moves; both None for all linear matrices at once.
        sums: (draws, batches): Σ_t Var_{y∼π}[(J_D z)_y]/‖D‖_F²; no draw where the direction is zero.
        tokens: (batches,).
    """

    direction: str
    layer: int | None
    role: str | None
    sums: Array
    tokens: Array

    @staticmethod
    def of(
        place: tuple[str, int | None, str | None],
        fisher: Array,
        squares: Array,
        tokens: Array,
        batch_of: NDArray[np.int64],
    ) -> "Curvature":
        """From sums over sequences.

        Args:
            fisher: (draws, sequences); squares: (draws,), ‖D‖_F²; tokens, batch_of: (sequences,), the latter integers.
        """
        count = int(batch_of.max()) + 1
        kept = squares > 0
        per_norm = fisher[kept] / squares[kept, None]
        sums = np.stack([per_norm[:, batch_of == b].sum(-1) for b in range(count)], axis=1)
        of_batch = np.array([tokens[batch_of == b].sum() for b in range(count)], dtype=np.float64)
        return Curvature(*place, sums, of_batch)

    @property
    def defined(self) -> bool:
        return len(self.sums) > 0

    @property
    def of_draws(self) -> list[float]:
        """The value of each draw over all batches."""
        return [float(x) for x in self.sums.sum(-1) / self.tokens.sum()]

    @property
    def of_batches(self) -> Array:
        """The value of each batch, the mean over draws; (batches,)."""
        found: Array = self.sums.mean(0) / self.tokens
        return found

    @property
    def value(self) -> float | None:
        return float(np.mean(self.of_draws)) if self.defined else None

    def resampled(self) -> Array:
        """Bootstrap draws of the value over batches and, where there are several, over draws."""
        return resampled_means(self.sums, self.tokens, np.random.default_rng(_number(self.direction)))


def curvature_rows(found: Iterable[Curvature], pairs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `curvature`; `sign_test_p` is that of the pair to which the direction belongs."""
    p = {(row[side], row["layer"], row["role"]): row["sign_test_p"] for row in pairs for side in ("first", "second")}
    rows = []
    for each in found:
        batches = len(each.tokens)
        low, high = interval(each.resampled(), batches) if each.defined else (None, None)
        place = {"direction": each.direction, "layer": each.layer, "role": each.role}
        measured = {"value": each.value, "low": low, "high": high, "batches": batches}
        rows.append({**place, **measured, "sign_test_p": p.get((each.direction, each.layer, each.role))})
    return rows


def pair_rows(found: Iterable[Curvature]) -> list[dict[str, Any]]:
    """Rows of `curvature_pairs`: each direction in or on the principal part against its partner, batch by batch."""
    by_place = {(each.direction, each.layer, each.role): each for each in found}
    places = dict.fromkeys((each.layer, each.role) for each in by_place.values())
    rows = []
    for layer, role in places:
        for first, second in PAIRS:
            sides = [by_place.get((direction, layer, role)) for direction in (first, second)]
            if sides[0] is not None and sides[1] is not None and sides[0].defined and sides[1].defined:
                rows.append(_pair_row(sides[0], sides[1]))
    return rows


def draw_rows(found: Iterable[Curvature]) -> list[dict[str, Any]]:
    """Rows of `curvature_draws`: the value of every random direction that was drawn, and their standard deviation."""
    return [
        {
            "direction": each.direction,
            "layer": each.layer,
            "role": each.role,
            "values": each.of_draws,
            "sd": float(np.std(each.of_draws, ddof=1)),
        }
        for each in found
        if len(each.sums) > 1
    ]


def _pair_row(first: Curvature, second: Curvature) -> dict[str, Any]:
    batches = len(first.tokens)
    differences = first.of_batches - second.of_batches
    ours, theirs = first.resampled(), second.resampled()
    low, high = interval(ours - theirs, batches)
    value, other = first.value or 0.0, second.value or 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_low, ratio_high = interval(ours / theirs, batches)
    return {
        "first": first.direction,
        "second": second.direction,
        "layer": first.layer,
        "role": first.role,
        "difference": value - other,
        "low": low,
        "high": high,
        "ratio": value / other if other > 0 else None,
        "ratio_low": ratio_low,
        "ratio_high": ratio_high,
        "standard_errors": standard_errors(differences),
        "sign_test_p": sign_test(differences),
        "batches": batches,
        "batches_wanted": batches_wanted(differences),
    }


def _number(text: str) -> int:
    """The same number for the same text, whatever the process."""
    return int.from_bytes(text.encode(), "big")
