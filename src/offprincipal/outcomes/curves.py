"""Runs under masks: grouped by mask and density, and how far each one's divergence is from that of the full run."""

from collections.abc import Iterable, Mapping
from itertools import combinations

from offprincipal.outcomes import Row

Curve = Mapping[int, float]  # step -> divergence from the base
Masked = tuple[str, float | None]  # a mask and the density that was asked for; None: the mask's own
BySeed = Mapping[int, Row]

FULL: Masked = ("full", None)
PUBLISHED: Masked = ("safe", None)
PROJECTIONS: Masked = ("random", 1.0)  # every entry of the projections; embeddings, head and norms are frozen


def runs_by_mask(rows: Iterable[Row]) -> dict[Masked, dict[int, Row]]:
    """Mask and density -> seed -> the run's row; the full runs under `FULL`."""
    found: dict[Masked, dict[int, Row]] = {}
    for row in rows:
        if row["method"] == "full":
            found.setdefault(FULL, {})[row["seed"]] = row
        elif row["method"] == "sparse":
            found.setdefault((row["mask"] or "safe", row["density"]), {})[row["seed"]] = row
    return found


def curves_by_run(rows: Iterable[Row]) -> dict[str, dict[int, float]]:
    """Run -> step -> its divergence from the base."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["kl_cumulative"] is not None:
            found.setdefault(row["run"], {})[row["step"]] = row["kl_cumulative"]
    return found


def area_between(curve: Curve, other: Curve) -> float | None:
    """Mean distance between two curves over the steps that both have, over the mean of the second.

    >>> area_between({1: 1.0, 2: 3.0}, {1: 2.0, 2: 2.0, 3: 9.0})
    0.5
    """
    steps = curve.keys() & other.keys()
    whole = sum(other[step] for step in steps)
    return sum(abs(curve[step] - other[step]) for step in steps) / whole if whole > 0 else None


def areas_to_full(runs: BySeed, full: BySeed, curves: Mapping[str, Curve]) -> dict[int, float]:
    """Seed -> the area between a run's curve and that of the full run of that seed, over the latter's."""
    found = {}
    for seed in runs.keys() & full.keys():
        pair = [curves.get(side[seed]["run"], {}) for side in (runs, full)]
        area = area_between(*pair)
        if area is not None:
            found[seed] = area
    return dict(sorted(found.items()))


def areas_between_seeds(runs: BySeed, curves: Mapping[str, Curve]) -> list[float]:
    """The areas between runs of one kind that differ in their seed, a pair of seeds each."""
    found = [curves.get(runs[seed]["run"], {}) for seed in sorted(runs)]
    between = [area_between(one, two) for one, two in combinations(found, 2)]
    return [area for area in between if area is not None]


def mask_words(masked: Masked) -> str:
    """A mask and its density in words."""
    mask, density = masked
    if masked == FULL:
        return mask
    if masked == PROJECTIONS:
        return "all projections"
    return f"{mask} (its own density)" if density is None else f"{mask} at {density:g}"
