"""What a step of SparseAdamW costs, in time and in memory, against dense AdamW and AdamW on a masked gradient.

    python benchmarks/sparse.py [--side 2048] [--rounds 21] [--threads 1]

One float32 matrix, and a bfloat16 one with float32 masters. Dense is `torch.optim.AdamW(fused=True)`, torch's fastest
on a CPU; of bfloat16 weights it steps on float32 masters that are then rounded into them. The masked gradient is what
one does without a sparse optimizer: multiply by the mask, step, put the inactive entries back. The sides of a density
run in turn; seconds are the process's own CPU time, which other processes disturb least. Memory is what the optimizer
keeps between steps, masks and masters included. What touching the active entries takes by itself, one read of the
gradient and one read and one write of the weight, is what memory asks of any sparse step: entry by entry, or, where
that is slower, all entries in order.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from harness import Table, in_rounds, number, ratios, torch_threads
from numba import njit
from torch import Tensor

from offprincipal.adapters import SparseAdamW

DENSITIES = (0.01, 0.05, 0.25, 0.74)
COLUMNS = (
    "weights",
    "density",
    "step, in dense steps",
    "step, in masked-gradient steps",
    "touching the active entries alone, in dense steps",
    "ms: sparse, dense, masked gradient, touching",
    "memory, in density × dense",
    "with the index",
    "index, bytes an entry",
)
Step = Callable[[], None]


def dense(W: Tensor, grad: Tensor, mask: Tensor | None = None) -> tuple[Step, int]:
    """A step of dense AdamW, on a masked gradient where there is a mask, and the bytes that it keeps."""
    stored = W.clone()
    weight = stored if W.dtype == torch.float32 else W.float()
    parameter = torch.nn.Parameter(weight)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    base = weight.clone()

    def step() -> None:
        given = grad if mask is None else grad * mask
        parameter.grad = given.float()
        optimizer.step()
        if mask is not None:
            parameter.data.copy_(torch.where(mask, parameter.data, base))
        if stored is not weight:
            stored.copy_(parameter.data)

    step()
    kept = sum(tensor.nbytes for tensor in optimizer.state[parameter].values())
    return step, kept + (0 if stored is weight else weight.nbytes)


def sparse(W: Tensor, grad: Tensor, mask: Tensor) -> tuple[Step, int, int]:
    """A step of SparseAdamW, the bytes that it keeps without the index, and those of the index."""
    parameter = torch.nn.Parameter(W.clone())
    parameter.grad = grad
    optimizer = SparseAdamW([("weight", parameter)], {"weight": mask})
    optimizer.step()
    sizes = {key: tensor.nbytes for key, tensor in optimizer.state[parameter].items()}
    index = sizes.pop("index")
    return optimizer.step, sum(sizes.values()), index


@njit
def touch(places: Any, param: Any, grad: Any) -> None:
    """Read a gradient and a weight at some places, and write the weight."""
    for place in places:
        param[place] += grad[place]


@njit
def touch_all(param: Any, grad: Any) -> None:
    for place in range(len(param)):
        param[place] += grad[place]


def touching(W: Tensor, grad: Tensor, mask: Tensor) -> tuple[Step, Step]:
    """What memory asks of any step: the active entries of both arrays, or all of them; nothing comes of it."""
    kind = torch.float32 if W.dtype == torch.float32 else torch.int16
    param, given = (tensor.clone().view(kind).view(-1).numpy() for tensor in (W, grad))
    places = torch.nonzero(mask.view(-1)).view(-1).to(torch.int32).numpy()
    return lambda: touch(places, param, given), lambda: touch_all(param, given)


def row(kind: torch.dtype, density: float, side: int, rounds: int) -> tuple[str, ...]:
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(side, side, generator=draw).to(kind)
    grad = torch.randn(side, side, generator=draw).to(kind)
    mask = torch.rand(side, side, generator=draw) < density
    ours, kept, index = sparse(W, grad, mask)
    whole, whole_kept = dense(W, grad)
    masked, _ = dense(W, grad, mask)
    seconds = in_rounds([ours, whole, masked, *touching(W, grad, mask)], rounds, warm_up=2)
    bound = min(seconds[3:], key=statistics.median)
    share = mask.float().mean().item() * whole_kept
    return (
        str(kind).removeprefix("torch."),
        f"{density:.0%}",
        str(ratios(seconds[0], seconds[1])),
        str(ratios(seconds[0], seconds[2])),
        str(ratios(bound, seconds[1])),
        ", ".join(number(1e3 * statistics.median(one)) for one in (*seconds[:3], bound)),
        f"{kept / share:.3f}",
        f"{(kept + index) / share:.3f}",
        f"{index / W.numel():.3f}",
    )


def sparse_steps(side: int, rounds: int, threads: int = 1) -> Table:
    """(h): every density, of either type of weights."""
    with torch_threads(threads):
        rows = tuple(
            row(kind, density, side, rounds) for kind in (torch.float32, torch.bfloat16) for density in DENSITIES
        )
    note = (
        f"One {side} × {side} matrix, {threads} thread{'s' if threads > 1 else ''}, {rounds} rounds. Dense is "
        "`AdamW(fused=True)`; the masked gradient is dense AdamW with the inactive entries put back. Touching reads "
        "gradient and weight and writes the weight at the active entries, or at all in order where that is faster, and "
        "computes nothing. CPU time of the process."
    )
    return Table("(h) A step of SparseAdamW", note, COLUMNS, rows)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--side", type=int, default=2048, help="of the square matrix")
    arguments.add_argument("--rounds", type=int, default=21)
    arguments.add_argument("--threads", type=int, default=1)
    given = arguments.parse_args()
    print(sparse_steps(given.side, given.rounds, given.threads))


if __name__ == "__main__":
    main()
