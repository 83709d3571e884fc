"""A plain training loop with a monitor, and, as a program, one of several processes of it: MODEL and OUT are arguments.

Every process trains on the same batch, so that the mean over processes is the gradient of one.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from offprincipal.models import open_language_model
from offprincipal.training.monitor import Monitor

STEPS = 4
BATCH = [[5, 9, 13, 7, 21, 30], [8, 11, 40, 6, 17, 2], [33, 3, 14, 15, 9, 26]]


def shard(model: Any) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def fit(model: Any, monitor: Monitor | None, steps: Sequence[int] = range(1, STEPS + 1)) -> list[dict[str, Any]]:
    """AdamW on one batch; what the monitor gave for each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor(BATCH)
    rows = []
    for step in steps:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rows.append(monitor.observe(step, model) if monitor is not None else {})
        if rows[-1].get("stopped"):
            break
    return rows


if __name__ == "__main__":
    source, out = sys.argv[1:]
    opened = open_language_model(source, "cpu").model.train()
    shard(opened)
    watching = Monitor(out, every=2, sequences=BATCH)
    watching.start(opened)
    fit(opened, watching)
    dist.destroy_process_group()
