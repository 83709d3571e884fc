"""A trajectory: checkpoints of one run in order, their figures pooled over the model, by role, layer and tensor.

One pass over the files: every tensor of every checkpoint is read once, in blocks.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offprincipal.checkpoints import Checkpoint, Part, hub, open_checkpoint
from offprincipal.checkpoints.delta import SUFFIX
from offprincipal.comparison.execution import in_threads, one_core_each
from offprincipal.comparison.journal import gather, resumable
from offprincipal.comparison.work import CompareSettings, Work
from offprincipal.errors import ArgumentError, CheckpointError, NonFiniteTensor
from offprincipal.files import identities, require_folder, require_unchanged, write_atomically, write_json
from offprincipal.geometry import walks
from offprincipal.geometry.extrapolation import METHODS, Method
from offprincipal.trajectories.measure import Moved, Read, measure, restored
from offprincipal.trajectories.prediction import predictions_of, require_predictable, write_prediction

Progress = Callable[[int, int, str], None]
Row = dict[str, Any]
JSON, TABLE = "trajectory.json", "trajectory.parquet"
JOURNAL = "trajectory.journal.jsonl"
_STEP = re.compile(r"(?:^|[-_=.@])(?:checkpoint|global_step|step|iter|epoch)?s?[-_=]?([0-9]{1,12})$")
_ENDING = re.compile(r"\.(?:delta|safetensors|gguf|bin|pt|pth|ckpt)$")
_FIGURES = ("straightness", "rank1_share", "rank2_share", "linearity_r2")


@dataclass(frozen=True)
class Trajectory:
    """What many checkpoints of one run did.

    Args:
        content: what `trajectory.json` holds; rows: of `trajectory.parquet`, one a tensor and step.
    """

    content: dict[str, Any]
    rows: list[Row]

    def write(self, out: str | Path) -> Path:
        """Write `trajectory.json` and `trajectory.parquet` into a folder, each whole or not at all.

        Raises:
            FileError: they cannot be written.
        """
        folder = Path(out)
        require_folder(folder)
        table = pa.Table.from_pylist(self.rows)
        write_atomically(folder / TABLE, partial(pq.write_table, table, use_dictionary=["tensor", "role"]))
        write_json(folder / JSON, self.content)
        return folder


def trajectory(
    base: str | Path,
    checkpoints: str | Path | Sequence[str | Path],
    *,
    steps: Sequence[float] | None = None,
    out: str | Path | None = None,
    threads: int | None = None,
    masters: bool = False,
    skip_broken: bool = False,
    predict: float | None = None,
    predict_by: Method = "linear",
    progress: Progress | None = None,
) -> Trajectory:
    """How weights moved over the checkpoints of a run, every figure beside the random walk of its steps.

    Args:
        base: what the run started from: whatever `compare` opens.
        checkpoints: in any order, whatever `compare` opens; the run's root, whose `checkpoint-*` and the like are
            taken; or branches on the Hub by a pattern, `org/name@step_*`.
        steps: of the checkpoints, in their order; by default told from their names, or 1, 2, … where these do not tell.
        out: folder for `trajectory.json` and `trajectory.parquet`; nothing is written without it. What was killed goes
            on from the journal there.
        threads: tensors measured at once; all cores by default. The numbers do not depend on it.
        masters: follow the float32 weights that trainers keep beside checkpoints, in which storing hides no step.
        skip_broken: go on without checkpoints that cannot be opened, and say so.
        predict: a step; the model that the run would be there is written to `predicted-STEP` in `out`.
        predict_by: `linear`, each weight along its own line; `rank1`, all of them along one direction.
        progress: called with entries done, entries in all, and the tensor's name.

    Raises:
        CheckpointError: a checkpoint cannot be read, or is no pair with the base.
        ArgumentError: there is none, steps are repeated or not as many as checkpoints, or nothing can be predicted.
        FileError: the files cannot be written, or checkpoints changed meanwhile.

    >>> from offprincipal.assets import embedded_base
    >>> still = trajectory(embedded_base(), [embedded_base() / "model.safetensors"], steps=[10])
    >>> still.content["pooled"]["unchanged_fraction"], still.content["pooled"]["verdict"]
    ([1.0], 'cannot tell')
    """
    sources = expanded(checkpoints)
    at = steps_of(sources, steps)
    order = sorted(range(len(sources)), key=lambda i: at[i])
    labels = {_label(at[i]): sources[i] for i in order}
    warnings: list[str] = []
    if skip_broken:
        labels = dict(_opening(labels, open_checkpoint(base), warnings))
    if not labels:
        raise ArgumentError("no checkpoint is left: name at least one that can be opened")
    times = [float(label) for label in labels]
    work = (_OfMasters if masters else Work)(str(base), labels, CompareSettings(metrics=("changes",)))
    if predict is not None:
        _require_prediction(work, times, predict, predict_by, out)
    parts = [part for part in work.parts if part.numel]
    opened = identities(work.files)
    with resumable(work, out, opened, restored, JOURNAL) as (journal, found):
        same = {part.name: 0 for part in parts}  # blocks are small, however large a tensor is
        cores = threads or os.cpu_count() or 1
        with one_core_each(work):
            gather(
                parts,
                found,
                lambda left: in_threads(partial(_measured, work, times), left, cores, same, 0),
                journal,
                progress,
            )
        require_unchanged(opened)
        notes = dict.fromkeys(note for said in work.notes.values() for note in said)
        result = _result(work, parts, found, times, [*warnings, *notes])
        if out is not None:
            result.write(out)
            if predict is not None:
                model = f"predicted-{_label(predict)}"
                gram = np.asarray(result.content["pooled"]["gram"])
                write_prediction(work, gram, times, predict, predict_by, Path(out) / model, progress)
                result.content["prediction"] = {"step": predict, "by": predict_by, "model": model}
                result.write(out)
    if journal:
        journal.discard()
    return result


def _require_prediction(work: Work, steps: Sequence[float], at: float, by: str, out: str | Path | None) -> None:
    if by not in METHODS:
        raise ArgumentError(f"no prediction by '{by}': choose of {', '.join(METHODS)}")
    if out is None:
        raise ArgumentError("a predicted model is written into the folder `out`: name one")
    require_predictable(work, steps, at)


class _OfMasters(Work):
    """The same of the float32 weights beside the checkpoints."""

    @cached_property
    def runs(self) -> dict[str, Checkpoint]:
        found = {}
        for name, source in self.tuned.items():
            kept = open_checkpoint(source, self.base_checkpoint).masters()
            if kept is None:
                raise CheckpointError(f"{source} has no float32 weights beside it: leave masters out, or keep them")
            found[name] = kept
        return found


def expanded(checkpoints: str | Path | Sequence[str | Path]) -> list[str]:
    """The checkpoints that are named; those inside of a run's root, in the order of their steps.

    Raises:
        ArgumentError: there is none.
    """
    given = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    if len(given) == 1 and Path(given[0]).is_dir():
        inside = [
            path
            for path in Path(given[0]).iterdir()
            if (path.is_dir() or path.name.endswith(SUFFIX)) and _step_in(path.name) is not None
        ]
        if len(inside) > 1:
            return [str(path) for path in sorted(inside, key=lambda path: _step_in(path.name) or 0)]
    if not given:
        raise ArgumentError("no checkpoint given: name at least one, or the run's folder")
    return [one for source in given for one in _revisions(str(source))]


def _revisions(source: str) -> list[str]:
    """The revisions on the Hub that `org/name@step_*` names; what is no such pattern names itself."""
    pattern = any(sign in source.partition("@")[2] for sign in "*?[")
    return hub.revisions(source) if pattern and not Path(source).exists() else [source]


def steps_of(sources: Sequence[str], steps: Sequence[float] | None = None) -> list[float]:
    """The step of each checkpoint: as given, as its name tells, or its place where the names do not tell.

    Raises:
        ArgumentError: there are not as many, one is not above 0, or two are the same.

    >>> steps_of(["run/checkpoint-20", "run/checkpoint-5"]), steps_of(["a", "b"])
    ([20.0, 5.0], [1.0, 2.0])
    """
    if steps is None:
        told = [_step_in(source) for source in sources]
        known = [step for step in told if step is not None and step > 0]
        steps = known if len(known) == len(sources) else [float(i) for i in range(1, len(sources) + 1)]
    if len(steps) != len(sources):
        raise ArgumentError(f"{len(steps)} steps are given for {len(sources)} checkpoints: give one for each")
    seen: dict[float, str] = {}
    for step, source in zip(steps, sources, strict=True):
        if not 0 < step < float("inf"):
            raise ArgumentError(f"step {step} of {source} is not above 0: the base is at 0, and is given first")
        if step in seen:
            raise ArgumentError(
                f"{seen[step]} and {source} are both at step {_label(step)}: leave one out, or give --steps"
            )
        seen[step] = source
    return [float(step) for step in steps]


def _step_in(source: str) -> float | None:
    """The number that a name ends with, of the last part that has one: `run/global_step_20/actor` is at 20."""
    for name in reversed(re.split(r"[/\\]", source.rstrip("/\\"))):
        found = _STEP.search(_ENDING.sub("", name))
        if found:
            return float(found[1])
    return None


def _label(step: float) -> str:
    return str(int(step)) if step == int(step) else repr(step)


def _opening(labels: dict[str, str], base: Checkpoint, warnings: list[str]) -> Iterable[tuple[str, str]]:
    for label, source in labels.items():
        try:
            open_checkpoint(source, base)
        except CheckpointError as error:
            warnings.append(f"step {label} is left out: {error}")
        else:
            yield label, source


def _measured(work: Work, steps: Sequence[float], part: Part) -> Moved:
    sides = [work.base_checkpoint, *work.runs.values()]
    if part.numel == part.stop - part.start:
        reads = [_in_place(work, side, part) for side in sides]
        start, stop = part.start, part.stop
    else:  # interleaved with others
        reads, start, stop = [_put_together(work, side, part) for side in sides], 0, part.numel
    try:
        return measure(part.name, reads[0], reads[1:], start, stop, steps)
    except NonFiniteTensor as error:
        raise CheckpointError(f"{part.name}: {error}. Look at how it was trained or converted") from error


def _in_place(work: Work, side: Checkpoint, part: Part) -> Read:
    name = work.stored_as(side, part.tensor)
    return lambda first, last: side.read(name, first, last)


def _put_together(work: Work, side: Checkpoint, part: Part) -> Read:
    whole = work.read(side, part).reshape(-1)
    return lambda first, last: whole[first:last]


def _result(
    work: Work, parts: Sequence[Part], found: dict[str, Moved], steps: list[float], warnings: list[str]
) -> Trajectory:
    def pooled(chosen: Iterable[Part]) -> Moved:
        return reduce(add, (found[part.name] for part in chosen))

    whole = pooled(parts)
    own = {part.name: figures(found[part.name], steps) for part in parts}
    roles = dict.fromkeys(part.place.role for part in parts)
    layers = dict.fromkeys(part.place.layer for part in parts if part.place.layer is not None)
    content = {
        "schema": 1,
        "base": work.base_checkpoint.source,
        "checkpoints": [run.source for run in work.runs.values()],
        "steps": steps,
        "warnings": warnings,
        "pooled": figures(whole, steps),
        "by_role": {r: figures(pooled(p for p in parts if p.place.role == r), steps) for r in roles},
        "by_layer": {str(n): figures(pooled(p for p in parts if p.place.layer == n), steps) for n in layers},
        "by_tensor": {name: _brief(told) for name, told in own.items()},
        "held_out": predictions_of(whole.gram, steps),
        "prediction": None,
    }
    return Trajectory(content, [row for part in parts for row in _rows(part, found[part.name], own[part.name], steps)])


def figures(moved: Moved, steps: Sequence[float]) -> dict[str, Any]:
    """Everything that the inner products and counts say, JSON-able; undefined is None.

    Returns:
        `gram`, `norms`, `relative_norms` (over the base's), `increments`, `increment_cosine`, `components` (the
        first two, of every checkpoint), `components_random_walk_null`, `path_length`;
        `straightness`, `rank1_share`, `rank2_share`, `linearity_r2`, each with `value`, `random_walk_null`,
        `stored_walk_null`, `stored_line_null`; `drift` with `value`, `low`, `high`, `lag` and both; `verdict`; and for
        each step `unchanged_fraction`, `unchanged_since_last`, `reverted_fraction`.
    """
    walk, drift = walks.walk_of(moved.gram, steps), walks.drift_of(moved.gram)
    random_walk = walks.random_walk_gram(walk.increments)
    nulls = [walks.walk_of(G, steps) for G in (random_walk, moved.stored_gram, moved.line_gram)]
    of_walk, of_line = (walks.drift_of(G).value for G in (moved.stored_gram, moved.line_gram))
    base = moved.base_square**0.5
    return {
        "gram": moved.gram.tolist(),
        "norms": walk.norms.tolist(),
        "relative_norms": [float(norm) / base if base > 0 else None for norm in walk.norms],
        "increments": walk.increments.tolist(),
        "increment_cosine": [[None if np.isnan(x) else x for x in row] for row in walk.cosines.tolist()],
        "components": walks.components_of(moved.gram).tolist(),
        "components_random_walk_null": walks.components_of(random_walk).tolist(),
        "path_length": walk.path_length,
        **{
            name: {
                "value": getattr(walk, name),
                "random_walk_null": getattr(nulls[0], name),
                "stored_walk_null": getattr(nulls[1], name),
                "stored_line_null": getattr(nulls[2], name),
            }
            for name in _FIGURES
        },
        "drift": asdict(drift) | {"stored_walk_null": of_walk, "stored_line_null": of_line},
        "verdict": walks.verdict_of(drift, of_line),
        "unchanged_fraction": (1 - moved.changed / moved.entries).tolist(),
        "unchanged_since_last": (1 - moved.since_last / moved.entries).tolist(),
        "reverted_fraction": (moved.reverted / moved.entries).tolist(),
    }


def _brief(found: dict[str, Any]) -> dict[str, Any]:
    """Of one tensor: without matrices and lists, which the table has."""
    return {name: found[name] for name in ("path_length", *_FIGURES, "drift", "verdict")}


def _rows(part: Part, moved: Moved, found: dict[str, Any], steps: Sequence[float]) -> Iterable[Row]:
    for t, step in enumerate(steps):
        yield {
            **part.keys,
            "step": step,
            "base_norm": moved.base_square**0.5,
            "displacement_norm": found["norms"][t],
            "increment_norm": found["increments"][t],
            "unchanged_fraction": found["unchanged_fraction"][t],
            "unchanged_since_last": found["unchanged_since_last"][t],
            "reverted_fraction": found["reverted_fraction"][t],
        }
