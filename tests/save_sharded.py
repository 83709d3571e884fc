"""One rank of two that save sharded tensors and an FSDP2 module: `python save_sharded.py FOLDER`."""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Shard, distribute_tensor


def counted(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape).bfloat16()


def save(folder: str) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def sharded(placement: Placement, *shape: int) -> torch.Tensor:
        return distribute_tensor(counted(*shape), mesh, [placement])

    linear = torch.nn.Linear(5, 9).bfloat16()
    with torch.no_grad():
        linear.weight.copy_(counted(9, 5))
        linear.bias.copy_(counted(9))
    fully_shard(linear, mesh=mesh)
    state = {f"fsdp.{name}": tensor for name, tensor in get_model_state_dict(linear).items()}
    state |= {"rows": sharded(Shard(0), 7, 6), "columns": sharded(Shard(1), 4, 9), "both": sharded(Shard(2), 5, 3, 4)}
    dcp.save(state, checkpoint_id=folder)
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(path=f"{folder}-hf", save_distributed=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    save(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that ends by itself on a busy machine
