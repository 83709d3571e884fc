"""Open a checkpoint from the user's path or id. New kinds of checkpoint are registered here."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from offprincipal.assets import EMBEDDED, embedded_base
from offprincipal.checkpoints import (
    adapter,
    delta,
    distributed,
    fsdp_shards,
    gguf_file,
    hub,
    safetensors_folder,
    sharded_safetensors,
    torch_files,
    zero_shards,
)
from offprincipal.checkpoints.alignment import aligned
from offprincipal.checkpoints.checkpoint import Checkpoint
from offprincipal.checkpoints.hostile import is_file
from offprincipal.checkpoints.safetensors_folder import SafetensorsFolder
from offprincipal.checkpoints.shards import INDEX, is_numbered
from offprincipal.checkpoints.torch_files import TorchFolder
from offprincipal.errors import CheckpointError
from offprincipal.file_names import MASTERS

_DEEPEST, _MOST_FOLDERS = 3, 2000  # of the folders inside of a run's root that are looked into
_SHOWN = 8
_FOREIGN = {
    "Megatron's older format": re.compile(r"mp_rank_[0-9]+(_[0-9]+)*"),
    "Flax's": re.compile(r"flax_model.*\.msgpack(\.index\.json)?"),
    "TensorFlow's": re.compile(r"tf_model.*\.h5(\.index\.json)?|.*\.ckpt\.index|saved_model\.pb"),
    "ONNX": re.compile(r".*\.onnx"),
}
_Opener = Callable[[Path, str, Checkpoint | None], Checkpoint]
_KINDS: tuple[tuple[Callable[[Path], bool], _Opener], ...] = (
    (
        safetensors_folder.is_usual,
        lambda folder, source, base: _open_model_folder(folder, source),
    ),
    (
        adapter.is_adapter,
        lambda folder, source, base: adapter.open_adapter(folder, source, base, _open_model),
    ),
    (
        lambda folder: bool(torch_files.files_in(folder)),
        lambda folder, source, base: TorchFolder(folder, source),
    ),
    (distributed.is_distributed, distributed.open_distributed),
    (fsdp_shards.is_at, fsdp_shards.open_fsdp_shards),
    (lambda folder: zero_shards.folder_at(folder) is not None, zero_shards.open_zero_shards),
    (lambda folder: bool(sharded_safetensors.files_in(folder)), sharded_safetensors.open_sharded),
    (
        lambda folder: bool(safetensors_folder.files_in(folder)),
        lambda folder, source, base: SafetensorsFolder(folder, source),
    ),
)


def open_checkpoint(source: Any, base: Checkpoint | None = None) -> Checkpoint:
    """Open a model; only headers are read.

    Args:
        source: a local folder or file; a model on the Hugging Face Hub, 'org/name' or 'org/name@revision'; or
            `embedded`, the base that comes with the package. A folder contains safetensors or `pytorch_model.bin` (one
            file or shards), a PEFT adapter, or a checkpoint of torch.distributed, or is the root of a run that contains
            one. Or a `torch.nn.Module`.
        base: the model that it was trained from, to which an adapter is applied, and whose names and layout the tensors
            are given if they can be matched; without it an adapter is applied to the base that its configuration names.

    Raises:
        CheckpointError: it cannot be opened; the message says what is wrong, where, and what to do.

    >>> info = open_checkpoint("embedded").tensors["model.layers.0.self_attn.q_proj.weight"]
    >>> info.shape, info.dtype
    ((192, 192), 'bfloat16')
    """
    if not isinstance(source, str | Path):
        from offprincipal.checkpoints.in_memory import InMemory

        found: Checkpoint = InMemory(source)
    else:
        path = _path_of(source)
        found = _open_file(path, str(source), base) if is_file(path) else _open_folder(path, str(source), base)
    return found if base is None else aligned(found, base)


def _open_folder(folder: Path, source: str, base: Checkpoint | None) -> Checkpoint:
    opened = _opener(folder)
    if opened is not None:
        return opened(folder, source, base)
    inside = list(_models_in(folder))
    if len(inside) == 1:
        ((path, opener),) = inside
        return opener(path, str(path), base)
    if inside:
        more = f" and {len(inside) - _SHOWN} more" if len(inside) > _SHOWN else ""
        names = ", ".join(str(path.relative_to(folder)) for path, _ in inside[:_SHOWN])
        raise CheckpointError(
            f"{folder} contains {len(inside)} models, {names}{more}: give one of them, or follow a run's checkpoints "
            "with `offprincipal trajectory`"
        )
    raise CheckpointError(f"{folder} is not a model{_what_it_holds(folder)}")


def _open_model_folder(folder: Path, source: str) -> Checkpoint:
    """The model in a folder; with the adapter beside it, if there is one."""
    model = SafetensorsFolder(folder, source)
    if not adapter.is_adapter(folder) or not any(is_file(folder / name) for name in (adapter.WEIGHTS, adapter.PICKLED)):
        return model
    both = adapter.open_adapter(folder, source, model, _open_model)
    both.notes.append(
        f"{source} contains a model and an adapter; the adapter is applied to the model. If it is merged already, move "
        "it away"
    )
    return both


def _opener(folder: Path) -> _Opener | None:
    return next((opened for is_at, opened in _KINDS if is_at(folder)), None)


def _opener_inside(folder: Path) -> _Opener | None:
    try:
        return _opener(folder)
    except CheckpointError:  # a damaged folder is not a reason to refuse another
        return None


def _models_in(folder: Path) -> Iterator[tuple[Path, _Opener]]:
    """The models inside a folder, level by level, and what opens each; links and folders of masters are skipped."""
    level, seen = [folder], 0
    for _ in range(_DEEPEST):
        below: list[Path] = []
        for parent in level:
            try:
                entries = sorted(os.scandir(parent), key=lambda entry: _in_order(entry.name))
            except OSError:
                continue
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False) or entry.name == MASTERS:
                    continue
                seen += 1
                if seen > _MOST_FOLDERS:
                    return
                path = Path(entry.path)
                opener = _opener_inside(path)
                if opener is None:
                    below.append(path)
                else:
                    yield path, opener
        level = below


def _in_order(name: str) -> tuple[int, str]:
    """Sort key by number: checkpoint-5 before checkpoint-20."""
    digits = "".join(character for character in name if character in "0123456789")
    return int(digits[:18] or 0), name


def _open_file(path: Path, source: str, base: Checkpoint | None) -> Checkpoint:
    """A single file of weights; an index or a numbered shard stands for the whole model."""
    folder, name = path.parent, path.name
    if name.endswith(delta.SUFFIX):
        return delta.open_delta(path, source, base)
    if name.endswith(gguf_file.SUFFIX):
        return gguf_file.GgufFile(path, source, base)
    if name.endswith(safetensors_folder.SUFFIX):
        return SafetensorsFolder(folder, source, None if is_numbered(name) else [path])
    if name.endswith(safetensors_folder.SUFFIX + INDEX):
        return SafetensorsFolder(folder, source, [path])
    if name.endswith((*torch_files.SUFFIXES, *(suffix + INDEX for suffix in torch_files.SUFFIXES))):
        return TorchFolder(folder, source, [path])
    read = ", ".join((safetensors_folder.SUFFIX, *torch_files.SUFFIXES, gguf_file.SUFFIX, delta.SUFFIX))
    raise CheckpointError(
        f"{path} is not a file of weights{_foreign([name])}: give one of {read}, or the folder that contains "
        "config.json and the weights"
    )


def _what_it_holds(folder: Path) -> str:
    """What a message says about a folder without a model."""
    names = sorted(path.name for path in folder.glob("*") if is_file(path))
    foreign = _foreign([path.name for path in folder.glob("*")])
    if foreign:
        return f"{foreign}: convert it to a Hugging Face folder with the tools of the software that wrote it"
    for name in names:
        if name.endswith(gguf_file.SUFFIX):
            return f": it contains {name}; give the path of that file"
    pickles = [name for name in names if name.endswith((*torch_files.SUFFIXES, ".pkl"))]
    if pickles:
        return (
            f": it contains only files of torch.save without a model's usual name ({pickles[0]}): give the path of "
            "one, or convert it with save_pretrained(…, safe_serialization=True)"
        )
    return (
        f": it has neither {safetensors_folder.WEIGHTS} nor {safetensors_folder.INDEX}, nor {torch_files.WEIGHTS}, an "
        "adapter, or a distributed checkpoint, and no folder inside of it has"
    )


def _foreign(names: Sequence[str]) -> str:
    """Which unsupported software these weights are from; "" if none is recognised."""
    for name in sorted(names):
        for kind, pattern in _FOREIGN.items():
            if pattern.fullmatch(name):
                return f" that is read: {name} is {kind}"
    return ""


def _open_model(source: str) -> Checkpoint:
    """Open what an adapter names as its base."""
    path = _path_of(source)
    if is_adapter_alone(path):
        raise CheckpointError(f"the base {path} is itself an adapter: merge it into its own base first")
    return open_checkpoint(path)


def is_adapter_alone(path: Path) -> bool:
    """Whether a path is a folder with an adapter and no model in it."""
    return path.is_dir() and adapter.is_adapter(path) and not safetensors_folder.is_usual(path)


def _path_of(source: str | Path) -> Path:
    """The local folder or file of a source; that of an id is downloaded."""
    if str(source) == EMBEDDED:
        return embedded_base()
    path = Path(source)
    if _is_folder(path) or is_file(path):
        return path
    if isinstance(source, str) and hub.is_id(source):
        return hub.download(source)
    raise CheckpointError(f"{path} does not exist: give the folder of a Hugging Face model, or its id on the Hub")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
