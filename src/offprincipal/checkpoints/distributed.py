"""Checkpoints of torch.distributed: a folder with `.metadata` and a `.distcp` file of every rank.

FSDP writes them, by accelerate (`pytorch_model_fsdp_0/` in a Trainer's checkpoint) and by torchtitan (`step-100/`). The
model's tensors are kept, an optimizer's and a data loader's left out; their names are made those of Hugging Face.
"""

import io
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offprincipal.checkpoints.checkpoint import FLOATS, Array, Checkpoint, TensorInfo, without_copied_head
from offprincipal.checkpoints.distributed_index import METADATA, Chunk, StoredTensor, read_stored_tensors
from offprincipal.checkpoints.hostile import is_file, read_json
from offprincipal.checkpoints.torch_files import as_array, checked_tensor, dtype_name, load_tensors
from offprincipal.errors import CheckpointError

_FSDP = "pytorch_model_fsdp_*"
_NOT_THE_MODEL = re.compile(r"(?:optimizers?|optim|lr_schedulers?|dataloader|train_state)(?:\.|$)")
_WRAPPERS = re.compile(r"^module\.|(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_LLAMA_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_MAY_BE_TIED = {"lm_head.weight"}
_LAYER = re.compile(r"(layers\.[0-9]{1,9}\.)(.+)")


def is_distributed(folder: Path) -> bool:
    """Whether a folder holds one, itself or as accelerate puts it there."""
    return is_file(folder / METADATA) or len(_inside(folder)) == 1


def open_distributed(folder: Path, source: str, base: Checkpoint | None = None) -> "Distributed":
    """The checkpoint in a folder, under the base's names where its own can be made so.

    Raises:
        CheckpointError: it is corrupt or incomplete, would run code, or holds no model.
    """
    at = folder if is_file(folder / METADATA) else _inside(folder)[0]
    config = next(
        (read_json(path) for path in (at / "config.json", folder / "config.json") if is_file(path)),
        dict(base.config) if base else {},
    )
    stored = {
        _WRAPPERS.sub("", name): tensor
        for name, tensor in read_stored_tensors(at).items()
        if not _NOT_THE_MODEL.match(name)
    }
    if not stored:
        raise CheckpointError(f"{at} holds no model's tensors: give the folder that has them, not the optimizer's")
    if base is None:
        return Distributed(source, at, _unwrapped(stored), config)
    wanted = set(base.tensors)
    for naming in (_unwrapped(stored), stored, _shortened(stored), _lengthened(stored)):
        if naming.keys() ^ wanted <= _MAY_BE_TIED:
            return Distributed(source, at, naming, config)
    theirs = {_hugging_face_name(name): tensor for name, tensor in _unwrapped(stored).items()}
    if theirs.keys() ^ wanted <= _MAY_BE_TIED:
        return _as_hugging_face(source, at, theirs, config)
    return Distributed(source, at, _unwrapped(stored), config)


class Distributed:
    """A `Checkpoint` over one folder.

    Args:
        folder: which holds its files; stored: name -> tensor.
        heads: name -> the number of heads whose rows are stored in the order of Meta's rotary embedding, with the two
            halves of every pair side by side, and are read in Hugging Face's, halves apart.
    """

    def __init__(
        self,
        source: str,
        folder: Path,
        stored: Mapping[str, StoredTensor],
        config: dict[str, Any],
        heads: Mapping[str, int] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.source, self.config, self.notes = source, config, notes
        self.folders = (folder,)
        self._stored, self._heads = stored, heads or {}
        self.tensors: dict[str, TensorInfo] = _infos(stored)
        for name, info in self.tensors.items():
            if info.floating and info.dtype not in FLOATS:
                raise CheckpointError(f"{name} in {source} is stored as {info.dtype}, which is not read: use bfloat16")
        self._last = threading.local()  # each thread reads a tensor of its own
        self.tensors = without_copied_head(self.tensors, config, self.read)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        info = self.tensors[name]
        stop = info.numel if stop is None else stop
        if stop <= start:
            return np.empty(0, FLOATS.get(info.dtype, info.dtype))
        width = info.numel // info.shape[0] if info.shape else 1
        if name in self._heads:
            rows = self._rows(name, 0, info.shape[0])
            pairs = rows.reshape(self._heads[name], -1, 2, width)
            return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)[start:stop]
        first, last = start // width, -(-stop // width)
        return self._rows(name, first, last).reshape(-1)[start - first * width : stop - first * width]

    def masters(self) -> None:
        return None

    def _rows(self, name: str, first: int, last: int) -> Array:
        """Whole rows of a tensor, put together from the chunks that overlap them."""
        stored, info = self._stored[name], self.tensors[name]
        shape = info.shape or (1,)
        rows = np.zeros((last - first, *shape[1:]), FLOATS.get(info.dtype, info.dtype))
        filled = 0
        for chunk in stored.chunks:
            offsets, sizes = chunk.offsets or (0,), chunk.sizes or (1,)
            low, high = max(offsets[0], first), min(offsets[0] + sizes[0], last)
            if low >= high:
                continue
            part = self._entries(name, chunk).reshape(sizes)[low - offsets[0] : high - offsets[0]]
            box = tuple(slice(at, at + size) for at, size in zip(offsets[1:], sizes[1:], strict=True))
            rows[(slice(low - first, high - first), *box)] = part
            filled += part.size
        if filled != rows.size:
            raise CheckpointError(f"the parts of {name} in {self.source} overlap or leave gaps: do not trust it")
        return rows

    def _entries(self, name: str, chunk: Chunk) -> Array:
        """A chunk's entries; those of the tensor that was read last are kept."""
        if getattr(self._last, "name", None) != name:
            self._last.name, self._last.kept = name, {}
        kept: dict[Chunk, Array] = self._last.kept
        if chunk not in kept:
            kept[chunk] = self._load(name, chunk)
        return kept[chunk]

    def _load(self, name: str, chunk: Chunk) -> Array:
        try:
            with chunk.path.open("rb") as file:
                file.seek(chunk.start)
                content = file.read(chunk.length)
        except OSError as error:
            raise CheckpointError(f"cannot read {name} from {chunk.path}: {error.strerror or error}") from error
        where = f"{name} in {chunk.path}"
        tensor = checked_tensor(load_tensors(io.BytesIO(content), where), where)
        if tuple(tensor.shape) != chunk.sizes or dtype_name(tensor.dtype) != self.tensors[name].dtype:
            raise CheckpointError(f"{where} is not of the shape and type that {METADATA} gives: save it again")
        return as_array(tensor.reshape(-1))


def _inside(folder: Path) -> list[Path]:
    """The folders that accelerate put into a checkpoint's."""
    return sorted(path for path in folder.glob(_FSDP) if is_file(path / METADATA))


def _unwrapped(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors without the `model.` that accelerate and torchtitan put in front of every name, if they did."""
    inner = _shortened(stored)
    wrapped = len(inner) == len(stored) and any(
        name.startswith(("model.", "lm_head.", "tok_embeddings.")) for name in inner
    )
    return inner if wrapped else dict(stored)


def _shortened(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors whose names start with `model.`, without it."""
    return {name.removeprefix("model."): tensor for name, tensor in stored.items() if name.startswith("model.")}


def _lengthened(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {f"model.{name}": tensor for name, tensor in stored.items()}


def _infos(stored: Mapping[str, StoredTensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, tensor.info.shape, tensor.info.dtype) for name, tensor in sorted(stored.items())}


def _hugging_face_name(name: str) -> str:
    """The name in Hugging Face's Llama of a tensor in Meta's and torchtitan's."""
    layer = _LAYER.fullmatch(name)
    if layer:
        return f"model.{layer[1]}{_LLAMA_NAMES.get(layer[2], layer[2])}"
    return _LLAMA_NAMES.get(name, name)


def _as_hugging_face(source: str, at: Path, named: dict[str, StoredTensor], config: dict[str, Any]) -> Distributed:
    """torchtitan's Llama as Hugging Face's: queries and keys get the order of rows of its rotary embedding."""
    counts = {"q_proj": config.get("num_attention_heads")}
    counts["k_proj"] = config.get("num_key_value_heads", counts["q_proj"])
    heads = {}
    for name, tensor in named.items():
        projection = name.split(".")[-2] if "." in name else ""
        if projection not in counts or not name.endswith(".weight"):
            continue
        count, shape = counts[projection], tensor.info.shape
        if type(count) is not int or count < 1 or len(shape) != 2 or shape[0] % (2 * count):
            raise CheckpointError(
                f"{source} has torchtitan's names, and {name} cannot be put in Hugging Face's order: the base's "
                "config.json must give num_attention_heads and num_key_value_heads"
            )
        heads[name] = count
    note = "torchtitan's Llama, read with the names and the order of query and key rows of Hugging Face"
    return Distributed(source, at, named, config, heads, [note])
