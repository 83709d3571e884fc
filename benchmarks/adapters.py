"""What the adapters cost: training steps and rollouts of each method against PEFT's LoRA of the same rank.

    python benchmarks/adapters.py [--rounds 15] [--rank 8] [--model embedded] [--batch 240] [--length 24]

A step is forward, backward and AdamW on random tokens; a rollout is eight sampled tokens after half of them. Each
method and LoRA take turns, one of each a round, and which goes first alternates; a ratio is method over LoRA in one
round, the median with the least and the most; LoRA against itself shows the noise. Seconds are the process's own CPU
time, which other processes on the machine disturb least. The set-up, where the base is decomposed, stands apart.
"""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import Spread, machine, spread

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


def rollout_of(model: Any, tokens: torch.Tensor) -> Callable[[], None]:
    """Eight tokens sampled from an adapted model."""
    prompts = tokens[:, : max(tokens.shape[1] // 2, 1)]

    def rollout() -> None:
        with torch.no_grad():
            model.generate(input_ids=prompts, min_new_tokens=8, max_new_tokens=8, do_sample=True, pad_token_id=0)

    return rollout


def cpu_seconds(run: Callable[[], None]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def ratio(run: Callable[[], None], lora: Callable[[], None], rounds: int) -> Spread:
    """Of the method over LoRA, after one run of either that is not counted."""
    run(), lora()
    found = []
    for turn in range(rounds):
        first, second = (run, lora) if turn % 2 == 0 else (lora, run)
        seconds = cpu_seconds(first), cpu_seconds(second)
        found.append(seconds[0] / seconds[1] if turn % 2 == 0 else seconds[1] / seconds[0])
    return spread(found)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--rank", type=int, default=8)
    arguments.add_argument("--model", default="embedded")
    arguments.add_argument("--batch", type=int, default=240)
    arguments.add_argument("--length", type=int, default=24)
    arguments.add_argument("--methods", nargs="*", default=METHODS)
    given = arguments.parse_args()
    base = open_language_model(given.model, "cpu").model.train()
    tokens = torch.randint(0, base.config.vocab_size, (given.batch, given.length))
    lora = adapt(copy.deepcopy(base), "lora", rank=given.rank)
    step, rollout = step_of(lora, tokens), rollout_of(lora, tokens)
    print(f"{machine()}; torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    print(f"{given.model}, {given.batch} sequences of {given.length} tokens, rank {given.rank}")
    print(f"lora: {cpu_seconds(step):.3f} CPU s a step, {cpu_seconds(rollout):.3f} a rollout\n")
    print("| method | set-up, CPU s | step, times LoRA's | rollout, times LoRA's |\n|---|---|---|---|")
    for method in given.methods:
        began = time.process_time()
        adapted = adapt(copy.deepcopy(base), method, rank=given.rank)
        setup = time.process_time() - began
        steps = ratio(step_of(adapted, tokens), step, given.rounds)
        rollouts = ratio(rollout_of(adapted, tokens), rollout, given.rounds)
        print(f"| {method} | {setup:.2f} | {steps} | {rollouts} |", flush=True)


if __name__ == "__main__":
    main()
