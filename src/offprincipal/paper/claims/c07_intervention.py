"""C7: does a change of coordinates at equal function destroy where updates land, judged from agreement tables."""

import math
from collections.abc import Sequence
from typing import Literal

from offprincipal.measures.pooling import jaccard_estimate
from offprincipal.paper.claims.evidence import Evidence, Row
from offprincipal.paper.claims.registry import claim
from offprincipal.paper.claims.rules import (
    ClaimPart,
    Judgement,
    controlled_with,
    differences,
    judge_difference,
    nothing,
    over_units,
    published_with,
)
from offprincipal.studies.experiments import AS_TRAINED, UNDONE

_UNITS = "interventions, each with runs of its own"

Null = Literal["random", "spacing_null"]
_WORDS = {"random": "random locations", "spacing_null": "the spacing null"}
_SHORT = {"random": "random", "spacing_null": "spacings alone"}


@claim(
    "C7",
    "causal",
    "Rotating or permuting a layer, at equal function, destroys the agreement of update locations there and only there",
    "spacing null: as many changes of each spacing, in either run's own coordinates",
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
    said = f"{_said(trained, 'spacing_null')} {_said_of_undoing(rows)}"
    controlled, beyond = _fall(touched, untouched, "spacing_null", said)
    return published_with(published, conditions), controlled_with(controlled, beyond)


def _fall(
    touched: Sequence[Row], untouched: Sequence[Row], null: Null, said: str
) -> tuple[Judgement, tuple[ClaimPart, ClaimPart]]:
    """By how much the agreement beyond a null is smaller where the coordinates changed, and what else has to hold."""
    left, kept = (_beyond(rows, null) for rows in (touched, untouched))
    fell = differences(kept, {run: left.get(run) for run in kept})
    stays = judge_difference(
        over_units(kept, what=_UNITS), measure=f"Jaccard in untouched matrices minus that of {_WORDS[null]}"
    )
    gone = judge_difference(
        over_units(left, what=_UNITS), measure=f"Jaccard in intervened matrices minus that of {_WORDS[null]}"
    )
    headline = judge_difference(
        over_units(fell, what=_UNITS),
        measure=f"Jaccard with a run from the base minus that of {_WORDS[null]}: untouched minus intervened matrices",
        sentence=said,
    )
    return headline, (
        ClaimPart("the agreement stays elsewhere", stays),
        ClaimPart("none is left where the coordinates changed", gone, wanted=("no effect beyond the control",)),
    )


def _beyond(rows: Sequence[Row], null: Null) -> dict[str, float | None]:
    """Intervention -> the Jaccard of its runs beyond a null; each intervention has runs of its own."""
    found = {
        name: jaccard_estimate(of_one, "measured").value - jaccard_estimate(of_one, null).value
        for name, of_one in _by_intervention(rows).items()
    }
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


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
    parts = [f"{name} {_beside(of_one, 'spacing_null')}" for name, of_one in back.items()]
    return f"Brought back to the base's coordinates, the intervened matrices agree: {', '.join(parts)}."


def _beside(rows: Sequence[Row], null: Null) -> str:
    measured, expected = jaccard_estimate(rows, "measured").value, jaccard_estimate(rows, null).value
    return f"{measured:.3f} ({_SHORT[null]} {expected:.3f})"


def _by_intervention(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["intervention"], []).append(row)
    return found
