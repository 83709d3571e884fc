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
    """An ordinary Hugging Face folder: configuration, weights in one file, generation settings, tokenizer.

    Args:
        opened: the model whose configuration and tokenizer are written.
        weights: as they are stored; with a head of its own where the model's was tied and no longer is.
        dtype: what they are stored in.
    """
    folder.mkdir(exist_ok=True)
    with quiet_libraries():
        opened.model.config.save_pretrained(folder)
        if opened.model.generation_config is not None:
            # save_pretrained refuses what many published models hold, such as a temperature without do_sample
            opened.model.generation_config.to_json_file(folder / "generation_config.json")
        if tokenizer and opened.tokenizer is not None:
            opened.tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config |= {"dtype": dtype, "tie_word_embeddings": HEAD not in weights}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
