"""Compare a base with checkpoints tuned from it: plan the tensors, measure them, pool, write the tables."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offprincipal.checkpoints import Part
from offprincipal.checkpoints.naming import as_source, name_runs
from offprincipal.comparison.execution import run_in_threads, run_on_ray
from offprincipal.comparison.journal import DECISIVE, gather, held, journal_key, resumable
from offprincipal.comparison.lineage import lineage_warnings
from offprincipal.comparison.measure import Row, TensorRows
from offprincipal.comparison.result import Comparison
from offprincipal.comparison.reuse import (
    Before,
    adopt_journal,
    journal_about,
    keep_measured,
    measured_before,
    run_keys,
)
from offprincipal.comparison.work import Work
from offprincipal.errors import ArgumentError, FileError
from offprincipal.file_names import REPORT
from offprincipal.files import cache_folder, identities, require_unchanged
from offprincipal.measures.compare_settings import CompareSettings
from offprincipal.measures.pooling import anatomy, pool_pair, pool_run
from offprincipal.measures.settings import as_in_files
from offprincipal.memory import SHARE, free_memory
from offprincipal.tables import TABLES, require_nothing_lost
from offprincipal.versions import versions

if TYPE_CHECKING:
    from offprincipal.checkpoints.naming import Source

Progress = Callable[[int, int, str], None]

LOG = logging.getLogger("offprincipal")
_NOT_COARSER = {"bfloat16", "float32", "float64"}  # than bfloat16
_RULERS_ERROR = 0.01  # of a mask's share: error of the rounding null without masters, for smooth steps
_HOPELESS = 2  # a matrix is refused if its estimated need, which is generous, exceeds the free memory by this factor


def compare(
    base: "Source",
    tuned: "Source | Mapping[str, Source] | Sequence[Source]",
    settings: CompareSettings | None = None,
    *,
    out: str | Path | None = None,
    threads: int | None = None,
    memory: int | None = None,
    ray: str | None = None,
    cache: str | Path | bool = True,
    masters: Mapping[str, str | Path] | None = None,
    report: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    """Measure what training did to the weights, and compare every figure with its null.

    Args:
        base: the base model: a folder, a Hugging Face id, or a `torch.nn.Module`, such as `trainer.model`.
        tuned: the models trained from it, of the same kinds: run name -> model, or a list named after their folders.
        settings: metrics and their parameters.
        out: folder for the tables and `report.html`. An interrupted comparison continues from the journal there, and
            runs that were measured there before are not measured again; without it, nothing is written.
        threads: number of matrices measured in parallel, each on one core; all cores by default. It does not change
            the numbers.
        memory: budget in bytes for the matrices being measured, 60 % of free memory by default: the largest come first,
            and fewer at once if they do not fit. It does not change the numbers.
        ray: address of a Ray cluster to measure on, or `local` for one on this machine, instead of threads.
        cache: cache of base decompositions: a folder, True for the user's cache folder, or False for none, which also
            measures everything again whatever is in `out`.
        masters: run name -> its float32 master weights, if they are not in the run's folder.
        report: whether to write `report.html` too.
        overwrite: replace a comparison of other runs in the folder.
        progress: called with entries done, entries in all, and the tensor's name.
        options: instead of `settings`, any field of it or of its `matrix`: `density=0.3`.

    Raises:
        CheckpointError: a checkpoint cannot be read, or the tensors do not match.
        ArgumentError: a setting is out of range, or two runs have the same name.
        FileError: the tables cannot be written, another process is writing there, or the folder holds a comparison of
            other runs.

    >>> from offprincipal.assets import embedded_base
    >>> compare(embedded_base(), {"same": embedded_base()}, metrics=("location",)).runs["same"].unchanged_fraction.value
    1.0
    """
    if settings is not None and options:
        raise ArgumentError(f"both settings and {next(iter(options))} are given: give only one of them")
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads is {threads}: give at least 1")
    several: Any = [tuned] if isinstance(tuned, str | Path) or hasattr(tuned, "state_dict") else tuned
    kept = _users_cache() if cache is True else Path(cache) if cache else None
    runs = name_runs(several)
    given = {name: str(source) for name, source in (masters or {}).items()}
    if unknown := sorted(given.keys() - runs.keys()):
        raise ArgumentError(f"masters are given for '{unknown[0]}', which is not a run: runs are {', '.join(runs)}")
    work = Work(as_source(base), runs, settings or CompareSettings.of(**options), kept, given)
    if ray is not None and work.in_memory:
        raise ArgumentError("Ray workers cannot see a model in memory: save it, and give its folder")
    if work.settings.matrix.device != "cpu" and ray is None:
        from offprincipal.measures.spectral import chosen_device

        chosen_device(work.settings.matrix.device)

    opened = identities(work.files)
    if out is not None:
        _require_no_model(Path(out), [work.base, *work.tuned.values()])
        if not overwrite:
            sources = {name: run.source for name, run in work.runs.items()}
            require_nothing_lost(Path(out), work.base_checkpoint.source, sources, work.settings.metrics)
    with held(out) as folder:
        keys = run_keys(work, opened) if folder else {}
        before = measured_before(work, folder, keys) if cache and folder else Before()
        measured: dict[str, TensorRows] = dict(before.rows) if before.all else {}

        def measure(waiting: Sequence[Part]) -> Iterable[tuple[Part, TensorRows]]:
            rows_of = partial(Work.measure, known=before.runs)
            if ray:
                return run_on_ray(work, rows_of, waiting, ray)
            return run_in_threads(work, rows_of, waiting, threads or os.cpu_count() or 1, _budget(work, memory))

        def keep(name: str, rows: TensorRows) -> None:
            measured[name] = before.merged(name, rows, list(work.runs))

        def restore(name: str, kept: dict[str, Any]) -> None:
            keep(name, TensorRows(**kept))

        if folder and keys and not before.runs:
            adopt_journal(work, folder, journal_key(work, opened, ()), keys)
        about = journal_about(keys, before.runs)
        with resumable(folder, work, opened, restore, known=before.runs, about=about) as journal:
            gather(work.parts, measured, measure, keep, journal, progress)
            result = _comparison(work, [measured[part.name] for part in work.parts], before.runs)
            require_unchanged(opened)
            if folder and journal:
                journal.require_own()
                result.write(folder)
                keep_measured(folder, keys, measured)
                journal.require_own()  # otherwise tables of two comparisons could be mixed
        if journal:
            journal.discard()
        if folder and report:
            from offprincipal.reports.report import write_report

            write_report(folder / REPORT, folder)
    return result


def _require_no_model(out: Path, sources: Sequence[Any]) -> None:
    """Raises `FileError` where the output folder is a model's own."""
    for source in sources:
        if isinstance(source, str) and Path(source).is_dir() and out.resolve() == Path(source).resolve():
            raise FileError(f"output folder {out} is a model that is read: choose another --out")


def _budget(work: Work, memory: int | None) -> int:
    """Bytes for the matrices in flight; said where the largest needs more, and is then measured alone.

    Raises:
        ArgumentError: it needs so much more than this machine has that it would end the process.
    """
    if memory is not None and memory < 1:
        raise ArgumentError(f"memory is {memory} bytes: give at least 1")
    free = free_memory()
    budget = int(SHARE * free) if memory is None else memory
    widest = max(work.parts, key=work.bytes_needed)
    largest = work.bytes_needed(widest)
    if largest > _HOPELESS * max(free, budget):
        raise ArgumentError(
            f"{widest.name} with {widest.numel:,} entries needs about {largest / 1e9:.0f} GB but only "
            f"{max(free, budget) / 1e9:.0f} GB are free. Use --metrics changes, drop --include-embeddings, or use a "
            "larger machine"
        )
    if largest > budget:
        LOG.warning(
            "the largest matrix needs about %.1f GB, more than the budget of %.1f GB: the largest are measured one at "
            "a time, and may exceed the budget",
            largest / 1e9,
            budget / 1e9,
        )
    return budget


def _users_cache() -> Path | None:
    try:
        return cache_folder()
    except FileError as error:
        LOG.warning("base decompositions are not cached: %s", error)
        return None


def _comparison(work: Work, measured: list[TensorRows], known: tuple[str, ...]) -> Comparison:
    tables: dict[str, list[Row]] = {
        table: [row for rows in measured for row in getattr(rows, table)] for table in TABLES
    }
    summary = _summary(work, measured, tables["matrices"], tables["pairs"])
    return Comparison(**tables, summary=summary, measured_before=known)


def _summary(work: Work, measured: list[TensorRows], matrices: list[Row], pairs: list[Row]) -> dict[str, Any]:
    entries = {}
    for name, checkpoint in work.runs.items():
        rows = [row for row in matrices if row["run"] == name]
        unmeasured, differing = work.unmeasured(name)
        entries[name] = {
            "source": checkpoint.source,
            **({"masters": work.given_masters[name]} if name in work.given_masters else {}),
            "warnings": [
                *work.notes[name],
                *_left_out_warnings(work, name),
                *_unmeasured_warnings(unmeasured, differing),
                *_warnings(work, name, rows, not (differing or work.only_in_base or work.only_in_run(name))),
                *lineage_warnings(work.base_checkpoint, checkpoint, rows),
                *_error_bounds(rows),
                *_ruler_warnings(rows, name in work.masters),
                *_fallback_warnings(work, name, measured),
            ],
            "differing_unmeasured": len(differing),
            "only_in_run": work.only_in_run(name),
            "solvers": dict(sorted(Counter(row["solver"] for row in rows if row["solver"]).items())),
            "metrics": {metric: pooled.as_dict() for metric, pooled in pool_run(rows).items()},
            "anatomy": anatomy(rows),
        } | ({"contract": kept} if (kept := work.kept(name, rows, unmeasured, differing)) else {})
    couples = dict.fromkeys((row["run_a"], row["run_b"]) for row in pairs)
    flat = as_in_files(asdict(work.settings) | asdict(work.settings.matrix))
    return {
        "schema": 2,
        "base": work.base_checkpoint.source,
        "arguments": {
            key: list(value) if isinstance(value, tuple) else value for key, value in flat.items() if key != "matrix"
        },
        "versions": versions(*DECISIVE),
        "only_in_base": work.only_in_base,
        "runs": entries,
        "pairs": [
            {"run_a": a, "run_b": b} | pool_pair([row for row in pairs if (row["run_a"], row["run_b"]) == (a, b)])
            for a, b in couples
        ],
    }


def _error_bounds(rows: list[Row]) -> list[str]:
    """A note on the accuracy of the matrices that were approximated."""
    rows = [row for row in rows if row["solver"] in ("warm", "randomized")]
    errors = [error for row in rows if (error := row.get("singular_value_error_relative")) is not None]
    if not errors:
        return []
    angles = [angle for row in rows if (angle := row.get("angle_error_deg")) is not None]
    known = f", their principal angles to {max(angles):.2g}°" if angles else ""
    within = sum(0 < (row.get("spectral_shift") or 0) <= (row["singular_value_error_relative"] or 0) for row in rows)
    known += f"; of {within} of them the spectral shift is within its error bound" if within else ""
    return [f"{len(errors)} matrices were approximated: their singular values are correct to {max(errors):.1e}{known}"]


def _ruler_warnings(rows: list[Row], masters: bool) -> list[str]:
    """A note that the rounding null is an estimate, if the magnitude step is at least as large as its error."""
    steps = [abs(rungs["spacing"] - rungs["rounding"]) for rungs in anatomy(rows).values()]
    if masters or not steps or max(steps) < _RULERS_ERROR:
        return []
    return [
        "without float32 masters the rounding null is estimated from small weights. For updates of a single size it "
        "can be off by several points, which would be attributed to magnitude; pass --masters if the trainer kept them"
    ]


_FALLBACKS = {
    "tolerance": "missed the tolerance and were solved exactly",
    "memory": "did not fit on the device and were measured on the CPU",
}


def _fallback_warnings(work: Work, run: str, measured: list[TensorRows]) -> list[str]:
    warnings = []
    for reason, words in _FALLBACKS.items():
        pairs = zip(work.parts, measured, strict=True)
        names = [part.name for part, rows in pairs if rows.fallbacks.get(run) == reason]
        if names:
            warnings.append(f"{len(names)} matrices {words}, such as {names[0]}")
    return warnings


def _left_out_warnings(work: Work, run: str) -> list[str]:
    left_out = work.left_out(run)
    if not left_out:
        return []
    return [
        f"{len(left_out)} tensors that it shares with the base, such as {left_out[0]}, are left out because another "
        "run lacks them: its figures exclude them, and would differ if it were compared alone"
    ]


def _unmeasured_warnings(unmeasured: list[str], differing: list[str]) -> list[str]:
    if not unmeasured:
        return []
    said = f"{len(unmeasured)} tensors have no floating-point numbers and are not measured"
    differ = f"; {len(differing)} of them differ from the base's, such as {differing[0]}" if differing else ""
    return [f"{said}{differ or '; they are identical to those of the base'}"]


def _warnings(work: Work, name: str, rows: list[Row], whole: bool) -> list[str]:
    base, run = work.base_checkpoint, work.runs[name]
    warnings = []
    unchanged = [row["unchanged_fraction"] for row in rows if row.get("unchanged_fraction") is not None]
    if unchanged and min(unchanged) == 1 and whole:
        warnings.append("no weight changed: this checkpoint equals the base once both are stored in bfloat16")
    compared = {part.tensor for part in work.parts}
    theirs = compared & run.tensors.keys()
    types = [", ".join(sorted({c.tensors[name].dtype for name in compared & c.tensors.keys()})) for c in (base, run)]
    if types[0] != types[1]:
        finer = types[0] == "bfloat16" and {run.tensors[name].dtype for name in theirs} <= _NOT_COARSER
        update = "norms and spectra are of the update before storing" if finer else "part of the update is rounding"
        warnings.append(
            f"the base is stored as {types[0]}, the run as {types[1]}: {update}, and what changed is decided after "
            "rounding both sides to bfloat16"
        )
    elif types[0] != "bfloat16":
        warnings.append(
            f"both sides are stored as {types[0]}: what changed is decided after rounding them to bfloat16, and nulls "
            "of rounding are undefined in matrices that are not on the bfloat16 grid"
        )
    others = [row["tensor"] for row in rows if row["linear"] and row["role"] == "other"]
    if others:
        warnings.append(f"{len(others)} matrices of unknown role, such as {others[0]}, are treated as linear layers")
    wide = sum(part.numel for part in work.parts if len(part.matrix_shape) > 2)
    if wide:
        warnings.append(
            f"{wide:,} parameters are in tensors of more than two dimensions: only their location is measured"
        )
    return warnings
