"""The embedded base: what its card says of it, and the nulls on its real weights against weight-blind updates."""

import json
import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from bits import class_counts, line_dispersion
from matrices import gaussian
from pretraining import pretraining_script
from torch import Tensor

from offprincipal.assets import embedded_base
from offprincipal.comparison import CompareSettings
from offprincipal.comparison.work import Work
from offprincipal.geometry.masks import low_magnitude_ranks
from offprincipal.geometry.nulls import intersection_null, overlap_null
from offprincipal.geometry.precision import changed, exponent_class
from offprincipal.geometry.principal import principal_rank, principal_ranks
from offprincipal.geometry.spectrum import decompose
from offprincipal.measures.spectral import to_tensor
from offprincipal.tasks import mixture, open_task, split_of, symbolic_kinds
from offprincipal.training import evaluate

SEEDS = range(12)
SIZE = 1e-4  # of a weight-blind update, near what a short GRPO run does


@cache
def matrices() -> dict[str, Tensor]:
    work = Work(str(embedded_base()), {"same": str(embedded_base())}, CompareSettings())
    linear = [part for part in work.parts if work.is_linear(part)]
    read = work.base_checkpoint.read
    return {part.name: to_tensor(part.of(read(part.tensor, part.start, part.stop))) for part in linear}


@cache
def blind_changes(seed: int) -> dict[str, Tensor]:
    """Which entries change under a Gaussian update that ignores the weights."""
    return {
        name: changed(W, W.double() + SIZE * gaussian(*W.shape, seed=10_000 * seed + i))
        for i, (name, W) in enumerate(matrices().items())
    }


@cache
def half_mask(name: str, mask: str) -> Tensor:
    W = matrices()[name]
    if mask == "low_magnitude":
        return low_magnitude_ranks(W) < W.numel() // 2
    svd = decompose(W).top(principal_rank(W.shape, 0.125))
    return principal_ranks(svd.U, svd.S, svd.Vh) < W.numel() // 2


def pooled_z(count: Callable[[str], tuple[int, float, float]]) -> float:
    """(Σ observed − Σ expected)/√Σ variance over all matrices."""
    observed, expected, variance = (sum(part) for part in zip(*map(count, matrices()), strict=True))
    return (observed - expected) / math.sqrt(variance)


def require_standard_normal(z: list[float]) -> None:
    """Mean 0 and variance 1, each within five standard errors; no single value beyond four."""
    values = torch.tensor(z, dtype=torch.float64)
    print("z:", " ".join(f"{x:+.2f}" for x in z), f"mean {values.mean():+.2f} sd {values.std():.2f}")
    assert abs(values.mean().item()) < 5 / len(z) ** 0.5
    assert abs(values.var().item() - 1) < 5 * (2 / (len(z) - 1)) ** 0.5
    assert float(values.abs().max()) < 4


@pytest.mark.parametrize("mask", ["principal", "low_magnitude"])
def test_overlaps_of_weight_blind_updates_of_the_real_base_agree_with_the_precision_null(mask: str) -> None:
    def z(seed: int) -> float:
        def count(name: str) -> tuple[int, float, float]:
            moved, inside, classes = blind_changes(seed)[name], half_mask(name, mask), exponent_class(matrices()[name])
            null = overlap_null(class_counts(classes), class_counts(classes, moved), class_counts(classes, inside))
            return int((moved & inside).sum()), null.expected, null.variance

        return pooled_z(count)

    require_standard_normal([z(seed) for seed in SEEDS])


def test_jaccards_of_weight_blind_updates_of_the_real_base_agree_with_the_precision_null() -> None:
    def z(seed: int) -> float:
        def count(name: str) -> tuple[int, float, float]:
            a, b, classes = blind_changes(seed)[name], blind_changes(seed + 1)[name], exponent_class(matrices()[name])
            null = intersection_null(class_counts(classes), class_counts(classes, a), class_counts(classes, b))
            return int((a & b).sum()), null.expected, null.variance

        return pooled_z(count)

    require_standard_normal([z(seed) for seed in SEEDS[::2]])


def test_rows_of_weight_blind_updates_of_the_real_base_show_no_stripes() -> None:
    found = [line_dispersion(W, blind_changes(0)[name], 0) for name, W in matrices().items()]
    values = torch.tensor([x for x in found if x is not None], dtype=torch.float64)
    assert abs(values.mean().item() - 1) < 5 * values.std().item() / len(values) ** 0.5


def test_the_base_fits_its_budget() -> None:
    assert (embedded_base() / "model.safetensors").stat().st_size <= 8_000_000
    assert all(W.dtype == torch.bfloat16 for W in matrices().values())


def test_the_card_tells_the_accuracies_that_the_model_has() -> None:
    """Measured again on two tasks: within four standard errors of the record."""
    record = json.loads((embedded_base() / "evaluation.json").read_text())
    within = [kind for kind, score in record["accuracy"].items() if 0.3 <= score["sampled_accuracy"] <= 0.8]
    assert set(record["accuracy"]) == set(symbolic_kinds()) and len(within) >= 6
    for kind in ("add", "sort"):
        found = evaluate(embedded_base(), [kind], prompts=128, samples=4, seed=3)
        claimed = record["accuracy"][kind]["sampled_accuracy"]
        assert abs(found["sampled_accuracy"] - claimed) < 4 * math.sqrt(2) * found["sampled_accuracy_se"]
    card = (embedded_base() / "README.md").read_text()
    assert f"{record['accuracy']['add']['sampled_accuracy']:.1%}" in card


def test_pretraining_shows_training_prompts_alone_and_one_wrong_character_at_most() -> None:
    script = pretraining_script()
    recipe, tokenizer = script.Recipe(batch=96), script.build_tokenizer()
    answers = {}
    for kind in symbolic_kinds():
        for problem in mixture([open_task(kind)], "train", 96 // 12, seed=recipe.seed):
            answers[problem.prompt] = problem.answer
    wrong = 0
    for ids, labels in script.micro_batches(recipe, tokenizer, 0):
        for row, row_labels in zip(ids, labels, strict=True):
            shown = tokenizer.decode(row[row_labels == -100], skip_special_tokens=True)
            answer = tokenizer.decode(row_labels[row_labels != -100], skip_special_tokens=True)
            assert split_of(shown) == "train"
            differing = sum(a != b for a, b in zip(answer, answers[shown], strict=True))
            assert differing <= 1
            wrong += differing
    assert 10 <= wrong <= 50  # 96 answers, 30 % corrupted


def test_the_learning_rate_warms_up_decays_and_ends_at_nothing() -> None:
    script = pretraining_script()
    recipe = script.Recipe()
    rates = [script.learning_rate(recipe, step) for step in range(recipe.steps + 1)]
    assert max(rates) <= recipe.learning_rate and rates[-1] == 0
    assert rates[recipe.warmup :] == sorted(rates[recipe.warmup :], reverse=True)
