"""C8: is sparsity the format's doing and the location bias not, judged from one update stored in several formats."""

import math
from collections.abc import Callable, Mapping

from offprincipal.gates.precision_gate import Null, location, unchanged
from offprincipal.measures.pooling import Estimate
from offprincipal.paper.claims.evidence import Evidence, Row
from offprincipal.paper.claims.registry import claim
from offprincipal.paper.claims.rules import (
    ClaimPart,
    Judgement,
    controlled_with,
    differences,
    judge_difference,
    mean,
    over_units,
    percent,
    published_with,
)

LONG_STEP = 8.0  # times the step: the higher learning rate at which sparsity should be gone
_STORED, _LONG, _WHOLE = ("bf16", 1.0), ("bf16", LONG_STEP), ("fp32", 1.0)
_LONG_WORDS = f"at {LONG_STEP:g} times the step"

Cell = tuple[str, float]
Sweep = Mapping[str, list[Row]]


@claim(
    "C8",
    "precision",
    "Sparsity is a bfloat16 artefact: it goes with float32 storage or a higher learning rate; the location bias stays",
    "each format's own precision null: which weights its rounding lets move",
    tables=(),
    needs=("precision",),
)
def precision(evidence: Evidence) -> tuple[Judgement, Judgement]:
    by_run = evidence.by_run("precision")
    sweep = {run: by_run[run] for run in evidence.rl if run in by_run}
    kept = {cell: _of(sweep, cell, unchanged) for cell in (_STORED, _WHOLE, _LONG)}
    gone = [
        ClaimPart(
            f"sparsity goes {words}",
            judge_difference(
                over_units(differences(kept[_STORED], kept[cell])),
                measure=f"unchanged fraction in bfloat16 minus that {words}",
            ),
        )
        for cell, words in ((_WHOLE, "in float32"), (_LONG, _LONG_WORDS))
    ]
    shares = [percent(mean(kept[cell].values())) for cell in (_STORED, _WHOLE, _LONG)]
    amounts = (
        f"In bfloat16 {shares[0]} of the weights are unchanged, in float32 {shares[1]}, in bfloat16 {_LONG_WORDS} "
        f"{shares[2]}."
    )
    published, stays = _bias(sweep, "random", "its density", amounts)
    controlled, beyond = _bias(sweep, "precision", "that of the format's precision null", "")
    return published_with(published, [*gone, stays]), controlled_with(controlled, [*gone, beyond])


def _bias(sweep: Sweep, null: Null, words: str, said: str) -> tuple[Judgement, ClaimPart]:
    """The bias that a longer step leaves, and as a condition that of float32, where nothing is rounded at all."""
    whole = _of(sweep, _WHOLE, lambda rows: location(rows, "principal", "distance", "random"))
    stays = judge_difference(
        over_units(whole),
        -1,
        measure="share of the update's absolute size that is on principal weights minus their density",
    )
    headline = judge_difference(
        over_units(_of(sweep, _LONG, lambda rows: location(rows, "principal", beyond=null))),
        -1,
        measure=f"share of the changed weights in the principal mask minus {words}, {_LONG_WORDS}",
        sentence=f"{said} Points on principal weights beyond {words}: {_listed(sweep, null)}.".strip(),
    )
    return headline, ClaimPart("the bias stays in float32, where every entry moves", stays)


def _listed(sweep: Sweep, null: Null) -> str:
    cells = {
        "float32 (by size, beyond the density)": mean(
            _of(sweep, _WHOLE, lambda rows: location(rows, "principal", "distance", "random")).values()
        )
    }
    for cell in (("bf16", 1.0), ("fp16", 1.0), ("fp8", 1.0), _LONG):
        words = cell[0] if cell[1] == 1 else f"{cell[0]} {_LONG_WORDS}"
        cells[words] = mean(_of(sweep, cell, lambda rows: location(rows, "principal", beyond=null)).values())
    return ", ".join(f"{words} {100 * found:+.2f}" for words, found in cells.items() if found is not None)


def _of(sweep: Sweep, cell: Cell, measure: Callable[[list[Row]], Estimate]) -> dict[str, float | None]:
    """Run by run, of one format and factor of the update."""
    found = {
        run: measure([row for row in rows if (row["format"], row["step_length"]) == cell]).value
        for run, rows in sweep.items()
    }
    return {run: value if math.isfinite(value) else None for run, value in found.items()}
