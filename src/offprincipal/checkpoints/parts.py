"""The matrices inside a stored tensor: most tensors are one; fused projections and experts hold several.

Knows names, shapes and the model's configuration; reads nothing. A tensor whose make-up they do not tell is not split.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from offprincipal.checkpoints.checkpoint import Array, TensorInfo
from offprincipal.checkpoints.roles import TABLE_ROLES, VECTOR_ROLES, Place, place_of

if TYPE_CHECKING:
    from torch import Tensor

Entries = TypeVar("Entries", Array, "Tensor")

_FUSED = re.compile(r"\b(qkv_proj|query_key_value|c_attn|gate_up_proj|linear_qkv)\.weight$")
_FUSED_BIAS = re.compile(r"\blinear_qkv\.bias$")
_STACKED = re.compile(r"\bexperts\.\w+$|\bblock_sparse_moe\.(?:input|output)_linear\.weight$")
_CONV1D = re.compile(r"\.(?:c_attn|q_attn|c_proj|c_fc)\.weight$")
_OTHER_TOWER = re.compile(r"vision|visual|image|audio|speech")
_MOST_EXPERTS = 100_000

_CONV1D_MODELS = frozenset({"gpt2", "decision_transformer", "imagegpt", "openai-gpt"})
_QKV_ROWS_MODELS = frozenset({"phi3", "phi4mm", "phi4_multimodal"})
_QKV_BY_HEAD_MODELS = frozenset({"bloom", "gpt_neox", "persimmon"})
# fmt: off
_EXPERTS_OUT_IN = frozenset({
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "granitemoe", "granitemoehybrid", "granitemoeshared",
    "hunyuan_v1_moe", "jamba", "lfm2_moe", "minimax", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe",
    "qwen3_5_moe", "qwen3_moe", "qwen3_next", "solar_open",
})
# fmt: on
_EXPERTS_IN_OUT = frozenset({"aria", "gpt_oss", "llama4", "openai_privacy_filter"})
_EXPERTS_EITHER_WAY = frozenset({"qwen3_vl_moe"})
_EXPERTS_INTERLEAVED = frozenset({"gpt_oss"})


@dataclass(frozen=True)
class Part:
    """One matrix, or one tensor that is not a matrix, and where it lies in the tensor that is stored.

    Args:
        name: what tables call it; the tensor's own name where it is the whole of it.
        tensor: the stored tensor.
        place: role, layer, expert.
        start: its first entry in the stored tensor, flat.
        shape: of the contiguous entries that are read.
        columns: which columns of those belong to it; all by default.
        folded: the shape that these are given, in their order: of a projection whose rows lie head by head.
        transposed: stored as (in, out), as GPT-2's Conv1D is; `of` turns it round.
    """

    name: str
    tensor: str
    place: Place
    start: int
    shape: tuple[int, ...]
    columns: tuple[int, int] | None = None
    folded: tuple[int, ...] | None = None
    transposed: bool = False

    @property
    def stop(self) -> int:
        """One past its last entry in the stored tensor, flat."""
        return self.start + math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of what `of` gives: (out, in) for a projection."""
        shape = self.shape if self.columns is None else (self.shape[0], self.columns[1] - self.columns[0])
        shape = self.folded or shape
        return shape[::-1] if self.transposed else shape

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix with entries, and no bias or norm."""
        shape = self.matrix_shape
        return len(shape) == 2 and min(shape) > 0 and self.place.role not in VECTOR_ROLES

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear matrix: no embedding, head or router either."""
        return self.is_matrix and self.place.role not in TABLE_ROLES

    @property
    def numel(self) -> int:
        """How many entries it has."""
        return math.prod(self.matrix_shape)

    @property
    def keys(self) -> dict[str, Any]:
        """What names it in every table."""
        shape = self.matrix_shape
        rows = shape[0] if shape else 1
        return {
            "tensor": self.name,
            "layer": self.place.layer,
            "role": self.place.role,
            "expert": self.place.expert,
            "rows": rows,
            "cols": self.numel // rows if rows else 0,
            "numel": self.numel,
        }

    def of(self, entries: Entries) -> Entries:
        """The part, shaped and contiguous, from the flat entries `start` to `stop`, of numpy or torch."""
        array = self._laid_out(entries)
        if self.folded is not None:
            array = array.reshape(self.folded)
        if self.transposed:
            array = array.T
        return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array.contiguous()

    def cut(self, tensor: Entries) -> Entries:
        """The part, shaped and contiguous, from the whole stored tensor."""
        return self.of(tensor.reshape(-1)[self.start : self.stop])

    def put(self, tensor: Entries, values: Entries) -> None:
        """Write values of the part's shape to their place in the whole stored tensor, which is contiguous.

        >>> part = Part("w", "w", place_of("w"), 0, (2, 3), columns=(1, 2), transposed=True)
        >>> whole = np.zeros((2, 3))
        >>> part.put(whole, np.array([[1.0, 2.0]]))
        >>> whole.tolist()
        [[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]]
        """
        place = self._laid_out(tensor.reshape(-1)[self.start : self.stop])
        place[...] = (values.T if self.transposed else values).reshape(place.shape)

    def _laid_out(self, entries: Entries) -> Entries:
        """Those of the flat entries `start` to `stop` that belong to it: a view."""
        array = entries.reshape(self.shape)
        return array if self.columns is None else array[:, self.columns[0] : self.columns[1]]


def parts_of(info: TensorInfo, config: Mapping[str, Any]) -> list[Part]:
    """The parts of one tensor, in the order in which they lie.

    Args:
        config: the model's `config.json`, which says how fused tensors are made up; may be empty. A fused tensor that
            it does not explain is one part of role `other`.

    >>> info = TensorInfo("model.layers.0.self_attn.qkv_proj.weight", (8, 4), "bfloat16")
    >>> config = {"model_type": "phi3", "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> [(part.name.split(".")[-1], part.start, part.shape) for part in parts_of(info, config)]
    [('weight:q', 0, (4, 4)), ('weight:k', 16, (2, 4)), ('weight:v', 24, (2, 4))]
    >>> [part.place.role for part in parts_of(info, {})]
    ['other']
    """
    whole = Part(info.name, info.name, place_of(info.name), 0, info.shape)
    if _FUSED_BIAS.search(info.name) and len(info.shape) == 1:
        return _fused_parts(whole, "linear_qkv", _Model.of(config)) or [whole]
    if whole.place.role == "bias" or info.numel == 0 or _OTHER_TOWER.search(info.name):
        return [whole]
    model = _Model.of(config)
    if len(info.shape) == 3 and info.shape[0] <= _MOST_EXPERTS and _STACKED.search(info.name):
        return [part for expert in _experts(whole) for part in _expert_parts(expert, model)]
    if len(info.shape) == 2:
        fused = _FUSED.search(info.name)
        if fused is not None:
            return _fused_parts(whole, fused[1], model) or [whole]
        if model.kind in _CONV1D_MODELS and _CONV1D.search(info.name):
            return [replace(whole, transposed=True)]
    return [whole]


def stored_transposed(info: TensorInfo, config: Mapping[str, Any]) -> bool | None:
    """Whether a matrix is stored as (in, out), as GPT-2's Conv1D is; None if the model's type does not tell.

    >>> info = TensorInfo("transformer.h.0.attn.c_proj.weight", (8, 8), "float32")
    >>> stored_transposed(info, {"model_type": "gpt2"}), stored_transposed(info, {})
    (True, None)
    """
    return _CONV1D.search(info.name) is not None if _Model.of(config).kind in _CONV1D_MODELS else None


@dataclass(frozen=True)
class _Model:
    """What a configuration says of the fused tensors; zeros if it says nothing usable."""

    kind: str
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    one_kv_head: bool
    grouped: bool

    @staticmethod
    def of(config: Mapping[str, Any]) -> "_Model":
        nested = config.get("text_config")
        text = nested if isinstance(nested, dict) else config
        kind = text.get("model_type", config.get("model_type"))
        hidden = _count(text, "hidden_size", "n_embd", "n_embed", "d_model")
        heads = _count(text, "num_attention_heads", "n_head", "n_heads")
        return _Model(
            kind=kind.removesuffix("_text") if isinstance(kind, str) else "",
            hidden=hidden,
            heads=heads,
            kv_heads=_count(text, "num_key_value_heads", "num_kv_heads") or heads,
            head_size=_count(text, "head_dim") or (hidden // heads if heads else 0),
            one_kv_head=text.get("multi_query", True) is True,
            grouped=text.get("new_decoder_architecture") is True,
        )


def _count(config: Mapping[str, Any], *keys: str) -> int:
    """The first of the keys that holds a positive integer; 0 if none does."""
    values = (config.get(key) for key in keys)
    return next((value for value in values if type(value) is int and value > 0), 0)


def _fused_parts(whole: Part, name: str, model: _Model) -> list[Part]:
    """The parts of a fused projection, [] where the configuration does not say how it is made up."""
    if name == "gate_up_proj":
        half = whole.shape[0] // 2
        return _by_rows(whole, {"gate": half, "up": half})
    if name == "linear_qkv":  # Megatron's, of whatever model
        return _by_head(whole, model.kv_heads, model)
    q, kv = model.heads * model.head_size, model.kv_heads * model.head_size
    match model.kind, name:
        case kind, "qkv_proj" if kind in _QKV_ROWS_MODELS:
            return _by_rows(whole, {"q": q, "k": kv, "v": kv})
        case kind, "c_attn" if kind in _CONV1D_MODELS:
            return _by_columns(whole, {"q": model.hidden, "k": model.hidden, "v": model.hidden})
        case "gpt_bigcode", "c_attn" if model.one_kv_head:
            return _by_rows(whole, {"q": q, "k": model.head_size, "v": model.head_size})
        case "gpt_bigcode", "c_attn":
            return _by_head(whole, model.heads, model)
        case "falcon", "query_key_value":
            return _by_head(whole, model.kv_heads if model.grouped else 1 if model.one_kv_head else model.heads, model)
        case kind, "query_key_value" if kind in _QKV_BY_HEAD_MODELS:
            return _by_head(whole, model.heads, model)
    return []


def _by_rows(whole: Part, sizes: Mapping[str, int]) -> list[Part]:
    """Parts one below the other."""
    rows, cols = whole.shape
    if 0 in sizes.values() or sum(sizes.values()) != rows:
        return []
    return [
        _piece(whole, role, start=whole.start + above * cols, shape=(below - above, cols))
        for role, (above, below) in _ranges(sizes)
    ]


def _by_columns(whole: Part, sizes: Mapping[str, int]) -> list[Part]:
    """Parts side by side, stored as (in, out)."""
    if 0 in sizes.values() or sum(sizes.values()) != whole.shape[1]:
        return []
    return [_piece(whole, role, columns=columns, transposed=True) for role, columns in _ranges(sizes)]


def _by_head(whole: Part, groups: int, model: _Model) -> list[Part]:
    """Queries, key and value of one head, or of a group of heads that share them, then of the next."""
    rows, *rest = whole.shape
    cols = math.prod(rest)
    if not groups or model.heads % groups:
        return []
    sizes = {"q": model.heads // groups * model.head_size, "k": model.head_size, "v": model.head_size}
    together = sum(sizes.values())
    if 0 in sizes.values() or groups * together != rows:
        return []
    return [
        _piece(
            whole,
            role,
            shape=(groups, together * cols),
            columns=(first * cols, last * cols),
            folded=(groups * (last - first), *rest),
        )
        for role, (first, last) in _ranges(sizes)
    ]


def _experts(whole: Part) -> Iterator[Part]:
    """The experts of a stack of three dimensions, one by one."""
    count, *shape = whole.shape
    for expert in range(count):
        yield replace(
            whole,
            name=f"{whole.name}[{expert}]",
            place=replace(whole.place, expert=expert),
            start=whole.start + expert * math.prod(shape),
            shape=tuple(shape),
        )


def _expert_parts(expert: Part, model: _Model) -> list[Part]:
    """The parts of one expert: gate and up, or down, as the model's architecture lays them out."""
    fused = expert.tensor.endswith(("gate_up_proj", ".input_linear.weight"))
    down = expert.tensor.endswith(("down_proj", ".output_linear.weight"))
    if not fused and not down:
        return [expert]
    out_in, in_out = (size == model.hidden for size in (expert.shape[::-1] if fused else expert.shape))
    if model.kind in _EXPERTS_EITHER_WAY and out_in != in_out:
        transposed = in_out
    elif model.kind in _EXPERTS_IN_OUT and in_out:
        transposed = True
    elif model.kind in _EXPERTS_OUT_IN and out_in:
        transposed = False
    else:
        return [replace(expert, place=replace(expert.place, role="other"))]
    if down:
        return [replace(expert, place=replace(expert.place, role="down"), transposed=transposed)]
    half = expert.shape[1 if transposed else 0] // 2
    sizes = {"gate": half, "up": half}
    if model.kind in _EXPERTS_INTERLEAVED:
        parts = _alternating(expert)
    else:
        parts = _by_columns(expert, sizes) if transposed else _by_rows(expert, sizes)
    return parts or [expert]


def _alternating(expert: Part) -> list[Part]:
    """Gate and up in turn, column by column, stored as (in, out)."""
    rows, cols = expert.shape
    if cols % 2:
        return []
    return [
        _piece(
            expert,
            role,
            shape=(rows * cols // 2, 2),
            columns=columns,
            folded=(rows, cols // 2),
            transposed=True,
        )
        for role, columns in _ranges({"gate": 1, "up": 1})
    ]


def _piece(whole: Part, role: str, **changes: Any) -> Part:
    """One of several; those of a bias are biases."""
    place = whole.place if whole.place.role == "bias" else replace(whole.place, role=role)
    return replace(whole, name=f"{whole.name}:{role}", place=place, **changes)


def _ranges(sizes: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Each role with where it begins and ends when they lie one after another."""
    return zip(sizes, pairwise(accumulate(sizes.values(), initial=0)), strict=True)
