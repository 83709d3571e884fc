"""What the rules of claims decide of studies in which nothing is there to be found.

    python benchmarks/calibration.py --studies 100
    python benchmarks/calibration.py --studies 20 --kinds rows,low_rank

A study has three RLVR-like and three SFT-like runs of one kind of blind update, the latter twice as long, from one base
of plain or of scaled weights. Each claim is judged by its own rule; what is `supported` or `contradicted` with the
control is false. Rates up to 5 % are as they should be. A study that was judged is kept in --out and not done again.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np

from offprincipal.checkpoints import Part
from offprincipal.checkpoints.roles import Place
from offprincipal.comparison.measure import Row, Subject, measure_matrix
from offprincipal.geometry import synthetic
from offprincipal.measures.columns import GROUPS
from offprincipal.measures.settings import MatrixSettings
from offprincipal.studies.claims import CLAIMS, Evidence

SHAPE, MATRICES = (64, 96), 8
RL, SFT = (tuple(f"{kind}_{i}" for i in range(3)) for kind in ("rl", "sft"))
STEPS = {**dict.fromkeys(RL, 0.003), **dict.fromkeys(SFT, 0.006)}
SPREAD = 0.1  # log-sd of a run's length
JUDGED = ("C1", "C2", "C3", "C4", "C5", "C6")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=100, help="of each kind (%(default)s)")
    parser.add_argument("--kinds", default=",".join(synthetic.KINDS), help="of updates (all)")
    parser.add_argument("--out", type=Path, default=Path("/tmp/offprincipal-calibration.jsonl"), help="(%(default)s)")
    options = parser.parse_args()
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    known = {(row["weights"], row["kind"], row["seed"]): row["decided"] for row in done}
    print(
        f"{'weights':8} {'update':12} " + " ".join(f"{id:>6}" for id in JUDGED) + "   false verdicts with the control"
    )
    with options.out.open("a") as kept:
        for weights in synthetic.WEIGHTS:
            for kind in options.kinds.split(","):
                decided: Counter[str] = Counter()
                for seed in range(options.studies):
                    key = (weights, kind, seed)
                    if key not in known:
                        known[key] = false_verdicts(*key)
                        row = {"weights": weights, "kind": kind, "seed": seed, "decided": known[key]}
                        kept.write(json.dumps(row) + "\n")
                        kept.flush()
                    decided.update(known[key])
                rates = " ".join(f"{decided[id] / options.studies:6.3f}" for id in JUDGED)
                print(f"{weights:8} {kind:12} {rates}", flush=True)


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
    settings = MatrixSettings(alphas=(0.5,), null_draws=4, seed=seed)
    for i in range(MATRICES):
        base = synthetic.example_weights(weights, SHAPE, rng)
        steps = {run: synthetic.example_update(kind, base, length, rng) for run, length in lengths.items()}
        masters = {run: (base + step).astype(np.float32) for run, step in steps.items()}
        tuned = {run: values.astype(ml_dtypes.bfloat16) for run, values in masters.items()}
        rows = measure_matrix(subject(i), base.astype(ml_dtypes.bfloat16), tuned, masters, GROUPS, settings)
        for row in rows.matrices:
            matrices[row["run"]].append(row)
        pairs += rows.pairs
    matches = {"sft": dict(zip(RL, SFT, strict=True))}
    return Evidence(matrices, pairs, RL, {"sft": SFT}, "calibration", matches=matches, contrast="sft")


def subject(i: int) -> Subject:
    name = f"layers.{i}.q_proj.weight"
    part = Part(name, name, Place("q", i), 0, SHAPE)
    return Subject(part, linear=True)


if __name__ == "__main__":
    main()
