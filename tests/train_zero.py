"""Train a small module under ZeRO on CPUs; save it, and what DeepSpeed makes of it: `train_zero.py OUT STAGE`."""

import importlib
import os
import sys
from typing import Any

import torch
import torch.distributed as dist


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(11, 6)
        self.q_proj = torch.nn.Linear(6, 7)
        self.up_proj = torch.nn.Linear(7, 5, bias=False)
        self.frozen = torch.nn.Linear(5, 3)
        self.register_buffer("steps", torch.ones(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.frozen(self.up_proj(self.q_proj(self.embed_tokens(ids))))
        return out.float().square().mean()


def main(out: str, stage: int) -> None:
    deepspeed: Any = importlib.import_module("deepspeed")  # not installed with the tests
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
        model = Small()
    for parameter in model.frozen.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    for _ in range(3):
        engine.backward(engine(torch.randint(0, 11, (2, 4))))
        engine.step()
    engine.save_checkpoint(out, tag="global_step3")
    dist.barrier()
    if dist.get_rank() == 0:
        script: Any = importlib.import_module("deepspeed.utils.zero_to_fp32")
        whole = script.get_fp32_state_dict_from_zero_checkpoint(out)
        torch.save({name: tensor.detach().clone() for name, tensor in whole.items()}, f"{out}/reference.pt")
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that ends by itself on a busy machine
