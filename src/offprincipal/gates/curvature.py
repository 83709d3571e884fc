"""Gate II: curvature per unit norm of directions, with intervals, and paired tests between directions.

The units of a fixed direction, such as the update's parts, are batches. Those of random directions are *draws*: another
batch of one draw says nothing about another draw. Fewer than `LEAST_DRAWS` draws have no interval and no test. Sums
over batches in, entries of `gates.json` out. Knows no model.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offprincipal.gates.directions import PAIRS
from offprincipal.gates.forward import Array
from offprincipal.gates.statistics import interval, resampled_means, sign_test, standard_errors, units_wanted
from offprincipal.geometry.students_t import student

LEAST_DRAWS = 8

Ends = tuple[float | None, float | None]


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

    @property
    def drawn(self) -> bool:
        """Whether it is a random direction, so that draws are its units."""
        return self.direction.startswith("random_")

    @property
    def units(self) -> Array:
        """The value of each unit: of every draw, or of every batch; none where draws are too few to tell."""
        if not self.drawn:
            return self.of_batches
        return np.asarray(self.of_draws if len(self.sums) >= LEAST_DRAWS else [], dtype=np.float64)

    def resampled(self) -> Array:
        """Bootstrap draws of a fixed direction's value over batches."""
        return resampled_means(self.sums[0], self.tokens)

    def interval(self) -> Ends:
        """95 %: Student's over draws, or a bootstrap over batches."""
        if self.drawn:
            return student(self.units.tolist())[1:] if len(self.units) else (None, None)
        return interval(self.resampled(), len(self.tokens))


def curvature_rows(found: Iterable[Curvature], pairs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `curvature`; `sign_test_p` is that of the pair to which the direction belongs."""
    p = {(row[side], row["layer"], row["role"]): row["sign_test_p"] for row in pairs for side in ("first", "second")}
    rows = []
    for each in found:
        low, high = each.interval() if each.defined else (None, None)
        place = {"direction": each.direction, "layer": each.layer, "role": each.role}
        counts = {"batches": len(each.tokens), "draws": len(each.sums)}
        measured = {"value": each.value, "low": low, "high": high, **counts}
        rows.append({**place, **measured, "sign_test_p": p.get((each.direction, each.layer, each.role))})
    return rows


def pair_rows(found: Iterable[Curvature]) -> list[dict[str, Any]]:
    """Rows of `curvature_pairs`: each direction in or on the principal part against its partner, unit by unit."""
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
    ours, theirs = first.units, second.units
    differences = ours - theirs
    value, other = first.value or 0.0, second.value or 0.0
    (low, high), (ratio_low, ratio_high) = _over_draws(ours, theirs) if first.drawn else _over_batches(first, second)
    wanted = units_wanted(differences)
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
        "batches": len(first.tokens),
        "draws": len(first.sums),
        "batches_wanted": None if first.drawn else wanted,
        "draws_wanted": wanted if first.drawn else None,
    }


def _over_draws(ours: Array, theirs: Array) -> tuple[Ends, Ends]:
    """Intervals of difference and ratio; draws of the two directions are independent, so any pairing will do."""
    if not len(ours):
        return (None, None), (None, None)
    ratio: Ends = (None, None)
    if ours.min() > 0 and theirs.min() > 0:
        low, high = student(np.log(ours / theirs).tolist())[1:]
        ratio = (None, None) if low is None or high is None else (math.exp(low), math.exp(high))
    return student((ours - theirs).tolist())[1:], ratio


def _over_batches(first: Curvature, second: Curvature) -> tuple[Ends, Ends]:
    """The same of fixed directions, the batches being the same for both."""
    ours, theirs, batches = first.resampled(), second.resampled(), len(first.tokens)
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval(ours - theirs, batches), interval(ours / theirs, batches)
