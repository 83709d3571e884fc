"""What the adapters cost: forward, backward and AdamW step of each method against PEFT's LoRA of the same rank.

    python benchmarks/adapters.py [--rounds 7] [--rank 8] [--model embedded] [--batch 240] [--length 24]

Each method trains on the same random tokens as PEFT's own LoRA, one block of steps each in turn, and which goes first
alternates; a ratio is method over LoRA in one round, the least and most beside the median. Seconds are the process's
own CPU time, which other processes on the machine disturb least. The set-up, where bases are decomposed, stands apart.
"""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import machine, spread

from offprincipal import adapt
from offprincipal.adapters.adapt import METHODS
from offprincipal.models import open_language_model


def step_of(model: Any, tokens: torch.Tensor) -> Callable[[], None]:
    """One training step of an adapted model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def cpu_seconds(step: Callable[[], None], steps: int) -> float:
    began = time.process_time()
    for _ in range(steps):
        step()
    return time.process_time() - began


def ratios(step: Callable[[], None], lora: Callable[[], None], rounds: int, steps: int) -> list[float]:
    """Of the method over LoRA, one a round, after one step of either that is not counted."""
    step(), lora()
    found = []
    for turn in range(rounds):
        first, second = (step, lora) if turn % 2 == 0 else (lora, step)
        seconds = cpu_seconds(first, steps), cpu_seconds(second, steps)
        found.append(seconds[0] / seconds[1] if turn % 2 == 0 else seconds[1] / seconds[0])
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--steps", type=int, default=2)
    arguments.add_argument("--rank", type=int, default=8)
    arguments.add_argument("--model", default="embedded")
    arguments.add_argument("--batch", type=int, default=240)
    arguments.add_argument("--length", type=int, default=24)
    arguments.add_argument("--methods", nargs="*", default=METHODS)
    given = arguments.parse_args()
    base = open_language_model(given.model, "cpu").model.train()
    tokens = torch.randint(0, base.config.vocab_size, (given.batch, given.length))
    lora = step_of(adapt(copy.deepcopy(base), "lora", rank=given.rank), tokens)
    print(f"{machine()}; torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    print(f"{given.model}, {given.batch} sequences of {given.length} tokens, rank {given.rank}")
    print(f"lora: {cpu_seconds(lora, given.steps) / given.steps:.3f} CPU s a step\n")
    print("| method | set-up, CPU s | step, times LoRA's |\n|---|---|---|")
    for method in given.methods:
        began = time.process_time()
        adapted = adapt(copy.deepcopy(base), method, rank=given.rank)
        setup = time.process_time() - began
        found = ratios(step_of(adapted, tokens), lora, given.rounds, given.steps)
        print(f"| {method} | {setup:.2f} | {spread(found)} |", flush=True)


if __name__ == "__main__":
    main()
