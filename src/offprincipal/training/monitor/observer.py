"""The monitor without trainers: it keeps the base, decides when to observe, measures, and evaluates conditions.

Knows modules and steps; knows nothing of trainers, which `monitor.monitor` adds, or of how figures are computed.
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
    """The part of `Monitor` that works in any training loop; its arguments are described there.

    Attributes:
        out, step, stopped: as in `Monitor`.
        attached: whether a Trainer's callback calls it; the callback gives sequences and reports at the end if too few
            steps were observed.
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
        """Whether there are no sequences yet, so that divergences are not measured."""
        return self._sequences is None

    def start(self, model: Any, step: int = 0) -> None:
        """Take the model as the base, or continue with the base of a run that was interrupted.

        Args:
            model: the module that is trained, after it was sharded or wrapped for training; or an opened language
                model.
            step: optimizer steps done. At 0 the model is the base, and a table of another run in the folder is renamed
                to `monitor-1.parquet` and so on. At later steps the base and the table are read from the folder, and
                rows after this step are dropped.

        Raises:
            ArgumentError, TrainingError: no matrix matches, or matrices cannot be watched; or a condition needs
                divergences, and there are neither sequences nor a Trainer whose first batch would be used.
            NonFiniteTensor: a matrix holds NaN or infinity.
            FileError: the base of the interrupted run cannot be read from the folder.

        >>> import tempfile
        >>> monitor = Observer(tempfile.mkdtemp())
        >>> monitor.start(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)}))
        >>> monitor.step
        0
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
        """Mark the begin of a step, so that the time since the last observation does not count as time of the step."""
        self._since = time.perf_counter()

    @torch.no_grad()
    def observe(self, step: int, model: Any, *, last: bool = False) -> dict[str, Any]:
        """Measure the model if this step is due or is the last; call it after every optimizer step.

        All processes of a sharded model must call it. Weights, modes, gradients and random states are not changed.

        Args:
            step: optimizer steps done, from 1.
            model: as in `start`.
            last: whether this is the last step; it is observed regardless of the budget, but with `kl_step` only if it
                was due.

        Returns:
            The pooled row of `monitor.parquet`; empty if the step is not observed. Its `stopped` is the reason to stop
            training, or None.

        Raises:
            ArgumentError: `start` was not called, or the step is not after the last one.
            FileError: the table cannot be written.

        >>> import tempfile
        >>> layer = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})
        >>> monitor = Observer(tempfile.mkdtemp(), every=1, stop_if=["relative_update_norm > 0.1"])
        >>> monitor.start(layer)
        >>> with torch.no_grad():
        ...     _ = layer["q_proj"].weight.mul_(1.5)
        >>> monitor.observe(1, layer)["stopped"]
        'relative_update_norm > 0.1: 0.5 in q_proj.weight, at step 1'
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
            LOG.warning("%s", idle)  # a callback reports at the end of training, which is not known in other loops
        self.begin_step()
        return row

    def missed(self) -> str | None:
        """A message if the budget allowed at most one observation in a run of several steps; None otherwise.

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
        """Measure divergences on these sequences from now on; call it while the model is still the base.

        Args:
            rows: token ids; with several processes, those of the first process are used.
            model: as in `start`.
            counted: of the shape of `rows`, the tokens that count; None: all but the first of each row.

        Raises:
            ArgumentError: no token counts, or a token is not in the model's vocabulary.
            ModelError: the model returns no logits.
            FileError: the base's log-probabilities cannot be written.
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
        """The metrics in `stop_if` and `warn_if`."""
        return [watch.threshold.metric for watch in (*self._stop_if, *self._warn_if)]

    def _require_divergences(self, known: bool) -> None:
        """Refuse conditions on divergences if there are no sequences and no Trainer whose first batch gives them."""
        asked = [metric for metric in self.judged if metric in DIVERGENCES]
        if asked and not known and not self.attached:
            raise ArgumentError(
                f"{asked[0]} is not measured without sequences, so its condition would never hold: give "
                "sequences=[…], lists of token ids, to the monitor, or attach it to a Trainer before, to use its first "
                "batch"
            )

    def _remember(self, model: Any) -> None:
        """Keep the matrices of the base, in the first process, and its log-probabilities on given sequences."""
        readable = []
        for matrix in self._matrices:
            try:
                weight = matrix.now()
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # from an unknown kind of adapter
                LOG.warning("%s is not watched: its current value cannot be read (%s)", matrix.name, error)
                continue
            readable.append(matrix)
            if is_main():
                self._base.weights[matrix.name] = weight.clone()
        if not readable:
            raise TrainingError("none of the matrices to watch can be read: choose others")
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
        """Decide whether the next step is due; if so, keep the policy's log-probabilities before it."""
        step = self.step or 0
        due = self._cadence.due(step + 1)
        self._due = in_main(lambda: due) if self._cadence.every == "auto" else due
        self._before = None
        if self._due and self._sequences is not None:
            self._before = log_probabilities(model, self._sequences) if log_p is None else log_p

    def _look(self, step: int, model: Any, began: float) -> tuple[dict[str, Any], Tensor | None]:
        """Measure and record; the pooled row, the same in every process, and the policy's log-probabilities."""
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
        """Straightness and rank-1 share with their random-walk nulls; empty if a weight is not finite."""
        return dict(self._walk.add(step, sketch)) if all("update_norm" in row for row in rows) else {}

    def _record(self, step: int, rows: list[dict[str, Any]], divergences: Row, began: float) -> dict[str, Any]:
        """Pool the rows of one step, evaluate the conditions, and write the rows."""
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
