"""Checkpoints of Megatron's `torch_dist`: those of torch.distributed, with all layers stacked under names of its own.

slime, NeMo and verl's Megatron backend write them too. Layers and experts are taken apart, and named as Hugging Face
names them; queries, keys and values stay fused, group by group, as `linear_qkv`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offprincipal.checkpoints.checkpoint import TensorInfo
from offprincipal.checkpoints.chunked import Chunk, StoredTensor
from offprincipal.checkpoints.hostile import is_file
from offprincipal.checkpoints.torch_objects import PickledObject, read_objects
from offprincipal.errors import CheckpointError

COMMON = "common.pt"
_OURS = re.compile(r"^(?:module\.)?(?:embedding|decoder|output_layer|mtp)\.")
_MASTERS = re.compile(r"^(?:chained_[0-9]{1,4}\.)?optimizer\.state\.fp32_param\.")
_LAYERS = re.compile(r"\bdecoder\.layers\.(?![0-9])")
_EXPERTS = re.compile(r"\bmlp\.experts\.experts\.(?![0-9])")
# In turn; what is not named here keeps Megatron's name, and is listed as a tensor that one side alone has.
_NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^module\.", ""),
        (r"^embedding\.word_embeddings\.", "model.embed_tokens."),
        (r"^output_layer\.", "lm_head."),
        (r"^decoder\.final_(?:layer)?norm\.", "model.norm."),
        (r"^decoder\.layers\.", "model.layers."),
        (r"\.self_attention\.", ".self_attn."),
        (r"\.linear_qkv\.layer_norm_", ".input_layernorm."),
        (r"\.self_attn\.input_layernorm\.", ".input_layernorm."),
        (r"\.linear_q_up_proj\.layer_norm_", ".q_a_layernorm."),
        (r"\.linear_kv_up_proj\.layer_norm_", ".kv_a_layernorm."),
        (r"\.mlp\.linear_fc1\.layer_norm_", ".post_attention_layernorm."),
        (r"\.pre_mlp_layernorm\.", ".post_attention_layernorm."),
        (r"\.linear_proj\.", ".o_proj."),
        (r"\.([qk])_layernorm\.", r".\1_norm."),
        (r"\.linear_q_proj\.", ".q_proj."),
        (r"\.linear_q_down_proj\.", ".q_a_proj."),
        (r"\.linear_q_up_proj\.", ".q_b_proj."),
        (r"\.linear_kv_down_proj\.", ".kv_a_proj_with_mqa."),
        (r"\.linear_kv_up_proj\.", ".kv_b_proj."),
        (r"\.linear_fc2\.", ".down_proj."),
        (r"\.linear_fc1\.(weight|bias)_w$", r".gate_proj.\1"),
        (r"\.linear_fc1\.(weight|bias)_v$", r".up_proj.\1"),
        (r"\.mlp\.router\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
        (r"\.mlp\.router\.", ".mlp.gate."),
        (r"\.experts\.experts\.", ".experts."),
        (r"\.shared_experts\.gate_weight$", ".shared_expert_gate.weight"),
    )
)
_ARGUMENTS = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
}


def is_megatron(stored: Mapping[str, StoredTensor]) -> bool:
    """Whether a checkpoint's tensors are called as Megatron's core calls them.

    >>> is_megatron({"decoder.layers.mlp.linear_fc2.weight": StoredTensor(TensorInfo("w", (1,), "float32"), ())})
    True
    """
    return any(_OURS.match(name) and ".linear_" in name for name in stored)


def weights_in(stored: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """The model's tensors, one per layer and expert, under Hugging Face's names.

    Raises:
        CheckpointError: layers are stacked in another way than Megatron writes them.
    """
    return _named({name: tensor for name, tensor in stored.items() if _OURS.match(name)}, folder)


def masters_in(stored: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """The float32 weights of its optimizer, under the same names; empty if they were not saved or lie otherwise.

    Raises:
        CheckpointError: layers are stacked in another way than Megatron writes them.
    """
    found = {_MASTERS.sub("", name): tensor for name, tensor in stored.items() if _MASTERS.match(name)}
    # a distributed optimizer of before 0.15 stores them flat, rank by rank
    alike = all(name in stored and stored[name].info.shape == tensor.info.shape for name, tensor in found.items())
    return _named(found, folder) if alike else {}


def config_in(folder: Path) -> dict[str, Any]:
    """The model's sizes from Megatron's arguments, which are stored with the shards; empty if they are missing."""
    path = folder / COMMON
    try:
        content = read_objects(path) if is_file(path) else None
    except CheckpointError:  # whatever else a trainer put there: no figure depends on it if there is a config.json
        return {}
    arguments = content.get("args") if isinstance(content, dict) else None
    if not isinstance(arguments, PickledObject) or not isinstance(arguments.state, dict):
        return {}
    said = {ours: arguments.state.get(theirs) for theirs, ours in _ARGUMENTS.items()}
    return {name: value for name, value in said.items() if type(value) is int and value > 0}


def _named(stored: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    apart = dict(item for name, tensor in stored.items() for item in _taken_apart(name, tensor, folder))
    return {_name_of(name, apart): tensor for name, tensor in apart.items()}


def _name_of(name: str, apart: Mapping[str, StoredTensor]) -> str:
    """Hugging Face's name; `apart` tells whether the first projection of an MLP holds a gate as well."""
    first, _, kind = name.rpartition(".linear_fc1.")
    if first and kind in ("weight", "bias"):
        second = apart.get(f"{first}.linear_fc2.weight")
        rows = apart[name].info.shape[0] if apart[name].info.shape else 0
        gated = second is not None and len(second.info.shape) == 2 and rows == 2 * second.info.shape[1]
        name = f"{first}.{'gate_up_proj' if gated else 'up_proj'}.{kind}"
    for pattern, replacement in _NAMES:
        name = pattern.sub(replacement, name)
    return name


def _taken_apart(name: str, tensor: StoredTensor, folder: Path) -> Iterator[tuple[str, StoredTensor]]:
    """A tensor layer by layer and expert by expert, as far as it is a stack of them."""
    stacks = [pattern for pattern in (_LAYERS, _EXPERTS) if pattern.search(name)]
    deep = len(stacks)
    if not deep:
        yield name, tensor
        return
    if len(tensor.info.shape) <= deep or any(math.prod(chunk.sizes[:deep]) != 1 for chunk in tensor.chunks):
        raise CheckpointError(
            f"{name} in {folder} does not have one layer per chunk, as Megatron writes them: save it again"
        )
    boxes: dict[tuple[int, ...], list[Chunk]] = {}
    for chunk in tensor.chunks:
        inner = Chunk(chunk.offsets[deep:], chunk.sizes[deep:], chunk.path, chunk.start, chunk.length)
        boxes.setdefault(chunk.offsets[:deep], []).append(inner)
    for place, chunks in sorted(boxes.items()):
        own = name
        for pattern, index in zip(stacks, place, strict=True):
            own = pattern.sub(rf"\g<0>{index}.", own)
        yield own, StoredTensor(TensorInfo(own, tensor.info.shape[deep:], tensor.info.dtype), tuple(chunks))
