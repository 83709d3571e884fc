"""Compare a base with checkpoints tuned from it: plan the tensors, measure them in threads, pool, write the tables."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offprincipal.checkpoints import Checkpoint, open_checkpoint, place_of, require_same_tensors
from offprincipal.checkpoints.roles import TABLE_ROLES
from offprincipal.comparison.measure import Row, Subject, TensorRows, measure_tensor
from offprincipal.comparison.pair import MatrixSettings
from offprincipal.comparison.pooling import pool_pair, pool_run
from offprincipal.comparison.registry import GROUPS, Group
from offprincipal.comparison.tables import write_tables
from offprincipal.errors import ArgumentError, CheckpointError, NonFiniteTensor

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CompareSettings:
    """What decides the numbers of a comparison, beside the checkpoints.

    Args:
        metrics: groups to measure; `location` alone decomposes nothing, so it leaves out the principal and safe masks.
        matrix: what decides the numbers of one matrix.
        include_embeddings: measure and pool embeddings and heads as linear matrices too.
    """

    metrics: tuple[Group, ...] = GROUPS
    matrix: MatrixSettings = field(default_factory=MatrixSettings)
    include_embeddings: bool = False

    def __post_init__(self) -> None:
        matrix = self.matrix
        densities = [("alphas", alpha) for alpha in matrix.alphas]
        for name, value in (("rank_fraction", matrix.rank_fraction), ("alpha", matrix.alpha), *densities):
            if not 0 < value <= 1:
                raise ArgumentError(f"{name} is {value}: give a number above 0, at most 1")
        if matrix.null_draws < 1:
            raise ArgumentError(f"null_draws is {matrix.null_draws}: give at least 1")
        unknown = [group for group in self.metrics if group not in GROUPS]
        if unknown or not self.metrics:
            raise ArgumentError(f"no metric group {unknown or 'given'}: choose of {', '.join(GROUPS)}")
        object.__setattr__(self, "metrics", tuple(g for g in GROUPS if g in self.metrics))


@dataclass(frozen=True)
class Comparison:
    """The tables of one comparison: rows as dicts, and the pooled summary, as `METRICS` in the docs define them."""

    matrices: list[Row]
    masks: list[Row]
    pairs: list[Row]
    curves: list[Row]
    summary: dict[str, Any]

    def write(self, out: str | Path) -> Path:
        """Write the four Parquet tables and `summary.json`, each under a temporary name first."""
        return write_tables(Path(out), self.matrices, self.masks, self.pairs, self.curves, self.summary)


def compare(
    base: str | Path,
    tuned: str | Path | Mapping[str, str | Path] | Sequence[str | Path],
    settings: CompareSettings | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure what training did to the weights, every figure beside its null.

    Args:
        base: folder of the base model.
        tuned: folders of the models trained from it, by the name of the run, or named after their folders.
        settings: metrics and their parameters.
        threads: matrices measured at once; each on one core. All cores by default. The numbers do not depend on it.
        progress: called with entries done, entries in all, and the tensor's name.

    Raises:
        CheckpointError: a checkpoint cannot be read, or the tensors do not match.
        ArgumentError: a setting is out of range, or two runs have one name.

    >>> from offprincipal.assets import embedded_base
    >>> result = compare(embedded_base(), {"same": embedded_base()}, CompareSettings(metrics=("location",)))
    >>> result.summary["runs"]["same"]["metrics"]["unchanged_fraction"]["value"]
    1.0
    """
    settings = settings or CompareSettings()
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads is {threads}: give at least 1")
    if isinstance(tuned, str | Path):
        tuned = [tuned]
    base_checkpoint = open_checkpoint(base)
    runs = {name: open_checkpoint(path) for name, path in name_runs(tuned).items()}
    for run in runs.values():
        require_same_tensors(base_checkpoint, run)
    masters = {name: found for name, run in runs.items() if (found := run.masters())}
    for found in masters.values():
        require_same_tensors(base_checkpoint, found)
    subjects = plan(base_checkpoint, settings.include_embeddings)
    if not subjects:
        raise CheckpointError(f"{base_checkpoint.source} holds no floating-point tensor: there is nothing to compare")

    def measure(subject: Subject) -> TensorRows:
        def read(checkpoints: Mapping[str, Checkpoint]) -> dict[str, Tensor]:
            return {name: checkpoint.read(subject.name) for name, checkpoint in checkpoints.items()}

        weight = base_checkpoint.read(subject.name)
        try:
            return measure_tensor(subject, weight, read(runs), read(masters), settings.metrics, settings.matrix)
        except NonFiniteTensor as error:
            raise CheckpointError(f"{subject.name}: {error}. Look at how it was trained or converted") from error

    measured = list(_in_threads(measure, subjects, threads or os.cpu_count() or 1, progress))
    matrices, masks, pairs, curves = (
        [row for rows in measured for row in getattr(rows, table)] for table in ("matrices", "masks", "pairs", "curves")
    )
    summary = _summary(base_checkpoint, runs, settings, matrices, pairs)
    return Comparison(matrices, masks, pairs, curves, summary)


def name_runs(tuned: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, Path]:
    """Run -> folder; a folder given without a name is its own.

    Raises:
        ArgumentError: none is given, or two have one name.

    >>> name_runs(["runs/grpo", "runs/sft"])
    {'grpo': PosixPath('runs/grpo'), 'sft': PosixPath('runs/sft')}
    """
    if isinstance(tuned, Mapping):
        named = [(name, Path(path)) for name, path in tuned.items()]
    else:
        named = [(Path(path).resolve().name, Path(path)) for path in tuned]
    names = [name for name, _ in named]
    if not names:
        raise ArgumentError("no tuned checkpoint given: name at least one")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ArgumentError(f"two runs are named '{repeated[0]}': tell them apart with NAME=PATH")
    return dict(named)


def plan(base: Checkpoint, include_embeddings: bool = False) -> list[Subject]:
    """Every floating-point tensor of the base, and which of them are linear matrices."""
    subjects = []
    for info in base.tensors.values():
        place = place_of(info.name)
        matrix = len(info.shape) == 2 and min(info.shape) > 0
        linear = matrix and (include_embeddings or place.role not in TABLE_ROLES)
        if info.floating:
            subjects.append(Subject(info.name, info.shape, place, linear))
    return subjects


def _in_threads(
    measure: Callable[[Subject], TensorRows], subjects: list[Subject], threads: int, progress: Progress | None
) -> Iterator[TensorRows]:
    """Results in the order of the subjects, whatever the number of threads; the first error ends it."""
    total, done = sum(s.numel for s in subjects), 0
    with _one_core_each(), ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(measure, subject) for subject in subjects]
        try:
            for subject, future in zip(subjects, futures, strict=True):
                yield future.result()
                done += subject.numel
                if progress:
                    progress(done, total, subject.name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _one_core_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _summary(
    base: Checkpoint,
    runs: Mapping[str, Checkpoint],
    settings: CompareSettings,
    matrices: list[Row],
    pairs: list[Row],
) -> dict[str, Any]:
    entries = {}
    for name, checkpoint in runs.items():
        rows = [row for row in matrices if row["run"] == name]
        entries[name] = {
            "source": checkpoint.source,
            "warnings": _warnings(base, checkpoint, rows),
            "solvers": {"exact": sum(row["solver"] == "exact" for row in rows)},
            "metrics": {metric: pooled.as_dict() for metric, pooled in pool_run(rows).items()},
        }
    couples = dict.fromkeys((row["run_a"], row["run_b"]) for row in pairs)
    flat = asdict(settings) | asdict(settings.matrix)
    return {
        "schema": 1,
        "base": base.source,
        "arguments": {
            key: list(value) if isinstance(value, tuple) else value for key, value in flat.items() if key != "matrix"
        },
        "versions": {package: version(package) for package in ("offprincipal", "torch", "safetensors")},
        "runs": entries,
        "pairs": [
            {"run_a": a, "run_b": b} | pool_pair([row for row in pairs if (row["run_a"], row["run_b"]) == (a, b)])
            for a, b in couples
        ],
    }


def _warnings(base: Checkpoint, run: Checkpoint, rows: list[Row]) -> list[str]:
    warnings = []
    unchanged = [row["unchanged_fraction"] for row in rows if row.get("unchanged_fraction") is not None]
    if unchanged and min(unchanged) == 1:
        warnings.append("no weight changed: this checkpoint equals the base once both are stored in bfloat16")
    skipped = [info.name for info in base.tensors.values() if not info.floating]
    if skipped:
        warnings.append(f"{len(skipped)} tensors hold no floating-point numbers and were not compared")
    types = [", ".join(sorted({i.dtype for i in c.tensors.values() if i.floating})) for c in (base, run)]
    if types[0] != types[1]:
        warnings.append(f"the base is stored as {types[0]}, the run as {types[1]}: some of the update is rounding")
    if types != ["bfloat16", "bfloat16"]:
        warnings.append(
            f"stored as {types[1]}; `changed` is decided after rounding both sides to bfloat16, and the precision null "
            "of two runs is undefined where the base is not in bfloat16"
        )
    others = [row["tensor"] for row in rows if row["linear"] and row["role"] == "other"]
    if others:
        warnings.append(f"{len(others)} matrices of unknown role count as linear ones, {others[0]} among them")
    wide = sum(math.prod(info.shape) for info in base.tensors.values() if info.floating and len(info.shape) > 2)
    if wide:
        warnings.append(
            f"{wide:,} parameters sit in tensors of more than two dimensions: only their location is measured"
        )
    return warnings
