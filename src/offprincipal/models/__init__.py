"""Language models as transformers gives them: opened in float32 with a tokenizer, and sampled from.

torch is imported with this package; transformers only when a model is opened.
"""

from offprincipal.models.opening import (
    LanguageModel,
    hash_of,
    identify,
    model_name,
    open_language_model,
    open_tokenizer,
    require_training_extra,
    resolve_device,
    to_be_found,
)

__all__ = [
    "LanguageModel",
    "hash_of",
    "identify",
    "model_name",
    "open_language_model",
    "open_tokenizer",
    "require_training_extra",
    "resolve_device",
    "to_be_found",
]
