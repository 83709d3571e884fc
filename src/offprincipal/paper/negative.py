"""Negative controls: what the rules say about random updates that are independent of the weights.

Every run is replaced by a blind update as long as its own, stored as it was, and measured; then every claim is judged
again by the same rule. What is decided there is decided about nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from offprincipal.checkpoints import Array, Part
from offprincipal.checkpoints.checkpoint import FLOATS
from offprincipal.comparison.work import Work
from offprincipal.geometry.draws import seed_of
from offprincipal.geometry.synthetic import BLIND, blind_update, fewer_rows
from offprincipal.measures.agreement import pair_row
from offprincipal.measures.changes import Block, TensorPair
from offprincipal.measures.columns import METRICS
from offprincipal.measures.compare_settings import CompareSettings
from offprincipal.measures.pair import BaseMatrix, MatrixPair
from offprincipal.measures.settings import MatrixSettings
from offprincipal.measures.spectral import ANGLES
from offprincipal.paper.claims.evidence import Evidence, Row
from offprincipal.paper.claims.registry import CLAIMS
from offprincipal.parallel import one_core_each

Counts = dict[str, int]
Progress = Callable[[int, int], None]
_SIDES = ("as_published", "controlled")
_SAMPLED = 1 << 22  # entries, of a tensor that is not a linear matrix, that stand for all of it
_LOCATION = tuple(metric for metric in METRICS if metric.group in ("changes", "location"))


def negative_controls(blind: Iterable[Evidence], ids: Sequence[str]) -> dict[tuple[str, str, str], dict[str, Counts]]:
    """How often each claim's rule decides something of blind updates.

    Args:
        blind: as `blind_evidence` draws it.
        ids: claims; those that rest on more than a comparison's tables are left out.

    Returns:
        (claim, kind beyond RLVR, contrast) -> side, `as_published` or `controlled` -> `draws`, `supported`,
        `contradicted`.
    """
    judged = [id for id in ids if CLAIMS[id].tables]
    found: dict[tuple[str, str, str], dict[str, Counts]] = {}
    for one in blind:
        _count(found, one, judged)
    return found


def walk_controls(evidence: Evidence, ids: Sequence[str]) -> dict[tuple[str, str, str], dict[str, Counts]]:
    """The same of the claims that rest on trajectories, from the blind walks that their stages drew; as above."""
    judged = [id for id in ids if "trajectories" in CLAIMS[id].needs]
    draws = {row["draw"] for row in evidence.rows("trajectories")} - {None} if judged else set()
    found: dict[tuple[str, str, str], dict[str, Counts]] = {}
    for draw in sorted(draws):
        _count(found, replace(evidence, draw=draw), judged)
    return found


def _count(found: dict[tuple[str, str, str], dict[str, Counts]], blind: Evidence, ids: Sequence[str]) -> None:
    """Enter what the rules of claims say of one blind evidence."""
    for id in ids:
        for one in CLAIMS[id].contrasts(blind):
            sides = found.setdefault((id, one.kind, one.contrast), {side: _none() for side in _SIDES})
            for side, judgement in zip(_SIDES, CLAIMS[id].judge(one), strict=True):
                sides[side]["draws"] += 1
                if judgement.verdict in ("supported", "contradicted"):
                    sides[side][judgement.verdict] += 1


def blind_evidence(
    evidence: Evidence,
    base: str,
    runs: Mapping[str, str],
    draws: int,
    density: float,
    threads: int,
    progress: Progress | None = None,
) -> list[Evidence]:
    """The evidence as it would be had every run been a blind update; nulls of equal norm stay those of the run.

    Args:
        evidence: of the runs themselves, to which the blind updates are matched.
        base: where the base is; runs: run -> where it is.
        draws: blind updates of every run, of the kinds `BLIND` in turn.
        density: fraction of a matrix's entries in each mask.
        progress: called with entries done, and entries in all.
    """
    # by warm starts, many from one base; without what no rule reads
    settings = MatrixSettings(density=density, sweep_densities=(density,), exact_up_to=0, mask_tests=False)
    work = Work(base, runs, CompareSettings(matrix=settings))
    real = {(row["run"], row["tensor"]): row for rows in evidence.matrices.values() for row in rows}

    def measured(part: Part) -> list[tuple[list[Row], list[Row]]]:
        if work.is_linear(part):
            return _matrix(work, part, real, draws, list(combinations(evidence.rl, 2)))
        return _tensor(work, part, real, draws)

    by_part: list[list[tuple[list[Row], list[Row]]]] = []
    done, total = 0, sum(part.numel for part in work.parts)
    with one_core_each(), ThreadPoolExecutor(threads) as pool:
        for part, of_draws in zip(work.parts, pool.map(measured, work.parts), strict=True):
            by_part.append(of_draws)
            done += part.numel
            if progress:
                progress(done, total)
    found = []
    for draw in range(draws):
        matrices: dict[str, list[Row]] = {run: [] for run in runs}
        for rows, _ in (part[draw] for part in by_part):
            for row in rows:
                matrices[row["run"]].append(row)
        pairs = [row for part in by_part for row in part[draw][1]]
        found.append(replace(evidence, matrices=matrices, pairs=pairs))
    return found


def _matrix(
    work: Work,
    part: Part,
    real: Mapping[tuple[str, str], Row],
    draws: int,
    couples: Sequence[tuple[str, str]],
) -> list[tuple[list[Row], list[Row]]]:
    """Rows of every run and of the pairs that claims read, draw by draw."""
    base = BaseMatrix(part.name, work.read(work.base_checkpoint, part), work.settings.matrix)
    weight = base.weight.astype(np.float64)
    values = {run: work.read(work.masters.get(run, own), part).reshape(weight.shape) for run, own in work.runs.items()}
    updates = {run: found.astype(np.float64) - weight for run, found in values.items()}
    found = []
    for draw in range(draws):
        pairs = {
            run: MatrixPair(base, *_stored(work, run, part, weight, update, draw)) for run, update in updates.items()
        }
        rows = [real[run, part.name] | _measured(pair) for run, pair in pairs.items()]
        found.append((rows, [part.keys | pair_row(a, b, pairs) for a, b in couples]))
    return found


def _measured(pair: MatrixPair) -> Row:
    row: Row = {"changed_count": pair.changed_count}
    for metric in _LOCATION:
        row |= {column.name: value for column, value in zip(metric.columns, metric.measure(pair), strict=True)}
    angles = pair.spectral.angle_summary()
    row |= {f"principal_angle_{side}_{which}_deg": x for (side, which), x in zip(ANGLES, angles, strict=True)}
    return row | {"spectral_shift": pair.spectral.shift}


def _tensor(
    work: Work, part: Part, real: Mapping[tuple[str, str], Row], draws: int
) -> list[tuple[list[Row], list[Row]]]:
    """For tensors other than linear matrices claims need only the changed entries; for a large one, some rows."""
    base = work.read(work.base_checkpoint, part).reshape(len(part.matrix_shape) and part.matrix_shape[0], -1)
    most = max(1, _SAMPLED // max(base.shape[1], 1))
    rng = np.random.default_rng(seed_of(0, "rows", part.name))
    drawn = slice(None) if len(base) <= most else rng.choice(len(base), most, replace=False)
    weight = base[drawn].astype(np.float64)
    found: list[tuple[list[Row], list[Row]]] = [([], []) for _ in range(draws)]
    for run, checkpoint in work.runs.items():  # one at a time, since an embedding may be most of the model
        update = work.read(work.masters.get(run, checkpoint), part).reshape(base.shape).astype(np.float64) - base
        parts = {kind: fewer_rows(kind, update, len(weight), rng) for kind in BLIND[:draws]}
        for draw, (rows, _) in enumerate(found):
            stored = _stored(work, run, part, weight, parts[BLIND[draw % len(BLIND)]], draw)
            pair = TensorPair(_once(Block(base[drawn], *stored)))
            changed = pair.changed_count / pair.numel if pair.numel else 0.0
            row: Row = {"unchanged_fraction": 1 - changed if pair.numel else None}
            rows.append(real[run, part.name] | row | {"changed_count": round(changed * base.size)})
    return found


def _once(block: Block) -> Callable[[], list[Block]]:
    return lambda: [block]


def _stored(
    work: Work, run: str, part: Part, weight: np.ndarray[Any, Any], update: np.ndarray[Any, Any], draw: int
) -> tuple[Array, Array | None]:
    """A blind update of a run: stored as the run is, with masters if the run kept them."""
    rng = np.random.default_rng(seed_of(draw, "blind update", part.name, run))
    masters = (weight + blind_update(BLIND[draw % len(BLIND)], update, rng)).astype(np.float32)
    checkpoint = work.runs[run]
    kind = FLOATS[checkpoint.tensors[work.stored_as(checkpoint, part.tensor)].dtype]
    return masters.astype(kind), masters if run in work.masters else None


def _none() -> Counts:
    return {"draws": 0, "supported": 0, "contradicted": 0}
