"""`Monitor`: measures a model's weights and policy during training, in any loop or as a Trainer's callback."""

from typing import TYPE_CHECKING, Any

from offprincipal.errors import ArgumentError
from offprincipal.training.monitor.observer import Observer

if TYPE_CHECKING:
    from offprincipal.training.monitor.callback import MonitorCallback


class Monitor(Observer):
    """Measures a model during training, each figure with its null, and can stop the training.

    Args:
        out: folder for `monitor.parquet` and, to resume, `monitor.base.safetensors` and `monitor.walk.safetensors`;
            created if absent.
        matrices: shell-style patterns of names; None: one linear matrix of each role, spread over the layers.
        every: steps between observations; `auto`: as often as the budget allows, see `Cadence`.
        budget: largest time of observing with `auto`, as a share of the training's own time.
        rank_fraction: rank of the principal subspaces divided by min(rows, columns).
        sequences: token ids on which divergences are measured, at most 16 sequences and the last 64 tokens of each.
            None: the completions in the first training batch under a Trainer; no divergences in other loops.
        stop_if: conditions, such as `spectral_shift_per_norm > .5`, which holds if any matrix or the pooled value
            fulfils it, or `pooled kl_step > .1`. Training should stop if one holds, or if there is a condition and a
            watched weight is not finite.
        warn_if: conditions that only log a warning.

    Attributes:
        out: the folder.
        step: the last step that was passed to `start` or `observe`; None before `start`.
        stopped: the condition of `stop_if` that held at the last observation, with the value; None if none did.

    Raises:
        ArgumentError: a condition, `every`, `budget`, `rank_fraction` or `sequences` is not usable.
        FileError: the folder cannot be created.

    >>> import tempfile
    >>> layer = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8, bias=False)})
    >>> monitor = Monitor(tempfile.mkdtemp(), every=1)
    >>> monitor.start(layer)
    >>> with torch.no_grad():
    ...     _ = layer["q_proj"].weight.mul_(1.5)
    >>> row = monitor.observe(1, layer)
    >>> round(row["relative_update_norm"], 6), round(row["spectral_shift_per_norm"], 6), row["unchanged_fraction"]
    (0.5, 1.0, 0.0)
    """

    _callback: "MonitorCallback | None" = None

    def callback(self) -> "MonitorCallback":
        """A transformers TrainerCallback that observes, writes the table and stops training; it logs to no logger.

        Every call returns the same callback.
        """
        from offprincipal.training.monitor.callback import MonitorCallback  # imports transformers

        if self._callback is None:
            self._callback, self.attached = MonitorCallback(self), True
        return self._callback

    def attach(self, trainer: Any) -> "Monitor":
        """Watch a transformers or TRL trainer; its loggers (`report_to`) get figures as `offprincipal/spectral_shift`.

        A second call with the same trainer does nothing.

        Args:
            trainer: before `train()` is called.

        Returns:
            The monitor itself.

        Raises:
            ArgumentError: the object is not a trainer that takes callbacks, or the monitor watches another trainer.
        """
        if not hasattr(trainer, "callback_handler"):
            raise ArgumentError(
                f"{type(trainer).__name__} is not a trainer that takes callbacks: give the transformers or TRL "
                "trainer; for your own loop, call start(model)"
            )
        callback = self.callback()
        if callback.trainer not in (None, trainer):
            raise ArgumentError(
                "this monitor watches another trainer already: make one Monitor for each trainer, with its own folder"
            )
        callback.trainer = trainer
        if callback not in trainer.callback_handler.callbacks:
            trainer.add_callback(callback)
        return self
