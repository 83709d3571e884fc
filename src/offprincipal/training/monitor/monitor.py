"""Watch a model's weights and policy while it is trained, in any loop or by a Trainer's callback."""

from typing import TYPE_CHECKING, Any

from offprincipal.errors import ArgumentError
from offprincipal.training.monitor.observer import Observer

if TYPE_CHECKING:
    from offprincipal.training.monitor.callback import MonitorCallback


class Monitor(Observer):
    """Measures a model while it is trained, each figure beside its null, and may end the training.

    Args:
        out: folder for `monitor.parquet` and, for continuing, `monitor.base.safetensors`; made if absent.
        matrices: shell-style patterns of names; None: one linear matrix of each role, spread over the layers.
        every: steps between observations; `auto`: as often as the budget allows (`Cadence` says how).
        budget: share of the training's own time that `auto` may take.
        rank_fraction: rank of the principal subspaces over min(rows, columns).
        sequences: token ids that divergences are measured on, at most 16 of them and the last 64 tokens of each; None:
            the completions in the first training batch under a Trainer, no divergences in other loops.
        stop_if: conditions, such as `spectral_shift_per_norm > .5` (of any matrix, or of all) or `pooled kl_step > .1`;
            when one holds, or a watched weight is no longer finite, the training is to end.
        warn_if: conditions that are only reported.

    Raises:
        ArgumentError: a condition, the cadence or the budget is not usable.
        FileError: the folder cannot be made.

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
        """A transformers TrainerCallback that starts, observes and stops; it writes the table, but tells no logger."""
        from offprincipal.training.monitor.callback import MonitorCallback  # imports transformers

        if self._callback is None:
            self._callback, self.attached = MonitorCallback(self), True
        return self._callback

    def attach(self, trainer: Any) -> "Monitor":
        """Watch a transformers or TRL trainer, and tell its loggers (`report_to`), as `offprincipal/spectral_shift`.

        Once more for the same trainer, it does nothing.

        Returns:
            The monitor itself.

        Raises:
            ArgumentError: it is not a trainer that takes callbacks, or the monitor watches another one already.
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
