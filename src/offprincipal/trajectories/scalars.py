"""From what every tensor did to figures: of tensors one by one, and summed over layers, roles and the model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offprincipal.checkpoints import Part
from offprincipal.geometry import walks
from offprincipal.trajectories.measure import Moved

Row = dict[str, Any]
SIDES = ("left", "right")
NULLS_OF_OVERLAPS = ("random_walk_null", "own_cosines_null")
NULLS = ("random_walk_null", "stored_walk_null", "stored_line_null")
SCALARS = ("straightness", "rank1_share", "rank2_share", "linearity_r2")
_MATRICES_UP_TO = 100  # checkpoints; of more, only the whole model's are kept


class Sums:
    """What tensors did, summed as they come: of each, its figures are kept, and not its inner products.

    Args:
        parts: all that will come, in any order, which the last digits of sums depend on; rank: of the subspaces.
    """

    def __init__(self, parts: Sequence[Part], steps: Sequence[float], rank: int | None) -> None:
        self._parts = {part.name: part for part in parts}
        self._steps, self._rank = list(steps), rank
        self._roles: dict[str, Moved] = {}
        self._layers: dict[int, Moved] = {}
        self._left = Counter(part.place.layer for part in parts)
        self._done: dict[int, Row] = {}
        self._rows: dict[str, list[Row]] = {}
        self._briefs: dict[str, Row] = {}
        self._whole: Moved | None = None

    @property
    def known(self) -> set[str]:
        """Names of the tensors that have come."""
        return set(self._rows)

    def add(self, name: str, moved: Moved) -> None:
        """Take what one tensor did."""
        part = self._parts[name]
        place = part.place
        found = self._figures(moved)
        self._rows[name] = rows_of(part, moved, found, self._steps)
        self._briefs[name] = _brief(found)
        self._whole = _plus(self._whole, moved)
        self._roles[place.role] = _plus(self._roles.get(place.role), moved)
        if place.layer is None:
            return
        self._layers[place.layer] = _plus(self._layers.get(place.layer), moved)
        self._left[place.layer] -= 1
        if not self._left[place.layer]:
            self._done[place.layer] = self._small(self._layers.pop(place.layer))

    @property
    def whole(self) -> Moved:
        """All tensors together.

        Raises:
            ValueError: none has come.
        """
        if self._whole is None:
            raise ValueError("no tensor has come")
        return self._whole

    def content(self) -> Row:
        """`pooled`, `by_role`, `by_layer` and `by_tensor` of `trajectory.json`, once all have come."""
        roles = dict.fromkeys(part.place.role for part in self._parts.values())
        layers = dict.fromkeys(part.place.layer for part in self._parts.values() if part.place.layer is not None)
        return {
            "pooled": self._figures(self.whole),
            "by_role": {role: self._small(self._roles[role]) for role in roles},
            "by_layer": {str(layer): self._done[layer] for layer in layers},
            "by_tensor": {name: self._briefs[name] for name in self._parts},
        }

    def rows(self) -> list[Row]:
        """Those of `trajectory.parquet`."""
        return [row for name in self._parts for row in self._rows[name]]

    def _figures(self, moved: Moved) -> Row:
        return figures(moved, self._steps, self._rank)

    def _small(self, moved: Moved) -> Row:
        found = self._figures(moved)
        if len(self._steps) > _MATRICES_UP_TO:
            found |= {"gram": None, "increment_cosine": None}
        return found


def _plus(before: Moved | None, moved: Moved) -> Moved:
    return moved if before is None else before + moved


def figures(moved: Moved, steps: Sequence[float], rank: int | None = None) -> Row:
    """Everything that the inner products and counts say, JSON-able; undefined is None.

    Returns:
        `gram`, `norms`, `relative_norms` (over the base's), `increments`, `increment_cosine`, `components` (the
        first two, of every checkpoint), `components_random_walk_null`, `eigenvalue_shares` (of G, the first eight),
        `eigenvalue_shares_random_walk_null`, `path_length`;
        `straightness`, `rank1_share`, `rank2_share`, `linearity_r2`, each with `value`, `random_walk_null`,
        `stored_walk_null`, `stored_line_null`; `drift` with `value`, `low`, `high`, `lag` and both; `verdict`; and for
        each step `unchanged_fraction`, `unchanged_since_last`, `reverted_fraction`; `subspace_overlap` where a rank was
        asked for: `rank`, `angle_error_deg`, and `left` and `right`, each with `value`, `random_walk_null` and
        `own_cosines_null`, of every checkpoint.
    """
    walk, drift = walks.walk_of(moved.gram, steps), walks.drift_of(moved.gram)
    random_walk = walks.random_walk_gram(walk.increments)
    nulls = dict(
        zip(NULLS, (walks.walk_of(G, steps) for G in (random_walk, moved.stored_gram, moved.line_gram)), strict=True)
    )
    of_walk, of_line = (walks.drift_of(G).value for G in (moved.stored_gram, moved.line_gram))
    base = moved.base_square**0.5
    return {
        "gram": moved.gram.tolist(),
        "norms": walk.norms.tolist(),
        "relative_norms": [float(norm) / base if base > 0 else None for norm in walk.norms],
        "increments": walk.increments.tolist(),
        "increment_cosine": [_listed(row) for row in walk.cosines],
        "components": walks.components_of(moved.gram).tolist(),
        "components_random_walk_null": walks.components_of(random_walk).tolist(),
        "eigenvalue_shares": _listed(walks.shares_of(moved.gram)),
        "eigenvalue_shares_random_walk_null": _listed(walks.shares_of(random_walk)),
        "path_length": walk.path_length,
        **{
            name: {"value": getattr(walk, name)} | {null: getattr(found, name) for null, found in nulls.items()}
            for name in SCALARS
        },
        "drift": asdict(drift) | {"stored_walk_null": of_walk, "stored_line_null": of_line},
        "verdict": walks.verdict_of(drift, of_line),
        "unchanged_fraction": (1 - moved.changed / moved.entries).tolist(),
        "unchanged_since_last": (1 - moved.since_last / moved.entries).tolist(),
        "reverted_fraction": (moved.reverted / moved.entries).tolist(),
        "subspace_overlap": None if rank is None else _overlaps(moved, rank),
    }


def scalars_of(G: NDArray[np.float64], steps: Sequence[float], of_line: float | None) -> Row:
    """The scalars of an inner-product matrix, its drift and the verdict on it, without nulls.

    Args:
        G: (T, T); of_line: the drift of the stored line.
    """
    walk, drift = walks.walk_of(G, steps), walks.drift_of(G)
    found = {name: getattr(walk, name) for name in SCALARS}
    found |= {"drift": drift.value, "drift_low": drift.low, "drift_high": drift.high}
    return found | {"verdict": walks.verdict_of(drift, of_line)}


def _overlaps(moved: Moved, rank: int) -> Row:
    """Means over linear matrices, weighted by their entries; None if they are defined in none."""
    known = moved.overlapping > 0
    means = np.divide(moved.overlaps, moved.overlapping, out=np.full(known.shape, np.nan), where=known)
    return {
        "rank": rank,
        "angle_error_deg": moved.angle_error,
        **{
            side: {name: _listed(means[kind, place]) for kind, name in enumerate(("value", *NULLS_OF_OVERLAPS))}
            for place, side in enumerate(SIDES)
        },
    }


def _listed(values: NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _brief(found: Row) -> Row:
    """Of one tensor: without matrices and lists, which the table has."""
    return {name: found[name] for name in ("path_length", *SCALARS, "drift", "verdict")}


def rows_of(part: Part, moved: Moved, found: Row, steps: Sequence[float]) -> list[Row]:
    """The rows of one tensor, step by step."""
    overlap = found["subspace_overlap"]
    return [
        {
            **part.keys,
            "step": step,
            "base_norm": moved.base_square**0.5,
            "displacement_norm": found["norms"][t],
            "increment_norm": found["increments"][t],
            "unchanged_fraction": found["unchanged_fraction"][t],
            "unchanged_since_last": found["unchanged_since_last"][t],
            "reverted_fraction": found["reverted_fraction"][t],
            **({} if overlap is None else _overlap_columns(overlap, t)),
        }
        for t, step in enumerate(steps)
    ]


def _overlap_columns(overlap: Row, t: int) -> Row:
    return {
        f"subspace_overlap_{side}{ending}": overlap[side][name][t]
        for side in SIDES
        for name, ending in (("value", ""), *((null, f"_{null}") for null in NULLS_OF_OVERLAPS))
    }
