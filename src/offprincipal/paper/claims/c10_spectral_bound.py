"""C10: do the perturbation bounds hold, and how much of them RLVR uses; judged beside Gaussian updates."""

import math
from collections.abc import Mapping, Sequence

from offprincipal.measures.pooling import pool_column
from offprincipal.paper.claims.evidence import Evidence, Row
from offprincipal.paper.claims.registry import claim
from offprincipal.paper.claims.rules import Judgement, judge_at_most, judge_ratio, mean, nothing, over_units

BOUNDS = ("weyl", "mirsky", "ky_fan", "wedin")
SLACK = 1e-3  # of a bound, for what rounding and the error bound of an approximation may add


@claim(
    "C10",
    "bounds",
    "Weyl, Mirsky, Ky Fan and Wedin bound the spectral change",
    "length: how much of the bounds a Gaussian update of equal norm uses, stored alike",
    tables=(),
    needs=("bounds",),
)
def spectral_bounds(evidence: Evidence) -> tuple[Judgement, Judgement]:
    runs = evidence.by_run("bounds")
    return _hold(runs), _use(runs, {run: evidence.gaussian[run] for run in evidence.rl if run in evidence.gaussian})


def _hold(runs: Mapping[str, Sequence[Row]]) -> Judgement:
    used = [row[f"{bound}_tightness"] for rows in runs.values() for row in rows for bound in BOUNDS]
    known = [value for value in used if value is not None]
    largest = max(known, default=None)
    said = "No bound is defined here: nothing changed."
    if largest is not None:
        said = (
            f"At most {largest:.3f} of a bound is used in {len(known):,} cases: theorems, so it tests the measurement."
        )
    measure = "the largest share of any bound that any run used in any matrix"
    return judge_at_most(largest, 1 + SLACK, measure=measure, sentence=said)


def _use(runs: Mapping[str, Sequence[Row]], gaussian: Mapping[str, str]) -> Judgement:
    if not gaussian:
        return nothing("use of the bounds", "No Gaussian update stands beside an RLVR run.")
    return judge_ratio(
        over_units({run: _share_used_over(runs[null], runs[run]) for run, null in gaussian.items()}, geometric=True),
        measure="share of the bounds that a Gaussian update of equal norm uses, over RLVR's; mean over the bounds",
        sentence=(
            f"Share of each bound that is used: {'; '.join(_listed(runs, bound) for bound in BOUNDS)}. An effect above "
            "1 says that RLVR keeps the spectrum better than its length does."
        ),
    )


def _share_used_over(gaussian: Sequence[Row], run: Sequence[Row]) -> float | None:
    shares = [(_pooled(gaussian, bound), _pooled(run, bound)) for bound in BOUNDS]
    return mean(one / two for one, two in shares if one is not None and two)


def _pooled(rows: Sequence[Row], bound: str) -> float | None:
    value = pool_column(f"{bound}_tightness", rows).value
    return value if math.isfinite(value) else None


def _listed(runs: Mapping[str, Sequence[Row]], bound: str) -> str:
    used = ", ".join(f"{pool_column(f'{bound}_tightness', rows).value:.3f} ({run})" for run, rows in runs.items())
    return f"{bound.replace('_', ' ').title()} {used}"
