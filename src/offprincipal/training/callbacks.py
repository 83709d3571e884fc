"""Callbacks of the trainer: step times and progress, checkpoints, exact adapters, kept deltas, warnings."""

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from offprincipal.adapters import Isospectral
from offprincipal.deltas import make_delta
from offprincipal.file_names import MASTERS
from offprincipal.files import write_atomically
from offprincipal.memory import return_freed_memory_if_scarce
from offprincipal.training.processes import in_main, whole_state
from offprincipal.training.progress import ShowProgress, StepReport

LOG = logging.getLogger("offprincipal")


class Timekeeper(TrainerCallback):
    """Add the seconds of each step to the trainer's log, which its checkpoints contain, and show progress.

    Args:
        show: called after every step.
        metric: displayed name of the value that is shown.
        key: name of this value in the trainer's log.
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


class SaveSlowSteps(TrainerCallback):
    """Write a checkpoint when the last one is five minutes old, so that a kill loses little more than that."""

    MOST_LOST = 300.0  # seconds

    def __init__(self) -> None:
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if in_main(lambda: time.monotonic() - self._saved >= self.MOST_LOST):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved = time.monotonic()


class SpareMemory(TrainerCallback):
    """After each step, return freed memory to the operating system if little memory is left."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        return_freed_memory_if_scarce()


class NoSignal(TrainerCallback):
    """Warn once if in the first steps no prompt had completions with different rewards, so there was no gradient."""

    FIRST = 5  # steps

    def __init__(self) -> None:
        self._silent = 0

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        entry = state.log_history[-1]
        alike = entry.get("frac_reward_zero_std")
        if alike is None or self._silent < 0:
            return
        self._silent = self._silent + 1 if alike >= 1 else -1
        if self._silent == self.FIRST:
            reward, cut = entry["reward"], entry.get("completions/clipped_ratio", 0.0)
            why = (
                "none was verified" if reward <= -1 else "all were verified" if reward >= 1 else "alike in each prompt"
            )
            ended = f"; {cut:.0%} did not end within max_new_tokens" if cut else ""
            LOG.warning(
                "In the first %d steps every prompt's completions got the same reward (%s%s), so there was no gradient "
                "signal. Look at them with `offprincipal tasks --preview`, and choose other tasks, prompts or lengths",
                self.FIRST,
                why,
                ended,
            )


class FrameErrors(TrainerCallback):
    """Add an isospectral optimizer's `orthogonality_error` to the trainer's log after each step."""

    def __init__(self, optimizer: Isospectral) -> None:
        self._optimizer = optimizer

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history[-1]["orthogonality_error"] = self._optimizer.orthogonality_error


class KeepDeltas(TrainerCallback):
    """Write the weights every few steps, stored in bfloat16, as deltas from the base.

    Args:
        base: folder or Hugging Face id of the base.
        folder: for the deltas.
        every: steps between deltas.
        masters: also write the float32 weights.
    """

    def __init__(self, base: str, folder: Path, every: int, masters: bool) -> None:
        self._base, self._folder, self._every, self._masters = base, folder, every, masters

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step % self._every:
            return
        model = given["model"]
        masters = whole_state(model)
        if not state.is_world_process_zero:
            return
        if model.config.tie_word_embeddings:
            masters.pop("lm_head.weight", None)
        weights = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in masters.items()}
        self._folder.mkdir(exist_ok=True)
        if self._masters:
            (self._folder / MASTERS).mkdir(exist_ok=True)
            write_atomically(
                self._folder / MASTERS / f"step_{state.global_step}.safetensors",
                lambda part: save_file(masters, part, {"format": "pt"}),
            )
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".step.") as part:
            save_file(weights, Path(part) / "model.safetensors", {"format": "pt"})
            model.config.save_pretrained(part)
            make_delta(self._base, part, self._folder / f"step_{state.global_step}.delta")


class ExactAdapter(TrainerCallback):
    """Save the trained parameters of an adapter in each checkpoint, so that a killed run continues bit-identically.

    The trainer's own checkpoint holds the plain adapter, which is equivalent except for rounding.
    """

    NAME = "trained.safetensors"

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not state.is_world_process_zero:
            return
        tensors = {name: p.detach().contiguous() for name, p in _trained(given["model"]).items()}
        write_atomically(_checkpoint(args, state) / self.NAME, lambda part: save_file(tensors, part))

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        kept = _checkpoint(args, state) / self.NAME
        if state.global_step and kept.is_file():
            tensors = load_file(kept)
            for name, parameter in _trained(given["model"]).items():
                parameter.copy_(tensors[name])


def _trained(model: Any) -> dict[str, Any]:
    """Name -> parameter, of the parameters that are trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
