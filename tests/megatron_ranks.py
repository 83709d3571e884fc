"""A model laid out as Megatron's `torch_dist` lays it, and the same as Hugging Face does."""

import json
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint.metadata as dcp
import torch.distributed.checkpoint.planner as plans
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo

LAYERS, WIDTH, HEADS, GROUPS, HEAD, INNER, EXPERTS, WORDS = 2, 16, 4, 2, 6, 24, 3, 40
CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "intermediate_size": INNER,
}
State = dict[str, torch.Tensor]


def usual(seed: int, bias: bool = False) -> State:
    """A model as Hugging Face lays it out: a dense layer, then one of experts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    state = {
        "model.embed_tokens.weight": draw(WORDS, WIDTH),
        "lm_head.weight": draw(WORDS, WIDTH),
        "model.norm.weight": draw(WIDTH),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, rows in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            state[f"{at}self_attn.{name}_proj.weight"] = draw(rows * HEAD, WIDTH)
            if bias:
                state[f"{at}self_attn.{name}_proj.bias"] = draw(rows * HEAD)
        state |= {
            f"{at}self_attn.o_proj.weight": draw(WIDTH, HEADS * HEAD),
            f"{at}self_attn.q_norm.weight": draw(HEAD),
            f"{at}self_attn.k_norm.weight": draw(HEAD),
            f"{at}input_layernorm.weight": draw(WIDTH),
            f"{at}post_attention_layernorm.weight": draw(WIDTH),
            f"{at}mlp.gate.weight": draw(EXPERTS, WIDTH),
        }
        for expert in range(EXPERTS):
            for name, shape in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
                state[f"{at}mlp.experts.{expert}.{name}_proj.weight"] = draw(*shape)
    return state


def grouped(state: State, at: str, kind: str) -> torch.Tensor:
    """Queries, key and value of one group after those of another, as Megatron fuses them."""
    q, k, v = (state[f"{at}self_attn.{name}_proj.{kind}"] for name in "qkv")
    parts = zip(q.chunk(GROUPS), k.chunk(GROUPS), v.chunk(GROUPS), strict=True)
    return torch.cat([row for group in parts for row in group])


def megatrons(state: State) -> State:
    """The same as Megatron lays it out, layers and experts stacked."""
    found = {
        "embedding.word_embeddings.weight": torch.cat([state["model.embed_tokens.weight"], torch.zeros(8, WIDTH)]),
        "output_layer.weight": torch.cat([state["lm_head.weight"], torch.zeros(8, WIDTH)]),
        "decoder.final_layernorm.weight": state["model.norm.weight"],
    }
    layers: list[State] = []
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        own = {
            "self_attention.linear_proj.weight": state[f"{at}self_attn.o_proj.weight"],
            "self_attention.q_layernorm.weight": state[f"{at}self_attn.q_norm.weight"],
            "self_attention.k_layernorm.weight": state[f"{at}self_attn.k_norm.weight"],
            "self_attention.linear_qkv.layer_norm_weight": state[f"{at}input_layernorm.weight"],
            "pre_mlp_layernorm.weight": state[f"{at}post_attention_layernorm.weight"],
            "mlp.router.weight": state[f"{at}mlp.gate.weight"],
        }
        kinds = [kind for kind in ("weight", "bias") if f"{at}self_attn.q_proj.{kind}" in state]
        own |= {f"self_attention.linear_qkv.{kind}": grouped(state, at, kind) for kind in kinds}
        experts = [f"{at}mlp.experts.{expert}." for expert in range(EXPERTS)]
        first = [torch.cat([state[f"{e}gate_proj.weight"], state[f"{e}up_proj.weight"]]) for e in experts]
        own["mlp.experts.experts.linear_fc1.weight"] = torch.stack(first)
        own["mlp.experts.experts.linear_fc2.weight"] = torch.stack([state[f"{e}down_proj.weight"] for e in experts])
        layers.append(own)
    return found | {f"decoder.layers.{name}": torch.stack([own[name] for own in layers]) for name in layers[0]}


def boxes(name: str, shape: tuple[int, ...], ranks: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """One layer and expert a chunk, each cut into as many rows as there are ranks."""
    deep = ("decoder.layers." in name) + (".experts." in name)
    inner = shape[deep:]
    cuts = ranks if inner[0] % ranks == 0 else 1
    found = []
    for stack in np.ndindex(shape[:deep]):
        for cut in range(cuts):
            rows = inner[0] // cuts
            found.append(((*stack, cut * rows, *(0 for _ in inner[1:])), (*(1 for _ in stack), rows, *inner[1:])))
    return found


def write_megatron(folder: Path, state: State, ranks: int = 2, extra: Any = None) -> Path:
    """As its writer does: one file a rank, metadata of torch's with the plan that it keeps there."""
    folder.mkdir(parents=True, exist_ok=True)
    known, places = {}, {}
    with (folder / "__0_0.distcp").open("wb") as file:
        for name, tensor in state.items():
            chunks = []
            for offsets, sizes in boxes(name, tuple(tensor.shape), ranks):
                piece = tensor[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))].clone()
                start = file.tell()
                torch.save(piece, file)
                chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                index = dcp.MetadataIndex(name, torch.Size(offsets))
                places[index] = _StorageInfo("__0_0.distcp", start, file.tell() - start)
            kind = dcp.TensorProperties(dtype=tensor.dtype)
            known[name] = dcp.TensorStorageMetadata(kind, tensor.size(), chunks)
        known["decoder.layers.mlp.router._extra_state/shard_0_2"] = dcp.BytesStorageMetadata()
    item = plans.WriteItem(dcp.MetadataIndex("x"), plans.WriteItemType.BYTE_IO, None, None)
    metadata = dcp.Metadata(known, planner_data=extra, storage_data=places)
    metadata.all_local_plans = [plans.SavePlan([item])]  # type: ignore[attr-defined]  # where Megatron keeps it
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    arguments = Namespace(hidden_size=WIDTH, num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=HEAD)
    torch.save({"args": arguments, "iteration": 7}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder


def usual_folder(folder: Path, state: State) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
