"""What a reader is told of the columns of `matrices.parquet`: each metric in words, and the nulls of each.

Nulls and standard errors are no entries of the list: a null stands below its metric, and the errors are in the table.
"""

from collections.abc import Sequence

from offprincipal.geometry.cuts import MASKS
from offprincipal.measures.columns import METRICS, Column, nulls_of
from offprincipal.reports.nulls import NULL_WORDS

GROUPS = {
    "changes": "how much changed",
    "location": "where the change fell",
    "update": "the update itself",
    "spectrum": "singular values",
    "subspace": "principal subspaces",
    "bounds": "share of a bound that is used",
}
NULLS = {  # that is drawn first, where a metric has several, comes first
    "rounding": NULL_WORDS["_rounding_null"],
    "stored": NULL_WORDS["_stored_null"],
    "isotropic": NULL_WORDS["_isotropic_null"],
    "random": "chance",
    "spacing": "spacing",
    "margin": "margins",
    "scaled": "rounding, with each row's and column's own step length",
    "shuffled": "the update's own steps, shuffled and stored alike",
}
_TITLES = {  # where the meaning of a column is told from those before it, or is long
    "unchanged_fraction": "share of bit-identical entries",
    "unchanged_fraction_stored": "share of entries whose stored value did not change",
    "relative_update_norm": "relative update norm: Frobenius norm of the update over that of the base",
    "spectral_shift": "spectral shift: change of the top k singular values over their norm",
    "spectral_shift_full": "shift of all singular values over their norm",
    "singular_value_error_relative": "error bound of the top singular values, over the least of them",
    "hidden_fraction": "share of entries whose float32 master moved and whose bfloat16 value did not",
}
_OF_MASKS = {
    "overlap_rounding_judged": "share of the changed entries that rounding can tell, {} mask",
    "log_odds": "log-odds of a change in the {} mask, beyond spacing, row and column",
    "z": "z of the {} mask: its score test against the margin null, in standard deviations",
}
_SIDES = {
    "": "both principal subspaces",
    "_left": "the left principal subspace",
    "_right": "the right principal subspace",
}
_TITLES |= {f"principal_energy{side}": f"share of the update's energy in {words}" for side, words in _SIDES.items()}
_TITLES |= {
    f"principal_energy{side}_enrichment": f"energy over that of an isotropic update, in {words}"
    for side, words in _SIDES.items()
}
_TITLES |= {f"{mask}_{name}": text.format(mask.replace("_", "-")) for mask in MASKS for name, text in _OF_MASKS.items()}

_COLUMNS = {column.name: (metric, column) for metric in METRICS for column in metric.columns}


def group_of(name: str) -> str:
    """The heading that a metric is listed under."""
    return GROUPS[_COLUMNS[name][0].group] if name in _COLUMNS else "other"


def title_of(name: str, meaning: str) -> str:
    """A metric in words that stand alone.

    Args:
        meaning: as the table has it, for columns of other versions.

    >>> title_of("safe_log_odds", ""), title_of("weyl_tightness", "shift over Weyl's bound; of the top k")
    ('log-odds of a change in the safe mask, beyond spacing, row and column', "shift over Weyl's bound")
    """
    return _TITLES.get(name) or meaning.split(";")[0] or name


def is_listed(name: str) -> bool:
    """Whether a metric stands on its own: no null, and no standard deviation or error of another column.

    >>> [is_listed(name) for name in ("spectral_shift", "spectral_shift_stored_null", "spectral_shift_stored_null_sd")]
    [True, False, False]
    """
    return not _is_null(name) and not _is_spread(name)


def is_drawn(name: str) -> bool:
    """Whether the page holds a column's values: metrics and their nulls."""
    return not _is_spread(name)


def nulls_in(name: str, present: Sequence[str]) -> list[tuple[str, str]]:
    """The columns among `present` that hold nulls of a metric, each with its words; the one drawn first comes first."""
    known = {null: column for null, column in nulls_of(name).items() if column in present}
    order = [null for null in NULLS if null in known]
    return [(known[null], NULLS[null]) for null in order]


def _is_null(name: str) -> bool:
    column: Column | None = _COLUMNS[name][1] if name in _COLUMNS else None
    return column is not None and column.null_of is not None


def _is_spread(name: str) -> bool:
    return any(name.endswith(ending) and name.removesuffix(ending) in _COLUMNS for ending in ("_sd", "_se"))
