"""C10: do the perturbation bounds hold, and how much of them RLVR uses; judged beside Gaussian updates."""

from collections.abc import Mapping, Sequence

from offprincipal.comparison.pooling import Estimate, pool_column
from offprincipal.studies.claims.evidence import Evidence, Row
from offprincipal.studies.claims.registry import claim
from offprincipal.studies.claims.rules import Judgement, judge_at_most, judge_ratio, mean_of, nothing

BOUNDS = ("weyl", "mirsky", "ky_fan", "wedin")
SLACK = 1e-3  # of a bound, for what rounding and the certificate of an approximation may add


@claim(
    "C10",
    "bounds",
    "Weyl, Mirsky, Ky Fan and Wedin bound the spectral change",
    "step length: how much of the bounds a Gaussian update of equal length uses, stored alike",
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
        mean_of([_share_used_over(runs[null], runs[run]) for run, null in gaussian.items()]),
        measure="share of the bounds that a Gaussian update of equal length uses, over RLVR's; mean over the bounds",
        sentence=(
            f"Share of each bound that is used: {'; '.join(_listed(runs, bound) for bound in BOUNDS)}. An effect above "
            "1 says that RLVR keeps the spectrum better than its length does."
        ),
    )


def _share_used_over(gaussian: Sequence[Row], run: Sequence[Row]) -> Estimate:
    names = [f"{bound}_tightness" for bound in BOUNDS]
    defined = [name for name in names if all(any(r[name] is not None for r in rows) for rows in (gaussian, run))]
    return mean_of([pool_column(name, gaussian) / pool_column(name, run) for name in defined or names])


def _listed(runs: Mapping[str, Sequence[Row]], bound: str) -> str:
    used = ", ".join(f"{pool_column(f'{bound}_tightness', rows).value:.3f} ({run})" for run, rows in runs.items())
    return f"{bound.replace('_', ' ').title()} {used}"
