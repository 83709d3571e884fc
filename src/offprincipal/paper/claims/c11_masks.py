"""C11: does training under the safe mask alone follow full fine-tuning, judged from the KL curves of runs and seeds."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from offprincipal.outcomes.curves import (
    FULL,
    PROJECTIONS,
    PUBLISHED,
    BySeed,
    Masked,
    areas_between_seeds,
    areas_to_full,
    curves_by_run,
    mask_words,
    runs_by_mask,
)
from offprincipal.paper.claims.evidence import Evidence
from offprincipal.paper.claims.registry import claim
from offprincipal.paper.claims.rules import (
    RATIO_MARGIN,
    ClaimPart,
    Judgement,
    controlled_with,
    judge_at_most,
    judge_difference,
    judge_ratio,
    nothing,
    published_with,
)
from offprincipal.paper.claims.units import OverUnits

TRACKS = RATIO_MARGIN - 1  # of the full run's own divergence: a curve no further off than this follows it


@claim(
    "C11",
    "sparse fine-tuning",
    "Training only the safe mask follows full fine-tuning's KL curve; training only principal weights is worst",
    "density: masks of one density, and a random one of that density",
    tables=(),
    needs=("outcomes", "kl_curves"),
)
def sparse_fine_tuning(evidence: Evidence) -> tuple[Judgement, Judgement]:
    runs = runs_by_mask(evidence.rows("outcomes"))
    curves = curves_by_run(evidence.rows("kl_curves"))
    densities = sorted({density for mask, density in runs if mask == "principal" and density is not None})
    if FULL not in runs or not densities:
        none = nothing("area between KL curves", "There is no full run, or none of principal weights alone.")
        return none, none
    areas = {masked: areas_to_full(of_mask, runs[FULL], curves) for masked, of_mask in runs.items() if masked != FULL}
    said = (
        f"{_listed(areas, runs)} Another seed of the full run is {_mean(areas_between_seeds(runs[FULL], curves))} off."
    )
    return _published(runs, areas, densities[0], said), _controlled(areas, densities[0])


def _published(
    runs: Mapping[Masked, BySeed], areas: Mapping[Masked, Mapping[int, float]], density: float, said: str
) -> Judgement:
    safe, principal, projections = areas.get(PUBLISHED, {}), areas["principal", density], areas.get(PROJECTIONS, {})
    conditions = [
        ClaimPart(
            f"the safe curve is within {TRACKS:g} of the full one, beyond what freezing all but projections costs",
            judge_at_most(
                fmean(safe[seed] - projections.get(seed, 0.0) for seed in safe) if safe else None,
                TRACKS,
                measure="area between the two over that under the full one, less that of all projections, mean over "
                "seeds",
            ),
        ),
        ClaimPart(
            "principal weights end less accurate",
            judge_difference(
                _difference(runs.get(PUBLISHED, {}), runs["principal", density]),
                measure="sampled accuracy of the safe mask minus that of principal weights",
            ),
        ),
    ]
    headline = judge_ratio(
        _ratio(principal, safe),
        measure=f"distance from the full run's KL curve: principal weights at {density:g} over the published safe mask",
        sentence=said,
    )
    return published_with(headline, conditions)


def _controlled(areas: Mapping[Masked, Mapping[int, float]], density: float) -> Judgement:
    safe = areas.get(("safe", density), {})
    beyond_chance = judge_ratio(
        _ratio(areas.get(("random", density), {}), safe),
        measure=f"distance from the full run's KL curve: a random mask over the safe one, both at {density:g}",
    )
    shown = beyond_chance.effect
    headline = judge_ratio(
        _ratio(areas["principal", density], safe),
        measure=f"distance from the full run's KL curve: principal weights over the safe mask, both at {density:g}",
        sentence=f"A random mask is {shown:.2f} times as far from the full curve as the safe one." if shown else "",
    )
    return controlled_with(headline, [ClaimPart("the safe mask is nearer than a random one", beyond_chance)])


def _ratio(above: Mapping[int, float], below: Mapping[int, float]) -> OverUnits:
    seeds = sorted(above.keys() & below.keys())
    return OverUnits(
        {f"seed {s}": above[s] / below[s] for s in seeds if below[s] > 0}, geometric=True, what="pairs of runs"
    )


def _difference(one: BySeed, two: BySeed) -> OverUnits:
    seeds = sorted(one.keys() & two.keys())
    return OverUnits(
        {f"seed {s}": one[s]["sampled_accuracy"] - two[s]["sampled_accuracy"] for s in seeds}, what="pairs of runs"
    )


def _mean(areas: Sequence[float]) -> str:
    return f"{sum(areas) / len(areas):.2f}" if areas else "not known"


def _listed(areas: Mapping[Masked, Mapping[int, float]], runs: Mapping[Masked, BySeed]) -> str:
    """Every mask's areas and accuracies, lowest to highest over seeds."""
    parts = [
        f"{mask_words(masked)} {_range(of_seeds.values())} (accuracy {_range(_accuracies(runs[masked]), 3)})"
        for masked, of_seeds in areas.items()
    ]
    full = _range(_accuracies(runs[FULL]), 3)
    return f"Distance from the full run's KL curve, over seeds: {'; '.join(parts)}. Full: accuracy {full}."


def _accuracies(runs: BySeed) -> Sequence[float]:
    return [float(row["sampled_accuracy"]) for row in runs.values()]


def _range(values: Iterable[float], digits: int = 2) -> str:
    known = list(values)
    return f"{min(known):.{digits}f} to {max(known):.{digits}f}" if known else "unknown"
