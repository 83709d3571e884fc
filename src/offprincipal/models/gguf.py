"""A GGUF file as an ordinary folder: dequantised by transformers' own loader, once, and kept in bfloat16."""

import hashlib
import importlib
import importlib.util
import logging
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from offprincipal.errors import ModelError, install_command
from offprincipal.files import cache_folder, exclusively, new_folder, require_folder, write_atomically
from offprincipal.models.quiet import quiet_libraries

SUFFIX = ".gguf"
WEIGHTS = "model.safetensors"
LOG = logging.getLogger("offprincipal")


def folder_of(file: Path) -> Path:
    """The folder that holds a GGUF file's model, made where it is not there yet.

    Args:
        file: which is whole; a first part of several stands for none of them.

    Raises:
        ModelError: it cannot be read, its architecture is none that transformers dequantises, or gguf is missing.
        FileError: the folder cannot be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{file} is a GGUF file, which needs gguf: {install_command('gguf')}")
    try:
        about = file.stat()
        digest = _digest(file, about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror or error}") from error
    models = cache_folder() / "models"
    require_folder(models)
    folder = models / f"{file.stem}-{digest}"
    with exclusively(models):
        if not (folder / WEIGHTS).is_file():
            LOG.warning("%s is dequantised to bfloat16 once, and kept in %s", file.name, folder)
            _convert(file, folder)
    return folder


@lru_cache(maxsize=4)
def _digest(file: Path, size: int, changed: int) -> str:
    """Of its content, read once for a file that is as it was: a run asks for its model several times."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()[:16]


def _convert(file: Path, folder: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    try:
        with quiet_libraries():
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, trust_remote_code=False
            )
    except Exception as error:  # unknown architectures, damaged files and odd tokenizers all differ
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"transformers cannot open {file}: {reason}. Give the model's own folder") from error
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if missing := sorted(set(loaded["missing_keys"]) - tied):
        raise ModelError(f"{file} has no {missing[0]}, which transformers would draw at random: give another file")
    weights = {
        name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items() if name not in tied
    }
    model.config.dtype = torch.bfloat16
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    save_file = importlib.import_module("safetensors.torch").save_file
    with new_folder(folder, (WEIGHTS,), True, (file.parent,), "a model") as made:
        model.config.save_pretrained(made)
        model.generation_config.save_pretrained(made)
        tokenizer.save_pretrained(made)
        write_atomically(made / WEIGHTS, partial(save_file, weights, metadata={"format": "pt"}))
