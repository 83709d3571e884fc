"""A Hugging Face folder that appears whole or not at all, and never in place of a stranger's files."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from offprincipal.errors import FileError, InterventionError
from offprincipal.files import exclusively, follow_umask, replace_folder, require_folder
from offprincipal.interventions.architectures import HEAD
from offprincipal.interventions.plan import Weights
from offprincipal.models import LanguageModel
from offprincipal.models.quiet import quiet_libraries


@contextmanager
def new_folder(out: Path, marks: tuple[str, ...], overwrite: bool, kept: tuple[Path | None, ...]) -> Iterator[Path]:
    """A folder to fill, which is renamed to `out` when the block ends well and removed when it does not.

    Args:
        out: absent or empty; with `overwrite` it may hold one of the files `marks`, and is then replaced.
        kept: folders that are read from, which may not be replaced.

    Raises:
        InterventionError: `out` holds something else, or a folder that is read from.
        FileError: it cannot be written, or another process is writing there.
    """
    out = out.expanduser().resolve()
    require_folder(out.parent)
    with exclusively(out, beside=True):
        _require_replaceable(out, marks, overwrite, kept)
        part = out.parent / f".{out.name}.part"
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        require_folder(part)
        try:
            yield part
            follow_umask(part)
            replace_folder(out, part)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FileError(f"cannot write {out}: {reason}. Free some space or choose another --out") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


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


def _require_replaceable(out: Path, marks: tuple[str, ...], overwrite: bool, kept: tuple[Path | None, ...]) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise InterventionError(f"output path {out} is a file: name a folder")
    if not any(out.iterdir()):
        return
    if any(folder is not None and folder.resolve().is_relative_to(out.resolve()) for folder in kept):
        raise InterventionError(f"output folder {out} holds a model that is read: choose another --out")
    if not any((out / mark).is_file() for mark in marks):
        raise InterventionError(f"output folder {out} holds files that no intervention wrote: choose another --out")
    if not overwrite:
        raise InterventionError(f"output folder {out} holds an intervention: choose another --out or pass --overwrite")
