"""Training with a monitor, in a plain loop and under a Trainer; as a program, one of several processes that do both.

The program shards by FSDP2: `python train_monitored.py MODEL OUT`. In the plain loop every process trains on the same
batch, so that the mean over processes is the gradient of one; under a Trainer they share a batch.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from offprincipal.models import open_language_model
from offprincipal.training.monitor import Monitor

STEPS = 4
BATCH = [[5, 9, 13, 7, 21, 30], [8, 11, 40, 6, 17, 2], [33, 3, 14, 15, 9, 26], [4, 4, 8, 25, 11, 19]]


def shard(model: Any) -> None:
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


def trainer_of(model: Any, out: Path, processes: int = 1, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    """A Trainer that takes the batch of `fit` in every step, each process its share, and learns all but two tokens."""
    settings = TrainingArguments(
        str(out),
        max_steps=STEPS,
        per_device_train_batch_size=len(BATCH) // processes,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    data = [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in BATCH * STEPS]
    return Trainer(model, settings, train_dataset=data, callbacks=list(callbacks))


def force_fsdp() -> None:
    """Let accelerate shard on CPUs, which it does on accelerators alone."""
    State = accelerate.state.AcceleratorState
    begin = State.__init__

    def begin_sharded(self: Any, *positional: Any, fsdp_plugin: Any = None, **named: Any) -> None:
        begin(self, *positional, fsdp_plugin=fsdp_plugin, **named)
        self.distributed_type = accelerate.DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin or accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
        )

    State.__init__ = begin_sharded


def main(source: str, out: Path) -> None:
    dist.init_process_group("gloo")
    model = open_language_model(source, "cpu").model.train()
    shard(model)
    monitor = Monitor(out / "plain", every=2, sequences=BATCH)
    monitor.start(model)
    fit(model, monitor)
    unbound = Monitor(out / "auto", sequences=BATCH)
    unbound.start(model)
    unbound._cadence.budget = 1e6  # so that a slow machine looks at every step
    fit(model, unbound)

    force_fsdp()
    trainer = trainer_of(open_language_model(source, "cpu").model, out / "trainer", dist.get_world_size())
    Monitor(out / "trainer", every=2, sequences=BATCH).attach(trainer)
    trainer.train()
    assert all(isinstance(weight, DTensor) for weight in trainer.model.parameters())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that ends by itself on a busy machine
