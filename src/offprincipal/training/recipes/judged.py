"""Preference data: completions of training problems by the base, judged by the tasks' verifiers.

Deterministic given the seed. The samples are kept in the folder of checkpoints until the run is complete, so that an
interrupted run continues with the same data. Knows nothing of losses.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from offprincipal.errors import TrainingError
from offprincipal.files import ordinary, require_folder, write_atomically
from offprincipal.models import LanguageModel, hash_of
from offprincipal.models.decoding import complete
from offprincipal.models.quiet import quiet_libraries
from offprincipal.tasks import Problem, Task, problems
from offprincipal.training.processes import in_main
from offprincipal.training.progress import StepReport
from offprincipal.training.recipes.run import RecipeRun

KEPT = "judged.parquet"
_PROMPTS_AT_ONCE = 64
_TRIAL = 512  # prompts after which sampling stops if too few of them give a pair
_LEAST_SHARE = 0.02  # smallest share of prompts with a verified and a failed completion: one pair in 50 prompts

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class _Answered:
    """The tokens of a prompt and of its completions, and whether each completion was verified."""

    prompt_ids: list[int]
    completions: list[list[int]]
    verdicts: list[bool]


def kept_or_sampled(
    run: RecipeRun, base: LanguageModel, sample: Callable[[RecipeRun, LanguageModel], Columns]
) -> Columns:
    """The samples that the run kept before it was interrupted; otherwise new samples, which are then kept.

    Args:
        run: the run.
        base: the model that samples.
        sample: `sampled_pairs` or `sampled_examples`.

    Raises:
        TrainingError: there are too few pairs, or all completions have the same verdict.
        ModelError: a prompt and its completion do not fit into the context.
        FileError: the sample cannot be written.
    """
    key = {b"run": json.dumps(run.settings.model_dump(mode="json")).encode(), b"base": _hash(base)}
    path = run.checkpoints / KEPT

    def kept_or_new() -> Columns:
        if path.exists():
            table = pq.read_table(ordinary(path))
            if table.schema.metadata == key:
                kept: Columns = table.to_pydict()
                return kept
        columns = sample(run, base)
        require_folder(run.checkpoints)
        table = pa.table(columns).replace_schema_metadata(key)
        write_atomically(path, lambda temporary: pq.write_table(table, temporary))
        return columns

    return in_main(kept_or_new)


def sampled_pairs(run: RecipeRun, base: LanguageModel) -> Columns:
    """The first verified and the first failed completion for each of steps · batch prompts.

    Prompts without both are skipped and replaced by others.

    Returns:
        `prompt_ids`, `chosen_ids`, `rejected_ids`: token ids.

    Raises:
        TrainingError: fewer than 2 % of the prompts have both.
    """
    wanted = run.settings.steps * run.settings.batch
    columns: Columns = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    drawn = verified = 0
    for answered in _answered(run, base):
        drawn += 1
        verified += sum(answered.verdicts)
        if any(answered.verdicts) and not all(answered.verdicts):
            columns["prompt_ids"].append(answered.prompt_ids)
            columns["chosen_ids"].append(answered.completions[answered.verdicts.index(True)])
            columns["rejected_ids"].append(answered.completions[answered.verdicts.index(False)])
        pairs = len(columns["prompt_ids"])
        if pairs == wanted:
            return columns
        if drawn >= _TRIAL and pairs < _LEAST_SHARE * drawn:
            break
        if drawn % _PROMPTS_AT_ONCE == 0:
            _show(run, pairs)
    share = verified / (drawn * run.settings.rollouts_per_prompt)
    raise TrainingError(
        f"{pairs} of {drawn} training prompts got both a verified and a failed completion from {run.settings.model}, "
        f"and {share:.1%} of all completions are verified: too few pairs for {run.settings.recipe}. Choose harder or "
        "easier tasks, or another temperature, rollouts_per_prompt or max_new_tokens"
    )


def sampled_examples(run: RecipeRun, base: LanguageModel) -> Columns:
    """steps · batch completions, rollouts_per_prompt for each prompt, with their verdicts.

    Returns:
        `prompt_ids`, `completion_ids`: token ids; `label`: whether the completion was verified.

    Raises:
        TrainingError: all completions have the same verdict.
    """
    wanted = run.settings.steps * run.settings.batch
    columns: Columns = {"prompt_ids": [], "completion_ids": [], "label": []}
    for answered in _answered(run, base):
        columns["prompt_ids"] += [answered.prompt_ids] * len(answered.verdicts)
        columns["completion_ids"] += answered.completions
        columns["label"] += answered.verdicts
        if len(columns["label"]) >= wanted:
            break
        if len(columns["label"]) % (_PROMPTS_AT_ONCE * run.settings.rollouts_per_prompt) == 0:
            _show(run, len(columns["label"]))
    columns = {name: values[:wanted] for name, values in columns.items()}
    if all(columns["label"]) or not any(columns["label"]):
        verdict = "verified" if columns["label"][0] else "failed"
        raise TrainingError(
            f"all {wanted} completions sampled from {run.settings.model} are {verdict}, but {run.settings.recipe} "
            "needs both kinds. Choose harder or easier tasks, or another temperature or max_new_tokens"
        )
    return columns


def _answered(run: RecipeRun, base: LanguageModel) -> Iterator[_Answered]:
    """An endless stream of training prompts, from the tasks in turn, with sampled completions."""
    settings = run.settings
    stream = _endless(run.tasks, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    samples = settings.rollouts_per_prompt
    while True:
        asked = list(itertools.islice(stream, _PROMPTS_AT_ONCE))
        prompts = [base.prompt_ids(run.prompting.prompt(problem), settings.max_new_tokens) for problem in asked]
        with quiet_libraries():
            batch = complete(
                base, prompts, samples, settings.max_new_tokens, generator, temperature=settings.temperature
            )
        whole = batch.whole
        texts = base.tokenizer.batch_decode(whole, skip_special_tokens=True)
        for place, (problem, prompt_ids) in enumerate(zip(asked, prompts, strict=True)):
            own = range(
                place * (1 + samples) + 1, (place + 1) * (1 + samples)
            )  # skips the greedy completion, which comes first
            verdicts = [run.prompting.verify(problem, texts[i]) for i in own]
            yield _Answered(prompt_ids, [whole[i] for i in own], verdicts)


def _endless(tasks: Mapping[str, Task], seed: int) -> Iterator[Problem]:
    streams = itertools.cycle([problems(task, "train", seed) for task in tasks.values()])
    return (next(stream) for stream in streams)


def _show(run: RecipeRun, sampled: int) -> None:
    run.show(StepReport("sampling preferences", sampled // run.settings.batch, run.settings.steps, "loss"))


def _hash(base: LanguageModel) -> bytes:
    return hash_of(base.model.state_dict()).encode()
