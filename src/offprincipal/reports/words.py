"""Sentences: the results of a comparison in plain words, every figure with the null that would explain it away.

Reads the pooled values of `summary.json` and computes no metric. The rules of the wording are fixed here:

- An effect *beyond that*, that is beyond spacings, rows and columns, is reported only if |z|, the score test against
  the margin null, exceeds `Z_BEYOND`, and always with its size, because with millions of entries the smallest
  difference is significant.
- A figure is *about* that of a random update of equal norm, stored alike (the stored null), if it is within a factor of
  `ABOUT` of it.
- A pair of runs is reported if its gap is `TINY` or more and its |z| exceeds `Z_BEYOND` with Bonferroni's correction
  for the number of pairs.
- The sentence of a run names precision, magnitude or neurons if that rung changes a share by `TINY` or more, and says
  which of them cannot be told apart because a rung between them is undefined.
- Runs share a sentence only if no number in it is more than `_APART` times that of another run.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from rich.markup import escape

from offprincipal.measures.columns import RUNGS
from offprincipal.measures.pooling import STEPS
from offprincipal.plain_text import plain
from offprincipal.reports.nulls import ENDINGS, PARTS, listed, shares, steps_up
from offprincipal.reports.numbers import degrees, number, percent, points, signed

Z_BEYOND = 3.0
TINY, SMALL = 0.01, 0.05
ABOUT = 1.25
_SAME = 1 - 1e-12  # smallest cosine of two updates that are considered equal
_NOTHING = "none of the metrics that a sentence could be about was measured"
ASK = " (--explain has each)"
_NOTABLE = 3  # most pairs of runs that have their own sentence
_FEW = 3  # most runs that have a sentence each
_MOST_NAMES = 6  # most names in a shared sentence
_BLIND = "a random update of equal norm"
_APART, _NOTES_APART = 2.0, 10.0  # largest ratio of numbers in a shared sentence, or in a shared note
_OFF_GRID = "undefined here, since the base's weights are not bfloat16 numbers, so that precision cannot be told apart"
_BEYOND = tuple(PARTS)[-1]
_LENGTHS = {
    "spectral shift": "spectral_shift",
    "principal angle": "principal_angle_left_max_deg",
    "principal energy": "principal_energy",
}
MASKS = {"principal": "principal weights", "low_magnitude": "low-magnitude weights"}

_FAR = {"about": " (about the same)", "smaller than": " (less)", "larger than": " (more)", "": ""}

Metrics = Mapping[str, Mapping[str, Any]]
_Reader = Callable[[str], float | None]


def verdict_paragraph(summary: Mapping[str, Any]) -> list[str]:
    """One paragraph for each run, then one sentence for each pair of runs.

    Args:
        summary: the content of `summary.json`. Metrics that were not measured or are undefined are left out.

    Returns:
        Plain text without markup. Control characters in names are replaced, so that it is safe on a terminal.
    """
    return list(run_paragraphs(summary).values()) + [pair_sentence(pair) for pair in summary["pairs"]]


def run_paragraphs(summary: Mapping[str, Any]) -> dict[str, str]:
    """Run -> its paragraph."""
    return {
        name: run_paragraph(
            name,
            metrics_of(run),
            run.get("differing_unmeasured", 0),
            len(run.get("only_in_run", ())) + len(summary.get("only_in_base", ())),
        )
        for name, run in summary["runs"].items()
    }


def run_paragraph(name: str, metrics: Metrics, differing: int = 0, alone: int = 0) -> str:
    """A paragraph on what one run did to the weights: how many changed, how far, and where.

    Args:
        name: of the run.
        metrics: name -> pooled value.
        differing: number of tensors that differ from the base's but are not measured.
        alone: number of tensors that only the base or only the run has.
    """
    value = _reader(metrics)
    if is_unchanged(metrics):
        return _unchanged(name, value, differing, alone)
    parts = [_amount(value), _distance(value), _turn(value), _held(value), *(_place(mask, value) for mask in MASKS)]
    said = [part for part in parts if part] or [f"{_NOTHING}."]
    return f"{plain(name)}: " + " ".join(said)


def decisions(summary: Mapping[str, Any], more: str = "", labels: Mapping[str, str] | None = None) -> list[str]:
    """One sentence per run: how many weights changed, and which of precision, neurons and length explain it.

    If there are more than a few runs, those with the same words and similar numbers share a sentence. Then follow one
    sentence for each of the few pairs of runs whose agreement is furthest from the nulls, and one for all other pairs.

    Args:
        summary: the content of `summary.json`.
        more: appended to sentences on several pairs; says where the reader finds a sentence on each.
        labels: run -> its name in sentences; None: the names of the runs.

    Returns:
        As from `verdict_paragraph`, which gives the full text.
    """
    runs, labels = summary["runs"], labels or {}
    still = {name for name, run in runs.items() if is_unchanged(run["metrics"])}
    clauses = [(name, ", ".join(filter(None, _decided(metrics_of(runs[name]))))) for name in runs if name not in still]
    alike = _alike(clauses, _APART) if len(clauses) > _FEW else [([name], text) for name, text in clauses]
    said = [plain(f"{_few([labels.get(name, name) for name in names])}: {text}.") for names, text in alike]
    unchanged = {labels.get(name, name): runs[name] for name in runs if name in still}
    said += run_paragraphs({**summary, "runs": unchanged}).values()
    return said + _notable_pairs(summary["pairs"], more, labels)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= _MOST_NAMES else f"{', '.join(names[:3])} and {len(names) - 3} more runs"


def _notable_pairs(pairs: Sequence[Mapping[str, Any]], more: str, labels: Mapping[str, str]) -> list[str]:
    """Sentences on the pairs whose agreement the nulls do not explain, the furthest first; then one on the others."""
    named = [{**pair, **{run: labels.get(pair[run], pair[run]) for run in ("run_a", "run_b")}} for pair in pairs]
    named.sort(key=lambda pair: (_is_one(pair), agreement_left_over(pair)), reverse=True)
    beyond = _z_of_several(len(pairs))
    notable = [
        pair
        for pair in named
        if _is_one(pair) or (agreement_left_over(pair) >= TINY and abs(pair["jaccard_z"]) > beyond)
    ]
    said = [pair_sentence(pair) for pair in notable[:_NOTABLE]]
    if others := len(notable) - len(said):
        said.append(
            f"{others} more pair{'s' * (others > 1)} of runs differ from what the nulls explain, by less{more}."
        )
    explained = [pair for pair in named if pair not in notable and pair.get("jaccard_z") is not None]
    if not explained:
        return said or ([pair_sentence(named[0])] if len(pairs) == 1 else [])
    who, where = f"{'The other ' * bool(notable)}{len(explained)} pair{'s' * (len(explained) > 1)} of runs", more
    if len(pairs) == 1:
        who = f"{plain(named[0]['run_a'])} and {plain(named[0]['run_b'])}"
        where = f" (Jaccard index {number(named[0]['jaccard'])})"
    return [*said, f"{who} changed the same entries about as often as the nulls explain{where}."]


def _z_of_several(tests: int) -> float:
    """The threshold for |z| that replaces `Z_BEYOND` for several tests, by Bonferroni's correction.

    >>> round(_z_of_several(1), 6), round(_z_of_several(190), 2)
    (3.0, 4.34)
    """
    normal = NormalDist()
    return -normal.inv_cdf(normal.cdf(-Z_BEYOND) / max(tests, 1))


def _is_one(pair: Mapping[str, Any]) -> bool:
    """Whether two runs have equal weights."""
    return pair["jaccard"] == 1 and (pair.get("update_cosine") or 0) >= _SAME


def _decided(metrics: Metrics) -> list[str]:
    value = _reader(metrics)
    amount = _changed(value)
    if value("relative_update_norm") == 0:
        return [amount, "none of them in a linear matrix"]
    clauses = [amount, _where(value), _how_far(value, "such an update" if _BLIND in amount else _BLIND)]
    return clauses if any(clauses) else [_NOTHING]


def _changed(value: _Reader) -> str:
    """The share of weights that changed, with the share that a random update of equal norm would have changed."""
    unchanged, null = value("unchanged_fraction"), value("unchanged_fraction_isotropic_null")
    if unchanged is None:
        return ""
    said = f"{percent(1 - unchanged)} of the weights changed"
    if null is None:
        return said
    return f"{said} ({_BLIND}: {percent(1 - null)})"


def _where(value: _Reader) -> str:
    """Which nulls explain the overlaps of the changed entries with the principal and the low-magnitude mask."""
    steps = {mask: steps_up(shares(value, mask)) for mask in MASKS}
    known = [mask for mask, found in steps.items() if found]
    if not known:
        return ""
    spans = [step for mask in known for step in steps[mask]]
    explain = _explaining(spans)
    expected = listed(explain or ["chance"])
    reason = f"{untold[0][0]} cannot be told apart here" if (untold := [p for p, _ in spans if len(p) > 1]) else ""
    last = {mask: gap for mask in known for parts, gap in steps[mask] if len(parts) > 1 and _BEYOND in parts}
    left = {mask: gap for mask in known if (gap := _gap(mask, value)) is not None}
    mask, gap = max((last or left).items(), key=lambda each: abs(each[1]), default=("", 0.0))
    if abs(gap) >= (TINY if last else SMALL):
        said = f"{_spelled(abs(gap)).removeprefix('+')} {'more' if gap > 0 else 'fewer'} on {MASKS[mask]}"
        return f"{said} than {expected} would put there" + (f" ({reason})" if reason else "")
    rest = ""
    if left and not last:
        rest = f"beyond that {_spelled(gap)} on {MASKS[mask]}" if abs(gap) >= TINY else "a tiny rest beyond that"
    elif not last and any(value(f"{mask}_z") is not None for mask in known):
        expected = f"{expected} alone"
    notes = "; ".join(filter(None, (reason, rest)))
    return f"where {expected} would put them" + (f" ({notes})" if notes else "")


def _explaining(steps: Sequence[tuple[tuple[str, ...], float]]) -> list[str]:
    """Those of precision, magnitude and neurons that change a share; several that cannot be told apart are one."""
    moving = {parts for parts, gap in steps if _BEYOND not in parts and abs(gap) >= TINY}
    return [listed(parts, "or") for parts in sorted(moving, key=lambda parts: list(PARTS).index(parts[0]))]


def _how_far(value: _Reader, blind: str) -> str:
    """How spectral shift, principal angle and energy compare with those of a random update of equal norm."""
    ratios = {}
    for words, name in _LENGTHS.items():
        found, null = value(name), value(f"{name}_stored_null")
        if found is not None and null:
            ratios[words] = found / null
    if not ratios:
        return ""
    times = listed(list(map(_times, ratios.values())))
    verdicts = {_compared([ratio]) for ratio in ratios.values()}
    if len(verdicts) == 1:
        are, those = ("is", "that") if len(ratios) == 1 else ("are", "those")
        return f"and {listed(list(ratios))} {are} {verdicts.pop()} {those} of {blind} ({times} times)"
    return f"and {listed(list(ratios))} are {times} times those of {blind}"


def agreement_left_over(pair: Mapping[str, Any]) -> float:
    """Distance of the Jaccard index of two runs from its margin null; 0 if z does not exceed `Z_BEYOND`."""
    found, null, z = (pair[f"jaccard{suffix}"] for suffix in ("", "_margin_null", "_z"))
    return abs(found - null) if None not in (found, null, z) and abs(z) > Z_BEYOND else 0.0


def pair_sentence(pair: Mapping[str, Any]) -> str:
    """A sentence on the agreement of two runs' changed entries, with every rung of the ladder of nulls."""
    names = f"{plain(pair['run_a'])} and {plain(pair['run_b'])}"
    found, nulls = pair["jaccard"], [pair.get(f"jaccard_{rung}") for rung in RUNGS]
    if _is_one(pair):
        return f"{names} hold the same values in everything that was compared."
    if found is None:
        return f"{names}: the agreement of their changed entries is undefined, since neither changed any."
    if nulls[0] == 0:
        return f"{names} share no changed entry, since one of them changed none."
    return (
        f"{names} changed the same entries with a Jaccard index of {number(found)}; "
        f"{_beside_ladder(found, nulls, pair['jaccard_z'], 'gives {}', number)}."
    )


def _beside_ladder(
    found: float, nulls: Sequence[float | None], z: float | None, gives: str, text: Callable[[float | None], str]
) -> str:
    """The values at every rung of the ladder, and what is left; for an undefined rung the reason."""
    chance, rounding, spacing, margins = nulls
    said = f"chance alone {gives.format(text(chance))}"
    if margins is None:
        return f"{said}, and rounding, spacing and margins are {_OFF_GRID}"
    alone = "rounding alone is undefined" if rounding is None else f"rounding alone {text(rounding)}"
    last = f"spacing and margins {text(margins)}: {_beyond(found, margins, z)}"
    if spacing is None:
        return f"{said}, and {last}; rounding and spacing alone are {_OFF_GRID}"
    return f"{said}, {alone}, and {last}"


def answers(summary: Mapping[str, Any]) -> dict[str, str]:
    """Answers over all runs: what precision explains, what length explains, and what is left for geometry.

    Args:
        summary: the content of `summary.json`.

    Returns:
        Heading -> sentence; answers whose metrics were not measured are left out.
    """
    changed = [metrics_of(run) for run in summary["runs"].values() if not is_unchanged(run["metrics"])]
    if not changed:
        left_out = summary.get("only_in_base") or any(
            run.get("differing_unmeasured") or run.get("only_in_run") for run in summary["runs"].values()
        )
        measured = "that was measured " if left_out else ""
        return {"Neither": f"no weight {measured}changed in any run, so there is nothing to explain."}
    readers = [_reader(metrics) for metrics in changed]
    found = {
        "Precision": _precision_answer(readers),
        "Length": _length_answer(readers),
        "Geometry": _energy_answer(readers),
    }
    return {heading: sentence for heading, sentence in found.items() if sentence}


def contract_lines(summary: Mapping[str, Any]) -> list[str]:
    """Each expectation of a contract: whether a run kept it, and how many of its tensors break it."""
    return [
        plain(
            f"{'kept' if each['held'] else 'BROKEN'} by {name}: {each['pattern']}: {each['expected']} "
            f"({len(each['broken'])} of {each['tensors']} tensors break it)"
        )
        for name, run in summary["runs"].items()
        for each in run.get("contract", ())
    ]


def warnings_of(summary: Mapping[str, Any]) -> list[str]:
    """Notes on how the runs were read and measured, each with the runs that it concerns.

    Notes that differ only in numbers, by at most a factor of `_NOTES_APART`, are merged and show the range.
    """
    runs = summary["runs"]
    found = _alike([(name, warning) for name, run in runs.items() for warning in run["warnings"]], _NOTES_APART)
    return [plain(text if len(names) == len(runs) else f"{', '.join(names)}: {text}") for names, text in found]


_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_NAMES_A_TENSOR = re.compile(r"\w\.\w+\.\w")


def _alike(said: Iterable[tuple[str, str]], apart: float) -> list[tuple[list[str], str]]:
    """Merge the texts of runs: each different text once, with its runs.

    Texts that differ only in numbers are merged if no number is more than `apart` times another's.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for name, text in said:
        shape = text if _NAMES_A_TENSOR.search(text) else _NUMBER.sub("#", text)
        for other, texts in found:
            if other == shape and _near([*texts.values(), text], apart):
                texts[name] = text
                break
        else:
            found.append((shape, {name: text}))
    return [(list(texts), _ranged(texts.values())) for _, texts in found]


def _near(texts: Iterable[str], apart: float) -> bool:
    """Whether the numbers of texts that differ only in numbers differ by at most a factor."""
    columns = zip(*map(_NUMBER.findall, texts), strict=False)
    return all(_size(max(column, key=_size)) <= apart * _size(min(column, key=_size)) for column in columns)


def _size(written: str) -> float:
    return float(written.replace(",", ""))


def _ranged(texts: Iterable[str]) -> str:
    """One text for texts that differ only in numbers, with the smallest and the largest of each.

    >>> _ranged(["3 matrices, right to 1e-6", "3 matrices, right to 2e-5"])
    '3 matrices, right to 1e-6 to 2e-5'
    """
    first, *others = texts
    columns = zip(*map(_NUMBER.findall, (first, *others)), strict=False)
    ends = iter([sorted(set(column), key=_size) for column in columns])

    def both(_: Any) -> str:
        numbers = next(ends)
        return numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

    return _NUMBER.sub(both, first) if others else first


def is_unchanged(metrics: Metrics) -> bool:
    """Whether no weight of a run changed, once both are stored in bfloat16."""
    value = _reader(metrics)
    unchanged = value("unchanged_fraction")
    return unchanged == 1 if unchanged is not None else value("relative_update_norm") == 0


def shown(name: object) -> str:
    """The same for a cell of a rich table: every line is made safe, and rich's markup is escaped."""
    return escape("\n".join(map(plain, str(name).split("\n"))))


def place_name(source: str) -> str:
    """The name of a checkpoint on pages that are shared: the last part of an absolute path; otherwise unchanged.

    >>> place_name("/home/me/runs/grpo"), place_name("Qwen/Qwen3-0.6B")
    ('grpo', 'Qwen/Qwen3-0.6B')
    """
    return Path(source).name if Path(source).is_absolute() else source


def effect_size(gap: float) -> str:
    """A word for the size of a difference between two shares.

    >>> effect_size(0.002), effect_size(-0.03), effect_size(0.2)
    ('tiny', 'small', 'large')
    """
    return "tiny" if abs(gap) < TINY else "small" if abs(gap) < SMALL else "large"


def metrics_of(run: Mapping[str, Any]) -> Metrics:
    """A run's pooled figures, in which overlaps and their nulls are replaced by those of its anatomy, if it has one.

    The anatomy includes only matrices in which every null is defined, so that differences compare the same entries.
    """
    metrics = dict(run["metrics"])
    for mask, rungs in (run.get("anatomy") or {}).items():
        for step, ending in zip(STEPS, ENDINGS, strict=True):
            name = f"{mask}_overlap{ending}"
            pooled = metrics.get(name, {}).get("value")
            if pooled is None or not math.isclose(pooled, rungs[step], abs_tol=1e-12):
                metrics[name] = {
                    "value": rungs[step]
                }  # of other matrices than the pooled one, whose interval is not its
    return metrics


def beyond(run: Mapping[str, Any], mask: str) -> float | None:
    """The difference of a mask's overlap from the margin null; None if either is undefined."""
    return _difference(mask, _reader(metrics_of(run)))


def tally(claims: Sequence[Mapping[str, Any]]) -> str:
    """A sentence with the numbers of verdicts on a study's claims, as published and with their controls."""
    sides = [_counted([claim[side]["verdict"] for claim in claims]) for side in ("as_published", "controlled")]
    return f"Of {len(claims)} claims, as published: {sides[0]}; with the control: {sides[1]}." if claims else ""


def _counted(verdicts: Sequence[str]) -> str:
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))


def _reader(metrics: Metrics) -> _Reader:
    return lambda name: metrics.get(name, {}).get("value")


def _unchanged(name: str, value: _Reader, differing: int, alone: int) -> str:
    if alone and not differing:
        return (
            f"{plain(name)} is not the base: {alone} tensors are in one of the two alone. What both have is identical "
            "once both are stored in bfloat16."
        )
    if differing:
        return (
            f"{plain(name)} is not the base: {differing} tensors that hold no floating-point numbers, such as packed "
            "weights, differ, and are not measured. What is measured is identical once both are stored in bfloat16."
        )
    text = f"{plain(name)} is identical to the base: no weight changed once both are stored in bfloat16"
    stored, moved = value("unchanged_fraction_stored"), value("relative_update_norm")
    if stored is not None and stored < 1:
        text += f", although {percent(1 - stored)} of the stored values differ below that precision"
    if moved:
        text += f" (the stored update's norm is {number(moved)} of the base's)"
    return text + ". There is no changed entry to locate, so every overlap is undefined."


def _amount(value: _Reader) -> str:
    unchanged, null = value("unchanged_fraction"), value("unchanged_fraction_isotropic_null")
    if unchanged is None:
        return ""
    said = f"{percent(1 - unchanged)} of the weights changed; {percent(unchanged)} are bit-identical in bfloat16"
    if null is None:
        return f"{said}."
    gap = unchanged - null
    return f"{said}, where {_BLIND} would leave {percent(null)}: a {effect_size(gap)} difference ({_spelled(gap)})."


def _distance(value: _Reader) -> str:
    moved = value("relative_update_norm")
    if moved == 0:
        return "No linear matrix moved: all of it is in embeddings, heads, norms or biases."
    return f"The update's norm is {number(moved)} of the base's." if moved is not None else ""


def _turn(value: _Reader) -> str:
    if value("relative_update_norm") == 0:
        return ""
    angle, angle_null = value("principal_angle_left_max_deg"), value("principal_angle_left_max_deg_stored_null")
    shift, shift_null = value("spectral_shift"), value("spectral_shift_stored_null")
    parts = []
    if angle is not None:
        parts.append(f"The principal subspaces turned by {degrees(angle)}{_beside(angle, angle_null, degrees)}.")
    if shift is not None:
        parts.append(f"The singular values shifted by {number(shift)}{_beside(shift, shift_null, number)}.")
    return " ".join(parts)


def _held(value: _Reader) -> str:
    found, null = value("principal_energy"), value("principal_energy_stored_null")
    if found is None:
        return ""
    return f"The principal subspaces hold {percent(found)} of the update's energy{_beside(found, null, percent)}."


def _beside(found: float, null: float | None, text: Callable[[float], str]) -> str:
    if not null:
        return ""
    ratio = found / null
    return f", {_times(ratio)} times what {_BLIND} gives ({text(null)})"


def _place(mask: str, value: _Reader) -> str:
    found = value(f"{mask}_overlap")
    if found is None:
        return ""
    *nulls, _ = shares(value, mask)
    beside = _beside_ladder(found, nulls, value(f"{mask}_z"), "would put {} there", percent)
    return f"Of the changed entries {percent(found)} are {MASKS[mask]}; {beside}."


def _beyond(found: float, null: float, z: float | None) -> str:
    if z is None:
        return "these leave nothing to chance here, so nothing can be said beyond them"
    gap = found - null
    size = f"{_spelled(gap)}, z = {signed(z)}"
    if abs(z) <= Z_BEYOND:
        return f"nothing beyond that ({size})"
    kind = effect_size(gap)
    return f"more than that, but tiny ({size})" if kind == "tiny" else f"a {kind} effect beyond that ({size})"


def _spelled(gap: float) -> str:
    return points(gap).replace("points", "percentage points")


def _precision_answer(readers: Sequence[_Reader]) -> str:
    of_mask = {mask: [r for r in readers if r(f"{mask}_overlap") is not None] for mask in MASKS}
    mask = next((mask for mask in MASKS if of_mask[mask]), "")  # without a decomposition, low-magnitude weights alone
    if not mask:
        return ""
    located = of_mask[mask]
    chance, rounding, _, margins, found = (_known(f"{mask}_overlap{ending}", located) for ending in ENDINGS)
    nulls = {"where chance would put": chance, "bfloat16 rounding alone": rounding, "and spacing and margins": margins}
    beside = ", ".join(f"{words} {_span(null, percent)}" for words, null in nulls.items() if null)
    gaps = [gap for r in located for each in MASKS if (gap := _gap(each, r)) is not None]
    untold = len(located) - len(rounding)
    of_them = "" if untold == len(located) else f" of {untold} run{'s' * (untold > 1)}"
    rest = f"; precision cannot be told apart{of_them}, since rounding alone is undefined" if untold else ""
    where = "there or on low-magnitude weights" if mask == "principal" else "there"
    left = f"; {_left_over(gaps, where)}" if margins else ""
    return f"{MASKS[mask]} hold {_span(found, percent)} of the changed entries, {beside}{left}{rest}."


def _known(name: str, readers: Sequence[_Reader]) -> list[float]:
    return [found for value in readers if (found := value(name)) is not None]


def _gap(mask: str, value: _Reader) -> float | None:
    """The difference from the margin null if |z| exceeds `Z_BEYOND`; otherwise None."""
    z = value(f"{mask}_z")
    return _difference(mask, value) if z is not None and abs(z) > Z_BEYOND else None


def _difference(mask: str, value: _Reader) -> float | None:
    found, null = value(f"{mask}_overlap"), value(f"{mask}_overlap_margin_null")
    return None if found is None or null is None else found - null


def _left_over(gaps: Sequence[float], where: str) -> str:
    if not gaps:
        return f"nothing beyond that shows {where}"
    largest = max(gaps, key=abs)
    return f"the largest difference beyond that {where} is {_spelled(largest)}, which is {effect_size(largest)}"


def _length_answer(readers: Sequence[_Reader]) -> str:
    moved = [x for r in readers if (x := r("relative_update_norm")) is not None]
    if not moved:
        return ""
    text = f"the updates' norms are {_span(moved, number)} of the base's"
    clauses = [left] if (left := _left_unchanged(readers)) else []
    for words, name in (
        ("the spectrum shifted", "spectral_shift"),
        ("the principal subspaces turned", "principal_angle_left_max_deg"),
    ):
        ratios = [f / n for r in readers if (f := r(name)) is not None and (n := r(f"{name}_stored_null"))]
        if ratios:
            clauses.append(f"{words} {_span(ratios, _times)} times as far{_FAR[_compared(ratios)]}")
    if clauses:
        text += f"; beside {_BLIND}, stored alike, {listed(clauses)}"
    return text + "."


def _left_unchanged(readers: Sequence[_Reader]) -> str:
    """The unchanged share with its null, of the run in which they differ most."""
    names = ("unchanged_fraction", "unchanged_fraction_isotropic_null")
    known = [
        (found, null) for found, null in (map(r, names) for r in readers) if found is not None and null is not None
    ]
    if not known:
        return ""
    found, null = max(known, key=lambda pair: abs(pair[0] - pair[1]))
    most = "at most " if len(known) > 1 else ""
    return (
        f"the share of unchanged weights differs by {most}{_spelled(abs(found - null)).removeprefix('+')} "
        f"({percent(found)}, not {percent(null)}), which is {effect_size(found - null)}"
    )


def _compared(ratios: Sequence[float]) -> str:
    """How ratios to a null compare with 1; empty if the runs differ in that."""
    if all(1 / ABOUT <= ratio <= ABOUT for ratio in ratios):
        return "about"
    if all(ratio < 1 / ABOUT for ratio in ratios):
        return "smaller than"
    return "larger than" if all(ratio > ABOUT for ratio in ratios) else ""


def _energy_answer(readers: Sequence[_Reader]) -> str:
    energies = [(r("principal_energy"), r("principal_energy_stored_null")) for r in readers]
    known = [found / null for found, null in energies if found is not None and null]
    if not known:
        return ""
    return (
        f"the principal subspaces hold {_span(known, _times)} times the energy that {_BLIND}, stored "
        f"alike, would put there: {_preference(known)}."
    )


def _preference(enrichments: Sequence[float]) -> str:
    if all(1 / ABOUT <= x <= ABOUT for x in enrichments):
        return "no preference"
    if all(x > ABOUT for x in enrichments):
        return "the updates lean on the principal directions"
    if all(x < 1 / ABOUT for x in enrichments):
        return "the updates avoid the principal directions"
    return "the runs differ"


def _times(ratio: float) -> str:
    """A ratio with two decimals if it is near 1, so that 0.98 and 1.02 have the same form."""
    return f"{ratio:.2f}" if 0.1 <= ratio < 10 else number(ratio)


def _span(values: Sequence[float], text: Callable[[float], str]) -> str:
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"
