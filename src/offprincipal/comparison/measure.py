"""Measure one tensor of a base and of every run tuned from it: rows for the tables, and nothing else.

Knows nothing of files; a tensor comes with its name and place.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from offprincipal.checkpoints import Array, Part
from offprincipal.checkpoints.masters import require_own_masters
from offprincipal.geometry.bits import Counts
from offprincipal.measures.agreement import pair_row
from offprincipal.measures.changes import Block, TensorPair
from offprincipal.measures.columns import Group, decomposes_base, metrics_of
from offprincipal.measures.pair import BaseMatrix, MatrixPair
from offprincipal.measures.settings import MatrixSettings

if TYPE_CHECKING:
    from offprincipal.comparison.cache import BaseCache

Row = dict[str, Any]
BASE_CURVE = "singular_values_base"


@dataclass(frozen=True)
class TensorRows:
    """What one tensor adds to each table.

    Args:
        fallbacks: run -> why it was not measured as asked: its error bound missed the `tolerance`, or the device's
            `memory` did not hold it.
    """

    matrices: list[Row] = field(default_factory=list)
    masks: list[Row] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)
    curves: list[Row] = field(default_factory=list)
    fallbacks: dict[str, str] = field(default_factory=dict)


def measure_matrix(
    part: Part,
    base: Array,
    tuned: Mapping[str, Array],
    masters: Mapping[str, Array],
    groups: tuple[Group, ...],
    settings: MatrixSettings,
    cache: "BaseCache | None" = None,
    known: Collection[str] = (),
) -> TensorRows:
    """All rows of one linear matrix.

    Args:
        base: (n, m), as stored; tuned: run -> the same; masters: run -> float32, where they were kept.
        cache: where decompositions of bases are kept.
        known: runs whose own rows, and the base's curve, are known: only what they have in common is measured.
    """
    decompose = decomposes_base(groups)
    base_matrix = BaseMatrix(part.name, base, settings, decompose, cache)
    pairs = {run: MatrixPair(base_matrix, tensor, masters.get(run)) for run, tensor in tuned.items()}
    for run, pair in pairs.items():
        _require_own_masters(part.name, run, pair.block)
        pair.scan  # noqa: B018  # finds what is not finite before anything else is done
    found = TensorRows()
    for run, pair in pairs.items():
        if run in known:
            continue
        keys = {"run": run, **part.keys}
        found.matrices.append(keys | _matrix_row(pair, groups))
        if "location" in groups:
            found.masks.extend(keys | row for row in _mask_rows(pair))
            found.curves.extend(_rate_curves(pair, keys))
        if "spectrum" in groups:
            found.curves.append(
                _curve(keys, "singular_values", pair.spectral.svd.resolved(base_matrix.spectral.k).cpu().numpy())
            )
        if "subspace" in groups and pair.spectral.angles:
            for side, angles in zip(("left", "right"), pair.spectral.angles, strict=True):
                found.curves.append(_curve(keys, f"principal_angles_{side}_deg", angles.cpu().numpy()))
        if decompose and pair.spectral.fell_back:
            found.fallbacks[run] = "tolerance"
    if "spectrum" in groups and not known:
        values = base_matrix.spectral.svd.resolved(base_matrix.spectral.k).cpu().numpy()
        found.curves.append(_curve({"run": None, **part.keys}, BASE_CURVE, values))
    if "location" in groups and len(pairs) > 1:
        for a, b in itertools.combinations(pairs, 2):
            if not (a in known and b in known):
                found.pairs.append(part.keys | pair_row(a, b, pairs))
        counts = [(pair.scan.rows, pair.scan.columns) for pair in pairs.values()]
        found.curves.extend(consensus_of(counts, {"run": None, **part.keys}))
    return found


def measure_tensor(
    part: Part, blocks: Mapping[str, Callable[[], Iterable[Block]]], groups: tuple[Group, ...], linear: bool = False
) -> TensorRows:
    """All rows of a tensor of which only what every tensor has is measured, read block by block.

    Args:
        blocks: run -> what gives its blocks anew.
        linear: whether it is pooled as a linear matrix all the same.
    """
    found = TensorRows()
    for run, read in blocks.items():
        pair = TensorPair(partial(_with_own_masters, part.name, run, read))
        dtypes = dict(zip(("dtype_base", "dtype_tuned"), pair.counts.dtypes, strict=True))
        row: Row = dtypes | {"linear": linear, "k": None, "alpha": None, "solver": None}
        for metric in metrics_of(groups):
            values = metric.measure(pair) if metric.every_tensor else (None,) * len(metric.columns)
            row |= {column.name: value for column, value in zip(metric.columns, values, strict=True)}
        found.matrices.append({"run": run, **part.keys} | row)
    return found


def _with_own_masters(name: str, run: str, read: Callable[[], Iterable[Block]]) -> Iterator[Block]:
    for block in read():
        _require_own_masters(name, run, block)
        yield block


def _require_own_masters(name: str, run: str, block: Block) -> None:
    if block.masters is not None:
        require_own_masters(name, run, block.tuned, block.masters)


def _matrix_row(pair: MatrixPair, groups: tuple[Group, ...]) -> Row:
    measured = pair.base.decompose
    row: Row = {
        "dtype_base": pair.counts.dtypes[0],
        "dtype_tuned": pair.counts.dtypes[1],
        "linear": True,
        "k": pair.base.spectral.k if measured else None,
        "alpha": pair.base.settings.density,
        "solver": pair.spectral.svd.solver if measured else None,
    }
    metrics = metrics_of(groups)
    # Spectra first: what location keeps for masks and pairs would lie beside them, where memory is at its highest.
    measured_first = sorted(metrics, key=lambda metric: metric.group == "location")
    found = {metric: metric.measure(pair) for metric in measured_first}
    for metric in metrics:
        row |= {column.name: value for column, value in zip(metric.columns, found[metric], strict=True)}
    return row


def _mask_rows(pair: MatrixPair) -> list[Row]:
    return [
        {"mask": name, "alpha": alpha, **asdict(found), "changed_count": pair.changed_count}
        for alpha in pair.base.settings.sweep_densities
        for name, found in pair.overlaps[alpha].items()
    ]


def _curve(keys: Row, name: str, values: Array) -> Row:
    return {key: keys[key] for key in ("run", "tensor", "layer", "role", "expert")} | {
        "curve": name,
        "values": np.array(values, np.float64),  # a copy: a view would keep all that it was cut from
    }


def _rate_curves(pair: MatrixPair, keys: Row) -> list[Row]:
    curves = []
    counts = (pair.scan.rows, pair.scan.columns)
    lengths = pair.tuned.shape[::-1]
    for line, changed, (expected, _), length in zip(("row", "column"), counts, pair.line_nulls, lengths, strict=True):
        curves.append(_curve(keys, f"{line}_change_rate", changed / length))
        curves.append(_curve(keys, f"{line}_change_rate_spacing_null", expected / length))
    return curves


def consensus_of(counts: Sequence[tuple[Counts, Counts]], keys: Row) -> list[Row]:
    """Means of the share of runs that changed each entry: of integers, so that the order of runs does not matter.

    Args:
        counts: of each run, changed entries of every row and of every column.
    """
    rows, columns = (sum(sides) for sides in zip(*counts, strict=True))
    (n, m), runs = (len(rows), len(columns)), len(counts)
    return [
        _curve(keys, "consensus_rows", rows / (m * runs)),
        _curve(keys, "consensus_columns", columns / (n * runs)),
    ]


def counts_of(curves: Iterable[Row]) -> list[tuple[Counts, Counts]]:
    """Changed entries of the rows and columns of each run, from its `row_change_rate` and `column_change_rate`."""
    named = list(curves)
    rows, columns = ([c["values"] for c in named if c["curve"] == f"{line}_change_rate"] for line in ("row", "column"))
    return [
        (np.rint(r * len(c)).astype(np.int64), np.rint(c * len(r)).astype(np.int64))
        for r, c in zip(rows, columns, strict=True)
    ]
