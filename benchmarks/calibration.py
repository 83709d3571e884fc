"""(k) What the rules of claims decide of studies in which nothing is there to be found.

    python benchmarks/calibration.py --studies 100
    python benchmarks/calibration.py --studies 20 --kinds rows,low_rank

A study has three RLVR-like and three SFT-like runs of one kind of blind update, the latter twice as long, from one base
of plain or of scaled weights. Each claim is judged by its own rule; what is `supported` or `contradicted` with the
control is false. Rates up to 5 % are as they should be. A study that was judged is kept in --out and not done again.
"""

import argparse
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from harness import Table

from offprincipal.checkpoints import Part
from offprincipal.checkpoints.roles import Place
from offprincipal.comparison.measure import Row, measure_matrix
from offprincipal.geometry import synthetic
from offprincipal.measures.columns import GROUPS
from offprincipal.measures.settings import MatrixSettings
from offprincipal.paper.claims import CLAIMS, Evidence

SHAPE, MATRICES = (64, 96), 8
RL, SFT = (tuple(f"{kind}_{i}" for i in range(3)) for kind in ("rl", "sft"))
STEPS = {**dict.fromkeys(RL, 0.003), **dict.fromkeys(SFT, 0.006)}
SPREAD = 0.1  # log-sd of a run's length
JUDGED = ("C1", "C2", "C3", "C4", "C5", "C6")
KEPT = Path(tempfile.gettempdir()) / "offprincipal-calibration.jsonl"

Case = tuple[str, str, int]  # weights, kind of update, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=100, help="of each kind (%(default)s)")
    parser.add_argument("--kinds", default=",".join(synthetic.KINDS), help="of updates (all)")
    parser.add_argument("--out", type=Path, default=KEPT, help="(%(default)s)")
    options = parser.parse_args()
    print(calibration(options.studies, options.kinds.split(","), options.out))


def calibration(studies: int, kinds: Sequence[str] = synthetic.KINDS, kept: Path = KEPT) -> Table:
    """The share of studies in which each claim is decided with its control, by weights and kind of update."""
    cases = list(itertools.product(synthetic.WEIGHTS, kinds))
    decided: dict[tuple[str, str], Counter[str]] = {case: Counter() for case in cases}
    for (weights, kind, _), found in judged([(*case, seed) for case in cases for seed in range(studies)], kept):
        decided[weights, kind].update(found)
    rows = tuple((*case, *(f"{counts[id] / studies:.3f}" for id in JUDGED)) for case, counts in decided.items())
    note = (
        f"False verdicts with the control, as shares of {studies} studies each: {MATRICES} matrices of {SHAPE[0]} × "
        f"{SHAPE[1]}, {len(RL)} runs of either kind. By chance up to .05."
    )
    return Table("(k) Claims judged of updates that know nothing", note, ("weights", "update", *JUDGED), rows)


def judged(wanted: Sequence[Case], kept: Path) -> Iterator[tuple[Case, list[str]]]:
    """Every study with the claims that are decided in it; a study is a process's, on one thread."""
    known: dict[Case, list[str]] = {}
    if kept.exists():
        rows = map(json.loads, kept.read_text().splitlines())
        known = {(row["weights"], row["kind"], row["seed"]): row["decided"] for row in rows}
    yield from ((case, known[case]) for case in wanted if case in known)
    with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool, kept.open("a") as file:
        waiting = {pool.submit(false_verdicts, *case): case for case in wanted if case not in known}
        for future in as_completed(waiting):
            case, found = waiting[future], future.result()
            file.write(
                json.dumps(dict(zip(("weights", "kind", "seed"), case, strict=True)) | {"decided": found}) + "\n"
            )
            file.flush()
            yield case, found


def false_verdicts(weights: str, kind: str, seed: int) -> list[str]:
    """The claims that are decided, with their control, in one study of blind updates."""
    evidence = blind_study(weights, kind, seed)
    found = {id: CLAIMS[id].judge(evidence)[1].verdict for id in JUDGED}
    return [id for id, verdict in found.items() if verdict in ("supported", "contradicted")]


def blind_study(weights: str, kind: str, seed: int) -> Evidence:
    """The tables of six runs that know nothing."""
    rng = np.random.default_rng([seed, synthetic.KINDS.index(kind), len(weights)])
    lengths = {run: step * np.exp(SPREAD * rng.standard_normal()) for run, step in STEPS.items()}
    matrices: dict[str, list[Row]] = {run: [] for run in STEPS}
    pairs: list[Row] = []
    settings = MatrixSettings(sweep_densities=(0.5,), null_draws=4, seed=seed)
    for i in range(MATRICES):
        base = synthetic.example_weights(weights, SHAPE, rng)
        steps = {run: synthetic.example_update(kind, base, length, rng) for run, length in lengths.items()}
        masters = {run: (base + step).astype(np.float32) for run, step in steps.items()}
        tuned = {run: values.astype(ml_dtypes.bfloat16) for run, values in masters.items()}
        rows = measure_matrix(part(i), base.astype(ml_dtypes.bfloat16), tuned, masters, GROUPS, settings)
        for row in rows.matrices:
            matrices[row["run"]].append(row)
        pairs += rows.pairs
    matches = {"sft": dict(zip(RL, SFT, strict=True))}
    return Evidence(matrices, pairs, RL, {"sft": SFT}, "calibration", matches=matches, contrast="sft")


def part(i: int) -> Part:
    name = f"layers.{i}.q_proj.weight"
    return Part(name, name, Place("q", i), 0, SHAPE)


if __name__ == "__main__":
    main()
