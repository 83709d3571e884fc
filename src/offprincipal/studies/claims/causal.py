"""C7: does a change of coordinates at equal function destroy where updates land, judged from agreement tables."""

from collections.abc import Sequence
from typing import Literal

from offprincipal.comparison.pooling import Estimate, jaccard_estimate
from offprincipal.studies.claims.evidence import Evidence, Row
from offprincipal.studies.claims.registry import claim
from offprincipal.studies.claims.rules import (
    Condition,
    Judgement,
    controlled_with,
    judge_difference,
    nothing,
    published_with,
)

AS_TRAINED, UNDONE = "as trained", "undone"

Null = Literal["random", "precision_null"]
_WORDS = {"random": "random locations", "precision_null": "the precision null"}
_SHORT = {"random": "random", "precision_null": "rounding alone"}


@claim(
    "C7",
    "causal",
    "Rotating or permuting a layer, at equal function, destroys the agreement of update locations there and only there",
    "precision null: which weights rounding lets move, in either run's own coordinates",
    tables=(),
    needs=("agreement",),
)
def causal(evidence: Evidence) -> tuple[Judgement, Judgement]:
    rows = evidence.rows("agreement")
    trained = [row for row in rows if row["view"] == AS_TRAINED]
    touched, untouched = ([row for row in trained if row["touched"] is yes] for yes in (True, False))
    if not touched or not untouched:
        none = nothing("fall of the Jaccard in intervened matrices", "No matrix was intervened on, or every one.")
        return none, none
    published, conditions = _fall(touched, untouched, "random", _said(trained, "random"))
    said = f"{_said(trained, 'precision_null')} {_said_of_undoing(rows)}"
    controlled, beyond = _fall(touched, untouched, "precision_null", said)
    return published_with(published, conditions), controlled_with(controlled, beyond)


def _fall(
    touched: Sequence[Row], untouched: Sequence[Row], null: Null, said: str
) -> tuple[Judgement, tuple[Condition, Condition]]:
    """By how much the agreement beyond a null is smaller where the coordinates changed, and what else has to hold."""
    left, kept = (_beyond(rows, null) for rows in (touched, untouched))
    stays = judge_difference(kept, measure=f"Jaccard in untouched matrices minus that of {_WORDS[null]}")
    gone = judge_difference(left, measure=f"Jaccard in intervened matrices minus that of {_WORDS[null]}")
    headline = judge_difference(
        kept - left,
        measure=f"Jaccard with a run from the base minus that of {_WORDS[null]}: untouched minus intervened matrices",
        sentence=said,
    )
    return headline, (
        Condition("the agreement stays elsewhere", stays),
        Condition("none is left where the coordinates changed", gone, wanted="no effect beyond the control"),
    )


def _beyond(rows: Sequence[Row], null: Null) -> Estimate:
    return jaccard_estimate(rows, "measured") - jaccard_estimate(rows, null)


def _said(rows: Sequence[Row], null: Null) -> str:
    """Both kinds of matrices under each intervention, beside a null."""
    parts = []
    for name, of_one in _by_intervention(rows).items():
        sides = [
            f"{_beside(part, null)} in {len(part)} {what} matrices"
            for what, yes in (("intervened", True), ("untouched", False))
            if (part := [row for row in of_one if row["touched"] is yes])
        ]
        parts.append(f"{name}: Jaccard {' and '.join(sides)}")
    return "; ".join(parts) + "."


def _said_of_undoing(rows: Sequence[Row]) -> str:
    """The intervened matrices once brought back: Adam commutes with a permutation, not with a rotation."""
    back = _by_intervention([row for row in rows if row["view"] == UNDONE and row["touched"]])
    parts = [f"{name} {_beside(of_one, 'precision_null')}" for name, of_one in back.items()]
    return f"Brought back to the base's coordinates, the intervened matrices agree: {', '.join(parts)}."


def _beside(rows: Sequence[Row], null: Null) -> str:
    measured, expected = jaccard_estimate(rows, "measured").value, jaccard_estimate(rows, null).value
    return f"{measured:.3f} ({_SHORT[null]} {expected:.3f})"


def _by_intervention(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["intervention"], []).append(row)
    return found
