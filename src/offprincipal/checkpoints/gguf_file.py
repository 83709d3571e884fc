"""GGUF files, as llama.cpp writes them: read by the gguf package (extra `gguf`), under the names of Hugging Face.

Quantised tensors are given dequantised, in float32, some rows at a time. What the conversion turned is turned back: the
rows of Llama's queries and keys, and Gemma's gains, which are stored with 1 added.
"""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offprincipal.checkpoints.checkpoint import BFLOAT16, FLOATS, Array, Checkpoint, TensorInfo
from offprincipal.checkpoints.packed import dequantised_notes
from offprincipal.errors import CheckpointError, install_command

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_LLAMA = ("llama",)  # whose queries and keys llama.cpp wants in another order
_GEMMA = ("gemma", "gemma2", "gemma3")  # whose gains are stored with 1 added
_READ = (*_LLAMA, *_GEMMA, "qwen2", "qwen3", "phi3", "olmo2", "smollm3")
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OWN = {
    **{later: {"ffn_norm": "pre_feedforward_layernorm"} for later in _GEMMA[1:]},
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}
_LAYER = re.compile(r"blk\.([0-9]{1,4})\.(\w+)\.(weight|bias)")
_BUFFERS = re.compile(r"rope_freqs|rope_factors")
_PLAIN = {"F32": "float32", "F16": "float16", "F64": "float64"}


class GgufFile:
    """A `Checkpoint` over one file.

    Raises:
        CheckpointError: it is damaged, of an architecture whose layout is not known, or the extra is not installed.
    """

    def __init__(self, path: Path, source: str, base: Checkpoint | None = None) -> None:
        self.path, self.source, self.folders, self.files = path, source, (path.parent,), (path,)
        self._gguf = _library(path)
        try:
            with path.open("rb") as file:
                if file.read(4) != _MAGIC:
                    raise ValueError("it does not begin as one")
            reader = self._gguf.GGUFReader(path)
            self._arch = str(reader.get_field("general.architecture").contents())
            self._heads = [self._number(reader, f"attention.head_count{of}") for of in ("", "_kv")]
            stored = {str(tensor.name): tensor for tensor in reader.tensors}
        except Exception as error:  # a damaged file can raise anything
            raise CheckpointError(f"{path} is not a readable GGUF file ({error}): download it again") from error
        if self._arch not in _READ:
            raise CheckpointError(
                f"{path} has architecture {self._arch[:40]!r}, whose GGUF layout is not supported (only "
                f"{', '.join(_READ)}): give the model that it was converted from"
            )
        self._stored = {self._named(name): tensor for name, tensor in stored.items() if not _BUFFERS.search(name)}
        self.config: Mapping[str, Any] = base.config if base else {"model_type": self._arch}
        self.tensors = {name: self._info(name) for name in sorted(self._stored)}
        kinds = (tensor.tensor_type.name for tensor in self._stored.values())
        self.notes = dequantised_notes(f"stored in {kind}" for kind in kinds if kind not in (*_PLAIN, "BF16"))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        info = self.tensors[name]
        stop = info.numel if stop is None else stop
        if stop <= start:
            return np.empty(0, FLOATS[info.dtype])
        turned = self._turned(name)
        width = info.numel // info.shape[0]
        first, last = (0, info.shape[0]) if turned else (start // width, -(-stop // width))
        try:
            rows = self._rows(name, first, last).reshape(-1, width)
        except Exception as error:  # the library's own, of a damaged file
            raise CheckpointError(f"cannot read {name} from {self.path} ({error}): download it again") from error
        if turned:
            rows = rows.reshape(turned, -1, 2, width).swapaxes(1, 2).reshape(-1, width)
        if self._arch in _GEMMA and name.endswith("norm.weight"):
            rows = (rows.astype(np.float32) - 1).astype(rows.dtype)
        return np.ascontiguousarray(rows).reshape(-1)[start - first * width : stop - first * width]

    def masters(self) -> None:
        return None

    def _rows(self, name: str, first: int, last: int) -> Array:
        tensor, dtype = self._stored[name], FLOATS[self.tensors[name].dtype]
        kind = tensor.tensor_type.name
        data = np.asarray(tensor.data)
        if kind in _PLAIN:
            return data.reshape(len(data), -1)[first:last].astype(dtype)
        data = data.reshape(self.tensors[name].shape[0], -1)[first:last]
        if kind == "BF16":
            return np.ascontiguousarray(data).view(np.uint8).view(BFLOAT16)
        return np.asarray(self._gguf.quants.dequantize(data, tensor.tensor_type), np.float32)

    def _info(self, name: str) -> TensorInfo:
        tensor = self._stored[name]
        kind = tensor.tensor_type.name
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        if not shape:
            raise CheckpointError(f"{name} in {self.path} has no dimensions: download it again")
        return TensorInfo(name, shape, _PLAIN.get(kind, "bfloat16" if kind == "BF16" else "float32"))

    def _named(self, name: str) -> str:
        """What Hugging Face calls a tensor; its own name where the table has none."""
        layer = _LAYER.fullmatch(name)
        if layer is None:
            stem, _, kind = name.rpartition(".")
            return f"{_NAMES[stem]}.{kind}" if stem in _NAMES else name
        inner = (_IN_LAYERS | _OWN.get(self._arch, {})).get(layer[2])
        return f"model.layers.{layer[1]}.{inner}.{layer[3]}" if inner else name

    def _turned(self, name: str) -> int:
        """Heads whose rows lie in llama.cpp's order; 0 if they are in Hugging Face's."""
        place = next((i for i, part in enumerate((".q_proj.", ".k_proj.")) if part in name), None)
        if self._arch not in _LLAMA or place is None:
            return 0
        heads, rows = self._heads[place] or self._heads[0], self.tensors[name].shape[0]
        if not heads or rows % (2 * heads):
            raise CheckpointError(f"{self.path} does not say how many heads {name} has: download it again")
        return heads

    def _number(self, reader: Any, name: str) -> int:
        field = reader.get_field(f"{self._arch}.{name}")
        value = None if field is None else field.contents()
        return value if type(value) is int and value > 0 else 0


def _library(path: Path) -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError(f"{path} is GGUF: {install_command('gguf')} to read it") from error
