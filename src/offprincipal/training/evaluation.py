"""Evaluation on held-out prompts: greedy and sampled accuracy, pass@k, token entropy and KL divergence from the base.

Knows tasks and models; knows nothing of recipes or runs.
"""

import math
import statistics
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from offprincipal.errors import TrainingError
from offprincipal.models import LanguageModel, open_language_model
from offprincipal.models.decoding import Completions, complete
from offprincipal.models.quiet import quiet_libraries
from offprincipal.tasks import Problem, mixture, open_task, task_names
from offprincipal.tasks.prompt_settings import PromptSettings
from offprincipal.tasks.prompting import Prompting, prompting

_PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class _Score:
    """The verdicts on one prompt's completions."""

    task: str
    prompt: str
    greedy: bool
    sampled: list[bool]


def evaluate(
    model: str | Path | LanguageModel,
    tasks: str | Sequence[str],
    prompts: int = 256,
    samples: int = 8,
    seed: int = 0,
    reference: str | Path | LanguageModel | None = None,
    max_new_tokens: int = 40,
    device: str = "auto",
    prompt: PromptSettings | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure a model on held-out prompts, which no training run uses.

    Args:
        model: a folder, a Hugging Face id, `embedded`, or an open model.
        tasks: names for `open_task`, as a list or a string such as "add,sort@2", in equal shares.
        prompts: total number of held-out prompts.
        samples: completions sampled per prompt at temperature 1, in addition to the greedy one.
        seed: of prompts and samples; models that are measured with the same seed get the same prompts and noise.
        reference: the base for the KL divergence; None: not measured.
        max_new_tokens: longest completion, in tokens; a completion that reaches it is judged as it is.
        device: `auto`, `cpu` or `cuda`, for models that are opened here.
        prompt: how problems are presented to the model; None: as its tokenizer suggests.
        trust_remote_code: run Python code that comes with a checkpoint; only for checkpoints that you trust.

    Returns:
        `greedy_accuracy`, `sampled_accuracy` and `pass_at_k` (with k = samples: at least one sample is right), each
        with its standard error over distinct prompts (`…_se`); `prompts` and `distinct_prompts`, which is smaller if a
        task has fewer held-out prompts; `token_entropy` and `kl_to_base`, nats per sampled token, exact over the
        vocabulary, the latter None without a reference; `tokens_per_completion`; `samples`; and `tasks`: the accuracies
        with standard errors and both numbers of prompts for each task.

    Raises:
        TaskError: a task is unknown or has no held-out prompts.
        ModelError: the model does not exist, or a prompt does not fit its context.
        TrainingError: a number is below 1, or the reference has another vocabulary.

    >>> measured = evaluate("embedded", "add", prompts=2, samples=1, max_new_tokens=4, device="cpu")
    >>> measured["prompts"], measured["kl_to_base"], list(measured["tasks"])
    (2, None, ['add'])
    """
    counts = prompts, samples, max_new_tokens
    if not all(isinstance(count, int) for count in counts) or min(counts) < 1:
        raise TrainingError(
            f"prompts is {prompts!r}, samples {samples!r}, max_new_tokens {max_new_tokens!r}: each must be a whole "
            "number, at least 1"
        )
    by_name = {task.name: task for task in map(open_task, task_names(tasks))}
    problems = mixture(list(by_name.values()), "eval", prompts, seed)
    policy = _opened(model, device, trust_remote_code)
    asking = prompting(prompt, policy.tokenizer, by_name.values())
    policy = replace(policy, stops=asking.stop_ids)
    base = None if reference is None else _opened(reference, device, trust_remote_code)
    if base is not None and _vocabulary(base) != _vocabulary(policy):
        raise TrainingError("the reference model has another vocabulary than the model: measure without a reference")

    scores: list[_Score] = []
    tokens, entropy, divergence = 0, 0.0, 0.0
    other = None if reference is model else base  # the divergence of a model from itself is zero
    for asked, batch in _completed(policy, other, asking, problems, samples, max_new_tokens, seed):
        texts = policy.tokenizer.batch_decode(batch.whole, skip_special_tokens=True)
        for place, problem in enumerate(asked):
            answers = texts[place * (1 + samples) : (place + 1) * (1 + samples)]
            verdicts = [asking.verify(problem, answer) for answer in answers]
            scores.append(_Score(problem.task, problem.prompt, verdicts[0], verdicts[1:]))
        tokens += batch.tokens
        entropy += batch.entropy
        divergence += batch.divergence or 0.0

    of_task = {name: [score for score in scores if score.task == name] for name in by_name}
    return {
        **_accuracies(scores),
        "token_entropy": entropy / tokens,
        "kl_to_base": None if base is None else divergence / tokens,
        "tokens_per_completion": tokens / (prompts * samples),
        "samples": samples,
        "tasks": {name: _accuracies(own) for name, own in of_task.items() if own},
    }


def _completed(
    policy: LanguageModel,
    base: LanguageModel | None,
    asking: Prompting,
    problems: Sequence[Problem],
    samples: int,
    max_new_tokens: int,
    seed: int,
) -> Iterator[tuple[list[Problem], Completions]]:
    """Batches of problems of similar length, with their completions."""
    encoded = [policy.prompt_ids(asking.prompt(problem), max_new_tokens) for problem in problems]
    order = sorted(range(len(problems)), key=lambda i: len(encoded[i]))
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(order), _PROMPTS_AT_ONCE):
        chunk = order[start : start + _PROMPTS_AT_ONCE]
        with quiet_libraries():
            batch = complete(policy, [encoded[i] for i in chunk], samples, max_new_tokens, generator, base)
        yield [problems[i] for i in chunk], batch


def _opened(model: str | Path | LanguageModel, device: str, trust_remote_code: bool) -> LanguageModel:
    return model if isinstance(model, LanguageModel) else open_language_model(model, device, trust_remote_code)


def _vocabulary(language_model: LanguageModel) -> int:
    return int(language_model.model.config.get_text_config().vocab_size)


def _accuracies(scores: Sequence[_Score]) -> dict[str, Any]:
    """The accuracies with their standard errors, and the numbers of prompts."""
    values = {
        "greedy_accuracy": [float(score.greedy) for score in scores],
        "sampled_accuracy": [statistics.fmean(score.sampled) for score in scores],
        "pass_at_k": [float(any(score.sampled)) for score in scores],
    }
    asked = [(score.task, score.prompt) for score in scores]
    result: dict[str, Any] = {"prompts": len(scores), "distinct_prompts": len(set(asked))}
    for name, of_prompts in values.items():
        result[name] = statistics.fmean(of_prompts)
        result[f"{name}_se"] = standard_error(of_prompts, asked)
    return result


def standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """The standard error of a mean whose values come in clusters; values of one cluster are not independent.

    Args:
        values: (n,).
        clusters: (n,), the cluster of each value.

    Returns:
        In the units of the values; None if there is only one cluster.

    Source: the linearised variance of a ratio of cluster totals; without repeats, s/√n.

    >>> repeated = standard_error([0.0] * 3 + [1.0] * 6 + [0.0] * 3, "aaabbbcccddd")
    >>> repeated == standard_error([0.0, 1.0, 1.0, 0.0], "abcd")
    True
    """
    mean = statistics.fmean(values)
    off: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        off[cluster] = off.get(cluster, 0.0) + value - mean
    count = len(off)
    if count < 2:
        return None
    return math.sqrt(math.fsum(total**2 for total in off.values()) * count / (count - 1)) / len(values)
