"""The null of each figure, and the ladder of nulls: one table for page, terminal, card and notebook.

Knows names and words; computes only differences of given shares.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from offprincipal.measures.columns import RUNGS
from offprincipal.measures.pooling import STEPS

NULL_WORDS = {  # ending of a null's name -> description
    "_isotropic_null": "a Gaussian update of equal norm",
    "_stored_null": "a Gaussian update of equal norm, stored alike",
    "_rounding_null": "rounding alone",
}
ENDINGS = (*(f"_{rung}" for rung in RUNGS), "")  # of the names of overlaps, from chance to the measured one
RUNG_TITLES = {step: "chance" if step == "random" else step for step in STEPS}
PARTS = {  # name of the step up to each rung but the first -> its colour
    "precision": "#7d8795",
    "magnitude": "#b8932c",
    "neurons": "#4aa3b8",
    "beyond all nulls": "#c24d52",
}
MARK = "†"  # after a figure that does not include every matrix
NOT_TOLD_APART = ("not told apart", "#b4bbc5")  # several steps together, because a rung between is undefined


@dataclass(frozen=True)
class Figure:
    """A figure in the tables of runs.

    Args:
        title: in narrow tables, without its unit.
        metric: name in `summary.json`.
        null: ending of the name of its null; None if it has none.
        kind: format: `percent`, `number` or `degrees`.
        about: explanation of the title.
        page: title on the page; empty if another table of the page has the figure.
    """

    title: str
    metric: str
    null: str | None
    kind: str
    about: str = ""
    page: str = ""

    @property
    def null_metric(self) -> str | None:
        """Name of its null in `summary.json`; None if it has none."""
        return None if self.null is None else f"{self.metric}{self.null}"

    @property
    def names(self) -> tuple[str, str | None]:
        """The names of the figure and of its null."""
        return self.metric, self.null_metric

    @property
    def null_words(self) -> str:
        """Description of its null; empty if it has none."""
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
    """The overlap with a mask at each rung of the ladder, from chance to the measured one; None if undefined.

    Args:
        value: metric -> its value, or None.
        mask: `principal` or `low_magnitude`.
    """
    return [value(f"{mask}_overlap{ending}") for ending in ENDINGS]


def steps_up(rungs: Sequence[float | None]) -> list[tuple[tuple[str, ...], float]]:
    """The steps up the ladder: the parts of the difference between its last and its first rung.

    Args:
        rungs: as from `shares`.

    Returns:
        (names, difference) of each step. A step over undefined rungs has the names of all parts that it spans. Empty if
        the first or the last rung is undefined.

    >>> steps_up([0.5, None, 0.25, 0.5, 0.75])
    [(('precision', 'magnitude'), -0.25), (('neurons',), 0.25), (('beyond all nulls',), 0.25)]
    """
    known = [(place, rung) for place, rung in enumerate(rungs) if rung is not None]
    if not known or rungs[0] is None or rungs[-1] is None:
        return []
    parts = tuple(PARTS)
    return [(parts[low:high], above - below) for (low, below), (high, above) in pairwise(known)]


def listed(words: Sequence[str], last: str = "and") -> str:
    """Words as a list in a sentence.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def measured(summary: Mapping[str, Any]) -> list[Figure]:
    """The figures that were measured of any run."""
    runs = [run["metrics"] for run in summary["runs"].values()]
    return [figure for figure in FIGURES if any(figure.metric in metrics for metrics in runs)]


def matrices_of(metrics: Mapping[str, Mapping[str, Any]], figure: Figure) -> tuple[int, int] | None:
    """The number of matrices in a figure and its null, and the number of all matrices; None if they are equal.

    Matrices in which a figure is undefined, such as an angle below its error bound, are not pooled.
    """
    known = [pooled for name in figure.names if (pooled := metrics.get(name or "", {})).get("value") is not None]
    counts = [pooled.get("matrices", 0) for pooled in known]
    whole = metrics.get("relative_update_norm", {}).get("matrices")
    return (min(counts), whole) if counts and whole and min(counts) < whole else None


def caption(summary: Mapping[str, Any]) -> str:
    """Explanations of the figures of a comparison, and of their nulls."""
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
    """The number of matrices in each figure that does not include all of them; empty if there is none."""
    runs, said = [run["metrics"] for run in summary["runs"].values()], []
    for figure in measured(summary):
        counts = sorted({pair for metrics in runs if (pair := matrices_of(metrics, figure))})
        if counts:
            span = " to ".join(dict.fromkeys(str(count) for count, _ in (counts[0], counts[-1])))
            said.append(f"{figure.title} of {span} of {counts[-1][1]}")
    reason = "an angle that is smaller than its error bound is left out, as is whatever is undefined"
    return f"{MARK} not of every matrix: {', '.join(said)}; {reason}" if said else ""
