"""How far `off_principal` adapters stay off the principal subspaces, before and after rounding.

    python scripts/check_off_principal.py [--model embedded] [--steps 20] [--rank 8]

Trains on random tokens in float64, float32 and from a bfloat16 base, by AdamW and by SGD, and prints the larger
one-sided principal energy of the worst matrix: of the saved adapter, of its factors rounded to bfloat16, and of the
change of bfloat16 weights that it is merged into.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from offprincipal import adapt
from offprincipal.geometry.principal import principal_rank
from offprincipal.geometry.spectrum import decompose
from offprincipal.geometry.subspace import principal_energies
from offprincipal.models import open_language_model

OPTIMIZERS = {"AdamW": (torch.optim.AdamW, 1e-3), "SGD": (torch.optim.SGD, 0.1)}


def trained(model: Any, optimizer: str, steps: int, rank: int) -> Any:
    """An adapted model after some steps on random tokens."""
    tokens = torch.randint(3, model.config.vocab_size, (32, 12), generator=torch.Generator().manual_seed(0))
    adapted = adapt(model, "off_principal", rank=rank)
    kind, lr = OPTIMIZERS[optimizer]
    moved = kind([p for p in adapted.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        moved.step()
        moved.zero_grad()
    return adapted


def factors(adapted: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Base, A and B of every adapted matrix, as they are saved."""
    for layer in adapted.modules():
        if hasattr(layer, "lora_A"):
            A, B = (part["default"].state_dict()["weight"] for part in (layer.lora_A, layer.lora_B))
            yield layer.base_layer.weight.detach(), A, B


def energy(W: Tensor, update: Tensor) -> float:
    """The larger one-sided principal energy."""
    svd, k = decompose(W), principal_rank(W.shape, 0.125)
    found = principal_energies(svd.U[:, :k], svd.Vh[:k].T, update)
    return max(found[1:]) if found is not None else 0.0


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="embedded")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--rank", type=int, default=8)
    given = arguments.parse_args()
    print("| trained in | by | saved | rounded to bfloat16 | merged in bfloat16 |\n|---|---|---|---|---|")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for optimizer in OPTIMIZERS:
            worst = [0.0, 0.0, 0.0]
            model = open_language_model(given.model, "cpu").model.to(dtype)
            for W, A, B in factors(trained(model, optimizer, given.steps, given.rank)):
                stored, update = W.bfloat16(), B.double() @ A.double()
                rounded = B.bfloat16().double() @ A.bfloat16().double()
                merged = (stored + update.bfloat16()).double() - stored.double()
                worst = [
                    max(pair) for pair in zip(worst, (energy(W, d) for d in (update, rounded, merged)), strict=True)
                ]
            print(f"| {dtype} | {optimizer} | {worst[0]:.0e} | {worst[1]:.0e} | {worst[2]:.0e} |", flush=True)


if __name__ == "__main__":
    main()
