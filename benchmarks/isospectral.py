"""What the isospectral optimizers cost: a GRPO step of the study with each of them, beside the same step with AdamW.

    python benchmarks/isospectral.py [--rounds 3] [--steps 3] [--batch 240]

The trainer is that of `offprincipal train grpo`, on the embedded base, with the study's settings; a round trains from
the base with each optimizer in turn, on the same prompts with the same seed, and which goes first alternates. A step is
all that the trainer does between two updates: sample, verify, forward and backward, clip, update; of that the
optimizer's share. The first step of each is not counted: it decomposes the base. Seconds are the process's own CPU
time, which other processes on the machine disturb least.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from harness import Table, number, ratios, spread, torch_threads
from transformers import TrainerCallback

from offprincipal.models import open_language_model
from offprincipal.models.quiet import quiet_libraries
from offprincipal.training import parse_settings
from offprincipal.training.recipes import build_trainer
from offprincipal.training.trained import RunModels, prepare

TASKS = ("add", "sort@2")
RATE = 1e-5
KINDS: dict[str, dict[str, str] | None] = {
    "AdamW": None,
    "IsospectralAdamW, svd": {"method": "isospectral"},
    "IsospectralAdamW, newton-schulz": {"method": "isospectral", "retraction": "newton-schulz"},
    "IsospectralMuon, newton-schulz": {"method": "isospectral_muon", "retraction": "newton-schulz"},
}
COLUMNS = (
    "optimizer",
    "GRPO step, in those with AdamW",
    "optimizer's step, in AdamW's",
    "optimizer's share of the GRPO step",
    "s a GRPO step",
    "s an optimizer's step",
)


class Clock(TrainerCallback):
    """CPU seconds of each training step, and of the optimizer's step within it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.updates: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append(-time.process_time())

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.updates.append(-time.process_time())

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.updates[-1] += time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps[-1] += time.process_time()


def trained(kind: str, steps: int, batch: int) -> Clock:
    """A GRPO run of one uncounted step and `steps` more, timed."""
    values = {"recipe": "grpo", "tasks": TASKS, "steps": steps + 1, "batch": batch, "learning_rate": RATE}
    settings = parse_settings(values | {"eval_prompts": 0, "device": "cpu", "adapter": KINDS[kind]})
    base, clock = open_language_model("embedded", "cpu"), Clock()
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        opened = RunModels(base, prepare(settings, base.model))
        trainer = build_trainer(settings, opened, Path(folder), [clock])
        trainer.args.save_strategy = "no"
        trainer.train()
    return clock


def isospectral_steps(rounds: int, steps: int = 3, batch: int = 240, kinds: Sequence[str] = tuple(KINDS)) -> Table:
    """(j): a GRPO step with every optimizer; AdamW is first of `kinds`."""
    whole: dict[str, list[float]] = {kind: [] for kind in kinds}
    update: dict[str, list[float]] = {kind: [] for kind in kinds}
    with torch_threads(1):
        for turn in range(rounds):
            for kind in kinds[:: 1 if turn % 2 == 0 else -1]:
                clock = trained(kind, steps, batch)
                whole[kind] += clock.steps[1:]
                update[kind] += clock.updates[1:]
    note = (
        f"GRPO as `offprincipal train grpo` runs it on the embedded model, {batch} completions a step, one thread: "
        f"{rounds} runs of {steps} counted steps with each optimizer, in turn, on the same prompts. A ratio is of the "
        "same step of the same round, so below 1 ours needs less. CPU time of the process."
    )
    base = kinds[0]
    rows = tuple(
        (
            kind,
            str(ratios(whole[kind], whole[base])),
            str(ratios(update[kind], update[base])),
            str(spread([one / two for one, two in zip(update[kind], whole[kind], strict=True)])),
            number(median(whole[kind])),
            number(median(update[kind])),
        )
        for kind in kinds
    )
    return Table("(j) A step of the isospectral optimizers", note, COLUMNS, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="counted, of each run")
    parser.add_argument("--batch", type=int, default=240)
    given = parser.parse_args()
    print(isospectral_steps(given.rounds, given.steps, given.batch))


if __name__ == "__main__":
    main()
