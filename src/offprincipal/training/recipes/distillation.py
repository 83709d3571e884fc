"""On-policy distillation: the student learns a teacher's next-token distributions on its own completions."""

import importlib
from typing import Any

from offprincipal.errors import TrainingError
from offprincipal.models import LanguageModel
from offprincipal.training.recipes.run import RecipeRun, dataset


def distill(run: RecipeRun) -> Any:
    """Minimise the exact reverse KL(student‖teacher) at every token, at the sampling temperature (arXiv 2306.13649)."""
    trl: Any = importlib.import_module("trl")
    teacher = run.teacher
    assert teacher is not None, "the settings require a teacher"
    run.require_room(run.language_model, teacher)
    arguments = run.configured(
        trl.DistillationConfig,
        shuffle_dataset=False,
        max_completion_length=run.settings.max_new_tokens,
        temperature=run.settings.temperature,
    )
    data = dataset({"prompt": run.prompts})
    return trl.DistillationTrainer(
        **run.trainer, teacher_model=teacher.model.requires_grad_(False), args=arguments, train_dataset=data
    )


def require_one_vocabulary(student: LanguageModel, teacher: LanguageModel, source: str) -> None:
    """Check that student and teacher have the same token ids.

    Args:
        source: the teacher's name, for the message.

    Raises:
        TrainingError: their vocabularies differ.
    """
    sizes = [int(m.model.config.get_text_config().vocab_size) for m in (student, teacher)]
    if sizes[0] != sizes[1] or student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise TrainingError(
            f"teacher '{source}' has another vocabulary than the model ({sizes[1]} tokens and {sizes[0]}): "
            "choose a teacher of the model's own family, or train on its text by supervised fine-tuning"
        )
