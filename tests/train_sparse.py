"""Train two layers under masks, sharded by FSDP2, and save the whole weights: `torchrun train_sparse.py OUT`.

Every process has the same gradient, so that the mean over processes is that of one. Half way the optimizer is saved and
loaded into a fresh one, each process its own shard's state.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from offprincipal.adapters import Masks, SparseAdamW, make_masks
from offprincipal.adapters.weight_masks import base_hash, packed
from offprincipal.checkpoints.matrices import whole

STEPS = 6


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 33, bias=False), torch.nn.Linear(33, 7, bias=False))
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tensors = {"0.weight": torch.rand(33, 40) < 0.02, "1.weight": torch.rand(7, 33) < 0.5}
    masks = packed(tensors, base_hash(model, tensors), {})
    out.mkdir(parents=True, exist_ok=True)
    mine = out / f"masks-{dist.get_rank()}.safetensors"
    masks.save(mine)
    unsharded = make_masks(model, "safe", 0.3)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    masks = Masks.load(mine, model)
    made = make_masks(model, "safe", 0.3)
    alike = all(torch.equal(made[name], unsharded[name]) for name in unsharded)
    assert alike, "masks of the shards differ from the whole's"
    optimizer = SparseAdamW(model.named_parameters(), masks, lr=1e-2, weight_decay=0.1)
    inputs = torch.randn(STEPS, 1, 40)
    for i in range(STEPS):
        if i == STEPS // 2:
            state = optimizer.state_dict()
            optimizer = SparseAdamW(model.named_parameters(), masks)
            optimizer.load_state_dict(state)
        model(inputs[i]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: whole(parameter) for name, parameter in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save({"weights": weights, "base": base, "masks": tensors}, out / "weights.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that ends by itself on a busy machine
