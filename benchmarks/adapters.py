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
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from harness import Table, in_rounds, number, ratios, torch_threads

from offprincipal import adapt
from offprincipal.adapter_methods import LOW_RANK
from offprincipal.models import open_language_model

RANK = 8
COLUMNS = (
    "sequences × tokens",
    "method",
    "step, times LoRA's",
    "rollout, times LoRA's",
    "s a step",
    "s a rollout",
    "s of set-up",
)


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


def adapter_costs(model: str, sizes: Sequence[tuple[int, int, int]], methods: Sequence[str], rank: int = RANK) -> Table:
    """(i): every method at every size, a batch, a length, and the rounds of it."""
    with torch_threads(1):
        base = open_language_model(model, "cpu").model.train()
        rows = tuple(row for size in sizes for row in rows_of(base, *size, methods, rank))
    note = (
        f"The {model} model, {sum(p.numel() for p in base.parameters()) / 1e6:.1f} M parameters, rank {rank}, one "
        "thread; LoRA against itself is the noise. A step is forward, backward and AdamW, a rollout eight sampled "
        "tokens. CPU time of the process."
    )
    return Table("(i) Adapters against PEFT's LoRA", note, COLUMNS, rows)


def rows_of(
    base: Any, batch: int, length: int, rounds: int, methods: Sequence[str], rank: int
) -> Iterator[tuple[str, ...]]:
    """One row a method, all beside the same LoRA."""
    tokens = torch.randint(0, base.config.vocab_size, (batch, length))
    lora = adapt(copy.deepcopy(base), "lora", rank=rank)
    runs = step_of(lora, tokens), rollout_of(lora, tokens)
    for method in methods:
        began = time.process_time()
        adapted = adapt(copy.deepcopy(base), method, rank=rank)
        setup = time.process_time() - began
        ours = step_of(adapted, tokens), rollout_of(adapted, tokens)
        seconds = [in_rounds([run, peft], rounds) for run, peft in zip(ours, runs, strict=True)]
        medians = (f"{number(median(run))} against {number(median(peft))}" for run, peft in seconds)
        costs = (str(ratios(run, peft)) for run, peft in seconds)
        yield (f"{batch} × {length}", method, *costs, *medians, number(setup))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--rank", type=int, default=RANK)
    arguments.add_argument("--model", default="embedded")
    arguments.add_argument("--batch", type=int, default=240)
    arguments.add_argument("--length", type=int, default=24)
    arguments.add_argument("--methods", nargs="*", default=LOW_RANK)
    given = arguments.parse_args()
    print(adapter_costs(given.model, [(given.batch, given.length, given.rounds)], given.methods, given.rank))


if __name__ == "__main__":
    main()
