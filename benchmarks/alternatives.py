"""What one would do without us, as plainly as it is usually done.

    python benchmarks/alternatives.py load-and-compare BASE TUNED --dtype float32

Transformers is imported by `load-and-compare` alone, which the benchmark runs in a process of its own.
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

COPY_BLOCK = 1 << 24


def load_and_compare(base: Path, tuned: Path, dtype: str, count: str) -> tuple[int, int]:
    """Both models loaded by transformers and compared: (entries that changed, entries).

    Args:
        base: folder of the one.
        tuned: folder of the other.
        dtype: name of a torch type, or `auto`: as it is stored.
        count: a key of COUNTS.
    """
    from transformers import AutoModelForCausalLM

    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=kind, device_map="cpu", trust_remote_code=False)
        for folder in (base, tuned)
    )
    others = dict(after.named_parameters())
    with torch.no_grad():
        return COUNTS[count]((weight, others[name]) for name, weight in before.named_parameters())


def count_relative(weights: Iterable[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """Changed: by more than a thousandth of the larger of the two."""
    changed = total = 0
    for a, b in weights:
        changed += int(((a - b).abs() > 1e-3 * torch.maximum(a.abs(), b.abs())).sum())
        total += a.numel()
    return changed, total


def count_by_tensor(weights: Iterable[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """What check_sparsity.py of github.com/SagnikMukherjee/sparsity_in_rl asks of each difference, as it is now."""
    changed = total = 0
    for a, b in weights:
        difference = b - a
        exact = int((difference == 0).sum())
        close = int(torch.isclose(difference, torch.zeros_like(difference), atol=1e-5).sum())
        changed += int((difference != 0).sum())
        total += difference.numel()
        assert exact <= close
    return changed, total


def count_gathered(weights: Iterable[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """The same questions as that script asked them at first: of all differences in one vector."""
    kept = []
    changed = 0
    for a, b in weights:
        difference = b - a
        changed += int((difference != 0).sum())
        kept.append(difference.view(-1))
    every = torch.cat(kept)
    exact = int((every == 0).sum())
    close = int(torch.isclose(every, torch.zeros_like(every), atol=1e-5).sum())
    assert exact <= close
    return changed, every.numel()


COUNTS = {"relative": count_relative, "by-tensor": count_by_tensor, "gathered": count_gathered}


def safetensors_loop(base: Path, tuned: Path) -> tuple[int, int]:
    """Tensor by tensor from both files: (entries that differ, entries)."""
    changed = total = 0
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as before, safe_open(tuned / file.name, "pt") as after:
            for name in before.keys():  # noqa: SIM118
                a, b = before.get_tensor(name), after.get_tensor(name)
                changed += int(torch.ne(a, b).sum())
                total += a.numel()
    return changed, total


class MemoryCopy:
    """So many bytes from one buffer in memory to another, in blocks, a thread a core."""

    def __init__(self, size: int) -> None:
        self.source: NDArray[numpy.uint8] = numpy.ones(size, dtype=numpy.uint8)
        self.target: NDArray[numpy.uint8] = numpy.zeros(size, dtype=numpy.uint8)
        self.target[:: 1 << 12] = 2  # every page is there before the clock runs

    def run(self) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(self._block, range(0, self.source.size, COPY_BLOCK)))

    def _block(self, begin: int) -> None:
        numpy.copyto(self.target[begin : begin + COPY_BLOCK], self.source[begin : begin + COPY_BLOCK])


def two_svds(base: Path, tuned: Path, names: Sequence[str], device: str = "cpu", tall: bool = False) -> None:
    """Base and tuned decomposed in float32, matrix by matrix, on all cores; `tall` turns the wide ones first."""
    wanted = set(names)
    for folder in (base, tuned):
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for name in wanted.intersection(opened.keys()):
                    weight = opened.get_tensor(name).to(device).float()
                    if tall and weight.shape[0] < weight.shape[1]:
                        weight = weight.T
                    values = torch.linalg.svd(weight, full_matrices=False).S
                    values.sum().item()  # a GPU has finished when its answer is here


def masks_and_angles(base: Path, tuned: Path, rank_fraction: float = 0.125, density: float = 0.5) -> None:
    """What scripts after the paper do of every projection: two full SVDs, then spectra, subspaces and masks."""
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as before, safe_open(tuned / file.name, "pt") as after:
            for name in (name for name in before.keys() if name.endswith("_proj.weight")):  # noqa: SIM118
                a, b = before.get_tensor(name), after.get_tensor(name)
                changed, a, b = a != b, a.float(), b.float()
                sides = [torch.linalg.svd(weight, full_matrices=False) for weight in (a, b)]
                k = int(rank_fraction * min(a.shape))
                shift = (sides[0].S - sides[1].S).norm() / sides[0].S.norm()
                left = torch.linalg.svdvals(sides[0].U[:, :k].T @ sides[1].U[:, :k]).clamp(max=1).acos()
                right = torch.linalg.svdvals(sides[0].Vh[:k] @ sides[1].Vh[:k].T).clamp(max=1).acos()
                scores = (sides[0].U[:, :k] * sides[0].S[:k]) @ sides[0].Vh[:k]
                masks = [largest(scores.abs(), density), largest(-a.abs(), density)]
                overlaps = [(changed & mask).sum() / changed.sum() for mask in masks]
                print(name, float(shift), float(left.max()), float(right.max()), *map(float, overlaps))


def largest(scores: Tensor, density: float) -> Tensor:
    """The mask of the largest scores."""
    count = int(density * scores.numel())
    return scores >= scores.flatten().kthvalue(scores.numel() - count + 1).values


def stack_differences(base: Path, run: Path) -> Tensor:
    """What scripts about trajectories do: every difference at once, one row a checkpoint; their inner products."""
    folders = sorted(run.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    before = loaded(base)
    rows = []
    for folder in folders:
        after = loaded(folder)
        rows.append(torch.cat([(after[name].float() - weight.float()).flatten() for name, weight in before.items()]))
    stacked = torch.stack(rows)
    return stacked @ stacked.T


def loaded(folder: Path) -> dict[str, Tensor]:
    """A model's tensors, in memory."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load-and-compare", "full-svd", "stack"])
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--dtype", default="float32", help="float32, or auto: as it is stored")
    parser.add_argument("--count", default="relative", choices=COUNTS)
    arguments = parser.parse_args()
    if arguments.what == "full-svd":
        masks_and_angles(arguments.base, arguments.tuned)
        return
    if arguments.what == "stack":
        print(stack_differences(arguments.base, arguments.tuned))
        return
    changed, total = load_and_compare(arguments.base, arguments.tuned, arguments.dtype, arguments.count)
    print(f"{changed} of {total} entries changed")


if __name__ == "__main__":
    main()
