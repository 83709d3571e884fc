"""Train under masks through accelerate's FSDP2 and save by `torch.distributed.checkpoint`, or continue from there.

    torchrun train_sparse_sharded.py save OUT
    torchrun train_sparse_sharded.py continue OUT

Every process has the same gradient, so that the mean over processes is that of one. Both halves have three steps; after
saving it goes on to the end, so that its weights are those of a run that was never interrupted.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from offprincipal.adapters import SparseAdamW
from offprincipal.checkpoints.matrices import whole
from offprincipal.errors import AdapterError

STEPS = 3


def started(kind: torch.dtype) -> tuple[torch.nn.Module, dict[str, torch.Tensor], torch.Tensor]:
    """The base, its masks, and the inputs of all steps."""
    draw = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 33, bias=False), torch.nn.Linear(33, 7, bias=False))
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) / 6)
    masks = {"0.weight": torch.rand(33, 40, generator=draw) < 0.02, "1.weight": torch.rand(7, 33, generator=draw) < 0.5}
    return model.to(kind), masks, torch.randn(2 * STEPS, 1, 40, generator=draw).to(kind)


def optimized(model: torch.nn.Module, masks: dict[str, torch.Tensor]) -> SparseAdamW:
    return SparseAdamW(model.named_parameters(), masks, lr=1e-2, weight_decay=0.1)


def train(model: Any, optimizer: Any, inputs: torch.Tensor) -> None:
    for x in inputs:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded(model: torch.nn.Module, optimizer: SparseAdamW) -> tuple[Any, Any]:
    """What `accelerator.prepare` makes of both under FSDP2, which it does on GPUs unasked and on CPUs when told so."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(isinstance(parameter, DTensor) for parameter in trained)
    return model, optimizer


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def run(mode: str, out: Path, kind: torch.dtype) -> None:
    name = str(kind).removeprefix("torch.")
    model, masks, inputs = started(kind)
    model, optimizer = sharded(model, optimized(model, masks))
    sparse = optimizer.optimizer
    if mode == "save":
        train(model, optimizer, inputs[:STEPS])
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, sparse)}
        dcp.save(state, checkpoint_id=out / name)
        state = get_optimizer_state_dict(model, sparse, options=StateDictOptions(full_state_dict=True))
        if dist.get_rank() == 0:
            torch.save(state, out / f"{name}-whole.pt")
    else:
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, sparse)}
        dcp.load(state, checkpoint_id=out / name)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, sparse, optim_state_dict=state["optimizer"])
    train(model, optimizer, inputs[STEPS:])
    weights = weights_of(model)
    if dist.get_rank() == 0:
        torch.save(weights, out / f"{name}-{mode}-{dist.get_world_size()}.pt")
    late, late_masks, _ = started(kind)
    stepped = optimized(late, late_masks)
    train(late, stepped, inputs[:1])
    late, stepped = sharded(late, stepped)
    try:
        train(late, stepped, inputs[:1])
    except AdapterError as error:
        assert "before the first step" in str(error)
    else:
        raise AssertionError("an optimizer that has stepped was sharded, and lost its moments without a word")


if __name__ == "__main__":
    for kind in (torch.float32, torch.bfloat16):
        run(sys.argv[1], Path(sys.argv[2]), kind)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that ends by itself on a busy machine
