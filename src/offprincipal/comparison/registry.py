"""The metrics: one entry each, naming its columns, units, how they are pooled, and where the formula comes from.

To add a metric, write a pure function in `geometry`, an entry here, and a test against a closed form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from offprincipal.comparison.pair import MatrixPair
from offprincipal.geometry import bounds, masks, nulls, precision, spectrum

Group = Literal["location", "spectrum", "subspace", "bounds"]
GROUPS: tuple[Group, ...] = ("location", "spectrum", "subspace", "bounds")
Pool = Literal["entries", "changed", "parameters", "norm", "relative_norm", "z", "none"]
Number = float | int | None


@dataclass(frozen=True)
class Column:
    """One column of `matrices.parquet`.

    Args:
        name: a field name of the contract.
        meaning: one phrase for tables and reports.
        unit: of its values.
        pool: how `summary.json` pools it over matrices (`comparison.pooling`).
    """

    name: str
    meaning: str
    unit: str = "1"
    pool: Pool = "parameters"


@dataclass(frozen=True)
class Metric:
    """What is measured of a pair: a function that gives the values of `columns`, in their order.

    Args:
        every_tensor: measured of norms, biases and embeddings too, not of linear matrices alone.
        decomposes: needs a singular value decomposition, so it is left out where `location` is measured alone.
    """

    group: Group
    source: str
    columns: tuple[Column, ...]
    measure: Callable[[MatrixPair], tuple[Number, ...]]
    every_tensor: bool = False
    decomposes: bool = False


def metrics_of(groups: tuple[Group, ...]) -> tuple[Metric, ...]:
    """The metrics of some groups; those that decompose only where more than `location` is asked for."""
    decompose = set(groups) != {"location"}
    return tuple(m for m in METRICS if m.group in groups and (decompose or not m.decomposes))


def _stored_unchanged(pair: MatrixPair) -> tuple[Number, ...]:
    if pair.tuned.dtype != pair.base.weight.dtype or not pair.tuned.numel():
        return (None,)
    return ((pair.tuned == pair.base.weight).sum().item() / pair.tuned.numel(),)


def _hidden(pair: MatrixPair) -> tuple[Number, ...]:
    return (None if pair.masters is None else precision.hidden_fraction(pair.base.weight.float(), pair.masters),)


def _overlap(name: str) -> Metric:
    def measure(pair: MatrixPair) -> tuple[Number, ...]:
        found = pair.overlaps.get(name)
        if found is None:
            return (None,) * 5
        null = (found.overlap_precision_null, found.overlap_precision_null_sd, found.overlap_z)
        return found.overlap, found.overlap_random, *null

    title = name.replace("_", "-")
    return Metric(
        "location",
        "arXiv 2511.08567, claims C5 and C6; the precision null is ours",
        (
            Column(f"{name}_overlap", f"share of the changed entries in the {title} mask", pool="changed"),
            Column(
                f"{name}_overlap_random", f"the same if chance placed them: the {title} mask's density", pool="changed"
            ),
            Column(f"{name}_overlap_precision_null", "the same if rounding alone placed them", pool="changed"),
            Column(f"{name}_overlap_precision_null_sd", "standard deviation of that", pool="none"),
            Column(f"{name}_overlap_z", f"{title} overlap beyond rounding, in standard deviations", pool="z"),
        ),
        measure,
        decomposes=name in ("principal", "safe"),
    )


def _stripes(pair: MatrixPair) -> tuple[Number, ...]:
    rates = pair.changed.double()
    return (
        nulls.gini(rates.mean(dim=1)),
        nulls.gini(rates.mean(dim=0)),
        nulls.dispersion(pair.changed, pair.base.classes, 0),
        nulls.dispersion(pair.changed, pair.base.classes, 1),
    )


def _shift(pair: MatrixPair) -> tuple[Number, ...]:
    shift, relative = spectrum.spectral_shift(pair.base.svd.S, pair.svd.S), pair.relative_update_norm
    per_norm = shift / relative if shift is not None and relative and not pair.is_rounding else None
    null = (pair.isotropic_null.spectral_shift, pair.stored_null.spectral_shift)
    return shift, len(pair.svd.S), per_norm, *null


def _update_ranks(pair: MatrixPair) -> tuple[Number, ...]:
    return spectrum.stable_rank(pair.update_spectrum), spectrum.effective_rank(pair.update_spectrum)


def _angle_columns() -> tuple[Column, ...]:
    return tuple(
        Column(
            f"principal_angle_{side}_{which}_deg{null}",
            f"{words} {side} principal angle{after}",
            "degrees",
        )
        for null, after in (
            ("", ""),
            ("_isotropic_null", " after a Gaussian update of equal norm"),
            ("_stored_null", " after a Gaussian update of equal length, stored alike"),
        )
        for side in ("left", "right")
        for which, words in (("max", "largest"), ("mean", "mean"))
    )


def _angles(pair: MatrixPair) -> tuple[Number, ...]:
    undefined = (None,) * 4
    measured = [x.item() for side in pair.angles for x in (side.max(), side.mean())] if pair.angles else undefined
    return *measured, *(pair.isotropic_null.angles or undefined), *(pair.stored_null.angles or undefined)


def _energy_columns() -> tuple[Column, ...]:
    sides = (("", "both principal subspaces"), ("_left", "the left one"), ("_right", "the right one"))
    return tuple(
        Column(f"principal_energy{side}{suffix}", f"{meaning} {words}", unit)
        for side, words in sides
        for suffix, meaning, unit in (
            ("", "share of the update's energy in", "1"),
            ("_isotropic", "the same for an isotropic update, in", "1"),
            ("_enrichment", "measured over isotropic energy, in", "times"),
            ("_stored_null", "the same for a Gaussian update of equal length, stored alike, in", "1"),
        )
    )


def _energies(pair: MatrixPair) -> tuple[Number, ...]:
    (n, m), k = pair.update.shape, pair.base.k
    isotropic = (k * k / (n * m), k / n, k / m)
    undefined = (None, None, None)
    columns = zip(pair.energies or undefined, isotropic, pair.stored_null.energies or undefined, strict=True)
    return tuple(
        value
        for found, null, stored in columns
        for value in (found, null, None if found is None else found / null, stored)
    )


def _bounds(pair: MatrixPair) -> tuple[Number, ...]:
    if pair.is_rounding:
        return (None,) * 4
    S0, S1, k, norm_2 = pair.base.svd.S, pair.svd.S, pair.base.k, pair.update_norm_2
    wedin = None
    if pair.angles:
        left, right = (side.max().item() for side in pair.angles)
        wedin = bounds.wedin_tightness(S0, S1, k, norm_2, (left, right))
    return (
        bounds.weyl_tightness(S0, S1, norm_2),
        bounds.mirsky_tightness(S0, S1, pair.update_norm),
        bounds.ky_fan_tightness(S0, S1, k, norm_2),
        wedin,
    )


METRICS: tuple[Metric, ...] = (
    Metric(
        "location",
        "arXiv 2511.08567, claim C1",
        (
            Column("unchanged_fraction", "share of the entries whose bfloat16 value did not change", pool="entries"),
            Column("changed_count", "entries whose bfloat16 value changed", "entries", "none"),
        ),
        lambda pair: (1 - pair.changed_count / pair.tuned.numel() if pair.tuned.numel() else None, pair.changed_count),
        every_tensor=True,
    ),
    Metric(
        "location",
        "ours: the isotropic null of claim C1",
        (
            Column(
                "unchanged_fraction_isotropic_null",
                "the same after a Gaussian update of equal length",
                pool="entries",
            ),
        ),
        lambda pair: (nulls.unchanged_isotropic(pair.base.weight, pair.gaussian_scale),),
        every_tensor=True,
    ),
    Metric(
        "location",
        "claim C1 at the stored type's own precision",
        (
            Column(
                "unchanged_fraction_stored", "share of the entries whose stored value did not change", pool="entries"
            ),
        ),
        _stored_unchanged,
        every_tensor=True,
    ),
    Metric(
        "location",
        "arXiv 2511.08567, Gate III",
        (
            Column(
                "hidden_fraction", "share whose float32 master moved but whose bfloat16 value did not", pool="entries"
            ),
        ),
        _hidden,
        every_tensor=True,
    ),
    *(_overlap(name) for name in masks.MASKS),
    Metric(
        "location",
        "the stripes of arXiv 2511.08567, claim C2; the dispersion against the precision null is ours",
        (
            Column("row_gini", "Gini coefficient of the rows' change rates"),
            Column("column_gini", "Gini coefficient of the columns' change rates"),
            Column("row_dispersion", "scatter of the rows' change counts over that of rounding alone", "times"),
            Column("column_dispersion", "scatter of the columns' change counts over that of rounding alone", "times"),
        ),
        _stripes,
    ),
    Metric(
        "spectrum",
        "Frobenius norms",
        (
            Column("base_norm", "Frobenius norm of the base", "weight", "norm"),
            Column("update_norm", "Frobenius norm of the update", "weight", "norm"),
            Column(
                "relative_update_norm",
                "step length: Frobenius norm of the update over that of the base",
                "1",
                "relative_norm",
            ),
        ),
        lambda pair: (pair.base.norm, pair.update_norm, pair.relative_update_norm),
        every_tensor=True,
    ),
    Metric(
        "spectrum",
        "spectral norm",
        (Column("update_norm_2", "spectral norm of the update", "weight", "norm"),),
        lambda pair: (pair.update_norm_2,),
        decomposes=True,
    ),
    Metric(
        "spectrum",
        "NSS of arXiv 2511.08567, claim C3; the isotropic null is ours",
        (
            Column("spectral_shift", "shift of the singular values over their norm"),
            Column("spectral_shift_rank", "singular values compared", "1", "none"),
            Column("spectral_shift_per_norm", "spectral shift per relative step length"),
            Column("spectral_shift_isotropic_null", "spectral shift of a Gaussian update of equal norm"),
            Column("spectral_shift_stored_null", "spectral shift of a Gaussian update of equal length, stored alike"),
        ),
        _shift,
        decomposes=True,
    ),
    Metric(
        "spectrum",
        "Roy and Vetterli 2007 (effective rank)",
        (
            Column("update_stable_rank", "stable rank of the update"),
            Column("update_effective_rank", "effective rank of the update"),
        ),
        _update_ranks,
        decomposes=True,
    ),
    Metric(
        "subspace",
        "Björck and Golub 1973; arXiv 2511.08567, claim C4; the isotropic null is ours",
        _angle_columns(),
        _angles,
        decomposes=True,
    ),
    Metric("subspace", "ours: the energy in the principal subspaces", _energy_columns(), _energies, decomposes=True),
    Metric(
        "bounds",
        "Weyl, Mirsky, Ky Fan, Wedin; arXiv 2511.08567, theorem 3.3 and corollaries, claim C10",
        (
            Column("weyl_tightness", "largest shift of a singular value over Weyl's bound"),
            Column("mirsky_tightness", "norm of the shifts over Mirsky's bound"),
            Column("ky_fan_tightness", "shift of the top-k sum over Ky Fan's bound"),
            Column("wedin_tightness", "sine of the largest angle over Wedin's bound"),
        ),
        _bounds,
        decomposes=True,
    ),
)
