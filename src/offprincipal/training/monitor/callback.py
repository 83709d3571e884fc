"""The monitor as a callback of a transformers or TRL trainer."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from offprincipal.errors import OffPrincipalError
from offprincipal.training.monitor.divergence import unpadded
from offprincipal.training.monitor.observer import LOG, Observer
from offprincipal.training.monitor.table import DIVERGENCES
from offprincipal.training.processes import in_main

_PREFIX = "offprincipal/"
_LOGGED = (
    "kl_step",
    "kl_cumulative",
    "relative_update_norm",
    "unchanged_fraction",
    "spectral_shift",
)  # sent to the trainer's loggers; the table has all figures
_IGNORED = -100  # label of tokens that do not count in the loss


class MonitorCallback(TrainerCallback):
    """Starts a monitor when training begins, observes after optimizer steps, and stops training on its conditions.

    If `start` was called before training, that base is kept. Otherwise the base is the model at step 0, or, in a
    resumed run, the one in the monitor's folder. If the monitor has no sequences, divergences are measured on the first
    training batch, at the tokens that count in the loss: the completions of rollouts, or the labels of examples.

    Args:
        monitor: the monitor.

    Attributes:
        trainer: whose loggers get a few figures and those in conditions; None: only the table is written.
    """

    def __init__(self, monitor: Observer) -> None:
        self.trainer: Any = None
        self._monitor = monitor
        self._seen: tuple[list[list[int]], list[list[bool]]] | None = None
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._monitor.step != 0:
            self._monitor.start(model, state.global_step)
        if self._monitor.wants_sequences and state.global_step == 0:
            self._hook = model.register_forward_pre_hook(self._take, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._monitor.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._hook is None:
            return
        self._unhook()
        seen = in_main(lambda: self._seen)
        if seen is None:
            self._warn_of_no_divergences("the first batch shows no input_ids; give sequences to the monitor")
        else:
            try:
                self._monitor.measure_on(seen[0], model, seen[1])
            except OffPrincipalError as error:  # a monitor never ends a training that it was not asked to end
                self._warn_of_no_divergences(error)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        row = self._monitor.observe(state.global_step, model, last=state.global_step >= state.max_steps)
        if row:
            logged = dict.fromkeys((*_LOGGED, *self._monitor.judged))
            self._log({_PREFIX + name: row[name] for name in logged if row.get(name) is not None})
        if row.get("stopped"):
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._unhook()
        if missed := self._monitor.missed():
            LOG.warning("%s", missed)

    def _take(self, module: Any, positional: Any, named: dict[str, Any]) -> None:
        """Keep the token ids of the first forward pass with gradients: sampling and scoring run without them."""
        if "input_ids" not in named:
            named = _rollout(positional)
        ids, labels, kept = (named.get(name) for name in ("input_ids", "labels", "logits_to_keep"))
        if ids is None or not torch.is_grad_enabled() or self._seen is not None:
            return
        counted = torch.ones_like(ids, dtype=torch.bool)
        if labels is not None and labels.shape == ids.shape:
            counted = labels != _IGNORED
        elif isinstance(kept, int) and 1 < kept <= ids.shape[1]:
            counted[:, : 1 - kept] = False  # the logits kept are those of the completion and of the token before it
        batch = unpadded(ids, counted, named.get("attention_mask"))
        if any(any(row[1:]) for row in batch[1]):
            self._seen = batch

    def _warn_of_no_divergences(self, why: str | OffPrincipalError) -> None:
        judged = set(DIVERGENCES) & set(self._monitor.judged)
        LOG.warning("no divergences are measured%s: %s", ", and conditions on them never hold" if judged else "", why)

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _log(self, values: dict[str, float]) -> None:
        """Log by `Trainer.log`, since TRL's overrides add and clear their own metrics; a log that is due stays due."""
        if self.trainer is None:
            return
        due = self.trainer.control.should_log
        Trainer.log(self.trainer, values)
        self.trainer.control.should_log = due


def _rollout(arguments: Sequence[Any]) -> dict[str, Any]:
    """The inputs of TRL's distillation loss, which has prompts and completions, named as those of a forward pass."""
    for given in arguments:
        if (
            isinstance(given, dict)
            and {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"} <= given.keys()
        ):
            return {
                "input_ids": torch.cat([given["prompt_ids"], given["completion_ids"]], dim=1),
                "attention_mask": torch.cat([given["prompt_mask"], given["completion_mask"]], dim=1),
                "logits_to_keep": given["completion_ids"].shape[1] + 1,
            }
    return {}
