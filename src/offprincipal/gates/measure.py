"""`measure_gates`: a base, what was tuned from it, and sequences in; the entries of `gates.json` out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import torch

from offprincipal.checkpoints import Checkpoint, open_checkpoint
from offprincipal.checkpoints.naming import name_runs
from offprincipal.defaults import (
    BATCHES,
    DENSITY,
    DRAWS,
    LAYER_DRAWS,
    MAX_NEW_TOKENS,
    PROMPTS_PER_BATCH,
    RANK_FRACTION,
)
from offprincipal.errors import ArgumentError, ModelError, meant
from offprincipal.file_names import GATES
from offprincipal.files import require_folder, write_json
from offprincipal.gates.curvature import Curvature, curvature_rows, draw_rows, pair_rows
from offprincipal.gates.directions import (
    RANDOM_DIRECTIONS,
    UPDATE_DIRECTIONS,
    cells,
    linear_matrices,
    random_direction,
    update_direction,
)
from offprincipal.gates.forward import Array, Direction, fisher_sums, kl_sums
from offprincipal.gates.kl_bound import FRACTIONS, curve, norm_bound
from offprincipal.gates.precision_gate import PrecisionSettings, precision_gate
from offprincipal.gates.sequences import (
    Sequences,
    encode_prompts,
    read_prompts,
    read_sequences,
    sample_continuations,
    shuffled_batches,
    task_prompts,
)
from offprincipal.gates.statistics import mean_with_interval
from offprincipal.gates.updates import Tuned, Update, Weights, moved_by
from offprincipal.measures.settings import as_in_files
from offprincipal.models import LanguageModel, model_name, open_language_model
from offprincipal.models.float64 import computing_in
from offprincipal.tables import require_none_replaced
from offprincipal.tabular import Tabular
from offprincipal.tasks import open_task, task_names
from offprincipal.tasks.prompting import prompting
from offprincipal.versions import versions

if TYPE_CHECKING:
    from offprincipal.checkpoints.naming import Source

ENOUGH_BATCHES = 16
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class GateSettings:
    """How the gates are measured.

    Args:
        batches: into which the sequences are dealt; the unit of the curvature's intervals and tests.
        prompts_per_batch: prompts of each where they come from tasks.
        max_new_tokens: the longest sampled continuation.
        draws: random directions of each kind over all linear matrices.
        layer_draws: random directions of each kind in each matrix.
        per_layer: whether to measure each layer and role too, not all linear matrices at once alone.
        rank_fraction: rank of the principal subspace over min(rows, columns).
        density: fraction of a matrix's entries that count as principal.
        precision: whether to measure Gate III too, where float32 masters were kept.
        weights: `auto` (float32 masters where they were kept), `masters` or `stored`.
        dtype: `float32` or `float64`, of weights, directions and activations, norms and softmaxes included.
        attention: the attention's implementation, which needs a forward-mode derivative.
        device: `auto`, `cpu` or `cuda`.
        seed: of prompts, continuations, batches and random directions.
        trust_remote_code: whether Python that comes with the base may be executed where it asks for that.

    Raises:
        ArgumentError: a value is outside what it may be.
    """

    batches: int = BATCHES
    prompts_per_batch: int = PROMPTS_PER_BATCH
    max_new_tokens: int = MAX_NEW_TOKENS
    draws: int = DRAWS
    layer_draws: int = LAYER_DRAWS
    per_layer: bool = True
    rank_fraction: float = RANK_FRACTION
    density: float = DENSITY
    precision: bool = True
    weights: Weights = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    attention: str = "eager"
    device: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("batches", "prompts_per_batch", "max_new_tokens", "draws", "layer_draws"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}: give a whole number, at least 1")
        for name in ("rank_fraction", "density"):
            if not (isinstance(getattr(self, name), int | float) and 0 < getattr(self, name) < 1):
                raise ArgumentError(f"{name} is {getattr(self, name)!r}: it lies between 0 and 1")
        if self.weights not in get_args(Weights):
            raise ArgumentError(f"no weights '{self.weights}': choose one of {', '.join(get_args(Weights))}")
        if self.dtype not in ("float32", "float64"):
            raise ArgumentError(f"cannot compute in dtype '{self.dtype}': choose float32 or float64")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**32):
            raise ArgumentError(f"seed {self.seed!r} is not a whole number from 0 to 2**32 − 1")


@dataclass(frozen=True, repr=False)
class Gates(Tabular):
    """What `measure_gates` found; its text has the tables that the terminal shows.

    Args:
        content: of `gates.json`.
    """

    content: dict[str, Any]

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """Run -> its entry."""
        runs: dict[str, dict[str, Any]] = self.content["runs"]
        return runs

    def to_arrow(self, table: str = "kl") -> pa.Table:
        """`kl`, a row for each run and whose samples it is on; `curve` or `curvature`, the rows of each run's.

        Raises:
            ArgumentError: there is no such table.
        """
        if table not in ("kl", "curve", "curvature"):
            raise ArgumentError(f"gates have no table '{table}': choose one of kl, curve, curvature")
        rows: list[dict[str, Any]] = []
        for run, entry in self.runs.items():
            of_samples = [{"samples": samples} | kl for samples, kl in entry["kl_by_samples"].items()]
            found = of_samples if table == "kl" else entry[table]
            rows += [{"run": run} | row for row in found]
        return pa.Table.from_pylist(rows)

    def _shown(self) -> Any:
        from offprincipal.reports.gates import gates_tables

        return gates_tables(self.content)

    def write(self, out: str | Path) -> Path:
        """Write `gates.json` into a folder, whole or not at all.

        Raises:
            FileError: the folder cannot be made or written.
        """
        folder = Path(out)
        require_folder(folder)
        write_json(folder / GATES, self.content)
        return folder / GATES


def measure_gates(
    base: str | Path,
    tuned: "Source | Mapping[str, Source] | Sequence[Source]",
    settings: GateSettings | None = None,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    prompts: str | Path | Sequence[str] | None = None,
    task: str | Sequence[str] | None = None,
    sequences: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Gates:
    """The gates of models tuned from one base: divergence, Fisher form along the update, curvature, precision.

    Give exactly one of `prompts`, `task` and `sequences`. With the first two, continuations are sampled from the base,
    for the Fisher form, the curve and the curvature, and from each tuned policy, for its divergence.

    Args:
        base: a folder, a Hugging Face id, or `embedded`.
        tuned: run name -> folder or id of a model, adapter or distributed checkpoint; or one, or a list of them, named
            after their folders.
        settings: how the gates are measured.
        out: folder for `gates.json`; None: nothing is written.
        overwrite: replace the gates of another base or of other runs in the folder.
        prompts: a file of prompts, one a line, or JSON lines `{"prompt": …}` called `.jsonl`; or a list of prompts.
        task: one or more names for `open_task`, as a list or a text such as "add,sort@2"; held-out prompts are taken.
        sequences: JSON lines, `{"text": …}` or `{"input_ids": […]}`, measured at every position after the first.
        progress: told how many directions are done, of how many, and of which run.
        options: instead of `settings`, any field of `GateSettings`.

    Raises:
        ArgumentError: not exactly one of `prompts`, `task` and `sequences` is given, or an option is out of range.
        ModelError: the base cannot be opened or differentiated, a prompt does not fit its context, or a tuned model has
            another vocabulary or tokenizer.
        CheckpointError, FileError, TaskError: a checkpoint, file or task cannot be read.

    >>> from offprincipal.assets import embedded_base
    >>> options = {"batches": 2, "prompts_per_batch": 2, "per_layer": False, "draws": 1, "max_new_tokens": 4}
    >>> found = measure_gates("embedded", {"same": embedded_base()}, task="add@1", **options)
    >>> found.runs["same"]["kl_cumulative"]["value"]
    0.0
    """
    known = [each.name for each in fields(GateSettings)]
    for name in options:
        if name not in known:
            raise ArgumentError(f"there is no option {name!r}: {meant(name, known, 'there are ' + ', '.join(known))}")
    if settings is not None and options:
        raise ArgumentError(f"both settings and {next(iter(options))} are given: give only one of them")
    settings = settings or GateSettings(**options)
    if [prompts, task, sequences].count(None) != 2:
        raise ArgumentError("give one of prompts, task and sequences: what the gates are measured on")
    several: Any = [tuned] if isinstance(tuned, str | Path) or hasattr(tuned, "state_dict") else tuned
    tuned = name_runs(several)
    for run, source in (("the base", base), *tuned.items()):
        if not isinstance(source, str | Path):
            kind = type(source).__name__
            raise ArgumentError(
                f"{run} is a {kind}, but the gates open models themselves: save it, and give its folder"
            )
    if out is not None:
        require_folder(Path(out))
        if not overwrite:
            given_runs = list(map(str, tuned.values()))
            require_none_replaced(Path(out) / GATES, str(base), given_runs, _sources_of)
    names = [] if task is None else task_names(task)
    asked = None if prompts is None else read_prompts(prompts) if isinstance(prompts, str | Path) else [*prompts]
    language_model = open_for_derivatives(base, settings, tokenizer=sequences is None)
    if names:
        asking = prompting(None, language_model.tokenizer, map(open_task, names))
        language_model = replace(language_model, stops=asking.stop_ids)
        asked = task_prompts(asking, settings.batches * settings.prompts_per_batch, settings.seed)
    checkpoint = open_checkpoint(model_name(base))
    opened = {run: Tuned(language_model, checkpoint, source, settings.weights) for run, source in tuned.items()}
    gate = PrecisionSettings(rank_fraction=settings.rank_fraction, density=settings.density)
    stored = {run: precision_gate(model_name(base), tuned[run], gate) for run in opened if settings.precision}
    with computing_in(settings.dtype):
        if asked is None:
            encoded, measured = None, read_sequences(sequences or "", language_model)
        else:
            encoded = encode_prompts(language_model, asked, settings.max_new_tokens)
            options = {"max_new_tokens": settings.max_new_tokens, "seed": settings.seed}
            measured = sample_continuations(language_model, encoded, **options, samples="base")
        ground = Ground(measured, settings)
        study = _Study(language_model, checkpoint, ground, encoded, settings, len(opened), progress)
        runs = {
            run: {"source": str(tuned[run]), **study.entry(run, each), **stored.get(run, {})}
            for run, each in opened.items()
        }
    given = {"prompts": prompts, "task": names or None, "sequences": sequences}
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    found = Gates(
        {
            "schema": 1,
            "base": str(base),
            "arguments": arguments | as_in_files(asdict(settings)),
            "versions": versions("offprincipal", "torch", "transformers"),
            "runs": runs,
        }
    )
    if out is not None:
        found.write(out)
    return found


def _sources_of(content: dict[str, Any]) -> list[str]:
    return [run["source"] for run in content["runs"].values()]


def open_for_derivatives(base: str | Path, settings: GateSettings, tokenizer: bool = True) -> LanguageModel:
    """The base in the asked precision, with an attention that has a forward-mode derivative.

    Args:
        tokenizer: whether there has to be one.

    Raises:
        ModelError: it cannot be opened, or has no such attention.
    """
    language_model = open_language_model(base, settings.device, settings.trust_remote_code, tokenizer=tokenizer)
    model = language_model.model.to(getattr(torch, settings.dtype))
    try:
        model.set_attn_implementation(settings.attention)
        if model.config.get_text_config().to_dict().get("num_experts_per_tok"):
            model.set_experts_implementation("eager")  # grouped products have no forward-mode derivative
    except (ValueError, ImportError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{type(model).__name__} has no attn_implementation='{settings.attention}': choose 'eager' ({reason})"
        ) from error
    model.requires_grad_(False)
    return language_model


@dataclass(frozen=True)
class Ground:
    """Sequences dealt into batches.

    Args:
        sequences: on which the base's Fisher form is measured.
    """

    sequences: Sequences
    settings: GateSettings
    tokens: Array = field(init=False)
    batch_of: Any = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.sequences)
        dealt = shuffled_batches(count, min(self.settings.batches, count), self.settings.seed)
        object.__setattr__(self, "tokens", np.asarray(self.sequences.tokens, dtype=np.float64))
        object.__setattr__(self, "batch_of", np.asarray(dealt))

    @property
    def batches(self) -> int:
        return int(self.batch_of.max()) + 1

    def curvature(self, place: tuple[str, int | None, str | None], fisher: Array, squares: Array) -> Curvature:
        """Of one kind of direction, from sums over sequences."""
        return Curvature.of(place, fisher, squares, self.tokens, self.batch_of)


class _Study:
    """One base on its sequences, and the entries of the runs that were tuned from it."""

    def __init__(
        self,
        language_model: LanguageModel,
        base: Checkpoint,
        ground: Ground,
        prompts: Sequence[Sequence[int]] | None,
        settings: GateSettings,
        runs: int,
        progress: Progress | None,
    ) -> None:
        self.language_model, self.ground, self.prompts, self.settings = language_model, ground, prompts, settings
        options = (settings.rank_fraction, settings.density, settings.seed)
        self.matrices, self.left_out = linear_matrices(language_model.model, base, *options)
        self.cells = cells(self.matrices) if settings.per_layer else {}
        of_run = 1 + len(UPDATE_DIRECTIONS) * (1 + len(self.cells)) + len(RANDOM_DIRECTIONS) * settings.draws
        of_base = len(self.cells) * len(RANDOM_DIRECTIONS) * settings.layer_draws
        self._done, self._total, self._progress = 0, of_base + runs * of_run, progress
        self._random_cells: list[Curvature] | None = None

    def entry(self, run: str, tuned: Tuned) -> dict[str, Any]:
        """A run's entry of `gates.json`."""
        update = tuned.update()
        policy = tuned.policy() if tuned.has_masters else update
        divergence = self._divergence(policy)
        del policy
        sequences, tokens = self.ground.sequences, self.ground.tokens
        kl = kl_sums(self.language_model, update.tensors, FRACTIONS, sequences)
        fisher, _ = self._fisher(run, [lambda: update.tensors])
        pooled = self._pooled(run, update)
        curvatures = [*pooled, *self._update_cells(run, update), *self._shared_cells()]
        pairs = pair_rows(curvatures)
        known = [each for each in pooled if each.value is not None]
        least = min(known, key=lambda each: each.value or 0.0, default=None)
        smallest = None if least is None else {"direction": least.direction, "value": least.value}
        return {
            "weights": update.weights,
            "warnings": [*update.notes, *self._warnings()],
            "kl_cumulative": divergence.get("tuned") or divergence["given"],
            "kl_by_samples": divergence,
            "curve": curve(kl, fisher[0], tokens),
            "curvature": curvature_rows(curvatures, pairs),
            "curvature_pairs": pairs,
            "curvature_draws": draw_rows(curvatures),
            "norm_bound": norm_bound(kl[-1], fisher[0], tokens, update.norm, smallest),
        }

    def _divergence(self, policy: Update) -> dict[str, dict[str, Any]]:
        """KL(π_new‖π_old) on the policy's own continuations, if any are sampled, and on the sequences at hand."""
        model, ground = self.language_model, self.ground.sequences
        measured = [ground]
        if self.prompts is not None:
            with moved_by(model.model, policy.tensors):
                own = sample_continuations(
                    model, self.prompts, self.settings.max_new_tokens, self.settings.seed, samples="tuned"
                )
            measured = [own, ground]
        return {
            each.samples: mean_with_interval(kl_sums(model, policy.tensors, [1.0], each)[0], each.tokens)
            for each in measured
        }

    def _pooled(self, run: str, update: Update) -> list[Curvature]:
        """Of all linear matrices at once; each random direction has the norm of the update in every matrix."""
        moved = update.tensors
        parts = [partial(update_direction, self.matrices, moved, each) for each in UPDATE_DIRECTIONS]
        fisher, squares = self._fisher(run, parts)
        found = [
            self.ground.curvature((direction, None, None), fisher[i : i + 1], squares[i : i + 1])
            for i, direction in enumerate(UPDATE_DIRECTIONS)
        ]
        for direction in RANDOM_DIRECTIONS:
            drawn = [
                partial(random_direction, self.matrices, direction, draw, moved) for draw in range(self.settings.draws)
            ]
            found.append(self.ground.curvature((direction, None, None), *self._fisher(run, drawn)))
        return found

    def _update_cells(self, run: str, update: Update) -> list[Curvature]:
        """Of the update's two parts in each layer and role."""
        found = []
        for place, matrices in self.cells.items():
            parts = [partial(update_direction, matrices, update.tensors, each) for each in UPDATE_DIRECTIONS]
            fisher, squares = self._fisher(run, parts)
            for i, direction in enumerate(UPDATE_DIRECTIONS):
                rows = slice(i, i + 1)
                found.append(self.ground.curvature((direction, *place), fisher[rows], squares[rows]))
        return found

    def _shared_cells(self) -> list[Curvature]:
        """Of random directions in each layer and role, which are the same for all runs."""
        if self._random_cells is None:
            self._random_cells = [each for place in self.cells for each in self._random_cell(place)]
        return self._random_cells

    def _random_cell(self, place: tuple[int | None, str]) -> list[Curvature]:
        draws = self.settings.layer_draws
        drawn = [
            partial(random_direction, self.cells[place], direction, draw)
            for direction in RANDOM_DIRECTIONS
            for draw in range(draws)
        ]
        fisher, squares = self._fisher("the base", drawn)
        return [
            self.ground.curvature((direction, *place), fisher[i * draws :][:draws], squares[i * draws :][:draws])
            for i, direction in enumerate(RANDOM_DIRECTIONS)
        ]

    def _fisher(self, run: str, directions: Sequence[Callable[[], Direction]]) -> tuple[Array, Array]:
        return fisher_sums(self.language_model, directions, self.ground.sequences, partial(self._advance, run))

    def _advance(self, run: str, directions: int) -> None:
        self._done += directions
        if self._progress is not None:
            self._progress(self._done, self._total, run)

    def _warnings(self) -> list[str]:
        found = []
        if self.ground.batches < ENOUGH_BATCHES:
            found.append(
                f"there are only {self.ground.batches} batches; intervals and sign tests of the curvature need "
                f"{ENOUGH_BATCHES} or more: give more prompts or sequences"
            )
        if self.left_out:
            found.append(
                f"no curvature is measured in {len(self.left_out)} matrices, such as {self.left_out[0]}: transformers "
                "has them under another name or shape, or they have no principal subspace of this rank"
            )
        return found
