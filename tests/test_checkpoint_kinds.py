"""Every kind of checkpoint gives what the library that wrote it would load; whatever is wrong with one is said."""

import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_folders import write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from offprincipal.checkpoints import Checkpoint, open_checkpoint, pair_tensors
from offprincipal.errors import CheckpointError

ATTENTION = ["q_proj", "v_proj"]


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.mark,)


def tiny(kind: str = "llama", **settings: Any) -> torch.nn.Module:
    """A random model of two small layers in float32."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=24, n_positions=8, **settings)
        return transformers.GPT2LMHeadModel(config)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 48, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(kind, **(sizes | heads | settings))
    return transformers.AutoModelForCausalLM.from_config(config)


def shaken(model: torch.nn.Module, size: float = 0.05, seed: int = 1) -> None:
    """Move every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def tensor_of(checkpoint: Checkpoint, name: str) -> Tensor:
    return torch.from_numpy(checkpoint.read(name).astype(np.float32)).reshape(checkpoint.tensors[name].shape)


def assert_same(checkpoint: Checkpoint, wanted: dict[str, Tensor], atol: float = 1e-6) -> None:
    """The checkpoint holds these tensors, whole and in ranges."""
    assert checkpoint.tensors, checkpoint.source
    for name, info in checkpoint.tensors.items():
        torch.testing.assert_close(tensor_of(checkpoint, name), wanted[name].float(), rtol=0, atol=atol, msg=name)
        third = info.numel // 3 + 1
        parts = [checkpoint.read(name, start, min(start + third, info.numel)) for start in range(0, info.numel, third)]
        np.testing.assert_allclose(np.concatenate(parts), checkpoint.read(name), rtol=0, atol=1e-6)


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


def adapt(peft: Any, model: torch.nn.Module, folder: Path, config: Any, **saving: Any) -> dict[str, Tensor]:
    """Save the base and a trained adapter; what PEFT merges them to, in float32."""
    model.save_pretrained(folder / "base")
    model.name_or_path = model.config._name_or_path = str(folder / "base")
    adapted = peft.get_peft_model(model, config)
    if saving:
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(folder / "start")
        adapted.peft_config["default"].init_lora_weights = config.init_lora_weights
        saving = {"path_initial_model_for_weight_conversion": str(folder / "start")}
    shaken(adapted)
    adapted.save_pretrained(folder / "adapter", **saving)
    return merged(adapted)


def merged(adapted: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapted.merge_and_unload().state_dict().items()}


def lora(peft: Any, **settings: Any) -> Any:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | settings
    )


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama", {}),
    "rsLoRA": ("llama", {"use_rslora": True}),
    "patterns": (
        "qwen3",
        {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 3}, "alpha_pattern": {r"^model.layers.0.*": 11}},
    ),
    "DoRA": ("llama", {"use_dora": True, "target_modules": "all-linear"}),
    "biases": ("llama", {"bias": "lora_only", "lora_bias": True, "target_modules": ["q_proj", "o_proj"]}),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "DoRA of embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "modules to save": ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "tied": ("qwen3", {}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D and a head": ("gpt2", {"target_modules": ["c_attn", "c_proj", "lm_head"]}),
    "DoRA of Conv1D and a head": ("gpt2", {"target_modules": ["c_proj", "lm_head"], "use_dora": True}),
    "DoRA of Conv1D": ("gpt2", {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True, "use_dora": True}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_what_peft_merges(tmp_path: Path, peft: Any, kind: str) -> None:
    name, settings = ADAPTERS[kind]
    more = {"attention_bias": True} if kind == "biases" else {"tie_word_embeddings": True} if kind == "tied" else {}
    if kind.endswith("head"):
        more = {"tie_word_embeddings": False}
    model = tiny(name, **more)
    wanted = adapt(peft, model, tmp_path, lora(peft, **settings))
    base = open_checkpoint(tmp_path / "base")
    tuned = open_checkpoint(tmp_path / "adapter", base)
    pair_tensors(base, tuned)
    assert_same(tuned, wanted)
    moved = [name for name in base.tensors if not np.array_equal(base.read(name), tuned.read(name))]
    assert moved and all(tuned.tensors[name].dtype == "float32" for name in moved)
    assert_same(open_checkpoint(tmp_path / "adapter"), wanted)


def test_only_adapted_tensors_are_float32(tmp_path: Path, peft: Any) -> None:
    wanted = adapt(peft, tiny().bfloat16(), tmp_path, lora(peft))
    base = open_checkpoint(tmp_path / "base")
    tuned = open_checkpoint(tmp_path / "adapter", base)
    kinds = {name: info.dtype for name, info in tuned.tensors.items()}
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "float32"
    assert kinds["model.layers.0.self_attn.k_proj.weight"] == "bfloat16"
    name = "model.layers.1.self_attn.q_proj.weight"
    rounded = tensor_of(tuned, name).bfloat16()
    assert (rounded == wanted[name]).float().mean() > 0.95


def test_shira_is_what_peft_merges(tmp_path: Path, peft: Any) -> None:
    config = peft.ShiraConfig(r=2, target_modules=ATTENTION, task_type="CAUSAL_LM", random_seed=3)
    wanted = adapt(peft, tiny(), tmp_path, config)
    base = open_checkpoint(tmp_path / "base")
    tuned = open_checkpoint(tmp_path / "adapter", base)
    assert_same(tuned, wanted)
    name = "model.layers.0.self_attn.q_proj.weight"
    rows, cols = base.tensors[name].shape
    assert np.count_nonzero(base.read(name) != tuned.read(name)) == 2 * (rows + cols)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OTHERS: dict[
    str, tuple[str, dict[str, Any], str, dict[str, Any]]
] = {  # model, its settings, configuration, its settings
    "AdaLoRA": ("llama", {}, "AdaLoraConfig", {"total_step": 10, "init_r": 6, "target_r": 3}),
    "AdaLoRA without alpha": ("llama", {}, "AdaLoraConfig", {"total_step": 10, "lora_alpha": 0}),
    "MiSS": ("llama", {}, "MissConfig", {"r": 5, "target_modules": ["q_proj", "down_proj"]}),
    "MiSS mini": ("llama", {}, "MissConfig", {"r": 4, "init_weights": "mini", "mini_r": 2}),
    "IA3": (
        "llama",
        {"attention_bias": True},
        "IA3Config",
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "IA3 of Conv1D": (
        "gpt2",
        {},
        "IA3Config",
        {"target_modules": ["attn.c_attn", "c_proj"], "feedforward_modules": ["c_proj"], "fan_in_fan_out": True},
    ),
    "norms": ("llama", {}, "LNTuningConfig", {"target_modules": ["norm", "input_layernorm"]}),
    "tokens": ("llama", {}, "TrainableTokensConfig", {"token_indices": [7, 3], "target_modules": ["embed_tokens"]}),
    "LoRA and tokens": ("llama", {}, "LoraConfig", {"trainable_token_indices": [40, 2]}),
    "LoRA and tokens of two": (
        "llama",
        {},
        "LoraConfig",
        {"trainable_token_indices": {"embed_tokens": [4, 2], "lm_head": [9]}},
    ),
    "tokens of tied": ("qwen3", {"tie_word_embeddings": True}, "LoraConfig", {"trainable_token_indices": [1]}),
    "experts": ("qwen3_moe", MOE, "LoraConfig", {"target_parameters": STACKED}),
    "experts down": ("qwen3_moe", MOE, "LoraConfig", {"target_parameters": STACKED[1:], "use_rslora": True}),
    "experts and router": ("qwen3_moe", MOE, "LoraConfig", {"target_parameters": [*STACKED, "gate.weight"]}),
    "experts by pattern": (
        "qwen3_moe",
        MOE,
        "LoraConfig",
        {"target_parameters": STACKED, "rank_pattern": {"experts.down_proj": 2}},
    ),
    "experts of gpt_oss": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        "LoraConfig",
        {"target_parameters": STACKED},
    ),
    "convolution": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "LoraConfig", {"target_modules": ["in_proj"]}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_are_what_peft_merges(tmp_path: Path, peft: Any, kind: str) -> None:
    name, more, method, settings = OTHERS[kind]
    if method != "LNTuningConfig" and "target_modules" not in settings:
        settings = {"target_modules": ATTENTION} | settings
    if method in ("LoraConfig", "MissConfig") and "r" not in settings:
        settings = {"r": 4} | settings
    model = tiny(name, **more)
    adapt(peft, model, tmp_path, getattr(peft, method)(**settings))
    again = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32)
    peft.PeftModel.from_pretrained(again, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    base, wanted = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "merged")
    tuned = open_checkpoint(tmp_path / "adapter", base)
    assert tuned.tensors.keys() == base.tensors.keys()
    assert_same(tuned, {name: tensor_of(wanted, name) for name in tuned.tensors})
    assert any(not np.array_equal(base.read(name), tuned.read(name)) for name in base.tensors)


@pytest.mark.parametrize("settings", [{}, {"intermediate_size": 24, "moe_intermediate_size": 24}], ids=["", "square"])
def test_adapted_experts_are_the_same_on_a_base_that_stacks_them(
    tmp_path: Path, peft: Any, settings: dict[str, Any]
) -> None:
    model = tiny("qwen3_moe", **MOE | settings)
    adapt(peft, model, tmp_path, lora(peft, target_parameters=STACKED))
    alone = open_checkpoint(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    stacks = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32).state_dict()
    (tmp_path / "stacked").mkdir()
    save_file(stacks, tmp_path / "stacked" / "model.safetensors")
    (tmp_path / "stacked" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    stacked = open_checkpoint(tmp_path / "adapter", open_checkpoint(tmp_path / "stacked"))
    for place in ("0.mlp.experts", "1.mlp.experts"):
        gate_up = tensor_of(stacked, f"model.layers.{place}.gate_up_proj")
        for expert in range(4):
            parts = [
                tensor_of(alone, f"model.layers.{place}.{expert}.{role}_proj.weight") for role in ("gate", "up", "down")
            ]
            torch.testing.assert_close(gate_up[expert], torch.cat(parts[:2]))
            torch.testing.assert_close(tensor_of(stacked, f"model.layers.{place}.down_proj")[expert], parts[2])
    assert_same(stacked, {name: tensor_of(stacked, name) for name in stacked.tensors})  # in ranges, too


def test_a_low_rank_change_of_a_convolution(tmp_path: Path, peft: Any) -> None:
    """Over all its filter's places, as PEFT convolves the one factor with the other."""
    conv = torch.nn.Sequential(torch.nn.Conv1d(6, 10, 3), torch.nn.Conv2d(4, 8, (2, 3)))
    (tmp_path / "base").mkdir()
    save_file(conv.state_dict(), tmp_path / "base" / "model.safetensors")
    adapted = peft.get_peft_model(conv, peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    tuned = open_checkpoint(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    assert_same(tuned, merged(adapted))


def test_a_head_that_the_base_ties_becomes_one_of_its_own(tmp_path: Path, peft: Any) -> None:
    model = tiny("qwen3", tie_word_embeddings=True)
    adapt(peft, model, tmp_path, lora(peft, target_modules=["q_proj", "lm_head"]))
    base = open_checkpoint(tmp_path / "base")
    tuned = open_checkpoint(tmp_path / "adapter", base)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.lm_head.lora_{which}.weight"] for which in "AB")
    embedding = tensor_of(base, "model.embed_tokens.weight")
    torch.testing.assert_close(tensor_of(tuned, "lm_head.weight"), embedding + 1.5 * B @ A)
    assert torch.equal(tensor_of(tuned, "model.embed_tokens.weight"), embedding)
    assert pair_tensors(base, tuned).tied == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_a_converted_pissa_is_a_lora_on_the_original_base(tmp_path: Path, peft: Any, init: str) -> None:
    wanted = adapt(peft, tiny(), tmp_path, lora(peft, init_lora_weights=init), convert=True)
    assert_same(open_checkpoint(tmp_path / "adapter", open_checkpoint(tmp_path / "base")), wanted, atol=3e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["plain", "DoRA"])
def test_a_raw_pissa_loses_its_start_from_the_base(
    tmp_path: Path, peft: Any, init: str, settings: dict[str, Any]
) -> None:
    wanted = adapt(peft, tiny(), tmp_path, lora(peft, init_lora_weights=init, **settings))
    base = open_checkpoint(tmp_path / "base")
    tuned = open_checkpoint(tmp_path / "adapter", base)
    assert_same(tuned, wanted, atol=5e-6)
    assert "recomputed" in tuned.notes[-1]


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_a_raw_pissa_finds_its_residual_base(tmp_path: Path, peft: Any, init: str) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "original")
    adapted = peft.get_peft_model(model, lora(peft, init_lora_weights=init))
    residual = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for name, tensor in adapted.state_dict().items()
        if "lora_" not in name
    }
    (tmp_path / "residual").mkdir()
    save_file(residual, tmp_path / "residual" / "model.safetensors")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "residual")
    shaken(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = merged(adapted)
    for base in (None, open_checkpoint(tmp_path / "original"), open_checkpoint(tmp_path / "residual")):
        tuned = open_checkpoint(tmp_path / "adapter", base)
        assert_same(tuned, wanted)
        assert "residual base" in tuned.notes[-1] and "recomputed" not in tuned.notes[-1]


def test_a_raw_adapter_whose_residual_is_lost_is_refused(tmp_path: Path, peft: Any) -> None:
    adapt(peft, tiny(), tmp_path, lora(peft, init_lora_weights="pissa_niter_4"))
    with pytest.raises(CheckpointError, match="path_initial_model_for_weight_conversion"):
        open_checkpoint(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))


def test_a_pickled_adapter_is_read_without_running_it(tmp_path: Path, peft: Any) -> None:
    wanted = adapt(peft, tiny(), tmp_path, lora(peft))
    folder = tmp_path / "adapter"
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    base = open_checkpoint(tmp_path / "base")
    assert_same(open_checkpoint(folder, base), wanted)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin holds more than tensors"):
        open_checkpoint(folder, base)
    assert not (tmp_path / "mark").exists()


@pytest.fixture(scope="module")
def plain_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and a LoRA of two modules, written by hand."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(1)
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]
    write_model(folder / "base", {name: torch.randn(12, 8) for name in names} | {"model.norm.weight": torch.ones(8)})
    (folder / "adapter").mkdir()
    save_file(lora_tensors(names), folder / "adapter" / "adapter_model.safetensors")
    return folder


def lora_tensors(names: list[str], rank: int = 2) -> dict[str, Tensor]:
    modules = [f"base_model.model.{name.removesuffix('.weight')}" for name in names]
    return {f"{module}.lora_A.weight": torch.randn(rank, 8) for module in modules} | {
        f"{module}.lora_B.weight": torch.randn(12, rank) for module in modules
    }


CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": None}
BAD_CONFIGS: dict[str, tuple[object, str]] = {
    "no object": ([CONFIG], "not contain a JSON object"),
    "no kind": ({"r": 2}, "bad peft_type"),
    "another kind": (CONFIG | {"peft_type": "LOHA"}, "'LOHA', which is not supported"),
    "no name of a kind": (CONFIG | {"peft_type": ["LORA"]}, "bad peft_type"),
    "rank 0": (CONFIG | {"r": 0}, "bad r: "),
    "rank is text": (CONFIG | {"r": "2"}, "bad r: "),
    "rank is true": (CONFIG | {"r": True}, "bad r: "),
    "rank is another": (CONFIG | {"r": 3}, "rank 3"),
    "rank is huge": (CONFIG | {"r": 10**400}, "bad r: "),
    "no rank by pattern": (CONFIG | {"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    "alpha is NaN": (CONFIG | {"lora_alpha": float("nan")}, "bad lora_alpha"),
    "alpha is infinite": (CONFIG | {"lora_alpha": float("inf")}, "bad lora_alpha"),
    "alpha is huge": (CONFIG | {"lora_alpha": 10**400}, "bad lora_alpha"),
    "pattern is a list": (CONFIG | {"alpha_pattern": ["q_proj"]}, "bad alpha_pattern"),
    "pattern of NaN": (CONFIG | {"alpha_pattern": {"q_proj": float("nan")}}, "bad alpha_pattern"),
    "pattern is no pattern": (CONFIG | {"alpha_pattern": {"q_proj(": 1}}, "not a regular expression"),
    "pattern without end": (CONFIG | {"alpha_pattern": {"(a+)+$": 1}}, "too complex"),
    "pattern of options": (CONFIG | {"rank_pattern": {"[a-z]?" * 30 + "[a-z]" * 30: 1}}, "too complex"),
    "nested options": (CONFIG | {"rank_pattern": {"(((a?)?)?)?(((b?)?)?)?": 1}}, "too complex"),
    "patterns of patterns": (CONFIG | {"rank_pattern": {str(i): 1 for i in range(1001)}}, "1001 patterns"),
    "DoRA without magnitudes": (CONFIG | {"use_dora": True}, "lacks lora_magnitude_vector"),
    "replicated layers": (CONFIG | {"layer_replication": [[0, 1], [0, 1]]}, "sets layer_replication"),
    "experts that are not there": (CONFIG | {"target_parameters": ["self_attn.q_proj.mlp"]}, "target_parameters"),
    "half a MiSS": (CONFIG | {"peft_type": "MISS", "init_weights": "bat"}, "init_weights 'bat'"),
    "no AdaLoRA": (CONFIG | {"peft_type": "ADALORA"}, "lacks lora_E"),
    "no list of tokens": (CONFIG | {"trainable_token_indices": [1.5]}, "bad trainable_token_indices"),
    "PiSSA of nothing": (CONFIG | {"init_lora_weights": "corda"}, "residual|left of the base"),
    "init is a number": (CONFIG | {"init_lora_weights": 3}, "bad init_lora_weights"),
}


@pytest.mark.parametrize("fault", BAD_CONFIGS)
def test_a_bad_adapter_config_is_refused_by_name(tmp_path: Path, plain_adapter: Path, fault: str) -> None:
    config, says = BAD_CONFIGS[fault]
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(
        (plain_adapter / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match=says) as error:
        open_checkpoint(folder, open_checkpoint(plain_adapter / "base"))
    assert str(folder) in str(error.value)


def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path: Path, plain_adapter: Path) -> None:
    base = open_checkpoint(plain_adapter / "base")
    tensors = load_file(plain_adapter / "adapter" / "adapter_model.safetensors")
    first = "base_model.model.model.layers.0.self_attn.q_proj"
    shira = {f"{first}.shira_weight": torch.ones(2), f"{first}.shira_indices": torch.tensor([[0, 1], [0, 8]])}
    faults: dict[str, tuple[dict[str, Tensor], str]] = {
        "narrow": (tensors | {f"{first}.lora_A.weight": torch.ones(2, 7)}, "does not fit"),
        "ranks": (tensors | {f"{first}.lora_A.weight": torch.ones(3, 8)}, "not of the rank"),
        "cube": (tensors | {f"{first}.lora_A.weight": torch.ones(2, 8, 1)}, "not of the rank"),
        "half": ({name: tensor for name, tensor in tensors.items() if "lora_A" in name}, "not both"),
        "elsewhere": ({name.replace("q_proj", "qkv"): tensor for name, tensor in tensors.items()}, "has not"),
        "no adapter": ({"base_model.model.model.norm.weight": torch.ones(8)}, "has no weights of a supported adapter"),
        "unknown": (tensors | {"base_model.model.model.layers.0.oft_R.weight": torch.ones(2)}, "has not"),
        "a vector": (
            {name.replace("layers.0.self_attn.q_proj", "norm"): tensors[name] for name in tensors},
            "not a matrix",
        ),
        "whole numbers": ({name: tensor.int() for name, tensor in tensors.items()}, "no floating-point numbers"),
        "no places": ({f"{first}.shira_weight": torch.ones(2)}, "lacks the places"),
        "bad places": (shira, "points outside"),
        "other places": (tensors, "not of the peft_type"),
        "another kind": (shira, "not of the peft_type"),
        "twice": (tensors | {f"{first}.lora_A.other.weight": torch.ones(2, 8)}, "twice"),
        "two names": (
            tensors | {name.replace("base_model.model.", ""): tensors[name] + 1 for name in tensors},
            "twice",
        ),
        "long": (tensors | {first + ".lora_A" * 100: torch.ones(1)}, "key of .* characters"),
    }
    for fault, (content, says) in faults.items():
        folder = tmp_path / fault
        folder.mkdir()
        kind = "SHIRA" if "places" in fault else "LORA"
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"peft_type": kind}))
        save_file(content, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=says) as error:
            tuned = open_checkpoint(folder, base)
            tuned.read("model.layers.0.self_attn.q_proj.weight")
        assert str(folder) in str(error.value), fault


def test_an_adapter_without_a_usable_base_says_so(tmp_path: Path, plain_adapter: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    weights = (plain_adapter / "adapter" / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    for named, says in {
        None: "names no base",
        "": "names no base",
        str(tmp_path / "gone"): "cannot be opened: .* does not exist",
        str(folder): "is itself an adapter",
        "x" * 5000: "cannot be opened",
        "a\0b": "cannot be opened",
    }.items():
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"base_model_name_or_path": named}))
        with pytest.raises(CheckpointError, match=says):
            open_checkpoint(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        open_checkpoint(folder)


def test_an_adapter_on_another_base_than_it_names_says_so(tmp_path: Path, plain_adapter: Path) -> None:
    base = open_checkpoint(plain_adapter / "base")
    config = plain_adapter / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(CONFIG | {"base_model_name_or_path": str(tmp_path)}))
    assert f"though it names {tmp_path}" in open_checkpoint(plain_adapter / "adapter", base).notes[-1]
    config.write_text(json.dumps(CONFIG | {"base_model_name_or_path": str(plain_adapter / "base")}))
    assert len(open_checkpoint(plain_adapter / "adapter", base).notes) == 1


def test_an_adapter_reads_no_more_rows_than_it_needs(plain_adapter: Path) -> None:
    class Watched:
        """A base that remembers what was read of it."""

        def __init__(self, base: Checkpoint) -> None:
            self.base, self.ranges = base, []

        def __getattr__(self, name: str) -> Any:
            return getattr(self.base, name)

        def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
            self.ranges.append((start, stop))
            return self.base.read(name, start, stop)

    (plain_adapter / "adapter" / "adapter_config.json").write_text(json.dumps(CONFIG))
    watched: Any = Watched(open_checkpoint(plain_adapter / "base"))
    tuned = open_checkpoint(plain_adapter / "adapter", watched)
    assert watched.ranges == []
    tuned.read("model.layers.0.self_attn.q_proj.weight", 19, 26)
    assert watched.ranges == [(16, 32)]


def weights_of_every_type() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {
        "model.a.weight": torch.randn(7, 5).bfloat16(),
        "model.b.weight": torch.randn(5, 7).t(),
        "model.c.weight": torch.randn(3, 2, 2).half(),
        "model.d.weight": torch.randn(4, 4).double(),
        "model.e.weight": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "model.scalar": torch.tensor(1.5),
        "model.steps": torch.arange(3),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files_are_read_bit_for_bit(tmp_path: Path, zipped: bool) -> None:
    weights = weights_of_every_type()
    if not zipped:
        del weights["model.e.weight"]  # torch itself cannot load float8 from its old format
    torch.save(OrderedDict(weights), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == sorted(weights)
    for name, tensor in weights.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.tensors[name].dtype == str(tensor.dtype).removeprefix("torch.")
        whole = checkpoint.read(name)
        assert whole.tobytes() == tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes(), name
        assert checkpoint.read(name, 1, 3).tobytes() == whole[1:3].tobytes()


def torch_shards(folder: Path) -> Path:
    folder.mkdir()
    weights = weights_of_every_type()
    weight_map = {}
    for i, names in enumerate((list(weights)[::2], list(weights)[1::2])):
        file = f"pytorch_model-{i + 1:05}-of-00002.bin"
        torch.save({name: weights[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_torch_shards_are_one_checkpoint(tmp_path: Path) -> None:
    torch.save(weights_of_every_type(), tmp_path / "pytorch_model.bin")
    one, shards = open_checkpoint(tmp_path), open_checkpoint(torch_shards(tmp_path / "shards"))
    pair_tensors(one, shards)
    assert all(np.array_equal(one.read(name), shards.read(name)) for name in one.tensors)


def test_a_bad_torch_file_is_refused_by_name_and_never_run(tmp_path: Path) -> None:
    weights = weights_of_every_type()
    mark = tmp_path / "mark"
    faults: dict[str, tuple[Callable[[Path], object], str]] = {
        "bomb": (lambda path: path.write_bytes(pickle.dumps(Bomb(mark))), "holds more than tensors"),
        "zipped bomb": (lambda path: torch.save(weights | {"x": Bomb(mark)}, path), r"\(pathlib.Path.touch|more than"),
        "system": (lambda path: torch.save({"x": os.system}, path), r"holds more than tensors \(posix.system\)"),
        "truncated": (lambda path: truncate(path, weights), "truncated or corrupt"),
        "empty": (lambda path: path.write_bytes(b""), "truncated or corrupt"),
        "text": (lambda path: path.write_text("version https://git-lfs"), "truncated or corrupt"),
        "list": (lambda path: torch.save([torch.ones(2)], path), "not a dictionary of tensors"),
        "tensor": (lambda path: torch.save(torch.ones(2), path), "not a dictionary of tensors"),
        "nothing": (lambda path: torch.save({}, path), "not a dictionary of tensors"),
        "numbers": (lambda path: torch.save({1: torch.ones(2)}, path), "not a dictionary of tensors"),
        "nested": (lambda path: torch.save({"model": weights | {"n": 3}}, path), "'n' .* is int, not a tensor"),
        "sparse": (lambda path: torch.save({"x": torch.ones(2, 2).to_sparse()}, path), "sparse_tensor, not a tensor"),
        "expanded": (lambda path: torch.save({"x": torch.ones(1).expand(2**40)}, path), "repeats its entries"),
        "without data": (lambda path: torch.save({"x": torch.ones(1, device="meta")}, path), "not a tensor"),
    }
    for fault, (write, says) in faults.items():
        folder = tmp_path / fault
        folder.mkdir()
        write(folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=says) as error:
            open_checkpoint(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value), fault
    assert not mark.exists(), "a pickle was run"


def truncate(path: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:-700])


@pytest.mark.parametrize("shard", ["../pytorch_model.bin", "/etc/passwd", 7, "", "a\0b", "gone.bin"])
def test_a_torch_index_cannot_leave_its_folder(tmp_path: Path, shard: object) -> None:
    folder = torch_shards(tmp_path / "shards")
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.a.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"is missing" if shard == "gone.bin" else r"not a file inside its folder"
    ):
        open_checkpoint(folder)


def test_opening_checkpoints_needs_no_torch() -> None:
    heavy = ("torch", "peft", "huggingface_hub", "transformers")
    program = f"import sys, offprincipal.checkpoints; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore")
class TestDistributed:
    """Checkpoints of torch.distributed."""

    def test_accelerates_wrapper_is_taken_off(self, tmp_path: Path) -> None:
        model = tiny()
        model.save_pretrained(tmp_path / "base")
        shaken(model)
        run = tmp_path / "checkpoint-100"
        dcp.save({"model": model.state_dict()}, checkpoint_id=run / "pytorch_model_fsdp_0")
        dcp.save({"optimizer": {"state": torch.ones(2)}}, checkpoint_id=run / "optimizer_0")
        base = open_checkpoint(tmp_path / "base")
        for tuned in (open_checkpoint(run, base), open_checkpoint(run), open_checkpoint(run / "pytorch_model_fsdp_0")):
            pair_tensors(base, tuned)
            assert_same(tuned, model.state_dict(), atol=0)

    @pytest.mark.parametrize("older", [False, True])
    def test_members_of_enumerations_are_read_however_python_wrote_them(
        self, tmp_path: Path, older: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Python 3.11.0 to 3.11.3 write `getattr(kind, name)`, others `kind(value)`."""
        kind: Any = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
        how = (lambda self, _: (getattr, (kind, self._name_))) if older else (lambda self, _: (kind, (self._value_,)))
        monkeypatch.setattr(kind, "__reduce_ex__", how)
        weights = {"a.weight": torch.arange(6.0).reshape(2, 3)}
        torch.distributed.checkpoint.save(weights, checkpoint_id=str(tmp_path))
        assert (b"getattr" in (tmp_path / ".metadata").read_bytes()) == older
        assert_same(open_checkpoint(tmp_path), weights)

    def test_a_bare_state_dict_keeps_its_names(self, tmp_path: Path) -> None:
        model = tiny("qwen3", tie_word_embeddings=True)
        model.save_pretrained(tmp_path / "base")
        state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        dcp.save(state, checkpoint_id=tmp_path / "run")
        base = open_checkpoint(tmp_path / "base")
        for tuned in (open_checkpoint(tmp_path / "run", base), open_checkpoint(tmp_path / "run")):
            assert pair_tensors(base, tuned).tensors.keys() == base.tensors.keys()
        dcp.save(model.state_dict(), checkpoint_id=tmp_path / "with head")
        whole = open_checkpoint(tmp_path / "with head", base)
        assert pair_tensors(base, whole).tensors.keys() == base.tensors.keys()

    @pytest.mark.parametrize("wrapped", ["", "model."])
    def test_torchtitans_llama_is_put_in_hugging_faces_order(self, tmp_path: Path, wrapped: str) -> None:
        model = tiny()
        model.save_pretrained(tmp_path / "base")
        titan = {f"{wrapped}{name}": tensor for name, tensor in as_torchtitan(model.state_dict(), 4, 2).items()}
        others = {"optimizer.state.x": torch.ones(3), "train_state": {"step": 3}, "lr_scheduler.x": torch.ones(1)}
        dcp.save(titan | others, checkpoint_id=tmp_path / "step-100")
        base = open_checkpoint(tmp_path / "base")
        tuned = open_checkpoint(tmp_path / "step-100", base)
        pair_tensors(base, tuned)
        assert_same(tuned, model.state_dict(), atol=0)
        assert "rows of 4 tensors are put from the order of Meta's rotary embedding" in tuned.notes[-1]
        as_it_is = open_checkpoint(tmp_path / "step-100")
        assert "layers.0.attention.wq.weight" in as_it_is.tensors and len(as_it_is.tensors) == len(base.tensors)

    def test_torchtitans_order_needs_the_number_of_heads(self, tmp_path: Path) -> None:
        model = tiny()
        model.save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "config.json").unlink()
        dcp.save(as_torchtitan(model.state_dict(), 4, 2), checkpoint_id=tmp_path / "step-100")
        with pytest.raises(CheckpointError, match="num_attention_heads"):
            open_checkpoint(tmp_path / "step-100", open_checkpoint(tmp_path / "base"))

    def test_chunks_of_two_ranks_are_put_together(self, tmp_path: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        program = Path(__file__).with_name("save_sharded.py")
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        ranks = [
            subprocess.Popen(
                [sys.executable, str(program), str(tmp_path / "run")],
                env=environment | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
            )
            for rank in range(2)
        ]
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors.decode()[-2000:]
        assert len(list((tmp_path / "run").glob("*.distcp"))) == 2
        assert len(list((tmp_path / "run-hf").glob("shard-*-model-*-of-*.safetensors"))) == 2
        wanted = {"rows": (7, 6), "columns": (4, 9), "both": (5, 3, 4), "fsdp.weight": (9, 5), "fsdp.bias": (9,)}
        for checkpoint in map(open_checkpoint, (tmp_path / "run", tmp_path / "run-hf")):
            assert {name: info.shape for name, info in checkpoint.tensors.items()} == wanted
            for name, info in checkpoint.tensors.items():
                whole = torch.arange(info.numel).bfloat16().float()
                assert torch.equal(tensor_of(checkpoint, name).flatten(), whole), name
                for start, stop in ((0, 1), (1, info.numel - 1), (info.numel // 2, info.numel)):
                    part = torch.from_numpy(checkpoint.read(name, start, stop).astype(np.float32))
                    assert torch.equal(part, whole[start:stop]), name

    def test_what_is_wrong_with_one_is_said(self, tmp_path: Path) -> None:
        state = {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(3)}
        mark = tmp_path / "mark"

        def saved(fault: str) -> Path:
            dcp.save(state, checkpoint_id=tmp_path / fault)
            return tmp_path / fault

        def edited(fault: str, edit: Callable[[Any], None]) -> Path:
            folder = saved(fault)
            metadata = pickle.loads((folder / ".metadata").read_bytes())
            edit(metadata)
            (folder / ".metadata").write_bytes(pickle.dumps(metadata))
            return folder

        def place(metadata: Any, **changes: object) -> None:
            for info in metadata.storage_data.values():
                for field, value in changes.items():
                    setattr(info, field, value)

        def metadata_of(fault: str, content: bytes) -> Path:
            folder = saved(fault)
            (folder / ".metadata").write_bytes(content)
            return folder

        lost = saved("lost")
        next(lost.glob("*.distcp")).unlink()
        short = saved("short")
        shard = next(short.glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-10])
        garbled = saved("garbled")
        shard = next(garbled.glob("*.distcp"))
        shard.write_bytes(bytes(len(shard.read_bytes())))
        swapped = saved("swapped")
        next(swapped.glob("*.distcp")).write_bytes(pickle.dumps(Bomb(mark)) + bytes(10_000))
        faults = {
            lost: r"__0_0\.distcp is missing",
            short: r"__0_0\.distcp is truncated",
            garbled: r"__0_0\.distcp is truncated or corrupt",
            swapped: r"__0_0\.distcp (holds more than tensors|is truncated or corrupt)",
            metadata_of("bomb", pickle.dumps(Bomb(mark))): r"names pathlib\.Path\.touch|names builtins.getattr",
            metadata_of("system", pickle.dumps(os.system)): r"names posix\.system",
            metadata_of("import", b"cos\nsystem\n(S'true'\ntR."): r"names os\.system",
            metadata_of("member", b"cbuiltins\ngetattr\n(cpathlib\nPath\nS'touch'\ntR."): r"names builtins\.getattr",
            metadata_of("getattr", b"cbuiltins\ngetattr\n(S'x'\nS'__class__'\ntR."): r"names builtins\.getattr",
            metadata_of("module", b"cantigravity\nfly\n."): r"names antigravity\.fly",
            metadata_of("empty", b""): "truncated or corrupt",
            metadata_of("list", pickle.dumps([1])): "not the metadata of a distributed checkpoint",
            metadata_of("persistent", b"Px\n."): "truncated or corrupt",
            edited("parent", lambda metadata: place(metadata, relative_path="../x.distcp")): "not a file inside",
            edited("absolute", lambda metadata: place(metadata, relative_path="/etc/passwd")): "not a file inside",
            edited("negative", lambda metadata: place(metadata, offset=-1)): "in place of a shape",
            edited("far", lambda metadata: place(metadata, offset=2**40)): "is truncated",
            edited("text", lambda metadata: place(metadata, length="all")): "in place of a shape",
            edited("packed", lambda metadata: place(metadata, transform_descriptors=["zstd"])): "compressed",
            edited("unplaced", lambda metadata: metadata.storage_data.clear()): "does not say where",
            edited(
                "unsaved", lambda metadata: metadata.state_dict_metadata["a.weight"].chunks.clear()
            ): "every part of a.weight",
            edited(
                "outside",
                lambda metadata: setattr(
                    metadata.state_dict_metadata["a.weight"].chunks[0], "offsets", torch.Size([1, 0])
                ),
            ): "outside it",
            edited("large", lambda metadata: enlarge(metadata.state_dict_metadata["a.weight"])): "fewer bytes",
            edited("no model", lambda metadata: metadata.state_dict_metadata.clear()): "not contain a model's tensors",
        }
        for folder, says in faults.items():
            with pytest.raises(CheckpointError, match=says) as error:
                checkpoint = open_checkpoint(folder)
                for name in checkpoint.tensors:
                    checkpoint.read(name)
            assert str(folder) in str(error.value), folder
        assert not mark.exists(), "a pickle was run"


def enlarge(stored: Any) -> None:
    stored.size = stored.chunks[0].sizes = torch.Size([2**40, 4])


def as_torchtitan(state: dict[str, Tensor], heads: int, key_heads: int) -> dict[str, Tensor]:
    """A Llama's tensors under torchtitan's names, rows of queries and keys in the order of Meta's rotary embedding."""
    names = {
        "embed_tokens": "tok_embeddings",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "lm_head": "output",
    }
    found = {}
    for name, tensor in state.items():
        for theirs, count in (("q_proj", heads), ("k_proj", key_heads)):
            if theirs in name:
                halves = tensor.reshape(count, 2, -1, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
        name = name.removeprefix("model.")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found


HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Opens an id in a fresh process, as the environment must be set before the library is imported."""
    home = tmp_path / "home"
    cached(home, "org/name", {"main": HASH, "v1": HASH[::-1]})

    def opened(source: str, **environment: str) -> str:
        program = (
            "import sys; from offprincipal.checkpoints import open_checkpoint\n"
            "from offprincipal.errors import CheckpointError\n"
            "try:\n    c = open_checkpoint(sys.argv[1]); print(c.source, *c.tensors, c.read('x.weight').sum())\n"
            "except CheckpointError as error:\n    print('error:', error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, source],
            env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"} | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    yield opened


def cached(home: Path, repo: str, refs: dict[str, str], save: Callable[..., None] = save_file, file: str = "") -> None:
    """The library's cache of a repository: a snapshot of every revision."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    for i, (revision, commit) in enumerate(refs.items()):
        (folder / "refs" / revision).write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        save(
            {"x.weight": torch.full((2, 2), float(i + 1))},
            folder / "snapshots" / commit / (file or "model.safetensors"),
        )


def test_hub_ids_are_found_in_the_cache_without_a_network(hub: Callable[..., str]) -> None:
    assert hub("org/name") == "org/name x.weight 4.0"
    assert hub("org/name@v1") == "org/name@v1 x.weight 8.0"
    assert hub(f"org/name@{HASH}") == f"org/name@{HASH} x.weight 4.0"
    assert hub("org/name", HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9") == "org/name x.weight 4.0"


def test_pickles_of_the_hub_are_read_where_there_is_nothing_else(tmp_path: Path, hub: Callable[..., str]) -> None:
    cached(tmp_path / "home", "org/old", {"main": HASH}, torch.save, "pytorch_model.bin")
    cached(tmp_path / "home", "org/none", {"main": HASH}, torch.save, "weights.gguf")
    assert hub("org/old") == "org/old x.weight 4.0"
    assert "has no weights" in hub("org/none")


def test_an_adapter_of_the_hub_finds_its_base_there(tmp_path: Path, hub: Callable[..., str]) -> None:
    def save(tensors: dict[str, Tensor], path: Path) -> None:
        save_file({"x.lora_A.weight": torch.ones(2, 2), "x.lora_B.weight": torch.ones(2, 2)}, path)
        (path.parent / "adapter_config.json").write_text(
            json.dumps(CONFIG | {"base_model_name_or_path": "org/name@v1"})
        )

    cached(tmp_path / "home", "org/lora", {"main": HASH}, save, "adapter_model.safetensors")
    assert hub("org/lora") == "org/lora x.weight 24.0"


def test_a_local_folder_wins_over_an_id(tmp_path: Path, hub: Callable[..., str]) -> None:
    write_model(tmp_path / "org" / "name", {"x.weight": torch.full((2, 2), 9.0)})
    assert hub("org/name") == "org/name x.weight 36.0"


def test_what_cannot_be_got_from_the_hub_is_said(hub: Callable[..., str]) -> None:
    assert "HF_HUB_OFFLINE is set" in hub("org/absent")
    assert "HF_HUB_OFFLINE is set" in hub("org/name@v2")
    assert "cannot be reached" in hub("org/absent", HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert "is not a Hub id" in hub("org/na--me")
    for source in ("org/name/more", "org/name@../../x", "./org/absent", "/org/absent", "org /name", "org/"):
        assert "does not exist" in hub(source), source


BOXES: dict[str, tuple[object, str]] = {
    "nothing": (None, "does not say where its parts lie"),
    "no object": ([1], "does not say where its parts lie"),
    "another tensor": ({"b": {"saved_offsets": [0, 0]}}, "does not say where its part of a lies"),
    "one dimension": ({"a": {"saved_offsets": [0]}}, "does not say where its part of a lies"),
    "before it": ({"a": {"saved_offsets": [-1, 0]}}, "does not say where its part of a lies"),
    "text": ({"a": {"saved_offsets": ["0", 0]}}, "does not say where its part of a lies"),
    "a gap": ({"a": {"saved_offsets": [3, 0]}}, "overlap or leave gaps"),
}


@pytest.mark.parametrize("fault", BOXES)
def test_safetensors_of_ranks_that_do_not_fill_their_tensors_are_refused(tmp_path: Path, fault: str) -> None:
    where, says = BOXES[fault]
    metadata = None if where is None else {"DCP_SHARDING_INFO": json.dumps(where)}
    save_file({"a": torch.ones(2, 3)}, tmp_path / "shard-00001-model-00001-of-00001.safetensors", metadata)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(tmp_path).read("a")


def rewritten(path: Path, out: Path, change: Callable[[str, bytes], tuple[bytes, int]]) -> Path:
    """A copy of a zipped file of torch with other records: content and way of compression by name."""
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(out, "w") as made:
        for entry in stored.infolist():
            content, how = change(entry.filename, stored.read(entry))
            made.writestr(zipfile.ZipInfo(entry.filename), content, how)
    return out


def test_records_that_are_short_or_compressed_are_not_read_on_into_what_lies_behind(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100), "b": torch.full((100,), 7.0)}, tmp_path / "whole.pt")
    changes: dict[str, Callable[[str, bytes], tuple[bytes, int]]] = {
        "short": lambda n, c: (c[:40] if n.endswith("data/0") else c, zipfile.ZIP_STORED),
        "deflated": lambda n, c: (c, zipfile.ZIP_DEFLATED if n.endswith("data/0") else zipfile.ZIP_STORED),
    }
    for fault, change in changes.items():
        path = rewritten(tmp_path / "whole.pt", tmp_path / f"{fault}.pt", change)
        with pytest.raises(CheckpointError, match=f"{fault}.pt is truncated or corrupt"):
            open_checkpoint(path).read("a")
    same = rewritten(tmp_path / "whole.pt", tmp_path / "same.pt", lambda n, c: (c, zipfile.ZIP_STORED))
    assert open_checkpoint(same).read("b").tolist() == [7.0] * 100


def test_a_file_that_is_cut_short_while_it_is_open_is_an_error_and_no_crash(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1 << 18)}, tmp_path / "m.pt")
    found = open_checkpoint(tmp_path / "m.pt")
    os.truncate(tmp_path / "m.pt", 5000)
    with pytest.raises(CheckpointError, match=r"m\.pt ends before a does"):
        found.read("a")


def test_views_in_torch_files_are_read_as_they_are_seen(tmp_path: Path) -> None:
    whole = torch.arange(24).float().view(4, 6)
    views = {"turned": whole.T, "column": whole[:, 2], "part": whole[1:3], "every": whole[::2, ::3], "one": whole[1, 1]}
    torch.save(views, tmp_path / "m.pt")
    found = open_checkpoint(tmp_path / "m.pt")
    for name, view in views.items():
        assert found.tensors[name].shape == tuple(view.shape)
        assert torch.equal(tensor_of(found, name), view), name
        assert found.read(name, 1, 3).tolist() == view.flatten()[1:3].tolist()


def test_what_is_read_may_be_written_to_so_that_torch_warns_of_nothing(tmp_path: Path) -> None:
    weights = {"a": torch.randn(4, 3), "b": torch.randn(4, 3).T}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    found = open_checkpoint(tmp_path)
    for name in weights:
        assert found.read(name).flags.writeable, name
