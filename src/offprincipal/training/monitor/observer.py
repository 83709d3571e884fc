"""Watch a model's weights and policy while it is trained: what it is measured against, when, and what follows.

Knows modules and steps; knows nothing of any trainer (`monitor.monitor` does), nor how a figure is computed.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from offprincipal.adapters.given import module_of
from offprincipal.defaults import RANK_FRACTION
from offprincipal.errors import ArgumentError, NonFiniteTensor, TrainingError
from offprincipal.files import require_folder
from offprincipal.training.monitor.base_file import Remembered, remembered
from offprincipal.training.monitor.cadence import Cadence
from offprincipal.training.monitor.divergence import (
    PaddedSequences,
    log_probabilities,
    mean_divergence,
    sequences_of,
    vocabulary_of,
)
from offprincipal.training.monitor.matrices import WatchedMatrix, watched_matrices
from offprincipal.training.monitor.monitored_base import MonitoredBase
from offprincipal.training.monitor.table import DIVERGENCES, MonitorTable, Row, pooled
from offprincipal.training.monitor.verdicts import parse_watch
from offprincipal.training.monitor.walk import BUCKETS, SketchedWalk, sketch_of
from offprincipal.training.processes import in_main, is_main

LOG = logging.getLogger("offprincipal.monitor")


class Observer:
    """What a `Monitor` is of any loop; its arguments are told there.

    Attributes:
        attached: whether a Trainer's callback drives it, which gives sequences, and says at the end what was missed.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        matrices: str | Sequence[str] | None = None,
        every: int | Literal["auto"] = "auto",
        budget: float = 0.03,
        rank_fraction: float = RANK_FRACTION,
        sequences: Sequence[Sequence[int]] | None = None,
        stop_if: Sequence[str] = (),
        warn_if: Sequence[str] = (),
    ) -> None:
        if not (isinstance(rank_fraction, int | float) and 0 < rank_fraction <= 1):
            raise ArgumentError(
                f"rank_fraction={rank_fraction!r}: give a share of min(rows, columns), above 0, at most 1"
            )
        self._stop_if = [parse_watch(text) for text in _texts(stop_if)]
        self._warn_if = [parse_watch(text) for text in _texts(warn_if)]
        self._cadence = Cadence(every, budget)
        self._every: int | Literal["auto"] = every
        self._patterns = None if matrices is None else _texts(matrices)
        self._rank_fraction = rank_fraction
        if sequences is not None and any(isinstance(one, str) for one in sequences):
            raise ArgumentError("sequences are lists of token ids: give tokenizer(texts)['input_ids']")
        self._given = sequences
        self.out = Path(out).expanduser()
        require_folder(self.out)
        self.stopped: str | None = None
        self.step: int | None = None
        self.attached = False
        self._forget()

    def __repr__(self) -> str:
        seen = "not started" if self.step is None else f"{len(self._matrices)} matrices at step {self.step}"
        stopped = f", stopped by {self.stopped}" if self.stopped else ""
        return f"{type(self).__name__}({str(self.out)!r}, every={self._every!r}; {seen}{stopped})"

    def _forget(self) -> None:
        self._cadence = Cadence(self._every, self._cadence.budget)
        self._matrices: list[WatchedMatrix] = []
        self._base = Remembered()
        self._bases: dict[str, MonitoredBase] = {}
        self._sequences: PaddedSequences | None = None
        self._before: Tensor | None = None
        self._due = False
        self._setup_seconds = self._since = 0.0

    @property
    def wants_sequences(self) -> bool:
        """Whether no sequences were given or remembered, so that divergences are not measured yet."""
        return self._sequences is None

    def start(self, model: Any, step: int = 0) -> None:
        """Take the model as the base, or go on with the base of a run that was killed.

        Args:
            model: the module that is trained, prepared for it (sharded, wrapped), or an opened language model.
            step: optimizer steps done. At 0 the model is the base, and the table that a former run left in the folder
                is put aside, as `monitor-1.parquet`; later, the base is what that run left, and its rows beyond the
                step are dropped.

        Raises:
            ArgumentError, TrainingError: no such matrices, or they cannot be watched; or a condition is on divergences,
                and there are no sequences to measure them on, nor a Trainer whose first batch would be taken.
            NonFiniteTensor: a matrix holds NaN or infinity.
            FileError: the base of a run that goes on is not in the folder.
        """
        began = time.perf_counter()
        model = module_of(model)
        self._forget()
        self._matrices = watched_matrices(model, self._patterns)
        if step == 0:
            self._require_divergences(self._given is not None)
            self._remember(model)
        else:
            self._sequences = in_main(lambda: self._recall(step))
            self._require_divergences(self._sequences is not None)
        in_main(self._decompose)
        self.step = step
        self._setup_seconds = time.perf_counter() - began
        self._prepare(model, None)
        self.begin_step()

    def begin_step(self) -> None:
        """The next step begins now; what passed since the last observation is not counted as the step's time."""
        self._since = time.perf_counter()

    @torch.no_grad()
    def observe(self, step: int, model: Any, *, last: bool = False) -> dict[str, Any]:
        """Measure the model after an optimizer step, if this one is due or the last; call it after every step.

        Every process of a sharded model calls it. Leaves weights, modes, gradients and random states as they are.

        Args:
            step: optimizer steps done, counting from 1.
            last: whether no other follows; it is measured whatever the budget says, but its `kl_step` only if due.

        Returns:
            The pooled row of `monitor.parquet`; empty where the step is not due. Its `stopped` says why training is to
            end, and is None where it is not.

        Raises:
            ArgumentError: `start` was not called, or the step was observed already.
        """
        if self.step is None:
            raise ArgumentError("this monitor has no base yet: call start(model) before the first step")
        if step <= self.step:
            raise ArgumentError(f"step {step} was passed already, at {self.step}: call start(model, step) to go back")
        began = time.perf_counter()
        model = module_of(model)
        self._cadence.add_step(began - self._since)
        self.step = step
        due = self._due or last
        row, after = self._look(step, model, began) if due else ({}, None)
        if not last:
            self._prepare(model, after)
        self._cadence.add_cost(time.perf_counter() - began, observed=due)
        if not self.attached and is_main() and (idle := self._cadence.idle()):
            LOG.warning("%s", idle)  # a Trainer's callback says at the end what was missed; a loop's end is not known
        self.begin_step()
        return row

    def missed(self) -> str | None:
        """What the budget left out, where it left so much that the run was hardly watched; None where it did not.

        >>> import tempfile
        >>> Observer(tempfile.mkdtemp(), every=2).missed()
        """
        missed = self._cadence.missed()
        if missed is None:
            return None
        rarely = " stop_if and warn_if were therefore rarely checked." if self._stop_if or self._warn_if else ""
        return f"{missed}.{rarely} Set every=N or a larger budget"

    def measure_on(
        self, rows: Sequence[Sequence[int]], model: Any, counted: Sequence[Sequence[bool]] | None = None
    ) -> None:
        """Measure divergences on these sequences from now on; the model still is the base.

        Args:
            rows: token ids; with several processes, those of the first are taken.
            counted: which of them count; None: all but the first of each row.

        Raises:
            ArgumentError: no token counts.
            ModelError: the model gives no logits.
        """
        began = time.perf_counter()
        model = module_of(model)
        sequences = in_main(lambda: sequences_of(rows, vocabulary_of(model), counted))
        log_p = log_probabilities(model, sequences)
        self._sequences = sequences
        self._cadence.expect(2 * (time.perf_counter() - began))
        self._before = log_p if self._due else None
        if is_main():
            self._base.sequences, self._base.log_p = sequences, log_p
        in_main(lambda: self._base.write(self.out))
        seconds = time.perf_counter() - began
        self._setup_seconds += seconds
        self._since += seconds

    @property
    def judged(self) -> list[str]:
        """The metrics that conditions are on."""
        return [watch.threshold.metric for watch in (*self._stop_if, *self._warn_if)]

    def _require_divergences(self, known: bool) -> None:
        """Refuse conditions on divergences that nothing will measure, where no Trainer's first batch is waited for."""
        asked = [metric for metric in self.judged if metric in DIVERGENCES]
        if asked and not known and not self.attached:
            raise ArgumentError(
                f"{asked[0]} is not measured without sequences, so that its condition would never hold: give "
                "sequences=[…], lists of token ids, to the monitor, or attach it to a Trainer first, whose first batch "
                "it takes"
            )

    def _remember(self, model: Any) -> None:
        """Keep the base's matrices, in the first process, and what it says of the sequences that were given."""
        readable = []
        for matrix in self._matrices:
            try:
                weight = matrix.now()
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # of an adapter that nothing knows
                LOG.warning("%s is not watched: what it is now cannot be read (%s)", matrix.name, error)
                continue
            readable.append(matrix)
            if is_main():
                self._base.weights[matrix.name] = weight.clone()
        if not readable:
            raise TrainingError("none of the matrices to watch can be read as it is now: choose others")
        self._matrices = readable
        in_main(lambda: self._open_table(0))
        if self._given is not None:
            self.measure_on(self._given, model)
        else:
            in_main(lambda: self._base.write(self.out))

    def _recall(self, step: int) -> PaddedSequences | None:
        self._base = remembered(self.out, [matrix.name for matrix in self._matrices])
        self._open_table(step)
        return self._base.sequences

    def _open_table(self, after_step: int) -> None:
        self._table = MonitorTable(self.out, after_step)
        self._walk = SketchedWalk(self.out, after_step)

    def _decompose(self) -> None:
        for matrix in self._matrices:
            weight = self._base.weights[matrix.name].to(matrix.parameter.device)
            self._base.weights[matrix.name] = weight
            try:
                self._bases[matrix.name] = MonitoredBase(matrix.name, weight, self._rank_fraction)
            except NonFiniteTensor as error:
                raise NonFiniteTensor(f"{matrix.name}: {error}") from error
        began = time.perf_counter()
        for base in self._bases.values():
            base.rehearse()
        self._cadence.expect(time.perf_counter() - began)

    def _prepare(self, model: Any, log_p: Tensor | None) -> None:
        """Settle whether the next step is due; if so, keep what the policy says before it."""
        step = self.step or 0
        due = self._cadence.due(step + 1)
        self._due = in_main(lambda: due) if self._cadence.every == "auto" else due
        self._before = None
        if self._due and self._sequences is not None:
            self._before = log_probabilities(model, self._sequences) if log_p is None else log_p

    def _look(self, step: int, model: Any, began: float) -> tuple[dict[str, Any], Tensor | None]:
        """Measure, record and judge; the row that every process sees, and what the policy says now."""
        after = None if self._sequences is None else log_probabilities(model, self._sequences)
        rows: list[dict[str, Any]] = []
        sketch = np.zeros(BUCKETS)
        for matrix in self._matrices:
            weight = matrix.now()
            if is_main():
                rows.append({"step": step} | matrix.part.keys | self._bases[matrix.name].figures(weight))
                moved = weight.float() - self._base.weights[matrix.name].float()
                sketch += sketch_of(matrix.name, moved.cpu().numpy())
        row = in_main(lambda: self._record(step, rows, self._divergences(after) | self._way(step, rows, sketch), began))
        self.stopped = row["stopped"]
        return row, after

    def _divergences(self, after: Tensor | None) -> dict[str, Any]:
        if after is None or self._base.log_p is None:
            return {}
        return {
            "kl_step": None if self._before is None else mean_divergence(after, self._before),
            "kl_cumulative": mean_divergence(after, self._base.log_p.to(after.device)),
            "kl_tokens": len(after),
        }

    def _way(self, step: int, rows: list[dict[str, Any]], sketch: Any) -> dict[str, Any]:
        """Whether the run goes straight ahead, or as a random walk would; nothing of weights that are not finite."""
        return dict(self._walk.add(step, sketch)) if all("update_norm" in row for row in rows) else {}

    def _record(self, step: int, rows: list[dict[str, Any]], divergences: Row, began: float) -> dict[str, Any]:
        """Pool, judge and write the rows of one step."""
        seconds = self._cadence.spent + time.perf_counter() - began
        whole: dict[str, Any] = {"step": step, **pooled(rows), **divergences, "monitor_seconds": seconds}
        whole["monitor_share"] = seconds / self._cadence.trained if self._cadence.trained > 0 else None
        whole["setup_seconds"] = self._setup_seconds
        broken = [f"{row['tensor']} holds NaN or infinity, at step {step}" for row in rows if "update_norm" not in row]
        warned = broken + [held for watch in self._warn_if if (held := watch.held(rows, whole))]
        stopped = [held for watch in self._stop_if if (held := watch.held(rows, whole))]
        stopped += broken if self._stop_if else []
        whole["warned"] = "; ".join(warned) or None
        whole["stopped"] = "; ".join(stopped) or None
        self._table.add([*rows, whole])
        if warned:
            LOG.warning("warning: %s", whole["warned"])
        if stopped:
            LOG.warning("stopping the training: %s", whole["stopped"])
        return whole


def _texts(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)
