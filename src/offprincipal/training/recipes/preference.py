"""Preference recipes, on completions that the base samples before the first step and that verifiers judge.

Verifiable tasks have no preference data, so the verifiers decide. The reference policy is a frozen second copy of the
base, so that it is independent of how the trained model is wrapped.
"""

import importlib
import random
from dataclasses import replace
from typing import Any

from offprincipal.models import LanguageModel, open_language_model
from offprincipal.training.recipes.judged import Columns, kept_or_sampled, sampled_examples, sampled_pairs
from offprincipal.training.recipes.run import RecipeRun, dataset


def dpo(run: RecipeRun) -> Any:
    """Direct preference optimization (arXiv 2305.18290) with the sigmoid loss, on pairs for the same prompt."""
    trl: Any = importlib.import_module("trl")
    reference = _reference(run)
    pairs = kept_or_sampled(run, reference, sampled_pairs)
    arguments = run.configured(trl.DPOConfig, **_beta(run), max_length=None)
    return _taking_tokens(trl.DPOTrainer)(
        **run.trainer, ref_model=reference.model, args=arguments, train_dataset=dataset(pairs)
    )


def kto(run: RecipeRun) -> Any:
    """Kahneman-Tversky optimization (arXiv 2402.01306): each completion is compared with a common reference point.

    The reference point is a KL divergence that TRL estimates in each micro-batch, from prompts paired with the
    completion of the previous example. The examples of a step are shuffled, so that the two seldom share a prompt.
    """
    trl: Any = importlib.import_module("trl")
    reference = _reference(run)
    examples = _shuffled_steps(kept_or_sampled(run, reference, sampled_examples), run.settings.batch, run.settings.seed)
    examples["KL_completion_ids"] = _of_the_one_before(
        examples["completion_ids"], run.arguments["per_device_train_batch_size"]
    )
    arguments = run.configured(trl.KTOConfig, **_beta(run), max_length=None)
    return _taking_tokens(trl.KTOTrainer)(
        **run.trainer, ref_model=reference.model, args=arguments, train_dataset=dataset(examples)
    )


def _reference(run: RecipeRun) -> LanguageModel:
    settings = run.settings
    reference = open_language_model(settings.model, settings.device, settings.trust_remote_code)
    reference.model.requires_grad_(False)
    return replace(reference, stops=run.prompting.stop_ids)


def _beta(run: RecipeRun) -> dict[str, float]:
    return {} if run.settings.beta is None else {"beta": run.settings.beta}


def _taking_tokens(trainer: Any) -> Any:
    """The trainer for data that are tokens already: decoding and tokenizing again could give other tokens."""
    return type(trainer.__name__, (trainer,), {"_prepare_dataset": lambda self, data, *_: data})


def _shuffled_steps(columns: Columns, batch: int, seed: int) -> Columns:
    """The examples, shuffled within each step."""
    size = len(columns["label"])
    chance = random.Random(seed)
    order: list[int] = []
    for start in range(0, size, batch):
        order += chance.sample(range(start, start + batch), batch)
    return {name: [values[i] for i in order] for name, values in columns.items()}


def _of_the_one_before(completions: list[Any], micro_batch: int) -> list[Any]:
    """For each example the completion of the previous one in its micro-batch; for the first that of the last."""
    micro_batches = [completions[start : start + micro_batch] for start in range(0, len(completions), micro_batch)]
    return [completion for part in micro_batches for completion in (part[-1], *part[:-1])]
