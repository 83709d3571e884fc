"""Completions that the base samples of training problems, judged by the tasks' verifiers, and kept with the run.

Deterministic in the seed. What was sampled lies beside the trainer's checkpoints until the run is complete, so that a
killed run continues on the same data. Knows nothing of losses.
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
_TRIAL = 512  # prompts after which the share that tells anything is judged
_LEAST_SHARE = 0.02  # of prompts with both a verified and a failed completion: below, a pair costs fifty prompts

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class _Answered:
    """A prompt's tokens and, of each of its completions, the tokens and whether it was verified."""

    prompt_ids: list[int]
    completions: list[list[int]]
    verdicts: list[bool]


def kept_or_sampled(
    run: RecipeRun, base: LanguageModel, sample: Callable[[RecipeRun, LanguageModel], Columns]
) -> Columns:
    """What an earlier sitting of the run sampled, or what is sampled and kept now.

    Raises:
        TrainingError: there is too little to tell apart.
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
    """A verified and a failed completion for each of steps · batch prompts, the first of either kind.

    Prompts without both are passed over, and others are drawn in their place.

    Returns:
        `prompt_ids`, `chosen_ids`, `rejected_ids`: tokens.
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
        found = len(columns["prompt_ids"])
        if found == wanted:
            return columns
        if drawn >= _TRIAL and found < _LEAST_SHARE * drawn:
            break
        if drawn % _PROMPTS_AT_ONCE == 0:
            _show(run, found)
    share = verified / (drawn * run.settings.rollouts_per_prompt)
    raise TrainingError(
        f"{found} of {drawn} training prompts got both a verified and a failed completion from {run.settings.model}, "
        f"and {share:.1%} of all completions are verified: too few pairs for dpo. Choose harder or easier tasks, or "
        "another temperature, rollouts_per_prompt or max_new_tokens"
    )


def sampled_examples(run: RecipeRun, base: LanguageModel) -> Columns:
    """steps · batch completions, rollouts_per_prompt of each prompt, with their verdicts.

    Returns:
        `prompt_ids`, `completion_ids`: tokens; `label`: whether it was verified.
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
            f"all {wanted} completions sampled from {run.settings.model} are {verdict}: kto has nothing to tell apart. "
            "Choose harder or easier tasks, or another temperature or max_new_tokens"
        )
    return columns


def _answered(run: RecipeRun, base: LanguageModel) -> Iterator[_Answered]:
    """Training prompts without end, the tasks in turn, each with its sampled completions."""
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
            own = range(place * (1 + samples) + 1, (place + 1) * (1 + samples))  # the first of each is the greedy one
            verdicts = [run.prompting.verify(problem, texts[i]) for i in own]
            yield _Answered(prompt_ids, [whole[i] for i in own], verdicts)


def _endless(tasks: Mapping[str, Task], seed: int) -> Iterator[Problem]:
    streams = itertools.cycle([problems(task, "train", seed) for task in tasks.values()])
    return (next(stream) for stream in streams)


def _show(run: RecipeRun, found: int) -> None:
    run.show(StepReport("sampling preferences", found // run.settings.batch, run.settings.steps, "loss"))


def _hash(base: LanguageModel) -> bytes:
    return hash_of(base.model.state_dict()).encode()
