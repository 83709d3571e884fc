"""Gate III, precision: which part of an update storing hides, and whether its place is due to more than the format.

Reads a base and the float32 masters of a tuned checkpoint, one matrix at a time; the mathematics is in
`offprincipal.geometry.ulp` and `offprincipal.geometry.formats`. Runs no model.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from offprincipal.checkpoints import Checkpoint, Part, open_checkpoint
from offprincipal.checkpoints.masters import masters_of
from offprincipal.checkpoints.matrices import common_parts, read_part
from offprincipal.defaults import DENSITY, RANK_FRACTION
from offprincipal.errors import ArgumentError, CheckpointError, NonFiniteTensor
from offprincipal.geometry.formats import FORMATS, BeyondFormat, MaskChange, StoredBase, StoredChange
from offprincipal.geometry.masks import entry_ranks, low_magnitude_ranks, masks_at
from offprincipal.geometry.nulls import CountNull
from offprincipal.geometry.principal import PrincipalSubspace, principal_rank
from offprincipal.geometry.ulp import UlpHistogram, total, ulp_histogram
from offprincipal.measures.pooling import Estimate, estimate_ratio
from offprincipal.memory import SHARE, free_memory
from offprincipal.parallel import in_order, in_threads, one_core_each

STEP_LENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SWEPT_MASKS = ("principal", "low_magnitude")
_BYTES_AN_ENTRY = 96  # held at once of a matrix: the update, its sum with the base and what is stored, in float64

LOG = logging.getLogger("offprincipal")

Row = dict[str, Any]
Null = Literal["nothing", "random", "precision"]


@dataclass(frozen=True)
class PrecisionSettings:
    """Settings of Gate III.

    Args:
        formats: storage formats; step_lengths: factors by which the update is multiplied.
        rank_fraction: rank of the principal subspace over min(rows, columns); density: of the masks.

    Raises:
        ArgumentError: a format is unknown, or a number is out of range.
    """

    formats: tuple[str, ...] = tuple(FORMATS)
    step_lengths: tuple[float, ...] = STEP_LENGTHS
    rank_fraction: float = RANK_FRACTION
    density: float = DENSITY

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise ArgumentError(
                f"{f'no storage format {unknown[0]}' if unknown else 'no storage format is given'}: choose one of "
                f"{', '.join(FORMATS)}"
            )
        if not self.step_lengths or min(self.step_lengths) <= 0:
            raise ArgumentError(f"step_lengths {self.step_lengths} multiply the update: give factors above 0")
        if not (0 < self.rank_fraction <= 1 and 0 < self.density <= 1):
            raise ArgumentError("rank_fraction and density are fractions: give numbers above 0 and at most 1")


@dataclass(frozen=True)
class PrecisionRows:
    """Gate III of one tuned checkpoint, matrix by matrix.

    Args:
        histograms: tensor -> its histogram.
        sweep: one row per matrix, format and length: `tensor, layer, role, format, step_length, numel, changed,
            distance`, and for each mask `<mask>_entries, _changed, _changed_null, _changed_variance, _distance,
            _distance_null`.
    """

    histograms: dict[str, UlpHistogram]
    sweep: list[Row]


def precision_gate(
    base: str | Path, tuned: str | Path, settings: PrecisionSettings | None = None
) -> dict[str, list[Row] | Row | None]:
    """Gate III of one tuned checkpoint: JSON-able entries of a run in `gates.json`.

    Args:
        base: any checkpoint that `offprincipal compare` opens.
        tuned: trained from it, with float32 masters in its folder `masters`, or stored in float32 itself.
        settings: formats, factors of the update, rank and density; the defaults if None.

    Returns:
        `ulp_histogram`: the rows of `UlpHistogram.rows`, pooled over the linear matrices;
        `hidden_fraction`: `value`, `gaussian_null`, `permuted_null`, with `low` and `high` of the value;
        `precision_sweep`: the rows of `pool_sweep`. All three are None without masters.

    Raises:
        CheckpointError: one of them cannot be read, or they do not belong together.

    >>> precision_gate("embedded", "embedded")["hidden_fraction"] is None  # stored in bfloat16, without masters
    True
    """
    settings = settings or PrecisionSettings()
    opened = open_checkpoint(base)
    masters = masters_of(open_checkpoint(tuned, opened))
    if masters is None:
        return {"ulp_histogram": None, "hidden_fraction": None, "precision_sweep": None}
    found = measure_precision(opened, masters, settings)
    return {
        "ulp_histogram": total(list(found.histograms.values())).rows(),
        "hidden_fraction": hidden_share(list(found.histograms.values())),
        "precision_sweep": pool_sweep(found.sweep),
    }


def measure_precision(base: Checkpoint, masters: Checkpoint, settings: PrecisionSettings) -> PrecisionRows:
    """Every linear matrix of one tuned checkpoint, each on one core.

    Raises:
        CheckpointError: a matrix cannot be read or holds NaN or infinity, or the two do not belong together.
    """
    parts = common_parts([base, masters])
    if not parts:
        raise CheckpointError(f"{base.source} has no linear matrices: there is nothing to measure")

    def measure(part: Part) -> tuple[UlpHistogram, list[Row]]:
        weight, master = map(torch.from_numpy, read_part([base, masters], part))
        try:
            return ulp_histogram(weight, master), _sweep_rows(part, weight, master, settings)
        except NonFiniteTensor as error:
            raise CheckpointError(f"{part.name}: {error}. Check how it was trained or converted") from error

    needs = {part.name: _BYTES_AN_ENTRY * part.numel for part in parts}
    with one_core_each():
        found = in_threads(measure, parts, os.cpu_count() or 1, needs, int(SHARE * free_memory()))
        rows = {part.name: measured for part, measured in in_order(parts, found)}
    return PrecisionRows(
        {name: histogram for name, (histogram, _) in rows.items()}, [row for _, sweep in rows.values() for row in sweep]
    )


def pool_sweep(rows: Sequence[Row]) -> list[Row]:
    """The sweep pooled over matrices: one row per format and length of the update, JSON-able.

    Args:
        rows: `PrecisionRows.sweep`.

    Returns:
        Rows of `format`, `step_length`, and each with `value`, `low`, `high`: `unchanged_fraction`; and for each mask
        `<mask>_overlap`, its difference from the density, `<mask>_bias`, and from the format's own precision null,
        `<mask>_bias_beyond_precision`; the same of the stored update's absolute size in place of its changed entries:
        `<mask>_distance_bias`, `<mask>_distance_bias_beyond_precision`. None if nothing changed. And `<mask>_z`, a
        number: the changed entries in the mask less the precision null's, over its standard deviation.
    """
    measures: dict[str, Callable[[Sequence[Row]], Estimate]] = {"unchanged_fraction": unchanged}
    for mask in SWEPT_MASKS:
        measures[f"{mask}_overlap"] = partial(location, mask=mask, beyond="nothing")
        measures[f"{mask}_bias"] = partial(location, mask=mask)
        measures[f"{mask}_bias_beyond_precision"] = partial(location, mask=mask, beyond="precision")
        measures[f"{mask}_distance_bias"] = partial(location, mask=mask, of="distance")
        measures[f"{mask}_distance_bias_beyond_precision"] = partial(
            location, mask=mask, of="distance", beyond="precision"
        )
    found = []
    for format, step_length in dict.fromkeys((row["format"], row["step_length"]) for row in rows):
        cell = [row for row in rows if (row["format"], row["step_length"]) == (format, step_length)]
        pooled: Row = {name: _as_json(measure(cell)) for name, measure in measures.items()}
        pooled |= {f"{mask}_z": location_z(cell, mask) for mask in SWEPT_MASKS}
        found.append({"format": format, "step_length": step_length} | pooled)
    return found


def unchanged(rows: Sequence[Row]) -> Estimate:
    """Share of the entries that an update left as they were, over the matrices of one format and length."""
    return estimate_ratio([(row["numel"] - row["changed"], row["numel"]) for row in rows])


def location(
    rows: Sequence[Row],
    mask: str,
    of: Literal["changed", "distance"] = "changed",
    beyond: Null = "random",
) -> Estimate:
    """Share of an update that is in a mask, minus what a null puts there; over matrices of one format and length.

    Args:
        of: what is counted: `changed` entries, or `distance`, the absolute size of the stored change, which is defined
            where every entry changed too.
        beyond: the null: the mask's density (`random`), or the format's own precision null.
    """
    parts = []
    for row in rows:
        inside, whole = row[f"{mask}_{of}"], row[of]
        if inside is None or not whole:
            parts.append((0.0, 0.0))
            continue
        chance = {"nothing": 0.0, "random": whole * row[f"{mask}_entries"] / row["numel"]}
        expected = row[f"{mask}_{of}_null"] if beyond == "precision" else chance[beyond]
        parts.append((inside - expected, whole))
    return estimate_ratio(parts)


def location_z(rows: Sequence[Row], mask: str) -> float | None:
    """(changed − expected)/sd of a mask under the format's precision null; None if nothing is left to chance."""
    known = [row for row in rows if row[f"{mask}_changed"] is not None]
    null = CountNull(*(sum(row[f"{mask}_changed_{moment}"] for row in known) for moment in ("null", "variance")))
    return null.z(sum(row[f"{mask}_changed"] for row in known))


def hidden_share(histograms: Sequence[UlpHistogram]) -> Row:
    """Share of the entries whose master moved while the bfloat16 value did not, with both nulls."""
    parts = [(float(found.hidden.sum()), float(found.entries)) for found in histograms]
    entries = sum(found.entries for found in histograms)
    nulls = {
        f"{name}_null": sum(float(getattr(found, f"hidden_{name}_null").sum()) for found in histograms) / entries
        for name in ("gaussian", "permuted")
    }
    return _as_json(estimate_ratio(parts)) | nulls


def _sweep_rows(part: Part, base: Tensor, masters: Tensor, settings: PrecisionSettings) -> list[Row]:
    masks = _masks(base, settings)
    keys = {"tensor": part.name, "layer": part.place.layer, "role": part.place.role}
    rows = []
    for name in settings.formats:
        try:
            rows += [keys | {"format": name} | row for row in _in_format(base, masters, name, masks, settings)]
        except BeyondFormat as error:
            LOG.warning("%s is left out of the sweep in %s: %s", part.name, name, error)
    return rows


def _in_format(
    base: Tensor, masters: Tensor, name: str, masks: dict[str, Tensor], settings: PrecisionSettings
) -> list[Row]:
    stored = StoredBase(base, FORMATS[name])
    update = masters.double() - base.double()
    return [
        {"step_length": length} | _flat(stored.change_by(length * update, masks)) for length in settings.step_lengths
    ]


def _masks(base: Tensor, settings: PrecisionSettings) -> dict[str, Tensor]:
    """The low-magnitude mask, and the principal one if the base has a principal subspace."""
    ranks = {"low_magnitude": low_magnitude_ranks(base)}
    space = PrincipalSubspace.of(base, principal_rank(base.shape, settings.rank_fraction))
    if space is not None:
        ranks["principal"] = entry_ranks(space.scores())
    found = masks_at(settings.density, ranks)
    return {name: found[name] for name in SWEPT_MASKS if name in found}


def _flat(found: StoredChange) -> Row:
    row: Row = {"numel": found.entries, "changed": found.changed, "distance": found.distance}
    for mask in SWEPT_MASKS:
        inside = found.masks.get(mask)
        for field in fields(MaskChange):
            row[f"{mask}_{field.name}"] = None if inside is None else getattr(inside, field.name)
    return row


def _as_json(estimate: Estimate) -> Row:
    pooled = estimate.pooled()
    return {"value": pooled.value, "low": pooled.low, "high": pooled.high}
