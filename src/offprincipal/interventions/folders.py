"""The Hugging Face folder that an intervention writes."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from offprincipal.interventions.architectures import HEAD
from offprincipal.interventions.plan import Weights
from offprincipal.models import LanguageModel
from offprincipal.models.quiet import quiet_libraries


def write_model(folder: Path, opened: LanguageModel, weights: Weights, dtype: str, *, tokenizer: bool = True) -> None:
    """Write a Hugging Face folder: configuration, weights in one file, generation settings, tokenizer.

    Args:
        folder: to write into; created if absent.
        opened: the model whose configuration and tokenizer are written.
        weights: to be stored; they include a head only if it is not tied to the embedding.
        dtype: of the weights, for `config.json`.
        tokenizer: whether to write the tokenizer, if there is one.
    """
    folder.mkdir(exist_ok=True)
    with quiet_libraries():
        opened.model.config.save_pretrained(folder)
        if opened.model.generation_config is not None:
            # save_pretrained refuses settings of many published models, such as a temperature without do_sample
            opened.model.generation_config.to_json_file(folder / "generation_config.json")
        if tokenizer and opened.tokenizer is not None:
            opened.tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config |= {"dtype": dtype, "tie_word_embeddings": HEAD not in weights}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
