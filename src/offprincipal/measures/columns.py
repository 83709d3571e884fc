"""The metrics: one entry each, naming its columns, units, how they are pooled, and where the formula comes from.

To add a metric, write a pure function in `geometry`, an entry here, and a test against a closed form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from offprincipal.geometry import nulls
from offprincipal.geometry.cuts import MASKS
from offprincipal.measures.changes import TensorPair
from offprincipal.measures.pair import MatrixPair

Group = Literal["changes", "location", "update", "spectrum", "subspace", "bounds"]
GROUPS: tuple[Group, ...] = ("changes", "location", "update", "spectrum", "subspace", "bounds")
Pool = Literal["entries", "changed", "parameters", "norm", "relative_norm", "log_odds", "log_odds_se", "z", "none"]
Number = float | int | None


@dataclass(frozen=True)
class Column:
    """One column of `matrices.parquet`.

    Args:
        name: a field name of the contract.
        meaning: one phrase for tables and reports.
        unit: of its values.
        pool: how `summary.json` pools it over matrices (`measures.pooling`).
        beside: the figure whose matrices it is pooled over, of which it is a null or a ratio to one.
        null_of: the figure that it is a null of, matrix by matrix.
    """

    name: str
    meaning: str
    unit: str = "1"
    pool: Pool = "parameters"
    beside: str | None = None
    null_of: str | None = None


@dataclass(frozen=True)
class Metric:
    """What is measured of a pair: a function that gives the values of `columns`, in their order.

    Args:
        measure: takes a `MatrixPair`, or a `TensorPair` where every tensor is measured.
        every_tensor: measured of norms, biases and embeddings too, not of linear matrices alone.
        decomposes: needs the base's singular value decomposition though its group does not, so it is left out where no
            group does.
    """

    group: Group
    source: str
    columns: tuple[Column, ...]
    measure: Callable[[Any], tuple[Number, ...]]
    every_tensor: bool = False
    decomposes: bool = False


def decomposes_base(groups: tuple[Group, ...]) -> bool:
    """Whether a group is among these that needs the base's singular value decomposition.

    >>> decomposes_base(("changes", "location", "update")), decomposes_base(("changes", "subspace"))
    (False, True)
    """
    return not {"spectrum", "subspace", "bounds"}.isdisjoint(groups)


def needs_torch(groups: tuple[Group, ...]) -> bool:
    """Whether a group is among these that decomposes anything.

    >>> needs_torch(("changes", "location")), needs_torch(("changes", "update"))
    (False, True)
    """
    return "update" in groups or decomposes_base(groups)


def metrics_of(groups: tuple[Group, ...]) -> tuple[Metric, ...]:
    """The metrics of some groups."""
    return tuple(m for m in METRICS if m.group in groups and (decomposes_base(groups) or not m.decomposes))


def _share(count: int | None, pair: TensorPair) -> tuple[Number, ...]:
    return (None if count is None or not pair.numel else count / pair.numel,)


RUNGS = {
    "random": "chance",
    "rounding_null": "rounding alone",
    "spacing_null": "rounding and the spacings of what changed",
    "margin_null": "spacings, rows and columns of what changed",
}


def _overlap(name: str) -> Metric:
    def measure(pair: MatrixPair) -> tuple[Number, ...]:
        found = pair.overlaps[pair.base.settings.density].get(name)
        if found is None:
            return (None,) * (6 + len(RUNGS))
        rungs = (getattr(found, f"overlap_{rung}") for rung in RUNGS)
        beside = (found.overlap_rounding_judged, found.overlap_scaled_null)
        return found.overlap, *rungs, *beside, found.log_odds, found.log_odds_se, found.z

    title = name.replace("_", "-")
    return Metric(
        "location",
        "arXiv 2511.08567, claims C5 and C6; the ladder of nulls is ours",
        (
            Column(f"{name}_overlap", f"share of the changed entries in the {title} mask", pool="changed"),
            *(
                Column(
                    f"{name}_overlap_{rung}",
                    f"the same if {words} placed them",
                    pool="changed",
                    beside=f"{name}_overlap",
                    null_of=f"{name}_overlap",
                )
                for rung, words in RUNGS.items()
            ),
            Column(
                f"{name}_overlap_rounding_judged", "share of the changed entries that rounding can tell", pool="changed"
            ),
            Column(
                f"{name}_overlap_scaled_null",
                "the same if rounding alone placed them, each row and column stepping as far as it does",
                pool="changed",
                beside=f"{name}_overlap",
                null_of=f"{name}_overlap",
            ),
            Column(
                f"{name}_log_odds",
                f"how much being in the {title} mask raises the log-odds of a change, beyond spacing, row and column",
                pool="log_odds",
            ),
            Column(f"{name}_log_odds_se", "its standard error", pool="log_odds_se"),
            Column(f"{name}_z", "its score test against the margin null, in standard deviations", pool="z"),
        ),
        measure,
        decomposes=name in ("principal", "safe"),
    )


def _unchanged_blindly(pair: MatrixPair) -> tuple[Number, ...]:
    rounding, (scaled, *_) = pair.rounding_null, pair.scaled_changes
    changes = (
        rounding.changes(pair.class_entries) if rounding else None,
        None if scaled is None else scaled.sum().item(),
    )
    return tuple(None if expected is None else 1 - expected / pair.numel for expected in changes)


def _stripes(pair: MatrixPair) -> tuple[Number, ...]:
    counts = (pair.scan.rows, pair.scan.columns)
    ginis = (nulls.gini(line) for line in counts)
    return *ginis, *(nulls.dispersion(line, *null) for line, null in zip(counts, pair.line_nulls, strict=True))


_NULLS = (
    ("_isotropic_null", " after a Gaussian update of equal norm"),
    ("_stored_null", " after a Gaussian update of equal norm, stored alike"),
    ("_shuffled_null", " after its own steps, shuffled over the matrix and stored alike"),
)
_SPREAD = "standard deviation of that over draws"
_ANGLES = {"max": "largest", "mean": "mean", "rms": "root-mean-square"}


def _with_nulls(names: dict[str, tuple[str, str]], nulls: tuple[tuple[str, str], ...] = _NULLS) -> tuple[Column, ...]:
    """Columns by name, meaning and unit, then those of each null, then its spread."""
    measured = tuple(Column(name, meaning, unit) for name, (meaning, unit) in names.items())
    drawn = []
    for null, after in nulls:
        drawn += [
            Column(f"{name}{null}", meaning + after, unit, beside=name, null_of=name)
            for name, (meaning, unit) in names.items()
        ]
        drawn += [Column(f"{name}{null}_sd", _SPREAD, unit, "none") for name, (_, unit) in names.items()]
    return measured + tuple(drawn)


def _angle_columns() -> tuple[Column, ...]:
    return _with_nulls(
        {
            f"principal_angle_{side}_{which}_deg": (f"{_ANGLES[which]} {side} principal angle", "degrees")
            for which in _ANGLES
            for side in ("left", "right")
        }
    )


def _energy_columns() -> tuple[Column, ...]:
    sides = (("", "both principal subspaces"), ("_left", "the left one"), ("_right", "the right one"))
    return tuple(
        Column(
            f"principal_energy{side}{suffix}",
            f"{meaning} {words}",
            unit,
            pool,
            f"principal_energy{side}",
            f"principal_energy{side}" if suffix in ("_isotropic", "_stored_null") else None,
        )
        for side, words in sides
        for suffix, meaning, unit, pool in _ENERGIES
    )


_ENERGIES: tuple[tuple[str, str, str, Pool], ...] = (
    ("", "share of the update's energy in", "1", "parameters"),
    ("_isotropic", "the same for an isotropic update, in", "1", "parameters"),
    ("_enrichment", "measured over isotropic energy, in", "times", "parameters"),
    ("_stored_null", "the same for a Gaussian update of equal norm, stored alike, in", "1", "parameters"),
    ("_stored_null_sd", "standard deviation of that over draws, in", "1", "none"),
)


METRICS: tuple[Metric, ...] = (
    Metric(
        "changes",
        "arXiv 2511.08567, claim C1",
        (
            Column("unchanged_fraction", "share of the entries whose bfloat16 value did not change", pool="entries"),
            Column("changed_count", "entries whose bfloat16 value changed", "entries", "none"),
        ),
        lambda pair: (1 - pair.changed_count / pair.numel if pair.numel else None, pair.changed_count),
        every_tensor=True,
    ),
    Metric(
        "changes",
        "ours: the isotropic null of claim C1",
        (
            Column(
                "unchanged_fraction_isotropic_null",
                "the same after a Gaussian update of equal norm",
                pool="entries",
                beside="unchanged_fraction",
                null_of="unchanged_fraction",
            ),
        ),
        lambda pair: (pair.unchanged_isotropic,),
        every_tensor=True,
    ),
    Metric(
        "changes",
        "claim C1 at the stored type's own precision",
        (
            Column(
                "unchanged_fraction_stored", "share of the entries whose stored value did not change", pool="entries"
            ),
        ),
        lambda pair: _share(pair.counts.unchanged_stored, pair),
        every_tensor=True,
    ),
    Metric(
        "changes",
        "arXiv 2511.08567, Gate III",
        (
            Column(
                "hidden_fraction", "share whose float32 master moved but whose bfloat16 value did not", pool="entries"
            ),
        ),
        lambda pair: _share(pair.counts.hidden, pair),
        every_tensor=True,
    ),
    Metric(
        "changes",
        "Frobenius norms",
        (
            Column("base_norm", "Frobenius norm of the base", "weight", "norm"),
            Column("update_norm", "Frobenius norm of the update", "weight", "norm"),
            Column(
                "relative_update_norm",
                "Frobenius norm of the update over that of the base",
                "1",
                "relative_norm",
            ),
        ),
        lambda pair: (pair.base_norm, pair.update_norm, pair.relative_update_norm),
        every_tensor=True,
    ),
    Metric(
        "location",
        "ours: the steps themselves, dealt out to weights of which they know nothing",
        (
            Column(
                "unchanged_fraction_rounding_null",
                "the same if its own steps were dealt out blindly, of linear matrices",
                pool="parameters",
                null_of="unchanged_fraction",
            ),
            Column(
                "unchanged_fraction_scaled_null",
                "the same of its own steps within rows and columns, of linear matrices",
                pool="parameters",
                null_of="unchanged_fraction",
            ),
        ),
        _unchanged_blindly,
    ),
    *(_overlap(name) for name in MASKS),
    Metric(
        "location",
        "the stripes of arXiv 2511.08567, claim C2; the dispersion against the spacing null is ours",
        (
            Column("row_gini", "Gini coefficient of the rows' change rates"),
            Column("column_gini", "Gini coefficient of the columns' change rates"),
            Column("row_dispersion", "scatter of the rows' change counts over that of the spacing null", "times"),
            Column("column_dispersion", "scatter of the columns' change counts over that of the spacing null", "times"),
        ),
        _stripes,
    ),
    Metric(
        "update",
        "spectral norm",
        (Column("update_norm_2", "spectral norm of the update", "weight", "norm"),),
        lambda pair: (pair.spectral.update_norm_2,),
    ),
    Metric(
        "update",
        "Roy and Vetterli 2007 (effective rank)",
        (
            Column("update_stable_rank", "stable rank of the update"),
            Column("update_effective_rank", "effective rank of the update"),
        ),
        lambda pair: pair.spectral.update_ranks(),
    ),
    Metric(
        "spectrum",
        "NSS of arXiv 2511.08567, claim C3; the isotropic null is ours",
        (
            Column("spectral_shift", "shift of the top k singular values over their norm"),
            Column("spectral_shift_full", "the same over all singular values, if both sides' are known"),
            Column("spectral_shift_per_norm", "spectral shift per relative update norm"),
            *_with_nulls({"spectral_shift": ("spectral shift", "1")})[1:],
        ),
        lambda pair: pair.spectral.spectral_shift(),
    ),
    Metric(
        "spectrum",
        "the residual of the decomposition; null for LAPACK's",
        (
            Column("singular_value_error", "error bound: how far a top singular value may be off", "weight", "none"),
            Column("singular_value_error_relative", "the same over the least of the top singular values", "1", "none"),
        ),
        lambda pair: pair.spectral.singular_value_errors(),
    ),
    Metric(
        "subspace",
        "Björck and Golub 1973; arXiv 2511.08567, claim C4; the isotropic null is ours",
        _angle_columns(),
        lambda pair: pair.spectral.all_angles(),
    ),
    Metric(
        "subspace",
        "Davis and Kahan 1970; null for LAPACK's",
        (Column("angle_error_deg", "error bound: how far the principal angles may be off", "degrees", "none"),),
        lambda pair: (pair.spectral.angle_error_deg,),
    ),
    Metric(
        "subspace",
        "ours: the energy in the principal subspaces",
        _energy_columns(),
        lambda pair: pair.spectral.all_energies(),
    ),
    Metric(
        "bounds",
        "Weyl, Mirsky, Ky Fan, Wedin; arXiv 2511.08567, theorem 3.3 and corollaries, claim C10",
        (
            Column(
                "weyl_tightness", "largest shift of a singular value over Weyl's bound; of a large matrix, of the top k"
            ),
            Column("mirsky_tightness", "norm of the shifts over Mirsky's bound; of a large matrix, of the top k"),
            Column("ky_fan_tightness", "shift of the top-k sum over Ky Fan's bound"),
            Column("wedin_tightness", "sine of the largest angle over Wedin's bound"),
        ),
        lambda pair: pair.spectral.bounds(),
    ),
)


def nulls_of(metric: str, pooled: bool = False) -> dict[str, str]:
    """Null -> column that holds it.

    Args:
        pooled: those alone that are pooled over the matrices of the metric.

    >>> nulls_of("principal_energy")
    {'isotropic': 'principal_energy_isotropic', 'stored': 'principal_energy_stored_null'}
    """
    columns = [column for one in METRICS for column in one.columns if column.null_of == metric]
    return {
        column.name[len(metric) + 1 :].removesuffix("_null"): column.name
        for column in columns
        if not pooled or column.beside == metric
    }
