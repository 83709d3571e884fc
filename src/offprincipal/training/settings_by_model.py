"""Defaults of a run that depend on its model: how problems are presented, and the longest completion."""

from offprincipal.assets import EMBEDDED
from offprincipal.models import model_name, open_tokenizer, to_be_found
from offprincipal.models.quiet import quiet_libraries
from offprincipal.tasks.prompt_settings import PromptSettings
from offprincipal.tasks.prompting import is_character_level, resolved
from offprincipal.training.settings import TrainSettings

_LONGEST = {"plain": 8, "few_shot": 32, "chat": 512}  # default of max_new_tokens for each template


def by_the_model(settings: TrainSettings) -> TrainSettings:
    """The settings with the defaults that the model's tokenizer decides filled in; unchanged for a character model.

    Args:
        settings: of the run.

    Raises:
        ModelError: the model does not exist.

    >>> by_the_model(TrainSettings(recipe="grpo", tasks=("add",))).max_new_tokens
    8
    """
    if settings.prompt is None and settings.model == EMBEDDED:
        return settings
    name = model_name(settings.model)
    with quiet_libraries(), to_be_found(name):
        try:
            tokenizer = open_tokenizer(name, trust_remote_code=settings.trust_remote_code)
        except Exception:  # the error is reported when the model is opened
            return settings
    if settings.prompt is None and is_character_level(tokenizer):
        return settings
    prompt = resolved(settings.prompt, tokenizer)
    unset = {name for name in ("max_new_tokens", "eval_max_new_tokens") if name not in settings.model_fields_set}
    lengths = {name: max(longest_completion(prompt), getattr(settings, name)) for name in unset}
    return settings.model_copy(update={"prompt": prompt} | lengths)


def longest_completion(prompt: PromptSettings) -> int:
    """Default of `max_new_tokens` for a prompt; a custom template has the default of `few_shot`."""
    return _LONGEST.get(prompt.template or "", _LONGEST["few_shot"])
