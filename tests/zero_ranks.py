"""ZeRO's files of every rank, laid out as DeepSpeed lays them, from whole weights."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_zero(
    folder: Path, groups: Sequence[dict[str, Tensor]], stage: int, world: int, frozen: dict[str, Tensor] | None = None
) -> Path:
    """A checkpoint of float32 weights in groups of parameters; frozen ones are kept in bfloat16.

    Returns:
        `folder`, which holds `latest` and `global_step3/`.
    """
    at, frozen = folder / "global_step3", frozen or {}
    at.mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    shapes = [{name: tensor.shape for name, tensor in group.items()} for group in groups]
    flat = [torch.cat([tensor.flatten() for tensor in group.values()]) for group in groups]
    for rank in range(world):
        model: dict[str, Any] = {
            "buffer_names": ["steps"],
            "param_shapes": shapes,
            "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen.items()},
            "frozen_param_fragments": {
                name: tensor if stage < 3 else _part(tensor, rank, world) for name, tensor in frozen.items()
            },
            "shared_params": {},
            "module": {"steps": torch.ones(3)},
        }
        states: dict[str, Any] = {"zero_stage": stage, "partition_count": [world] * len(groups)}
        if stage == 3:
            parts = [torch.cat([_part(tensor, rank, world) for tensor in group.values()]) for group in groups]
            states |= {"fp32_flat_groups": parts, "partition_count": world}
        else:
            model["module"] |= {name: t.bfloat16() for group in groups for name, t in group.items()} | frozen
            sizes = [math.ceil(len(vector) / (2 * world)) * 2 for vector in flat]
            states["single_partition_of_fp32_groups"] = [
                vector[rank * size : (rank + 1) * size].clone() for vector, size in zip(flat, sizes, strict=True)
            ]
        prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        if stage == 3 or rank == 0:
            torch.save(model, at / f"{prefix}mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": states}, at / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def _part(tensor: Tensor, rank: int, world: int) -> Tensor:
    """A rank's part at stage 3; the last is filled up."""
    each = math.ceil(tensor.numel() / world)
    filled = torch.zeros(each * world, dtype=tensor.dtype)
    filled[: tensor.numel()] = tensor.flatten()
    return filled[rank * each : (rank + 1) * each].clone()
