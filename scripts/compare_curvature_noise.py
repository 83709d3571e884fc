"""How much noise the forward-mode Fisher form saves: three estimators that sample labels, on the same batches.

    python scripts/compare_curvature_noise.py BASE TUNED --task add --task sort

Measures DᵀFD/‖D‖² of the same directions on the same sequences by

- `forward`: the variance of the logits' derivative over the vocabulary, as `offprincipal gates` does: no label drawn;
- `label`: (∇log π(y_t)·D)² with one label y_t ∼ π drawn at every position;
- `score`: (Σ_t ∇log π(y_t)·D)² of each sequence with its own sampled tokens: what per-sequence gradients give;
- `hessian`: Dᵀ∇²(−log π(y_t))D with one drawn label: what Hessian-vector products on minibatches give.

For each it prints the standard error over batches relative to `forward`'s (the median over layers, roles and
directions), the noise that the labels alone add, what one evaluation costs beside a forward-mode one when done as it
usually is (`score` by one backward pass, which leaves out what separate sequences add; `hessian` by two), the standard
error on the same time, and how many pairs of directions each separates by two standard errors.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp

from offprincipal.checkpoints import open_checkpoint
from offprincipal.gates.directions import (
    PAIRS,
    RANDOM_DIRECTIONS,
    UPDATE_DIRECTIONS,
    cells,
    linear_matrices,
    random_direction,
    update_direction,
)
from offprincipal.gates.measure import GateSettings, open_for_derivatives
from offprincipal.gates.sequences import (
    encode_prompts,
    sample_continuations,
    shuffled_batches,
    task_prompts,
)
from offprincipal.gates.updates import Tuned
from offprincipal.models import model_name
from offprincipal.models.fisher import Batch, batches_within, logit_derivatives, logit_variances
from offprincipal.models.float64 import computing_in
from offprincipal.tasks import open_task
from offprincipal.tasks.prompting import prompting

ESTIMATORS = ("forward", "label", "score", "hessian")
DIRECTIONS = (*UPDATE_DIRECTIONS, *RANDOM_DIRECTIONS)
LABEL_DRAWS = 8
TOKENS = 2048
STEP = 1e-3  # of unit directions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("tuned")
    parser.add_argument("--task", action="append", required=True)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--prompts-per-batch", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--cells", type=int, default=None, help="only the first so many layers and roles")
    given = parser.parse_args()
    settings = GateSettings(given.batches, given.prompts_per_batch, given.max_new_tokens, dtype="float64")
    with computing_in(settings.dtype):
        study = Study(given.base, given.tuned, given.task, settings, given.cells)
        size = f"{len(study.cells)} matrices, {len(DIRECTIONS)} directions, {settings.batches} batches"
        print(f"{size}, {study.total} tokens", flush=True)
        tables, label_noise = study.tables()
        costs = study.costs()
    report(tables, {name: values.numpy() for name, values in label_noise.items()}, costs, study.tokens)


class Study:
    """The base, its sequences in batches, and the directions."""

    def __init__(self, base: str, tuned: str, tasks: list[str], settings: GateSettings, most: int | None) -> None:
        self.language_model = open_for_derivatives(base, settings)
        self.model = self.language_model.model
        checkpoint = open_checkpoint(model_name(base))
        asking = prompting(None, self.language_model.tokenizer, map(open_task, tasks))
        prompts = task_prompts(asking, settings.batches * settings.prompts_per_batch, settings.seed)
        encoded = encode_prompts(self.language_model, prompts, settings.max_new_tokens)
        room = settings.max_new_tokens
        self.sequences = sample_continuations(self.language_model, encoded, room, settings.seed, "base")
        self.batch_of = torch.tensor(shuffled_batches(len(self.sequences), settings.batches, settings.seed))
        self.count = settings.batches
        self.tokens = np.bincount(self.batch_of, weights=self.sequences.tokens)
        self.total = sum(self.sequences.tokens)
        self.update = Tuned(self.language_model, checkpoint, tuned, settings.weights).update().tensors
        matrices, _ = linear_matrices(self.model, checkpoint, settings.rank_fraction, settings.density, settings.seed)
        self.cells = dict(list(cells(matrices).items())[:most])
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters()}

    def directions(self, cell: tuple[int | None, str]) -> dict[str, Tensor]:
        """The six directions of a cell, of unit norm, stacked: parameter -> (6, *shape)."""
        matrices = self.cells[cell]
        made = [update_direction(matrices, self.update, each) for each in UPDATE_DIRECTIONS]
        made += [random_direction(matrices, each, 0) for each in RANDOM_DIRECTIONS]
        norms = [sum(x.square().sum() for x in each.values()).sqrt() for each in made]
        return {name: torch.stack([d[name] / n for d, n in zip(made, norms, strict=True)]) for name in made[0]}

    def logits(self, batch: Batch, moving: dict[str, Tensor]) -> Tensor:
        arguments = {"input_ids": batch.ids, "use_cache": False}
        return functional_call(self.model, self.parameters | moving, (), arguments).logits

    @torch.no_grad()
    def twice_along(self, stack: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits with their first and second derivatives along each direction, where the batch counts.

        The first by forward mode; the second by central differences in float64, since few activations have two
        forward-mode derivatives.
        """
        z, first = logit_derivatives(self.model, stack, batch)
        second = torch.stack([self.bend(batch, {n: d[i] for n, d in stack.items()}, z) for i in range(len(first))])
        return z, first, second

    def bend(self, batch: Batch, direction: dict[str, Tensor], z: Tensor) -> Tensor:
        ends = []
        for step in (STEP, -STEP):
            moving = {name: self.parameters[name] + step * d for name, d in direction.items()}
            ends.append(self.logits(batch, moving)[batch.counted])
        return (ends[0] + ends[1] - 2 * z) / STEP**2

    def tables(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Estimator -> (cells, directions, batches), sums over tokens; and (cells, directions), the standard deviation
        over redrawn labels of the mean over all tokens."""
        shape = (len(self.cells), len(DIRECTIONS), self.count)
        found = {name: torch.zeros(shape, dtype=torch.float64) for name in ESTIMATORS}
        redrawn = {n: torch.zeros(LABEL_DRAWS, *shape[:2], dtype=torch.float64) for n in ("label", "hessian")}
        for place, cell in enumerate(self.cells):
            stack, generator = self.directions(cell), torch.Generator().manual_seed(place)
            for chosen, batch in batches_within(self.sequences.ids, self.sequences.first, TOKENS, torch.device("cpu")):
                z, first, second = self.twice_along(stack, batch)
                rows = batch.row_of_token
                of_token = self.batch_of[torch.tensor(chosen)][rows]
                drawn = [label_sampled(z, first, second, generator) for _ in range(LABEL_DRAWS)]
                for draw, sampled in enumerate(drawn):
                    for name in redrawn:
                        redrawn[name][draw, place] += sampled[name].sum(-1)
                once = {"forward": logit_variances(z, first), **drawn[0]}
                for name, values in once.items():
                    found[name][place].index_add_(1, of_token, values)
                scores = torch.zeros(len(DIRECTIONS), len(chosen), dtype=torch.float64)
                scores.index_add_(1, rows, score(z, first, self.own_labels(chosen, batch, z, generator)))
                found["score"][place].index_add_(1, self.batch_of[torch.tensor(chosen)], scores.square())
        return found, {name: values.std(0) / self.total for name, values in redrawn.items()}

    def own_labels(self, chosen: list[int], batch: Batch, z: Tensor, generator: torch.Generator) -> Tensor:
        """The token that follows each counted position; that after the last was not kept, and is drawn anew."""
        following = batch.ids.roll(-1, dims=1)[batch.counted]
        last = torch.cat([torch.arange(n) == n - 1 for n in batch.counted.sum(1).tolist()])
        return torch.where(last, draw_labels(z, generator), following)

    def costs(self) -> dict[str, float]:
        """Seconds of one evaluation of one direction in the middle layer, on the first batch of sequences."""
        cell = list(self.cells)[len(self.cells) // 2]
        stack = self.directions(cell)
        direction = {name: x[0] for name, x in stack.items()}
        _, batch = next(batches_within(self.sequences.ids, self.sequences.first, TOKENS, torch.device("cpu")))
        moved = {name: self.parameters[name] for name in direction}
        with torch.no_grad():
            labels = draw_labels(self.logits(batch, {})[batch.counted], torch.Generator().manual_seed(0))

        def log_likelihood(moving: dict[str, Tensor]) -> Tensor:
            log_p = self.logits(batch, moving)[batch.counted].log_softmax(-1)
            return log_p.gather(1, labels[:, None]).sum()

        forward = seconds(lambda: jvp(lambda m: self.logits(batch, m), (moved,), (direction,)))
        backward = seconds(lambda: grad(log_likelihood)(moved))

        def product() -> object:  # by two backward passes, as a Hessian-vector product usually is
            leaves = {name: x.clone().requires_grad_() for name, x in moved.items()}
            first = torch.autograd.grad(log_likelihood(leaves), list(leaves.values()), create_graph=True)
            along = sum((g * direction[name]).sum() for name, g in zip(leaves, first, strict=True))
            return torch.autograd.grad(along, list(leaves.values()))

        return {"forward": forward, "label": forward, "score": backward, "hessian": seconds(product)}


def label_sampled(z: Tensor, first: Tensor, second: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The squared score and the second derivative of −log π at drawn labels; each (directions, tokens)."""
    labels = draw_labels(z, generator)
    p = z.double().softmax(-1)
    bend = torch.einsum("tv,dtv->dt", p, second.double()) - at_labels(second, labels)
    return {"label": score(z, first, labels).square(), "hessian": logit_variances(z, first) + bend}


def score(z: Tensor, first: Tensor, labels: Tensor) -> Tensor:
    """∇log π(y)·D of each token; (directions, tokens)."""
    return at_labels(first, labels) - torch.einsum("tv,dtv->dt", z.double().softmax(-1), first.double())


def at_labels(table: Tensor, labels: Tensor) -> Tensor:
    return table.gather(2, labels[None, :, None].expand(len(table), -1, 1))[..., 0].double()


def draw_labels(z: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(z.double().softmax(-1), 1, generator=generator)[:, 0]


def seconds(run: Callable[[], object], repeats: int = 7) -> float:
    """The median processor time of a call, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def report(
    tables: dict[str, Tensor], label_noise: dict[str, np.ndarray], costs: dict[str, float], tokens: np.ndarray
) -> None:
    values = {name: table.numpy() / tokens for name, table in tables.items()}  # (cells, directions, batches)
    errors = {name: standard_error(v) for name, v in values.items()}
    pairs = [(DIRECTIONS.index(a), DIRECTIONS.index(b)) for a, b in PAIRS]
    print(
        "\nestimator | mean over forward's | standard error over forward's | label noise over forward's standard error "
        "| cost over forward's | standard error at equal cost | pairs beyond 2 standard errors"
    )
    for name in ESTIMATORS:
        ratio = float(np.median(errors[name] / errors["forward"]))
        cost = costs[name] / costs["forward"]
        labels = float(np.median(label_noise[name] / errors["forward"])) if name in label_noise else None
        mean = float(np.median(values[name].mean(-1) / values["forward"].mean(-1)))
        separated = [count_separated(values[name], first, second) for first, second in pairs]
        shown = "–" if labels is None else f"{labels:.2f}"
        found = ", ".join(f"{count} of {len(values[name])}" for count in separated)
        print(f"{name} | {mean:.3f} | {ratio:.2f} | {shown} | {cost:.2f} | {ratio * cost**0.5:.2f} | {found}")
    print("\npairs, in order: " + ", ".join(f"{a} / {b}" for a, b in PAIRS))
    print("standard error over forward's, by direction:")
    for i, direction in enumerate(DIRECTIONS):
        ratios = (f"{name} {np.median(errors[name][:, i] / errors['forward'][:, i]):.2f}" for name in ESTIMATORS[1:])
        print(f"  {direction}: {', '.join(ratios)}")


def standard_error(values: np.ndarray) -> np.ndarray:
    return values.std(-1, ddof=1) / values.shape[-1] ** 0.5


def count_separated(values: np.ndarray, first: int, second: int) -> int:
    """Cells whose paired difference lies two standard errors or more from zero."""
    differences = values[:, first] - values[:, second]
    return int((np.abs(differences.mean(-1)) >= 2 * standard_error(differences)).sum())


if __name__ == "__main__":
    main()
