"""C12: does principal LoRA gain nothing and collapse first, judged from sweeps of learning rates, ranks and seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

from offprincipal.outcomes.sweeps import (
    SAME_SIZE,
    Pair,
    Sweeps,
    at_equal_size,
    best_accuracy,
    open_end,
    stable_run,
    sweeps_of,
)
from offprincipal.paper.claims.evidence import Evidence, Row
from offprincipal.paper.claims.registry import claim
from offprincipal.paper.claims.rules import (
    SHARE_MARGIN,
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

PLAIN, PRINCIPAL = "lora", "pissa"
_MATCHES = (("update_norm", "update norm"), ("kl_to_base", "KL to the base"))


@claim(
    "C12",
    "PEFT",
    "Principal LoRA (PiSSA) gains nothing and collapses at higher learning rates, where plain LoRA is robust",
    "length: LoRA and PiSSA at equal update norm, and at equal KL, of either at its highest stable rate",
    tables=(),
    needs=("outcomes",),
)
def principal_lora(evidence: Evidence) -> tuple[Judgement, Judgement]:
    rows = evidence.rows("outcomes")
    sweeps = {method: sweeps_of(rows, method) for method in dict.fromkeys(row["method"] for row in rows)}
    plain, principal = sweeps.get(PLAIN, {}), sweeps.get(PRINCIPAL, {})
    if not plain.keys() & principal.keys():
        none = nothing("highest stable learning rate", "There are no runs of LoRA and of PiSSA to compare.")
        return none, none
    return _published(plain, principal, _said(sweeps)), _controlled(rows)


def _published(plain: Sweeps, principal: Sweeps, said: str) -> Judgement:
    pairs = sorted(plain.keys() & principal.keys())
    ratios = {pair: _stable_rate(plain[pair]) / _stable_rate(principal[pair]) for pair in pairs}
    gains = [best_accuracy(principal[pair]) - best_accuracy(plain[pair]) for pair in pairs]
    gains_nothing = judge_at_most(
        fmean(gains), SHARE_MARGIN, measure="best accuracy of PiSSA minus that of LoRA, mean over pairs"
    )
    headline = judge_ratio(
        _over_seeds(ratios, geometric=True),
        measure="highest stable learning rate of LoRA over that of PiSSA",
        sentence=said,
    )
    ends = [(open_end(plain[pair]), open_end(principal[pair])) for pair in pairs]
    return published_with(_within_bounds(headline, ends), [ClaimPart("PiSSA gains nothing", gains_nothing)])


def _within_bounds(headline: Judgement, ends: Sequence[tuple[str | None, str | None]]) -> Judgement:
    """The verdict on ratios of rates, where sweeps without a collapse, or with nothing else, give bounds of them.

    Args:
        ends: of each pair of sweeps, where the rate of LoRA, and that of PiSSA, has no bound.
    """
    at_least = sum(plain == "above" or principal == "below" for plain, principal in ends)
    at_most = sum(plain == "below" or principal == "above" for plain, principal in ends)
    undone_by = {"supported": at_most, "contradicted": at_least, "no effect beyond the control": at_least + at_most}
    said = [
        f"{count} of {len(ends)} ratios are only known to be at {what} as large, since {why}."
        for count, what, why in (
            (at_least, "least", "LoRA never collapsed, or PiSSA did at its lowest rate"),
            (at_most, "most", "PiSSA never collapsed, or LoRA did at its lowest rate"),
        )
        if count
    ]
    verdict = "inconclusive" if undone_by.get(headline.verdict) else headline.verdict
    rule = f"{headline.rule}; inconclusive too where a ratio is only a bound, on the side that could undo the verdict"
    return replace(headline, verdict=verdict, sentence=" ".join([headline.sentence, *said]), rule=rule)


def _controlled(rows: Sequence[Row]) -> Judgement:
    judged = [_at_equal(rows, by, words) for by, words in _MATCHES]
    said = " ".join(judgement.sentence for judgement in judged)
    headline, also = judged
    found = controlled_with(headline, [ClaimPart("it is so at equal KL too", also)])
    return replace(found, sentence=said)


def _at_equal(rows: Sequence[Row], by: str, words: str) -> Judgement:
    """LoRA minus PiSSA at equal step, at the highest stable rate of either, so that neither alone is the one chosen."""
    by_run = {row["run"]: row for row in rows}
    found: dict[Pair, dict[str, float]] = {}
    missed = 0
    for row in rows:
        like = by_run.get(row["matched_to"])
        if row["matched_by"] != by or like is None or {row["method"], like["method"]} != {PLAIN, PRINCIPAL}:
            continue
        if not at_equal_size(row):
            missed += 1
            continue
        ahead = like["sampled_accuracy"] - row["sampled_accuracy"]
        found.setdefault((row["rank"], row["seed"]), {})[like["method"]] = ahead if like["method"] == PLAIN else -ahead
    both = {pair: sum(sides.values()) / 2 for pair, sides in found.items() if len(sides) == 2}
    listed = "; ".join(
        f"{_words(pair)} {sides.get(PLAIN, math.nan):+.3f} and {sides.get(PRINCIPAL, math.nan):+.3f}"
        for pair, sides in sorted(found.items())
    ).replace("+nan", "unknown")
    left_out = f"; {missed} left out, having missed it by more than {SAME_SIZE - 1:.0%}" if missed else ""
    return judge_difference(
        _over_seeds(both),
        measure=f"sampled accuracy of LoRA minus that of PiSSA at equal {words}, at either's highest stable rate",
        sentence=f"LoRA minus PiSSA at the {words} of LoRA's highest stable rate, and of PiSSA's: {listed or 'none'}"
        f"{left_out}.",
    )


def _over_seeds(values: Mapping[Pair, float], geometric: bool = False) -> OverUnits:
    """Seeds are the unit: ranks of one seed share prompts and base, and are pooled."""
    of_seeds: dict[int, list[float]] = {}
    for (_, seed), value in values.items():
        of_seeds.setdefault(seed, []).append(math.log(value) if geometric else value)
    means = {f"seed {seed}": fmean(of_seed) for seed, of_seed in sorted(of_seeds.items())}
    return OverUnits({s: math.exp(x) if geometric else x for s, x in means.items()}, geometric, what="seeds")


def _stable_rate(sweep: Sequence[Row]) -> float:
    """The highest stable rate; the lowest that was tried where even that collapsed."""
    return float((stable_run(sweep) or sweep[0])["learning_rate"])


def _said(sweeps: Mapping[str, Sweeps]) -> str:
    """Every method: the range of its highest stable rates, of its best accuracies, and of the spectral shift there."""
    parts = []
    for method, of_pairs in sweeps.items():
        if not of_pairs:
            continue
        rates = [_stable_rate(sweep) for sweep in of_pairs.values()]
        best = [best_accuracy(sweep) for sweep in of_pairs.values()]
        shifts = [row["spectral_shift"] for sweep in of_pairs.values() if (row := stable_run(sweep)) is not None]
        parts.append(
            f"{method}: highest stable rate {_range(rates)}, best accuracy {_range(best)}, spectral shift at that rate "
            f"{_range(shifts)}"
        )
    both = [sweeps.get(method, {}) for method in (PLAIN, PRINCIPAL)]
    return (
        f"Over ranks and seeds, {'; '.join(parts)}. Best accuracies of LoRA and PiSSA {_overlap(*both)}. Rates were "
        f"tried a factor of {_range(_gaps(both))} apart, so that a single ratio is known to no more than that."
    )


def _gaps(sides: Sequence[Sweeps]) -> list[float]:
    """How many times as high each rate of a sweep is as the one below."""
    sweeps = [sweep for side in sides for sweep in side.values()]
    return [high["learning_rate"] / low["learning_rate"] for sweep in sweeps for low, high in pairwise(sweep)]


def _overlap(one: Sweeps, two: Sweeps) -> str:
    first, second = ([best_accuracy(sweep) for sweep in side.values()] for side in (one, two))
    apart = max(first) < min(second) or max(second) < min(first)
    return "do not overlap" if apart else "overlap"


def _range(values: Sequence[float]) -> str:
    if not values:
        return "undefined"
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _words(pair: Pair) -> str:
    return f"rank {pair[0]}, seed {pair[1]}"
