"""What the monitor costs: the same trainings with and without it, on the embedded model.

    python benchmarks/monitor.py [--steps 60] [--every auto]

Two kinds: GRPO as `offprincipal train` runs it, and a plain loop of supervised steps. Each is run without the monitor,
with it, and again, so that the machine's drift falls on both. Seconds are the process's own CPU time, which other
processes on the machine disturb least; beside them stands what the monitor's own clock says.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from offprincipal.models import open_language_model
from offprincipal.tasks import mixture, open_task
from offprincipal.training import TrainSettings, train
from offprincipal.training.monitor import Monitor, read_monitor

TASKS = ("add", "sort@2")
BATCH = 240


def plain_loop(steps: int, every: Any, out: Path) -> float:
    """CPU seconds of supervised steps; the monitor's setup is left out."""
    opened = open_language_model("embedded", "cpu")
    model = opened.model.train()
    problems = mixture([open_task(name) for name in TASKS], "train", BATCH, 0)
    texts = [problem.prompt + problem.answer for problem in problems]
    batch = opened.tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    monitor = None
    if every is not None:
        monitor = Monitor(out, every=every, sequences=[opened.tokenizer(text).input_ids for text in texts])
        monitor.start(model)
    began = time.process_time()
    for step in range(1, steps + 1):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.observe(step, model)
    return time.process_time() - began


def grpo(steps: int, every: Any, out: Path) -> float:
    """CPU seconds of a run, opening and saving included."""
    began = time.process_time()
    train(
        TrainSettings(
            recipe="grpo", tasks=TASKS, steps=steps, batch=BATCH, eval_prompts=0, device="cpu", monitor=every
        ),
        out,
        quiet=True,
    )
    return time.process_time() - began


def report(name: str, run: Any, steps: int, every: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for i in range(4):
            watched = i % 2 == 1
            seconds[watched].append(run(steps, every if watched else None, Path(folder) / str(i)))
        rows = [row for row in read_monitor(Path(folder) / "3") if row["tensor"] is None]
    without, with_it = ("/".join(f"{run / steps:.3f}" for run in seconds[watched]) for watched in (False, True))
    change = sum(seconds[True]) / sum(seconds[False]) - 1
    last = rows[-1]
    print(
        f"{name}: {without} CPU s a step without, {with_it} with: {change:+.1%} "
        f"(set-up {last['setup_seconds']:.2f} s); observed {len(rows)} of {steps} steps; by the monitor's own clock "
        f"{last['monitor_seconds'] / len(rows):.3f} s each, {last['monitor_share']:.1%} of the steps' time",
        flush=True,
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--every", default="auto")
    given = arguments.parse_args()
    every = "auto" if given.every == "auto" else int(given.every)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {os.cpu_count()} cores, {given.steps} steps"
    )
    report("plain supervised loop", plain_loop, given.steps, every)
    report("grpo", grpo, given.steps, every)


if __name__ == "__main__":
    main()
