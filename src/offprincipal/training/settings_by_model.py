"""What a run's settings leave to the model: how it is asked, and how long it may write."""

from offprincipal.assets import EMBEDDED
from offprincipal.models import model_name, open_tokenizer, to_be_found
from offprincipal.models.quiet import quiet_libraries
from offprincipal.tasks.prompt_settings import PromptSettings
from offprincipal.tasks.prompting import is_character_level, resolved
from offprincipal.training.settings import TrainSettings

_LONGEST = {"plain": 8, "few_shot": 32, "chat": 512}  # tokens of a completion, where nothing is said


def by_the_model(settings: TrainSettings) -> TrainSettings:
    """The settings with everything said that its model's tokenizer decides; as they are for a character model.

    Raises:
        ModelError: there is no such model.

    >>> by_the_model(TrainSettings(recipe="grpo", tasks=("add",))).max_new_tokens
    8
    """
    if settings.prompt is None and settings.model == EMBEDDED:
        return settings
    name = model_name(settings.model)
    with quiet_libraries(), to_be_found(name):
        try:
            tokenizer = open_tokenizer(name, trust_remote_code=settings.trust_remote_code)
        except Exception:  # whatever is wrong with it is said where the model is opened
            return settings
    if settings.prompt is None and is_character_level(tokenizer):
        return settings
    prompt = resolved(settings.prompt, tokenizer)
    unsaid = {name for name in ("max_new_tokens", "eval_max_new_tokens") if name not in settings.model_fields_set}
    lengths = {name: max(longest_completion(prompt), getattr(settings, name)) for name in unsaid}
    return settings.model_copy(update={"prompt": prompt} | lengths)


def longest_completion(prompt: PromptSettings) -> int:
    """Tokens of a completion, where nothing is said; a template of one's own is taken for few shots."""
    return _LONGEST.get(prompt.template or "", _LONGEST["few_shot"])
