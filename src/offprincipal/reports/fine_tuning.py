"""Data of the figures of fine-tuning methods, from the stages of claims C11 and C12, in the groups of these claims.

The results are JSON, as in `reports.figures`, and are also used by the tables of the terminal. Means for display only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offprincipal.adapter_methods import ADAPTER_METHODS
from offprincipal.outcomes import Row
from offprincipal.outcomes.curves import (
    FULL,
    BySeed,
    Curve,
    Masked,
    areas_between_seeds,
    areas_to_full,
    curves_by_run,
    runs_by_mask,
)
from offprincipal.outcomes.sweeps import (
    STABLE_LOSS,
    at_equal_size,
    best_accuracy,
    open_end,
    stable_run,
    sweeps_of,
    tried_rate,
)
from offprincipal.reports.numbers import short
from offprincipal.tables import read_table

SIZES = {"update_norm": "update norm", "kl_to_base": "KL to the base"}

Json = dict[str, Any]


def fine_tuning_figures(folder: Path, study: Mapping[str, Any] | None) -> Json:
    """Data of the figures of fine-tuning methods; empty without a study of them.

    Args:
        folder: of the study.
        study: the content of `study.json`; None if there is none.

    Raises:
        FileError: a table that the study names cannot be read.
    """
    sources: Mapping[str, Sequence[str]] = (study or {}).get("sources") or {}

    def rows(source: str) -> list[Row]:
        return [row for stage in sources.get(source, ()) for row in read_table(folder / Path(stage).name, source)]

    outcomes = rows("outcomes")
    drawn = {"masks": masks(outcomes, rows("kl_curves")), "sweeps": sweeps(outcomes)}
    return {name: figure for name, figure in drawn.items() if figure} | ({"runs": len(outcomes)} if outcomes else {})


def masks(outcomes: Sequence[Row], kl_curves: Sequence[Row]) -> Json:
    """Full fine-tuning and every mask: KL curves of each seed and their mean, area to the full curve, and accuracy.

    Returns:
        Empty unless there are a full run and a mask. Otherwise `masks`, the full runs first; `other_seeds`: areas
        between the curves of full runs with different seeds; `base`: accuracy before training.
    """
    runs = runs_by_mask(outcomes)
    if FULL not in runs or len(runs) == 1:
        return {}
    curves = curves_by_run(kl_curves)
    in_order = [FULL, *(masked for masked in runs if masked != FULL)]
    return {
        "masks": [_masked(masked, runs[masked], runs[FULL], curves) for masked in in_order],
        "other_seeds": [short(area) for area in areas_between_seeds(runs[FULL], curves)],
        "base": _mean([row["base_accuracy"] for of_mask in runs.values() for row in of_mask.values()]),
    }


def _masked(masked: Masked, runs: BySeed, full: BySeed, curves: Mapping[str, Curve]) -> Json:
    mask, density = masked
    areas = {} if masked == FULL else areas_to_full(runs, full, curves)
    of_runs = {seed: curves.get(runs[seed]["run"], {}) for seed in sorted(runs)}
    common = sorted(set.intersection(*(set(curve) for curve in of_runs.values())))
    return {
        "mask": mask,
        "density": density,
        "trained": _mean([row["trained_share"] for row in runs.values()]),
        "runs": [
            {
                "seed": seed,
                **_line(curve),
                "area": short(areas.get(seed)),
                "accuracy": short(runs[seed]["sampled_accuracy"]),
            }
            for seed, curve in of_runs.items()
        ],
        "mean": {"step": common, "kl": [_mean([curve[step] for curve in of_runs.values()]) for step in common]},
    }


def _line(curve: Curve) -> Json:
    steps = sorted(curve)
    return {"step": steps, "kl": [short(curve[step]) for step in steps]}


def sweeps(outcomes: Sequence[Row]) -> Json:
    """Learning-rate sweeps of low-rank methods by rank and seed, and the runs at matched learning rates.

    Returns:
        Empty unless there is a sweep. Otherwise `groups`, one for each method and rank, with a sweep for each seed;
        `matched`, as from `matched`; `base`: accuracy before training; `least`: the accuracy below which a run has
        collapsed.
    """
    groups = []
    for method in dict.fromkeys(row["method"] for row in outcomes):
        of_pairs = sweeps_of(outcomes, method)
        for rank in dict.fromkeys(rank for rank, _ in of_pairs):
            seeds = [_sweep(seed, sweep) for (of_rank, seed), sweep in of_pairs.items() if of_rank == rank]
            groups.append({"method": _label(method), "rank": rank, "sweeps": seeds})
    if not groups:
        return {}
    base = _mean([row["base_accuracy"] for row in outcomes if row["rank"] is not None])
    return {
        "groups": groups,
        "matched": matched(outcomes),
        "base": base,
        "least": None if base is None else short(base - STABLE_LOSS),
    }


def _sweep(seed: int, sweep: Sequence[Row]) -> Json:
    highest = stable_run(sweep)
    at = highest or {}
    return {
        "seed": seed,
        "runs": [_tried(row) | {"highest": highest is not None and row["run"] == highest["run"]} for row in sweep],
        "stable": (highest or sweep[0])["learning_rate"],
        "open": open_end(sweep),
        "best": short(best_accuracy(sweep)),
        "shift": short(at.get("spectral_shift")),
        "shift_null": short(at.get("spectral_shift_isotropic_null")),
    }


def matched(outcomes: Sequence[Row]) -> list[Json]:
    """Each run at a matched rate, the run that it matches, and its method's accuracy at the rate of the latter."""
    by_run = {row["run"]: row for row in outcomes}
    at_rate = {_place(row, row["learning_rate"]): row for row in outcomes if row["matched_by"] is None}
    pairs = []
    for row in outcomes:
        like = by_run.get(row["matched_to"])
        if row["matched_by"] is None or like is None:
            continue
        at_equal_rate = at_rate.get(_place(row, like["learning_rate"]))
        pairs.append(
            {
                "by": row["matched_by"],
                "size": SIZES.get(row["matched_by"], row["matched_by"]),
                "method": _title(row),
                "rank": row["rank"],
                "seed": row["seed"],
                "ratio": short(row["matched_ratio"]),
                "equal": at_equal_size(row),
                **_tried(row),
                "like": {"method": _title(like)} | _tried(like),
                "at_equal_rate": at_equal_rate and short(at_equal_rate["sampled_accuracy"]),
            }
        )
    return pairs


def _place(row: Row, rate: float) -> tuple[str, int | None, int, float]:
    """The key of a run in a sweep: method, rank, seed and learning rate."""
    return row["method"], row["rank"], row["seed"], rate


def _title(row: Row) -> str:
    return _label(row["method"])


def _label(method: str) -> str:
    """The label of a method; its name if this version does not know it."""
    return ADAPTER_METHODS[method].label if method in ADAPTER_METHODS else str(method)


def _tried(row: Row) -> Json:
    return {
        "run": row["run"],
        "rate": row["learning_rate"],
        "accuracy": short(row["sampled_accuracy"]),
        "length": short(row["relative_update_norm"]),
        "kl": short(row["kl_to_base"]),
        "collapsed": not tried_rate(row).stable,
    }


def _mean(values: Sequence[float]) -> float | None:
    return short(sum(values) / len(values)) if values else None
