"""Analyse two models with weightwatcher and take the distance between them; runs in weightwatcher's environment.

    python watch_weights.py BASE TUNED

Knows nothing of the rest of the benchmark.
"""

import sys

import torch
from transformers import AutoModelForCausalLM
from weightwatcher import WeightWatcher


def main(base: str, tuned: str) -> None:
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        for folder in (base, tuned)
    ]
    watcher = WeightWatcher()
    for model in models:
        details = watcher.analyze(model=model)
        print(details[["name", "N", "M", "alpha", "sv_max", "stable_rank"]].describe())
    average, _, _ = watcher.distances(*models, method="euclidean")
    print(average)


if __name__ == "__main__":
    main(*sys.argv[1:])
