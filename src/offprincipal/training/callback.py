"""The trainer's callback that times every step and reports it."""

import time
from typing import Any

from transformers import TrainerCallback

from offprincipal.training.progress import ShowProgress, StepReport


class Timekeeper(TrainerCallback):
    """Write each step's seconds into the trainer's log, which its checkpoints keep, and show progress.

    Args:
        show: told of every step.
        metric: name of the value that is shown.
        key: its name in the trainer's log.
    """

    def __init__(self, show: ShowProgress, metric: str, key: str) -> None:
        self._show = show
        self._metric = metric
        self._key = key
        self._began = 0.0
        self._seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        entry = state.log_history[-1]
        if "loss" not in entry:
            return
        self._seconds.append(time.perf_counter() - self._began)
        entry["seconds"] = round(self._seconds[-1], 4)
        mean = sum(self._seconds) / len(self._seconds)
        value = entry.get(self._key)
        self._show(StepReport("training", state.global_step, state.max_steps, self._metric, value, mean))
