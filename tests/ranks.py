"""Checkpoints of every rank of a sharded run, written in one process: each rank in turn, with torch's own DTensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

Spread = Mapping[str, Sequence[Placement] | None]


def write_ranks(folder: Path, tensors: Mapping[str, Tensor], mesh: tuple[int, ...], spread: Spread) -> Path:
    """As verl saves: `model_world_size_N_rank_R.pt`; a tensor that is spread as None is whole in every rank."""
    folder.mkdir(parents=True, exist_ok=True)
    world = torch.Size(mesh).numel()
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            ranks = init_device_mesh("cpu", mesh, mesh_dim_names=("ddp", "fsdp", "tp")[-len(mesh) :])
            state = {}
            for name, tensor in tensors.items():
                placements = spread[name]
                state[name] = tensor
                if placements is not None:
                    state[name] = distribute_tensor(tensor, ranks, placements, src_data_rank=None)
            torch.save(state, folder / f"model_world_size_{world}_rank_{rank}.pt")
        finally:
            dist.destroy_process_group()
    return folder
