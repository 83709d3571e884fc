"""Measure one tensor of a base and of every run tuned from it: rows for the tables, and nothing else.

Knows nothing of files; a tensor comes with its name and place.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offprincipal.checkpoints import Place
from offprincipal.comparison.pair import BaseMatrix, MatrixPair, MatrixSettings
from offprincipal.comparison.registry import Group, metrics_of
from offprincipal.errors import CheckpointError
from offprincipal.geometry import nulls
from offprincipal.geometry.masks import MASKS

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A tensor that is to be measured: its keys in every table.

    Args:
        linear: whether it is a linear matrix, whose geometry is measured and pooled.
    """

    name: str
    shape: tuple[int, ...]
    place: Place
    linear: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def keys(self) -> Row:
        rows = self.shape[0] if self.shape else 1
        return {
            "tensor": self.name,
            "layer": self.place.layer,
            "role": self.place.role,
            "expert": self.place.expert,
            "rows": rows,
            "cols": self.numel // rows if rows else 0,
            "numel": self.numel,
        }


@dataclass(frozen=True)
class TensorRows:
    """What one tensor adds to each table."""

    matrices: list[Row] = field(default_factory=list)
    masks: list[Row] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)
    curves: list[Row] = field(default_factory=list)


def measure_tensor(
    subject: Subject,
    base: Tensor,
    tuned: Mapping[str, Tensor],
    masters: Mapping[str, Tensor],
    groups: tuple[Group, ...],
    settings: MatrixSettings,
) -> TensorRows:
    """All rows of one tensor.

    Args:
        base: the base's tensor; tuned: run -> tensor of the same shape; masters: run -> float32, where they were kept.
    """
    for run, master in masters.items():
        if not torch.equal(master.to(tuned[run].dtype), tuned[run]):
            raise CheckpointError(
                f"{subject.name}: the masters of '{run}' do not round to its stored weights, so they are of another "
                "checkpoint: remove its masters folder, or save both again"
            )
    decompose = set(groups) != {"location"}
    shape = (subject.keys["rows"], subject.keys["cols"])
    base_matrix = BaseMatrix(subject.name, base.reshape(shape), settings, decompose)
    pairs = {
        run: MatrixPair(base_matrix, tensor.reshape(shape), masters[run].reshape(shape) if run in masters else None)
        for run, tensor in tuned.items()
    }
    found = TensorRows()
    for run, pair in pairs.items():
        keys = {"run": run, **subject.keys}
        found.matrices.append(keys | _matrix_row(subject, pair, groups))
        if subject.linear and "location" in groups:
            found.masks.extend(keys | row for row in _mask_rows(pair))
            found.curves.extend(_rate_curves(pair, keys))
        if subject.linear and "spectrum" in groups:
            found.curves.append(_curve(keys, "singular_values", pair.svd.S))
        if subject.linear and "subspace" in groups and pair.angles:
            for side, angles in zip(("left", "right"), pair.angles, strict=True):
                found.curves.append(_curve(keys, f"principal_angles_{side}_deg", angles))
    if subject.linear and "spectrum" in groups:
        found.curves.append(_curve({"run": None, **subject.keys}, "singular_values_base", base_matrix.svd.S))
    if subject.linear and "location" in groups and len(pairs) > 1:
        found.pairs.extend(subject.keys | _pair_row(a, b, pairs) for a, b in itertools.combinations(pairs, 2))
        found.curves.extend(_consensus_curves(pairs, {"run": None, **subject.keys}))
    return found


def _matrix_row(subject: Subject, pair: MatrixPair, groups: tuple[Group, ...]) -> Row:
    measured = subject.linear and pair.base.decompose
    row: Row = {
        "dtype_base": str(pair.base.weight.dtype).removeprefix("torch."),
        "dtype_tuned": str(pair.tuned.dtype).removeprefix("torch."),
        "linear": subject.linear,
        "k": pair.base.k if measured else None,
        "alpha": pair.base.settings.alpha if subject.linear else None,
        "solver": "exact" if measured else None,
    }
    for metric in metrics_of(groups):
        applies = subject.linear or metric.every_tensor
        values = metric.measure(pair) if applies else (None,) * len(metric.columns)
        row |= {column.name: value for column, value in zip(metric.columns, values, strict=True)}
    return row


def _mask_rows(pair: MatrixPair) -> list[Row]:
    rows = []
    for alpha in pair.base.settings.alphas:
        masks = pair.base.masks(alpha)
        for name in (name for name in MASKS if name in masks):
            found = pair.overlap(masks[name])
            rows.append(
                {
                    "mask": name,
                    "alpha": alpha,
                    "density": found.density,
                    "overlap": found.overlap,
                    "overlap_random": found.overlap_random,
                    "overlap_precision_null": found.overlap_precision_null,
                    "overlap_precision_null_sd": found.overlap_precision_null_sd,
                    "overlap_z": found.overlap_z,
                    "changed_count": pair.changed_count,
                }
            )
    return rows


def _pair_row(run_a: str, run_b: str, pairs: Mapping[str, MatrixPair]) -> Row:
    a, b = pairs[run_a], pairs[run_b]
    intersection = int((a.changed & b.changed).sum())
    counts = (a.changed_count, b.changed_count)
    null = nulls.intersection_null(a.base.class_entries, a.class_changed, b.class_changed)
    known = a.base.on_bf16_grid  # else two runs share where in its rounding cell each weight lies
    by_chance = counts[0] * counts[1] / a.changed.numel()
    return {
        "run_a": run_a,
        "run_b": run_b,
        "changed_a": counts[0],
        "changed_b": counts[1],
        "intersection": intersection,
        "intersection_precision_null": null.expected if known else None,
        "intersection_precision_null_sd": math.sqrt(null.variance) if known else None,
        "jaccard": nulls.jaccard(intersection, *counts),
        "jaccard_random": nulls.jaccard(by_chance, *counts),
        "jaccard_precision_null": nulls.jaccard(null.expected, *counts) if known else None,
        "jaccard_z": null.z(intersection) if known else None,
    }


def _curve(keys: Row, name: str, values: Tensor) -> Row:
    return {key: keys[key] for key in ("run", "tensor", "layer", "role", "expert")} | {
        "curve": name,
        "values": values.tolist(),
    }


def _rate_curves(pair: MatrixPair, keys: Row) -> list[Row]:
    curves = []
    for dim, line in enumerate(("row", "column")):
        counts, expected, _ = nulls.line_null(pair.changed, pair.base.classes, dim)
        length = pair.changed.shape[1 - dim]
        curves.append(_curve(keys, f"{line}_change_rate", counts / length))
        curves.append(_curve(keys, f"{line}_change_rate_precision_null", expected / length))
    return curves


def _consensus_curves(pairs: Mapping[str, MatrixPair], keys: Row) -> list[Row]:
    consensus = torch.stack([pair.changed for pair in pairs.values()]).double().mean(dim=0)  # (n, m)
    return [
        _curve(keys, "consensus_rows", consensus.mean(dim=1)),
        _curve(keys, "consensus_columns", consensus.mean(dim=0)),
    ]
