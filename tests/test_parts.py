"""Parts of a stored tensor: they tile it once, and are the matrices that the modelling code multiplies with."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from offprincipal.checkpoints import Checkpoint, Part, TensorInfo, open_checkpoint, parts_of, place_of
from offprincipal.checkpoints.matrices import linear_parts, matrices_of

LAYERS, EXPERTS, HEADS, KV_HEADS, HIDDEN, HEAD_DIM, INNER = 2, 3, 4, 2, 16, 4, 24
LLAMA = {
    "vocab_size": 40,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
NO_HEAD_DIM = {key: value for key, value in LLAMA.items() if key != "head_dim"}
NO_GROUPS = {key: value for key, value in NO_HEAD_DIM.items() if key != "num_key_value_heads"}
GPT2 = {
    "vocab_size": 40,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 32,
    **{"eos_token_id": 2},
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
FALCON = {"vocab_size": 40, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}

ATTENTION = dict.fromkeys("qkvo", LAYERS)
GATED = ATTENTION | dict.fromkeys(("gate", "up", "down"), LAYERS)
UNGATED = ATTENTION | dict.fromkeys(("up", "down"), LAYERS)
TABLES = {"embedding": 1, "head": 1}


def mixture(experts: int = EXPERTS, shared: int = 0) -> dict[str, int]:
    return ATTENTION | dict.fromkeys(("gate", "up", "down"), LAYERS * (experts + shared))


ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "llama": ("LlamaConfig", LLAMA, GATED | TABLES | {"norm": 2 * LAYERS + 1}),
    "mistral": ("MistralConfig", LLAMA, GATED | TABLES | {"norm": 2 * LAYERS + 1}),
    "qwen2": ("Qwen2Config", LLAMA, GATED | TABLES | {"norm": 2 * LAYERS + 1, "bias": 3 * LAYERS}),
    "qwen3": ("Qwen3Config", LLAMA, GATED | TABLES | {"norm": 4 * LAYERS + 1}),
    "gemma": ("GemmaConfig", LLAMA | {"tie_word_embeddings": True}, GATED | {"embedding": 1, "norm": 2 * LAYERS + 1}),
    "gemma2": ("Gemma2Config", LLAMA | {"tie_word_embeddings": True}, GATED | {"embedding": 1, "norm": 4 * LAYERS + 1}),
    "gemma3": (
        "Gemma3TextConfig",
        LLAMA | {"tie_word_embeddings": True},
        GATED | {"embedding": 1, "norm": 6 * LAYERS + 1},
    ),
    "phi3": ("Phi3Config", LLAMA, GATED | TABLES | {"norm": 2 * LAYERS + 1}),
    "phi2": ("PhiConfig", NO_HEAD_DIM, UNGATED | TABLES | {"norm": LAYERS + 1, "bias": 7 * LAYERS + 2}),
    "gpt2": ("GPT2Config", GPT2, UNGATED | {"embedding": 2, "norm": 2 * LAYERS + 1, "bias": 6 * LAYERS + 1}),
    "starcoder": (
        "GPTBigCodeConfig",
        GPT2,
        UNGATED | {"embedding": 2, "norm": 2 * LAYERS + 1, "bias": 6 * LAYERS + 1},
    ),
    "neox": ("GPTNeoXConfig", NO_GROUPS, UNGATED | TABLES | {"norm": 2 * LAYERS + 1, "bias": 6 * LAYERS + 1}),
    "falcon 7b": ("FalconConfig", FALCON, UNGATED | {"embedding": 1, "norm": LAYERS + 1, "bias": LAYERS + 1}),
    "falcon 40b": (
        "FalconConfig",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS},
        UNGATED | {"embedding": 1, "norm": 2 * LAYERS + 1, "bias": 2 * LAYERS + 1},
    ),
    "mixtral": (
        "MixtralConfig",
        LLAMA | {"num_local_experts": EXPERTS},
        mixture() | TABLES | {"norm": 2 * LAYERS + 1, "router": LAYERS},
    ),
    "qwen2 moe": (
        "Qwen2MoeConfig",
        LLAMA | MOE | {"num_experts": EXPERTS, "shared_expert_intermediate_size": 8},
        mixture(shared=1) | TABLES | {"norm": 2 * LAYERS + 1, "router": 2 * LAYERS, "bias": 3 * LAYERS},
    ),
    "qwen3 moe": (
        "Qwen3MoeConfig",
        LLAMA | MOE | {"num_experts": EXPERTS},
        mixture() | TABLES | {"norm": 4 * LAYERS + 1, "router": LAYERS},
    ),
    "gpt-oss": (
        "GptOssConfig",
        LLAMA | MOE | {"num_local_experts": EXPERTS, "layer_types": ["full_attention"] * LAYERS},
        mixture() | TABLES | {"norm": 2 * LAYERS + 1, "router": LAYERS, "bias": 7 * LAYERS, "other": LAYERS},
    ),
    "llama4": (
        "Llama4TextConfig",
        LLAMA | {"num_local_experts": EXPERTS, "intermediate_size_mlp": INNER, "interleave_moe_layer_step": 1},
        mixture(shared=1) | TABLES | {"norm": 2 * LAYERS + 1, "router": LAYERS},
    ),
    "granite moe": (
        "GraniteMoeConfig",
        NO_HEAD_DIM | {"num_local_experts": EXPERTS},
        mixture() | TABLES | {"norm": 2 * LAYERS + 1, "router": LAYERS},
    ),
}


ENCODER = {"vocab_size": 40, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
ENCODER |= {"num_attention_heads": HEADS}
T5 = {"d_model": HIDDEN, "d_ff": INNER, "d_kv": 8, "num_layers": LAYERS, "num_heads": HEADS, "vocab_size": 40}
# Of other kinds than decoders: model, configuration, settings, linear matrices by role, and what is no linear matrix.
OTHERS: dict[str, tuple[str, str, dict[str, Any], dict[str, int], set[str]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu"},
        dict.fromkeys("qkvo", 3 * LAYERS) | dict.fromkeys(("gate", "up", "down"), 2 * LAYERS),
        {"norm", "embedding"},
    ),
    "t5 ungated": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"feed_forward_proj": "relu", "tie_word_embeddings": False},
        dict.fromkeys("qkvo", 3 * LAYERS) | dict.fromkeys(("up", "down"), 2 * LAYERS),
        {"norm", "embedding", "head"},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", ENCODER, UNGATED | {"other": 1}, {"norm", "bias", "embedding", "head"}),
    "vit": (
        "ViTModel",
        "ViTConfig",
        ENCODER | {"image_size": 8, "patch_size": 4},
        UNGATED | {"other": 1},
        {"norm", "bias", "embedding", "other"},
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 40, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 4},
        {"other": 4 * LAYERS},
        {"norm", "bias", "embedding", "ssm", "other", "head"},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_are_no_transformer_decoders_have_their_roles_too(name: str, tmp_path: Path) -> None:
    model, config, settings, linear, others = OTHERS[name]
    torch.manual_seed(0)
    getattr(transformers, model)(getattr(transformers, config)(**settings)).save_pretrained(tmp_path)
    parts = all_parts(open_checkpoint(tmp_path))
    assert Counter(part.place.role for part in parts if part.is_linear) == linear
    assert {part.place.role for part in parts if not part.is_linear} <= others
    layered = [part.place.layer for part in parts if part.place.role in linear and part.place.role != "other"]
    assert all(layer in range(LAYERS) for layer in layered)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.0.mlp.down_proj.weight_scale_inv",
        "model.layers.0.mlp.up_proj.scales",
        "model.layers.0.mlp.up_proj.qzeros",
        "model.layers.0.mlp.experts.gate_up_proj_scales",
        "model.layers.0.self_attn.o_proj.weight.absmax",
        "model.layers.0.self_attn.k_proj.k_scale",
        "model.layers.0.self_attn.q_proj.SCB",
    ],
)
def test_scales_of_quantised_weights_are_no_matrices(name: str) -> None:
    (part,) = parts_of(TensorInfo(name, (8, 16), "float32"), {})
    assert part.place.role == "scale" and not part.is_matrix


def tiny(name: str) -> nn.Module:
    kind, settings, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).float().eval()


def saved(name: str, folder: Path) -> tuple[nn.Module, Checkpoint]:
    """A tiny model of the architecture with random weights, and the checkpoint that it saves."""
    model = tiny(name)
    model.save_pretrained(folder)
    return model, open_checkpoint(folder)


def all_parts(checkpoint: Checkpoint) -> list[Part]:
    return [part for info in checkpoint.tensors.values() for part in parts_of(info, checkpoint.config)]


def the_parts(checkpoint: Checkpoint, tensor: str) -> dict[str, Tensor]:
    """Role -> matrix, of one stored tensor."""
    parts = parts_of(checkpoint.tensors[tensor], checkpoint.config)
    read = {part.place.role: part.of(checkpoint.read(tensor, part.start, part.stop)) for part in parts}
    return {role: torch.from_numpy(matrix) for role, matrix in read.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_tile_every_tensor_and_have_the_roles_of_the_architecture(name: str, tmp_path: Path) -> None:
    _, checkpoint = saved(name, tmp_path)
    for info in checkpoint.tensors.values():
        parts = parts_of(info, checkpoint.config)
        entries = np.arange(info.numel)
        pieces = [part.of(entries[part.start : part.stop]) for part in parts]
        assert [piece.shape for piece in pieces] == [part.matrix_shape for part in parts]
        assert all(piece.flags.c_contiguous for piece in pieces)
        assert np.array_equal(np.sort(np.concatenate([piece.ravel() for piece in pieces])), entries), info.name
        whole = torch.from_numpy(entries).reshape(info.shape)
        rebuilt = torch.full_like(whole, -1)
        for part, piece in zip(parts, pieces, strict=True):
            cut = part.cut(whole)
            assert cut.is_contiguous() and np.array_equal(cut.numpy(), piece), part
            part.put(rebuilt, cut)
        assert torch.equal(rebuilt, whole), info.name
    parts = all_parts(checkpoint)
    assert len({part.name for part in parts}) == len(parts)
    assert Counter(part.place.role for part in parts) == ARCHITECTURES[name][2]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_projections_are_out_by_in(name: str, tmp_path: Path) -> None:
    """What reads the hidden state has its size as columns, what writes to it has it as rows."""
    _, checkpoint = saved(name, tmp_path)
    for part in all_parts(checkpoint):
        if part.place.role in ("q", "k", "v", "gate", "up"):
            assert part.matrix_shape[1] == HIDDEN, part
        if part.place.role in ("o", "down"):
            assert part.matrix_shape[0] == HIDDEN, part


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe", "gpt-oss", "llama4", "granite moe"])
def test_every_expert_has_its_layer_and_number(name: str, tmp_path: Path) -> None:
    _, checkpoint = saved(name, tmp_path)
    places = Counter(part.place for part in all_parts(checkpoint) if part.place.expert is not None)
    expected = {
        (role, layer, expert) for role in ("gate", "up", "down") for layer in range(LAYERS) for expert in range(EXPERTS)
    }
    linear = {(place.role, place.layer, place.expert): n for place, n in places.items() if place.role != "other"}
    assert linear == dict.fromkeys(expected, 1)


def test_phi3_parts_are_the_slices_of_its_forward_pass(tmp_path: Path) -> None:
    model, checkpoint = saved("phi3", tmp_path)
    x = torch.randn(5, HIDDEN)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    parts = the_parts(checkpoint, "model.layers.1.self_attn.qkv_proj.weight")
    qkv, q = attention.qkv_proj(x), HEADS * attention.head_dim
    kv = attention.num_key_value_heads * attention.head_dim
    torch.testing.assert_close(x @ parts["q"].T, qkv[..., :q])
    torch.testing.assert_close(x @ parts["k"].T, qkv[..., q : q + kv])
    torch.testing.assert_close(x @ parts["v"].T, qkv[..., q + kv :])
    parts = the_parts(checkpoint, "model.layers.1.mlp.gate_up_proj.weight")
    torch.testing.assert_close(
        (x @ parts["up"].T) * mlp.activation_fn(x @ parts["gate"].T) @ mlp.down_proj.weight.T, mlp(x)
    )


def test_gpt2_parts_are_what_its_forward_pass_splits_off(tmp_path: Path) -> None:
    model, checkpoint = saved("gpt2", tmp_path)
    x = torch.randn(5, HIDDEN)
    block = model.transformer.h[1]
    parts = the_parts(checkpoint, "transformer.h.1.attn.c_attn.weight")
    split = (block.attn.c_attn(x) - block.attn.c_attn.bias).split(block.attn.split_size, dim=1)
    for role, expected in zip("qkv", split, strict=True):
        torch.testing.assert_close(x @ parts[role].T, expected)
    up = the_parts(checkpoint, "transformer.h.1.mlp.c_fc.weight")["up"]
    torch.testing.assert_close(x @ up.T, block.mlp.c_fc(x) - block.mlp.c_fc.bias)


def heads_of(states: Tensor) -> Tensor:
    """(heads, tokens, size) -> (tokens, heads · size)."""
    return states.transpose(0, 1).flatten(1)


def test_neox_parts_are_the_heads_of_its_forward_pass(tmp_path: Path) -> None:
    model, checkpoint = saved("neox", tmp_path)
    x = torch.randn(5, HIDDEN)
    attention = model.gpt_neox.layers[1].attention
    parts = the_parts(checkpoint, "gpt_neox.layers.1.attention.query_key_value.weight")
    fused = attention.query_key_value(x) - attention.query_key_value.bias
    split = fused.view(5, -1, 3 * attention.head_size).transpose(0, 1).chunk(3, dim=-1)
    for role, expected in zip("qkv", split, strict=True):
        torch.testing.assert_close(x @ parts[role].T, heads_of(expected))


@pytest.mark.parametrize("name", ["falcon 7b", "falcon 40b"])
def test_falcon_parts_are_what_its_own_split_gives(name: str, tmp_path: Path) -> None:
    model, checkpoint = saved(name, tmp_path)
    x = torch.randn(5, HIDDEN)
    attention = model.transformer.h[1].self_attention
    parts = the_parts(checkpoint, "transformer.h.1.self_attention.query_key_value.weight")
    q, k, v = (heads[0] for heads in attention._split_heads(attention.query_key_value(x)[None]))
    repeats = k.shape[1] // (
        parts["k"].shape[0] // HEAD_DIM
    )  # one key for each query of a group, where it repeats them
    torch.testing.assert_close(x @ parts["q"].T, q.flatten(1))
    torch.testing.assert_close(x @ parts["k"].T, k[:, ::repeats].flatten(1))
    torch.testing.assert_close(x @ parts["v"].T, v[:, ::repeats].flatten(1))


@pytest.mark.parametrize("multi_query", [True, False])
def test_starcoder_parts_are_linear_and_not_conv1d(multi_query: bool, tmp_path: Path) -> None:
    config = transformers.GPTBigCodeConfig(**GPT2, multi_query=multi_query)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    x = torch.randn(5, HIDDEN)
    attention = model.transformer.h[1].attn
    parts = the_parts(open_checkpoint(tmp_path), "transformer.h.1.attn.c_attn.weight")
    fused = attention.c_attn(x) - attention.c_attn.bias
    if multi_query:
        split = fused.split((HIDDEN, HEAD_DIM, HEAD_DIM), dim=-1)
    else:
        split = tuple(part.flatten(1) for part in fused.view(5, HEADS, 3 * HEAD_DIM).split(HEAD_DIM, dim=-1))
    for role, expected in zip("qkv", split, strict=True):
        torch.testing.assert_close(x @ parts[role].T, expected)


def in_memory(model: nn.Module, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict as training holds it, experts stacked, and the model's configuration."""
    return dict(model.state_dict()), {**model.config.to_dict(), "model_type": kind}


def expert_parts(state: dict[str, Tensor], config: dict[str, Any], name: str, expert: int) -> dict[str, Tensor]:
    tensor = state[name]
    parts = parts_of(TensorInfo(name, tuple(tensor.shape), "float32"), config)
    entries = tensor.detach().numpy().ravel()
    return {
        part.place.role: torch.from_numpy(part.of(entries[part.start : part.stop]))
        for part in parts
        if part.place.expert == expert
    }


@pytest.mark.parametrize(
    ("name", "mlp"),
    [
        ("mixtral", "model.layers.1.mlp"),
        ("qwen3 moe", "model.layers.1.mlp"),
        ("granite moe", "model.layers.1.block_sparse_moe"),
        ("gpt-oss", "model.layers.1.mlp"),
        ("llama4", "model.layers.1.feed_forward"),
    ],
)
def test_stacked_experts_are_what_the_model_multiplies_with(name: str, mlp: str) -> None:
    """An expert made of our parts answers as the model's own module does, with one expert chosen."""
    model = tiny(name)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    state, config = in_memory(model, model.config.model_type)
    experts = model.get_submodule(f"{mlp}.experts")
    x = torch.randn(5, HIDDEN)
    for expert in range(EXPERTS):
        parts = expert_parts(state, config, f"{mlp}.experts.gate_up_proj", expert)
        parts |= expert_parts(state, config, f"{mlp}.experts.down_proj", expert)
        gate, up = x @ parts["gate"].T, x @ parts["up"].T
        if name == "llama4":
            stack = torch.stack([x if i == expert else torch.zeros_like(x) for i in range(EXPERTS)])
            given_by_model = experts(stack.flatten(0, 1)).view(EXPERTS, 5, HIDDEN)[expert]
        else:
            chosen = torch.full((5, 1), expert)
            given_by_model = experts(x, chosen, torch.ones(5, 1))
        if name == "gpt-oss":
            biases = state[f"{mlp}.experts.gate_up_proj_bias"][expert]
            gate, up = (gate + biases[::2]).clamp(max=experts.limit), up + biases[1::2]
            inner = (up.clamp(-experts.limit, experts.limit) + 1) * gate * torch.sigmoid(gate * experts.alpha)
            ours = inner @ parts["down"].T + state[f"{mlp}.experts.down_proj_bias"][expert]
        else:
            ours = torch.nn.functional.silu(gate) * up @ parts["down"].T
        torch.testing.assert_close(ours, given_by_model, rtol=1e-4, atol=1e-4)


def roles(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> list[str]:
    return [part.place.role for part in parts_of(TensorInfo(name, shape, "bfloat16"), config)]


def test_what_the_configuration_does_not_explain_is_not_split() -> None:
    qkv, experts = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"
    phi3 = {"model_type": "phi3"} | NO_HEAD_DIM
    assert roles(qkv, (32, 16), phi3) == ["q", "k", "v"]
    assert roles(qkv, (33, 16), phi3) == ["other"]
    assert roles(qkv, (32, 16), phi3 | {"model_type": "codegen"}) == ["other"]
    assert roles(qkv, (32, 16), {}) == ["other"]
    assert roles(qkv.replace("model.", "model.vision_tower."), (32, 16), phi3) == ["other"]
    moe = {"model_type": "qwen3_moe", "hidden_size": 16}
    assert roles(experts, (2, 12, 16), moe) == ["gate", "up"] * 2
    assert roles(experts, (2, 16, 12), moe) == ["other"] * 2
    assert roles(experts, (2, 12, 16), moe | {"model_type": "novel"}) == ["other"] * 2
    assert roles("h.0.attn.c_attn.weight", (16, 48), {"model_type": "gpt2", "n_embd": 15}) == ["other"]
    assert roles("x.gate_up_proj.weight", (7, 4), {}) == ["other"]


def test_experts_that_are_stored_either_way_round_are_told_by_their_shape() -> None:
    name, config = "model.layers.0.mlp.experts.gate_up_proj", {"text_config": {"hidden_size": 16}}
    config["model_type"] = "qwen3_vl_moe"
    for shape, transposed in (((2, 12, 16), False), ((2, 16, 12), True)):
        parts = parts_of(TensorInfo(name, shape, "bfloat16"), config)
        assert [part.transposed for part in parts] == [transposed] * 4
        assert {part.matrix_shape for part in parts} == {(6, 16)}
    assert roles(name, (2, 16, 16), config) == ["other"] * 2


def test_torchtitan_names() -> None:
    expected = {
        "tok_embeddings.weight": "embedding",
        "layers.0.attention.wq.weight": "q",
        "layers.0.attention.wk.weight": "k",
        "layers.0.attention.wv.weight": "v",
        "layers.0.attention.wo.weight": "o",
        "layers.0.feed_forward.w1.weight": "gate",
        "layers.0.feed_forward.w2.weight": "down",
        "layers.0.feed_forward.w3.weight": "up",
        "layers.0.attention_norm.weight": "norm",
        "layers.0.ffn_norm.weight": "norm",
        "layers.0.moe.router.gate.weight": "router",
        "layers.0.moe.shared_experts.w2.weight": "down",
        "norm.weight": "norm",
        "output.weight": "head",
    }
    assert {name: place_of(name).role for name in expected} == expected
    assert roles("layers.1.moe.experts.w3", (2, 6, 4), {}) == ["up", "up"]


HOSTILE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**301) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
KEYS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "n_embd", "multi_query")
NAMES = (
    "model.layers.0.self_attn.qkv_proj.weight",
    "gpt_neox.layers.0.attention.query_key_value.weight",
    "h.0.attn.c_attn.weight",
    "model.layers.0.mlp.gate_up_proj.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.mlp.experts.down_proj",
)


@given(
    name=st.sampled_from(NAMES),
    shape=st.lists(st.integers(0, 12), max_size=4).map(tuple),
    kind=st.sampled_from(("phi3", "gpt2", "gpt_neox", "falcon", "gpt_bigcode", "qwen3_moe", "gpt_oss")) | HOSTILE,
    values=st.dictionaries(st.sampled_from(KEYS), st.integers(-2, 12) | HOSTILE),
    nest=st.sampled_from(["flat", "text_config", "text_config is wrong"]),
)
def test_no_configuration_breaks_the_tiling(
    name: str, shape: tuple[int, ...], kind: object, values: dict[str, object], nest: str
) -> None:
    config: dict[str, Any] = {"model_type": kind, **values}
    config = {"flat": config, "text_config": {"text_config": config}}.get(nest, config | {"text_config": 3})
    parts = parts_of(TensorInfo(name, shape, "bfloat16"), config)
    entries = np.arange(int(np.prod(shape)))
    pieces = [part.of(entries[part.start : part.stop]).ravel() for part in parts]
    assert np.array_equal(np.sort(np.concatenate(pieces)), entries)
    rebuilt = np.full_like(entries, -1)
    for part, piece in zip(parts, pieces, strict=True):
        part.put(rebuilt, piece.reshape(part.matrix_shape))
    assert np.array_equal(rebuilt, entries)


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gpt2", "neox"])
def test_the_matrices_of_an_open_model_are_those_of_its_checkpoint(name: str, tmp_path: Path) -> None:
    """Compiled, or wrapped in whatever a trainer wraps it in, they keep their names and still read its parameters."""
    model, checkpoint = saved(name, tmp_path)
    wrapped: nn.Module = nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": model})})
    wrapped.config = model.config  # type: ignore[assignment]
    stored = {part.name: the_parts(checkpoint, info.name)[part.place.role] for info, part in _named(checkpoint)}
    for opened in (model, wrapped):
        found = {matrix.name: matrix for matrix in matrices_of(opened) if matrix.part.is_linear}
        parameters = dict(opened.named_parameters())
        for part_name, matrix in found.items():
            assert parameters[matrix.parameter_name] is matrix.parameter
            if part_name in stored:  # transformers holds some under another name than it stores them
                assert torch.equal(matrix.weight(), stored[part_name]), part_name
        assert len(stored.keys() & found.keys()) >= 6 * LAYERS


def _named(checkpoint: Checkpoint) -> list[tuple[TensorInfo, Part]]:
    return [(info, part) for info, part in linear_parts(checkpoint) if part.place.expert is None]


def test_a_stack_of_absurdly_many_experts_is_one_part() -> None:
    assert len(parts_of(TensorInfo("mlp.experts.down_proj", (10**12, 1, 1), "bfloat16"), {})) == 1
    assert len(parts_of(TensorInfo("mlp.experts.down_proj", (10**12, 0, 1), "bfloat16"), {})) == 1
