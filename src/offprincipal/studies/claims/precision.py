"""C8: is sparsity the format's doing and the location bias not, judged from one update stored in several formats."""

from collections.abc import Callable, Sequence

from offprincipal.comparison.pooling import Estimate
from offprincipal.gates.precision import Null, location, unchanged
from offprincipal.studies.claims.evidence import Evidence, Row
from offprincipal.studies.claims.registry import claim
from offprincipal.studies.claims.rules import (
    Condition,
    Judgement,
    controlled_with,
    judge_difference,
    mean_of,
    percent,
    published_with,
)

LONG_STEP = 8.0  # times the step: the higher learning rate at which sparsity should be gone
_STORED, _LONG, _WHOLE = ("bf16", 1.0), ("bf16", LONG_STEP), ("fp32", 1.0)
_LONG_WORDS = f"at {LONG_STEP:g} times the step"

Cell = tuple[str, float]
Sweep = Sequence[list[Row]]


@claim(
    "C8",
    "precision",
    "Sparsity is a bfloat16 artefact: it goes with float32 storage or a higher learning rate; the location bias stays",
    "each format's own precision null: which weights its rounding lets move",
    tables=(),
    needs=("precision",),
)
def precision(evidence: Evidence) -> tuple[Judgement, Judgement]:
    sweep = [evidence.by_run("precision")[run] for run in evidence.rl]
    kept = {cell: _mean(sweep, cell, unchanged) for cell in (_STORED, _WHOLE, _LONG)}
    gone = [
        Condition(
            f"sparsity goes {words}",
            judge_difference(kept[_STORED] - kept[cell], measure=f"unchanged fraction in bfloat16 minus that {words}"),
        )
        for cell, words in ((_WHOLE, "in float32"), (_LONG, _LONG_WORDS))
    ]
    amounts = (
        f"In bfloat16 {percent(kept[_STORED])} of the weights are unchanged, in float32 {percent(kept[_WHOLE])}, in "
        f"bfloat16 {_LONG_WORDS} {percent(kept[_LONG])}."
    )
    published, stays = _bias(sweep, "random", "its density", amounts)
    controlled, beyond = _bias(sweep, "precision", "that of the format's precision null", "")
    return published_with(published, [*gone, stays]), controlled_with(controlled, [*gone, beyond])


def _bias(sweep: Sweep, null: Null, words: str, said: str) -> tuple[Judgement, Condition]:
    """The bias that a longer step leaves, and as a condition that of float32, where only sizes can tell a place."""
    whole = _mean(sweep, _WHOLE, lambda rows: location(rows, "principal", "distance", null))
    stays = judge_difference(
        whole, -1, measure=f"share of the update's absolute size that is on principal weights minus {words}"
    )
    headline = judge_difference(
        _mean(sweep, _LONG, lambda rows: location(rows, "principal", beyond=null)),
        -1,
        measure=f"share of the changed weights in the principal mask minus {words}, {_LONG_WORDS}",
        sentence=f"{said} Points on principal weights beyond {words}: {_listed(sweep, null)}.".strip(),
    )
    return headline, Condition("the bias stays in float32, where every entry moves", stays)


def _listed(sweep: Sweep, null: Null) -> str:
    cells: dict[str, Estimate] = {
        "float32 (by size)": _mean(sweep, _WHOLE, lambda rows: location(rows, "principal", "distance", null))
    }
    for cell in (("bf16", 1.0), ("fp16", 1.0), ("fp8", 1.0), _LONG):
        words = cell[0] if cell[1] == 1 else f"{cell[0]} {_LONG_WORDS}"
        cells[words] = _mean(sweep, cell, lambda rows: location(rows, "principal", beyond=null))
    return ", ".join(f"{words} {100 * found.value:+.2f}" for words, found in cells.items())


def _mean(sweep: Sweep, cell: Cell, measure: Callable[[list[Row]], Estimate]) -> Estimate:
    """Over runs, of one format and step length."""
    return mean_of([measure([row for row in rows if (row["format"], row["step_length"]) == cell]) for rows in sweep])
