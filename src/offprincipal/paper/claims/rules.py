"""From an effect and its interval to a verdict: the margins and the rules, the same for every claim.

Knows nothing of claims or tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from offprincipal.paper.claims.units import Effect, OverUnits

Verdict = Literal["supported", "contradicted", "no effect beyond the control", "inconclusive"]

SHARE_MARGIN = 0.02  # two points of a share or an overlap are the least that counts as an effect
RATIO_MARGIN = 1.25  # as is a quarter more, for quantities that are compared as ratios
LEAST_UNITS = 3  # below, their spread is hardly known


@dataclass(frozen=True)
class Judgement:
    """One verdict, with the figure that it rests on.

    Args:
        measure: what `effect` is.
        rule: how the verdict follows from it.
        sentence: what was found, with the figures that stand behind it.
        units: how many runs, or pairs of runs, it rests on; None if it speaks of single ones.
    """

    verdict: Verdict
    effect: float | None
    low: float | None
    high: float | None
    measure: str
    rule: str
    sentence: str
    units: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class ClaimPart:
    """A part of a claim beside its headline: in words, as judged by its own rule, and the verdict that it wants."""

    words: str
    judgement: Judgement
    wanted: tuple[Verdict, ...] = ("supported",)


def published_with(headline: Judgement, conditions: Sequence[ClaimPart]) -> Judgement:
    """A claim of several parts, as published: every part has to come out as it says.

    Returns:
        `supported`, with the headline's effect, if all parts came out as claimed; with that of the first such part,
        `contradicted` if one came out otherwise, `inconclusive` if one is undecided.
    """
    found = _combined(headline, conditions)
    also = "As published every part must hold: one that is decided otherwise, or has no effect, contradicts the claim"
    return replace(found, rule=f"{found.rule}. {also}")


def controlled_with(headline: Judgement, conditions: Sequence[ClaimPart]) -> Judgement:
    """A claim of several parts, with its control: the headline decides, but is `supported` only if the others hold.

    A condition that wants an effect, and finds none beyond the margin, leaves none.
    """
    if headline.verdict != "supported":
        return _with_rule(headline, conditions)
    found = _combined(headline, conditions)
    if conditions:
        found = replace(found, rule=f"{found.rule}; parts without an effect leave none, others contradict the claim")
    none: Verdict = "no effect beyond the control"
    missed = {c.judgement.verdict for c in conditions if _missed(c)}
    return replace(found, verdict=none) if missed == {none} else found


def decided_alike(headline: Judgement, stricter: Judgement) -> Judgement:
    """A control, and one that knows more: decided only as both decide.

    Returns:
        The headline; where it is decided and the stricter one is not, or otherwise, the stricter one's effect, as
        `no effect beyond the control` if that is what it is, else as `inconclusive`.
    """
    rule = f"{headline.rule}. Decided only if so is, by its own rule: {stricter.measure}"
    if headline.verdict not in ("supported", "contradicted") or stricter.verdict == headline.verdict:
        return replace(headline, rule=rule)
    none: Verdict = "no effect beyond the control"
    verdict: Verdict = none if stricter.verdict == none else "inconclusive"
    return replace(stricter, verdict=verdict, rule=rule, sentence=headline.sentence)


def _combined(headline: Judgement, conditions: Sequence[ClaimPart]) -> Judgement:
    found = _with_rule(headline, conditions)
    parts = [ClaimPart("", headline), *conditions]
    missed, undecided = filter(_missed, parts), (c for c in parts if c.judgement.verdict == "inconclusive")
    decided = next(missed, None) or next(undecided, None)
    if decided is None:
        return found
    verdict: Verdict = "contradicted" if _missed(decided) else "inconclusive"
    if decided.judgement is headline:
        return replace(found, verdict=verdict)
    own, said = decided.judgement, ""
    if headline.effect is not None:
        known = headline.low is not None and headline.high is not None
        ends = f" [{headline.low:.3g}, {headline.high:.3g}]" if known else ""
        said = f" {headline.measure}: {headline.effect:.3g}{ends}."
    return replace(
        found,
        verdict=verdict,
        effect=own.effect,
        low=own.low,
        high=own.high,
        units=own.units,
        measure=f"{decided.words}, which decided: {own.measure}",
        sentence=headline.sentence + said,
    )


def _missed(condition: ClaimPart) -> bool:
    """Whether a part is decided, and not as it was claimed."""
    return condition.judgement.verdict not in (*condition.wanted, "inconclusive")


def _with_rule(headline: Judgement, conditions: Sequence[ClaimPart]) -> Judgement:
    also = "; ".join(f"{c.words} ({c.judgement.measure}: {' or '.join(c.wanted)} by its own rule)" for c in conditions)
    return replace(headline, rule=f"{headline.rule}. Supported only if also {also}") if conditions else headline


def judge_positive(effect: Effect, *, measure: str, sentence: str = "") -> Judgement:
    """Whether a quantity that cannot be negative is more than nothing."""
    found = effect.interval()
    if found.value is None:
        return nothing(measure, sentence)
    rule = (
        f"supported: interval above 0; no effect: nothing at all; else, and with fewer than {LEAST_UNITS} "
        f"{effect.what}, inconclusive"
    )
    verdict: Verdict = "inconclusive"
    if found.low is not None and found.units >= LEAST_UNITS and (found.low > 0 or found.value == 0):
        verdict = "supported" if found.low > 0 else "no effect beyond the control"
    return Judgement(verdict, found.value, found.low, found.high, measure, rule, sentence, found.units)


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


def judge_difference(
    effect: Effect, expected_sign: int = 1, *, measure: str, sentence: str = "", relative: Effect | None = None
) -> Judgement:
    """Whether a difference of shares is an effect.

    Args:
        expected_sign: +1 if the claim says above nothing, −1 if below.
        relative: the same effect as a ratio, whose margin counts too, so that a small share is not taken for nothing.
    """
    side, also = "above" if expected_sign > 0 else "below", ""
    if relative is not None:
        also = f", or the ratio beyond {RATIO_MARGIN:g} or 1/{RATIO_MARGIN:g}"
    rule = (
        f"supported: interval wholly {side} 0 and the effect at least {SHARE_MARGIN:g} in size{also}; contradicted: "
        f"the same on the other side; no effect: an interval wholly within ±{SHARE_MARGIN:g}"
        f"{' and that of the ratio within its margin' if also else ''}; else, and with fewer than {LEAST_UNITS} "
        f"{effect.what}, inconclusive"
    )
    found = _judged(effect, (0.0, -SHARE_MARGIN, SHARE_MARGIN), expected_sign, measure, rule, sentence)
    ratio = relative.interval() if relative is not None else None
    if ratio is None or ratio.value is None or ratio.low is None or ratio.high is None:
        return found
    within = ratio.low >= 1 / RATIO_MARGIN and ratio.high <= RATIO_MARGIN
    if found.verdict == "no effect beyond the control" and not within:
        found = replace(found, verdict="inconclusive")
    one_sided = found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)
    large = not 1 / RATIO_MARGIN < ratio.value < RATIO_MARGIN
    if found.verdict == "inconclusive" and one_sided and large and (found.units or 0) >= LEAST_UNITS:
        assert found.effect is not None
        found = replace(found, verdict="supported" if found.effect * expected_sign > 0 else "contradicted")
    return found


def judge_ratio(effect: Effect, *, measure: str, sentence: str = "") -> Judgement:
    """Whether a ratio is above 1."""
    rule = (
        f"supported: interval wholly above 1 and the ratio at least {RATIO_MARGIN:g}; contradicted: wholly below 1 and "
        f"at most 1/{RATIO_MARGIN:g}; no effect: an interval wholly between the two; else, and with fewer than "
        f"{LEAST_UNITS} {effect.what}, inconclusive"
    )
    return _judged(effect, (1.0, 1 / RATIO_MARGIN, RATIO_MARGIN), 1, measure, rule, sentence)


def _judged(
    effect: Effect, range_: tuple[float, float, float], expected_sign: int, measure: str, rule: str, sentence: str
) -> Judgement:
    """The verdict on an effect: its value if there is none, and the range in which it is too small to count."""
    found = effect.interval()
    if found.value is None:
        return nothing(measure, "The figures that this rests on are undefined: too little changed.")
    if found.low is None or found.high is None or found.units < LEAST_UNITS:
        said = f"{sentence} There are only {found.units} {effect.what}: shown, not judged."
        return Judgement("inconclusive", found.value, found.low, found.high, measure, rule, said, found.units)
    verdict = decide(found.value, found.low, found.high, *range_, expected_sign)
    return Judgement(verdict, found.value, found.low, found.high, measure, rule, sentence, found.units)


def decide(
    value: float, low: float, high: float, none: float, least: float, most: float, expected_sign: int
) -> Verdict:
    """The verdict on an effect.

    Args:
        value, low, high: the effect and its interval.
        none: the effect's value if there is none; least, most: the range in which it is too small to count.
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


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def percent(value: float | None, digits: int = 1) -> str:
    return "an undefined share" if value is None else f"{100 * value:.{digits}f} %"


def by_run(values: Mapping[str, float | None], text: str = "{:.3g}") -> str:
    """A figure for each run, so that a mean over unlike runs hides nothing.

    >>> by_run({"a": 0.5, "b": None})
    'a 0.5, b undefined'
    """
    shown = {run: "undefined" if value is None else text.format(value) for run, value in values.items()}
    return ", ".join(f"{run} {value}" for run, value in shown.items())


def ratios(above: Mapping[str, float | None], below: Mapping[str, float | None]) -> dict[str, float | None]:
    """Unit by unit, one over the other; None if either is undefined or nothing."""
    return {unit: top / bottom if (bottom := below[unit]) and top else None for unit, top in above.items()}


def differences(one: Mapping[str, float | None], two: Mapping[str, float | None]) -> dict[str, float | None]:
    """Unit by unit, one less the other; None if either is undefined."""
    pairs = {unit: (value, two[unit]) for unit, value in one.items()}
    return {unit: a - b if a is not None and b is not None else None for unit, (a, b) in pairs.items()}


def over_units(values: Mapping[str, float | None], geometric: bool = False, what: str = "runs") -> OverUnits:
    """The effect of the units where it is known."""
    return OverUnits({unit: value for unit, value in values.items() if value is not None}, geometric, what)
