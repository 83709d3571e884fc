"""Rows of `outcomes.parquet` and `kl_curves.parquet` whose truth is known by construction."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offprincipal.studies.experiments import write_rows
from offprincipal.studies.fine_tuning import CURVES, OUTCOMES

Row = dict[str, Any]
BASE = 0.5
EMPTY: Row = dict.fromkeys(OUTCOMES.names)


def outcome_row(run: str, **values: Any) -> Row:
    """A run's row: full fine-tuning of seed 1 that ends at its base, but for what is given."""
    row = EMPTY | {"run": run, "recipe": "grpo", "method": "full", "trained_share": 1.0, "learning_rate": 1e-3}
    row |= {"seed": 1, "steps": 4, "base_accuracy": BASE, "sampled_accuracy": BASE, "kl_to_base": 0.1}
    row |= {"relative_update_norm": 0.01, "update_norm": 1.0, "spectral_shift": 1e-3}
    return row | {"spectral_shift_isotropic_null": 5e-4} | values


def masked(mask: str, density: float | None, seed: int, accuracy: float = 0.6) -> Row:
    """A run under a mask; `full` without."""
    name = f"{mask}_{density}_s{seed}"
    values: Row = {"seed": seed, "sampled_accuracy": accuracy}
    if mask == "full":
        return outcome_row(name, **values)
    return outcome_row(name, method="sparse", mask=mask, density=density, trained_share=density or 0.75, **values)


def curve_rows(run: str, divergences: Sequence[float]) -> list[Row]:
    """A run's divergence from the base at steps 1, 2, …"""
    return [
        {"run": run, "step": step, "kl_cumulative": kl, "relative_update_norm": 1e-3 * step}
        for step, kl in enumerate(divergences, 1)
    ]


def sweep(method: str, rank: int, seed: int, accuracies: Mapping[float, float], **values: Any) -> list[Row]:
    """Runs of a low-rank method: learning rate -> final accuracy."""
    return [
        outcome_row(f"{method}_r{rank}_lr{rate:g}_s{seed}", method=method, rank=rank, seed=seed, trained_share=0.03)
        | {"learning_rate": rate, "sampled_accuracy": accuracy, "kl_to_base": 100 * rate, "relative_update_norm": rate}
        | values
        for rate, accuracy in accuracies.items()
    ]


def matched_row(by: str, like: Row, accuracy: float, ratio: float = 1.0, method: str = "pissa") -> Row:
    """A run of PiSSA at the rate that was to make its step as large as that of `like`."""
    rank, seed = like["rank"], like["seed"]
    values = {"learning_rate": 5e-4, "matched_to": like["run"], "matched_by": by, "matched_ratio": ratio}
    values |= {key: like[key] * ratio for key in ("relative_update_norm", "kl_to_base")}
    name = f"{method}_at_equal_{by}_r{rank}_s{seed}"
    return outcome_row(name, method=method, rank=rank, seed=seed, sampled_accuracy=accuracy, **values)


def write_outcomes(folder: Path, outcomes: Sequence[Row], curves: Sequence[Row]) -> Path:
    """The tables of a stage of outcomes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, schema in (("outcomes", outcomes, OUTCOMES), ("kl_curves", curves, CURVES)):
        write_rows(folder / f"{name}.parquet", list(rows), schema)
    return folder
