"""From an effect and its interval to a verdict: the margins and the rules, the same for every claim.

Knows nothing of claims or tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

from offprincipal.comparison.pooling import Estimate
from offprincipal.studies.claims.seeds import OverPairs

Verdict = Literal["supported", "contradicted", "no effect beyond the control", "inconclusive"]

SHARE_MARGIN = 0.02  # two points of a share or an overlap are the least that counts as an effect
LEAST_MATRICES = 8  # below, a bootstrap over matrices covers far less often than it says
LEAST_PAIRS = 3  # of runs, below which their spread is hardly known
RATIO_MARGIN = 1.25  # as is a quarter more, for quantities that are compared as ratios


Effect = Estimate | OverPairs


@dataclass(frozen=True)
class Judgement:
    """One verdict, with the figure that it rests on.

    Args:
        measure: what `effect` is.
        rule: how the verdict follows from it.
        sentence: what was found, with the figures that stand behind it.
    """

    verdict: Verdict
    effect: float | None
    low: float | None
    high: float | None
    measure: str
    rule: str
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Condition:
    """A part of a claim beside its headline: in words, as judged by its own rule, and the verdict that it wants."""

    words: str
    judgement: Judgement
    wanted: Verdict = "supported"


def published_with(headline: Judgement, conditions: Sequence[Condition]) -> Judgement:
    """A claim of several parts, as published: every part has to come out as it says.

    Returns:
        The headline's effect; `supported` if all parts came out as claimed, `contradicted` if one came out otherwise,
        `inconclusive` if one is undecided.
    """
    return _combined(headline, conditions)


def controlled_with(headline: Judgement, conditions: Sequence[Condition]) -> Judgement:
    """A claim of several parts, with its control: the headline decides, but is `supported` only if the others hold.

    A condition that wants an effect, and finds none beyond the margin, leaves none.
    """
    if headline.verdict != "supported":
        return _with_rule(headline, conditions)
    found = _combined(headline, conditions)
    none: Verdict = "no effect beyond the control"
    missed = {c.judgement.verdict for c in conditions if c.judgement.verdict not in (c.wanted, "inconclusive")}
    return replace(found, verdict=none) if missed == {none} else found


def _combined(headline: Judgement, conditions: Sequence[Condition]) -> Judgement:
    parts = [(headline.verdict, "supported"), *((c.judgement.verdict, c.wanted) for c in conditions)]
    verdict: Verdict = "supported"
    if any(found == "inconclusive" for found, _ in parts):
        verdict = "inconclusive"
    if any(found not in (wanted, "inconclusive") for found, wanted in parts):
        verdict = "contradicted"
    return replace(_with_rule(headline, conditions), verdict=verdict)


def _with_rule(headline: Judgement, conditions: Sequence[Condition]) -> Judgement:
    also = "; ".join(f"{c.words} ({c.judgement.measure}: {c.wanted} by its own rule)" for c in conditions)
    return replace(headline, rule=f"{headline.rule}. Supported only if also {also}") if conditions else headline


def judge_positive(effect: Estimate, *, measure: str, sentence: str = "") -> Judgement:
    """Whether a quantity that cannot be negative is more than nothing."""
    pooled = effect.pooled()
    if pooled.value is None or pooled.low is None:
        return nothing(measure, sentence)
    verdict: Verdict = "supported" if pooled.low > 0 else "no effect beyond the control"
    return Judgement(verdict, pooled.value, pooled.low, pooled.high, measure, "supported: interval above 0", sentence)


def judge_at_most(value: float | None, most: float, *, measure: str, sentence: str = "") -> Judgement:
    """Whether a quantity without an interval stays below a limit."""
    if value is None:
        return nothing(measure, sentence)
    verdict: Verdict = "supported" if value <= most else "contradicted"
    return Judgement(verdict, value, None, None, measure, f"supported: at most {most:g}; else contradicted", sentence)


def judge_bare_ratio(value: float | None, *, measure: str) -> Judgement:
    """Whether a ratio without an interval is above 1 by the margin."""
    if value is None:
        return nothing(measure)
    verdict: Verdict = "no effect beyond the control"
    if not 1 / RATIO_MARGIN < value < RATIO_MARGIN:
        verdict = "supported" if value > 1 else "contradicted"
    rule = f"supported: at least {RATIO_MARGIN:g}; contradicted: at most 1/{RATIO_MARGIN:g}; else no effect"
    return Judgement(verdict, value, None, None, measure, rule, "")


def judge_difference(effect: Effect, expected_sign: int = 1, *, measure: str, sentence: str = "") -> Judgement:
    units, what = _least(effect)
    side = "above" if expected_sign > 0 else "below"
    rule = (
        f"supported: interval wholly {side} 0 and the effect at least {SHARE_MARGIN:g} in size; contradicted: the same "
        f"on the other side; no effect: an interval wholly within ±{SHARE_MARGIN:g}; else, and with fewer than "
        f"{units} {what}, inconclusive"
    )
    return judgement(effect, 0.0, -SHARE_MARGIN, SHARE_MARGIN, expected_sign, measure, rule, sentence)


def judge_ratio(effect: Effect, *, measure: str, sentence: str = "") -> Judgement:
    units, what = _least(effect)
    rule = (
        f"supported: interval wholly above 1 and the ratio at least {RATIO_MARGIN:g}; contradicted: wholly below 1 and "
        f"at most 1/{RATIO_MARGIN:g}; no effect: an interval wholly between the two; else, and with fewer than "
        f"{units} {what}, inconclusive"
    )
    return judgement(effect, 1.0, 1 / RATIO_MARGIN, RATIO_MARGIN, 1, measure, rule, sentence)


def judgement(
    effect: Effect, none: float, least: float, most: float, expected_sign: int, measure: str, rule: str, sentence: str
) -> Judgement:
    pooled = effect.pooled()
    if pooled.value is None:
        return nothing(measure, "The figures that this rests on are undefined: too little changed.")
    least_units, what = _least(effect)
    if pooled.low is None or pooled.high is None or pooled.matrices < least_units:
        sentence = f"{sentence} There are only {pooled.matrices} {what}: too few for an interval to be trusted."
        return Judgement("inconclusive", pooled.value, pooled.low, pooled.high, measure, rule, sentence)
    verdict = decide(pooled.value, pooled.low, pooled.high, none, least, most, expected_sign)
    return Judgement(verdict, pooled.value, pooled.low, pooled.high, measure, rule, sentence)


def _least(effect: Effect) -> tuple[int, str]:
    """The fewest units that an interval is trusted with, and what they are."""
    return (LEAST_PAIRS, "pairs of runs") if isinstance(effect, OverPairs) else (LEAST_MATRICES, "matrices or steps")


def decide(
    value: float, low: float, high: float, none: float, least: float, most: float, expected_sign: int
) -> Verdict:
    """The verdict on an effect.

    Args:
        value, low, high: the effect and its interval.
        none: the effect's value where there is none; least, most: the range in which it is too small to count.
        expected_sign: +1 if the claim says above `none`, −1 if below.

    >>> decide(0.2, 0.1, 0.3, 0.0, -0.02, 0.02, 1), decide(0.001, -0.01, 0.01, 0.0, -0.02, 0.02, 1)
    ('supported', 'no effect beyond the control')
    >>> decide(-0.2, -0.3, -0.1, 0.0, -0.02, 0.02, 1), decide(0.2, -0.1, 0.3, 0.0, -0.02, 0.02, 1)
    ('contradicted', 'inconclusive')
    """
    if least <= low and high <= most:
        return "no effect beyond the control"
    one_sided = low > none or high < none
    if least < value < most or not one_sided:
        return "inconclusive"
    return "supported" if (value > none) == (expected_sign > 0) else "contradicted"


def nothing(measure: str, sentence: str = "") -> Judgement:
    return Judgement("inconclusive", None, None, None, measure, "inconclusive where the effect is undefined", sentence)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    return reduce(Estimate.__add__, estimates).scaled(1 / len(estimates))


def percent(estimate: Estimate, digits: int = 1) -> str:
    return f"{100 * estimate.value:.{digits}f} %"
