"""Which null stands beside which figure, and the ladder of nulls: one table for page, terminal, card and notebook.

Knows names and words; computes nothing but differences of shares that are there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from offprincipal.measures.columns import RUNGS
from offprincipal.measures.pooling import STEPS

NULL_WORDS = {  # ending of a null's name -> what it is
    "_isotropic_null": "a Gaussian update of equal norm",
    "_stored_null": "a Gaussian update of equal norm, stored alike",
    "_rounding_null": "rounding alone",
}
ENDINGS = (*(f"_{rung}" for rung in RUNGS), "")  # of a mask's overlap, from chance to what was measured
RUNG_TITLES = {step: "chance" if step == "random" else step for step in STEPS}
PARTS = {  # what the step up to each rung but the first explains -> its colour
    "precision": "#7d8795",
    "magnitude": "#b8932c",
    "neurons": "#4aa3b8",
    "beyond all nulls": "#c24d52",
}
MARK = "†"  # behind a figure that is not of every matrix
NOT_TOLD_APART = ("not told apart", "#b4bbc5")  # where a rung between is undefined


@dataclass(frozen=True)
class Figure:
    """A figure that every table of runs has.

    Args:
        title: in narrow tables, without its unit.
        metric: of `summary.json`.
        null: how the name of its null ends; None where it has none.
        kind: how it is written: `percent`, `number` or `degrees`.
        about: what the title does not say.
        page: its title on the page; empty where another table of the page has it.
    """

    title: str
    metric: str
    null: str | None
    kind: str
    about: str = ""
    page: str = ""

    @property
    def null_metric(self) -> str | None:
        """The name of its null."""
        return None if self.null is None else f"{self.metric}{self.null}"

    @property
    def names(self) -> tuple[str, str | None]:
        """The figure's and its null's."""
        return self.metric, self.null_metric

    @property
    def null_words(self) -> str:
        """What its null is."""
        return NULL_WORDS[self.null] if self.null else ""


_THERE = "of the changed entries, the share there"
FIGURES = (
    Figure("unchanged", "unchanged_fraction", "_isotropic_null", "percent", page="bit-identical entries"),
    Figure("relative update norm", "relative_update_norm", None, "number"),
    Figure("spectral shift", "spectral_shift", "_stored_null", "number", page="spectral shift"),
    Figure("angle left", "principal_angle_left_max_deg", "_stored_null", "degrees", page="largest principal angle"),
    Figure("angle right", "principal_angle_right_max_deg", "_stored_null", "degrees"),
    Figure("principal", "principal_overlap", "_rounding_null", "percent", _THERE),
    Figure("low-magnitude", "low_magnitude_overlap", "_rounding_null", "percent", _THERE),
    Figure(
        "energy",
        "principal_energy",
        "_stored_null",
        "percent",
        "of the update, the share in the principal subspaces",
        "principal energy",
    ),
)


def shares(value: Callable[[str], float | None], mask: str) -> list[float | None]:
    """What each rung of the ladder puts into a mask, from chance to what was measured; None where undefined."""
    return [value(f"{mask}_overlap{ending}") for ending in ENDINGS]


def steps_up(rungs: Sequence[float | None]) -> list[tuple[tuple[str, ...], float]]:
    """What explains how far the last rung is from the first, and how much of it each explains.

    A step over undefined rungs has every part that it spans: they cannot be told apart.

    >>> steps_up([0.5, None, 0.25, 0.5, 0.75])
    [(('precision', 'magnitude'), -0.25), (('neurons',), 0.25), (('beyond all nulls',), 0.25)]
    """
    known = [(place, rung) for place, rung in enumerate(rungs) if rung is not None]
    if not known or rungs[0] is None or rungs[-1] is None:
        return []
    parts = tuple(PARTS)
    return [(parts[low:high], above - below) for (low, below), (high, above) in pairwise(known)]


def listed(words: Sequence[str], last: str = "and") -> str:
    """Words as a sentence lists them.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def measured(summary: Mapping[str, Any]) -> list[Figure]:
    """The figures that any run was asked for."""
    runs = [run["metrics"] for run in summary["runs"].values()]
    return [figure for figure in FIGURES if any(figure.metric in metrics for metrics in runs)]


def matrices_of(metrics: Mapping[str, Mapping[str, Any]], figure: Figure) -> tuple[int, int] | None:
    """Of how many matrices a figure and its null are, and of how many they could be; None where it is of all of them.

    Where an angle is smaller than its error bound, for one, it is undefined, and its matrix is not pooled.
    """
    known = [found for name in figure.names if (found := metrics.get(name or "", {})).get("value") is not None]
    counts = [found.get("matrices", 0) for found in known]
    whole = metrics.get("relative_update_norm", {}).get("matrices")
    return (min(counts), whole) if counts and whole and min(counts) < whole else None


def caption(summary: Mapping[str, Any]) -> str:
    """What the figures of a comparison are whose titles do not say it, and the null of each that has one."""
    about: dict[str, list[str]] = {}
    nulls: dict[str, list[str]] = {}
    for figure in measured(summary):
        if figure.about:
            about.setdefault(figure.about, []).append(figure.title)
        if figure.null:
            nulls.setdefault(figure.null_words, []).append(figure.title)
    said = "; ".join(f"{listed(titles)}: {words}" for words, titles in about.items())
    beside = "; ".join(f"{words} ({listed(titles)})" for words, titles in nulls.items())
    in_brackets = f"in brackets: {beside}" if beside else ""
    return ". ".join(filter(None, (in_brackets, said, parts_of_all(summary))))


def parts_of_all(summary: Mapping[str, Any]) -> str:
    """Which marked figures are of how many matrices; empty where all are of all."""
    runs, said = [run["metrics"] for run in summary["runs"].values()], []
    for figure in measured(summary):
        counts = sorted({pair for metrics in runs if (pair := matrices_of(metrics, figure))})
        if counts:
            span = " to ".join(dict.fromkeys(str(count) for count, _ in (counts[0], counts[-1])))
            said.append(f"{figure.title} of {span} of {counts[-1][1]}")
    reason = "an angle that is smaller than its error bound is left out, as is whatever is undefined"
    return f"{MARK} not of every matrix: {', '.join(said)}; {reason}" if said else ""
