"""Reinforcement learning on the policy's own completions, rewarded by the tasks' verifiers, without a KL term."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from offprincipal.errors import TrainingError
from offprincipal.training.recipes.run import RecipeRun, dataset

RIGHT, WRONG = 1.0, -1.0


def grpo(run: RecipeRun) -> Any:
    """GRPO with DAPO's token-level loss (arXiv 2503.14476); advantages are scaled by the group's standard deviation."""
    trl: Any = importlib.import_module("trl")
    return _trainer(run, trl.GRPOTrainer, trl.GRPOConfig, loss_type="dapo")


def dr_grpo(run: RecipeRun) -> Any:
    """Dr. GRPO (arXiv 2503.20783): token losses are summed over a constant length, and advantages are not scaled."""
    trl: Any = importlib.import_module("trl")
    return _trainer(run, trl.GRPOTrainer, trl.GRPOConfig, loss_type="dr_grpo", scale_rewards="none")


def rloo(run: RecipeRun) -> Any:
    """REINFORCE leave-one-out (arXiv 2402.14740): the baseline is the mean reward of the prompt's other completions."""
    trl: Any = importlib.import_module("trl")
    trainer = _trainer(run, trl.RLOOTrainer, trl.RLOOConfig)
    if "ref" in getattr(trainer.model, "peft_config", ()):  # TRL adds it for a KL term, which this loss does not have
        trainer.model.delete_adapter("ref")
    return trainer


def _trainer(run: RecipeRun, trainer: Any, configuration: Any, **loss: Any) -> Any:
    """A trainer with the options of its loss, after a check that every prompt fits the context."""
    run.require_room(run.language_model)
    settings = run.settings
    if settings.vllm is not None:
        if importlib.util.find_spec("vllm") is None:
            raise TrainingError("vllm is not installed: pip install vllm on a machine with a GPU, or leave vllm out")
        loss |= {"use_vllm": True, "vllm_mode": settings.vllm}
    arguments = run.configured(
        configuration,
        **loss,
        beta=0.0,
        shuffle_dataset=False,
        num_generations=settings.rollouts_per_prompt,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
    )
    data = dataset({"prompt": run.prompts, "row": list(range(len(run.problems)))})
    return trainer(**run.trainer, reward_funcs=_verifier(run), args=arguments, train_dataset=data)


def _verifier(run: RecipeRun) -> Callable[..., list[float]]:
    """The reward: +1 for a verified completion and -1 for any other."""
    prompting, problems = run.prompting, run.problems

    def verified(completions: Sequence[str], row: Sequence[int], **_: Any) -> list[float]:
        return [
            RIGHT if prompting.verify(problems[i], completion) else WRONG
            for i, completion in zip(row, completions, strict=True)
        ]

    return verified
