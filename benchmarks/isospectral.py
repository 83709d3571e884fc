"""What a step of the isospectral optimizers costs on the embedded base: CPU seconds on one core, beside AdamW's.

    python benchmarks/isospectral.py --rounds 7

The step alone, without the forward and backward passes that it stands beside: an RL step of `offprincipal study` on the
same model is what `train grpo` prints. Optimizers take turns, so that a noisy machine hits all alike.
"""

import argparse
from statistics import median
from time import thread_time
from typing import Any

import torch

from offprincipal.adapters import IsospectralAdamW, IsospectralMuon
from offprincipal.models import open_language_model

KINDS = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-5),
    "IsospectralAdamW, svd": lambda model: IsospectralAdamW(model, lr=1e-5),
    "IsospectralAdamW, newton-schulz": lambda model: IsospectralAdamW(model, lr=1e-5, retraction="newton-schulz"),
    "IsospectralMuon, newton-schulz": lambda model: IsospectralMuon(model, lr=1e-5, retraction="newton-schulz"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    runs: dict[str, tuple[Any, Any]] = {}
    for name, build in KINDS.items():
        model = open_language_model("embedded", "cpu").model
        runs[name] = (model, build(model))
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    for step in range(rounds + 1):
        for name, (model, optimizer) in runs.items():
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
            began = thread_time()
            optimizer.step()
            seconds[name].append(thread_time() - began)
    print("| optimizer | CPU seconds a step | least to most |\n|---|---|---|")
    for name, found in seconds.items():
        kept = found[1:]  # the first decomposes the base
        print(f"| {name} | {median(kept):.3f} | {min(kept):.3f} to {max(kept):.3f} |")


if __name__ == "__main__":
    main()
