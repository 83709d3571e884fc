"""Pairs under two names or in two layouts: what is told alike is compared under the base's name, the rest is listed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoint_folders import base_weights, moved, stored, write_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_cli import call
from torch import Tensor

from offprincipal.checkpoints import Checkpoint, open_checkpoint, pair_tensors
from offprincipal.checkpoints.alignment import Aligned, key_of
from offprincipal.comparison import CompareSettings, compare
from offprincipal.errors import ArgumentError, CheckpointError
from offprincipal.gates.updates import Tuned
from offprincipal.models import open_language_model
from offprincipal.reports import words

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = TEXT | {"num_key_value_heads": 2, "vocab_size": 60}
EXPERTS = {"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
GEMMA_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
LOCATION = CompareSettings(metrics=("location", "spectrum"))
PREFIXES = (
    "_orig_mod.",
    "module.",
    "model.",
    "module._orig_mod.",
    "base_model.model.",
    "pretrained_model.",
    "actor.",
    "policy.module.",
    "app.model.",
    "state_dict.",
    "language_model.",
)


def shaken(model: Any, seed: int = 3) -> Any:
    """A model whose every weight moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def assert_alike(one: Checkpoint, two: Checkpoint, names: set[str]) -> None:
    for name in names:
        assert one.tensors[name].shape == two.tensors[name].shape, name
        whole = one.read(name)
        assert np.array_equal(two.read(name), whole), name
        assert np.array_equal(two.read(name, 3, min(11, len(whole))), whole[3:11]), name


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("of_base", [False, True])
def test_prefixes_of_trainers_and_wrappers_are_looked_through(tmp_path: Path, prefix: str, of_base: bool) -> None:
    weights = base_weights() | {"lm_head.weight": torch.ones(40, 24).bfloat16()}
    longer = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    sides = [write_model(tmp_path / name, tensors) for name, tensors in (("a", weights), ("b", longer))]
    base = open_checkpoint(sides[of_base])
    tuned = open_checkpoint(sides[not of_base], base)
    assert pair_tensors(base, tuned, strict=True).tensors.keys() == base.tensors.keys()
    assert_alike(base, tuned, set(base.tensors))
    assert "stored under another name" in tuned.notes[0]


def test_wrappers_inside_of_names_are_looked_through(tmp_path: Path) -> None:
    weights = base_weights()
    inner = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
    wrapped = {
        name.replace("self_attn.", "self_attn." + "".join(inner)).replace("layers.0.", "layers.0._orig_mod."): tensor
        for name, tensor in weights.items()
    }
    base = open_checkpoint(write_model(tmp_path / "base", weights))
    tuned = open_checkpoint(write_model(tmp_path / "tuned", wrapped), base)
    assert pair_tensors(base, tuned, strict=True).tensors.keys() == weights.keys()
    assert_alike(base, tuned, set(weights))


def test_names_that_agree_are_never_touched(tmp_path: Path) -> None:
    """A decoder's own norm is not taken for that of another tower, nor a stack for its copy."""
    weights = base_weights()
    both = weights | {f"reference.{name}": tensor + 1 for name, tensor in weights.items()}
    base = open_checkpoint(write_model(tmp_path / "base", both))
    tuned = open_checkpoint(write_model(tmp_path / "tuned", both), base)
    assert not isinstance(tuned, Aligned) and not pair_tensors(base, tuned, strict=True).notes


def test_what_is_called_alike_twice_is_not_guessed(tmp_path: Path) -> None:
    weights = base_weights()
    twice = {
        f"{side}.{name}": tensor + i for i, side in enumerate(("actor", "policy")) for name, tensor in weights.items()
    }
    base = open_checkpoint(write_model(tmp_path / "base", weights))
    tuned = open_checkpoint(write_model(tmp_path / "tuned", twice), base)
    with pytest.raises(CheckpointError, match=r"do not match: only 0%.*the base has .*embed_tokens.*actor\."):
        pair_tensors(base, tuned)


def vision_model(kind: str) -> Any:
    if kind == "qwen2_5_vl":
        qwen = transformers.Qwen2_5_VLConfig(
            text_config=GROUPED | {"rope_parameters": ROPE},
            vision_config=QWEN_VISION | {"patch_size": 4},
            tie_word_embeddings=False,
            **{f"{name}_token_id": 50 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))},
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(qwen)
    gemma = transformers.Gemma3Config(
        text_config=GROUPED | {"head_dim": 8, "pad_token_id": 0},
        vision_config=GEMMA_VISION | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(gemma)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_both_layouts_of_vision_language_models_are_one_model(kind: str, tmp_path: Path) -> None:
    """As the Hub has them, and as the module is called: transformers 4.52 to 4.57 and state dicts write the latter."""
    torch.manual_seed(0)
    model = vision_model(kind).bfloat16()
    model.save_pretrained(tmp_path / "base")
    shaken(model).save_pretrained(tmp_path / "same")
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
    (tmp_path / "modules").mkdir()
    save_file(own, tmp_path / "modules" / "model.safetensors")
    base = open_checkpoint(tmp_path / "base")
    same, modules = (open_checkpoint(tmp_path / name, base) for name in ("same", "modules"))
    assert set(load_file(tmp_path / "modules" / "model.safetensors")) != set(same.tensors)
    assert pair_tensors(base, modules, strict=True).tensors.keys() == same.tensors.keys()
    assert_alike(same, modules, set(same.tensors))


def causal(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**GROUPED | {"pad_token_id": 0} | more)
    return transformers.AutoModelForCausalLM.from_config(config).bfloat16()


@pytest.mark.parametrize(
    ("name", "more"), [("Qwen3Moe", EXPERTS), ("Mixtral", {"num_local_experts": 3}), ("Olmoe", EXPERTS)]
)
@pytest.mark.parametrize("stacked_base", [False, True])
def test_stacked_experts_are_those_that_are_stored_one_by_one(
    name: str, more: dict[str, Any], stacked_base: bool, tmp_path: Path
) -> None:
    model = causal(name, **more)
    model.save_pretrained(tmp_path / "before", save_original_format=not stacked_base)
    shaken(model).save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    base = open_checkpoint(tmp_path / "before")
    single, stacked = (open_checkpoint(tmp_path / side, base) for side in ("single", "stacked"))
    assert len(load_file(tmp_path / "single" / "model.safetensors")) > len(
        load_file(tmp_path / "stacked" / "model.safetensors")
    )
    for tuned in (single, stacked):
        assert pair_tensors(base, tuned, strict=True).tensors.keys() == base.tensors.keys()
    assert_alike(single, stacked, set(base.tensors))
    other = stacked if not stacked_base else single
    assert any("stored in another layout" in note for note in other.notes)


def test_fused_projections_are_those_that_are_stored_apart(tmp_path: Path) -> None:
    """Phi-3 as it is, and as Llama's names hold it."""
    model = causal("Phi3")
    model.save_pretrained(tmp_path / "fused")
    state = load_file(tmp_path / "fused" / "model.safetensors")
    apart: dict[str, Tensor] = {}
    for name, tensor in state.items():
        roles = {"qkv_proj": ("q", "k", "v"), "gate_up_proj": ("gate", "up")}.get(name.split(".")[-2], ())
        sizes = [32, 16, 16] if len(roles) == 3 else [48, 48]
        pieces = zip(roles, tensor.split(sizes) if roles else (), strict=True)
        apart |= {name.replace(name.split(".")[-2], f"{r}_proj"): piece.clone() for r, piece in pieces}
        apart |= {} if roles else {name: tensor}
    (tmp_path / "apart").mkdir()
    save_file(apart, tmp_path / "apart" / "model.safetensors")
    (tmp_path / "apart" / "config.json").write_text((tmp_path / "fused" / "config.json").read_text())
    for one, two in (("fused", "apart"), ("apart", "fused")):
        base = open_checkpoint(tmp_path / one)
        tuned = open_checkpoint(tmp_path / two, base)
        assert pair_tensors(base, tuned, strict=True).tensors.keys() == base.tensors.keys()
        assert_alike(base, tuned, set(base.tensors))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 16}),
        ("OPT", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}),
        ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60}),
        ("GPTNeoX", TEXT | {"vocab_size": 60}),
        ("Bert", TEXT | {"vocab_size": 60}),
    ],
)
def test_a_bare_model_is_the_decoder_of_one_with_a_head(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    """The Hub holds many as the bare model is called, and transformers saves them as what was trained is."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**more)
    kind = {"Bert": "BertForMaskedLM", "GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    model = getattr(transformers, kind)(config)
    model.save_pretrained(tmp_path / "whole")
    getattr(model, model.base_model_prefix).save_pretrained(tmp_path / "bare")
    base = open_checkpoint(tmp_path / "bare")
    tuned = open_checkpoint(tmp_path / "whole", base)
    pairing = pair_tensors(base, tuned)
    kept = set(base.tensors) - set(pairing.only_in_base)
    assert {name for name in base.tensors if "pooler" not in name} == kept - {n for n in kept if "pooler" in n}
    assert_alike(base, tuned, kept)


def test_t5_in_two_layouts_keeps_its_shared_embedding(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=16, vocab_size=60, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    state = load_file(tmp_path / "base" / "model.safetensors")
    copies = {f"{side}.embed_tokens.weight": state["shared.weight"].clone() for side in ("encoder", "decoder")}
    (tmp_path / "copies").mkdir()
    save_file(state | copies, tmp_path / "copies" / "model.safetensors")
    base = open_checkpoint(tmp_path / "base")
    pairing = pair_tensors(base, open_checkpoint(tmp_path / "copies", base))
    assert pairing.tensors.keys() == base.tensors.keys() and set(pairing.only_in_tuned) == set(copies)


class TestWhatOneAloneHas:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> dict[str, Path]:
        weights = base_weights()
        ahead = {
            name.replace("layers.1", "mtp.0"): tensor.clone() for name, tensor in weights.items() if "layers.1" in name
        }
        return {
            "base": write_model(tmp_path / "base", weights | ahead),
            "run": write_model(tmp_path / "run", weights | {"v_head.summary.weight": torch.ones(1, 24).bfloat16()}),
        }

    def test_it_is_listed_and_the_rest_is_compared(self, folders: dict[str, Path]) -> None:
        summary = compare(folders["base"], [folders["run"]], LOCATION, cache=False).summary
        run = summary["runs"]["run"]
        assert len(summary["only_in_base"]) == 3 and all("mtp" in name for name in summary["only_in_base"])
        assert run["only_in_run"] == ["v_head.summary.weight"]
        said = " ".join(run["warnings"])
        assert "base alone has 3 tensors" in said and "run alone has tensor v_head.summary.weight" in said
        assert "equals the base" not in said
        (paragraph,) = words.run_paragraphs(summary).values()
        assert paragraph.startswith("run is not the base: 4 tensors are in one of the two alone")
        assert "that was measured" in words.answers(summary)["Neither"]

    def test_strict_refuses_it(self, folders: dict[str, Path]) -> None:
        strict = CompareSettings(metrics=("location",), strict=True)
        with pytest.raises(CheckpointError, match=r"run lacks 3 tensors: .*mtp\.0.*omit --strict"):
            compare(folders["base"], [folders["run"]], strict, cache=False)

    def test_pipelines_can_ask_for_it(
        self, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        command = ["compare", str(folders["base"]), str(folders["run"]), "--out", str(tmp_path / "out")]
        command += ["--metrics", "location"]
        assert call(monkeypatch, *command, "--fail-if", "only_in_base > 3", "--fail-if", "only_in_run > 1") == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "note: " in shown and "base alone has 3 tensors" in shown
        assert call(monkeypatch, *command, "--fail-if", "only_in_base > 0") == 3
        assert "only_in_base is 3" in capsys.readouterr().err
        assert call(monkeypatch, *command, "--strict") == 2
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["only_in_base"]

    def test_less_than_half_is_no_pair(self, tmp_path: Path) -> None:
        weights = base_weights()
        other = {f"something.{name}": tensor for name, tensor in weights.items() if "norm" not in name}
        norms = {name: tensor for name, tensor in weights.items() if "norm" in name}
        base = open_checkpoint(write_model(tmp_path / "base", weights))
        with pytest.raises(CheckpointError, match=r"do not match: only \d+% of their parameters are in both"):
            pair_tensors(base, open_checkpoint(write_model(tmp_path / "other", other | norms), base))

    def test_gates_want_every_parameter_of_the_model(self, tiny_model: Path, tmp_path: Path) -> None:
        state = load_file(tiny_model / "model.safetensors")
        lost = {name: tensor for name, tensor in state.items() if "layers.1.mlp.up_proj" not in name}
        (tmp_path / "run").mkdir()
        save_file(lost, tmp_path / "run" / "model.safetensors")
        model, base = open_language_model(tiny_model, "cpu"), open_checkpoint(tiny_model)
        with pytest.raises(CheckpointError, match=r"lacks 1 parameters of the model, .*up_proj"):
            Tuned(model, base, tmp_path / "run", "stored")


def test_masters_go_by_the_same_names(tmp_path: Path) -> None:
    weights = base_weights()
    after = moved(weights, 1e-3, 7)
    longer = {f"_orig_mod.{name}": tensor for name, tensor in after.items()}
    write_model(tmp_path / "base", weights)
    write_model(tmp_path / "plain", stored(after), after)
    write_model(tmp_path / "wrapped", stored(longer), longer)
    rows = compare(tmp_path / "base", [tmp_path / "plain", tmp_path / "wrapped"], LOCATION, cache=False).matrices
    plain, wrapped = ([row for row in rows if row["run"] == run] for run in ("plain", "wrapped"))
    assert any(row["hidden_fraction"] for row in plain)
    assert [row | {"run": None} for row in plain] == [row | {"run": None} for row in wrapped]
    (tmp_path / "wrapped" / "masters" / "model.safetensors").unlink()
    lost = {name: tensor for name, tensor in longer.items() if "down_proj" not in name}
    save_file(lost, tmp_path / "wrapped" / "masters" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"masters of .* lack .*down_proj"):
        compare(tmp_path / "base", [tmp_path / "wrapped"], LOCATION, cache=False)


@given(st.lists(st.sampled_from(PREFIXES), max_size=3), st.sampled_from(sorted(base_weights())))
def test_a_key_is_the_same_under_any_prefixes(prefixes: list[str], name: str) -> None:
    assert key_of("".join(prefixes) + name) == key_of(name) == key_of(key_of(name))


def test_no_count_is_taken_for_a_metric() -> None:
    from offprincipal.comparison import parse_condition

    assert str(parse_condition("only_in_run > 0")) == "only_in_run > 0"
    with pytest.raises(ArgumentError, match="no metric 'only_in_both'"):
        parse_condition("only_in_both > 0")


@pytest.mark.parametrize(
    "change",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace("base_model.model.model.", "base_model.model.model.language_model."),
        lambda key: key.removeprefix("base_model.model."),
    ],
)
def test_keys_of_adapters_are_told_by_what_they_adapt(change: Callable[[str], str], tmp_path: Path) -> None:
    """As torch.compile, DDP, and a vision-language model's own modules name them."""
    base = open_checkpoint(write_model(tmp_path / "base", base_weights()))
    module, generator = "base_model.model.model.layers.0.self_attn.q_proj", torch.Generator().manual_seed(0)
    factors = {
        f"{module}.lora_A.weight": torch.randn(2, 24, generator=generator),
        f"{module}.lora_B.weight": torch.randn(32, 2, generator=generator),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    found = []
    for name, rename in (("good", str), ("other", change)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        save_file(
            {rename(key): tensor for key, tensor in factors.items()}, tmp_path / name / "adapter_model.safetensors"
        )
        found.append(open_checkpoint(tmp_path / name, base))
    assert_alike(found[0], found[1], set(base.tensors))
    assert not np.array_equal(found[1].read(f"{module.removeprefix('base_model.model.')}.weight")[:8], np.zeros(8))


@pytest.mark.parametrize(
    ("packed", "method", "said"),
    [
        (("experts.down_proj_blocks", "experts.down_proj_scales"), None, "mxfp4"),
        (("down_proj.qweight", "down_proj.qzeros", "down_proj.scales", "down_proj.g_idx"), None, "GPTQ or AWQ"),
        (("down_proj.qweight", "down_proj.scales"), "awq", "awq"),
        (("down_proj.weight_packed", "down_proj.weight_scale", "down_proj.weight_shape"), None, "compressed-tensors"),
        (("down_proj.weight", "down_proj.weight.absmax", "down_proj.weight.quant_map"), None, "bitsandbytes, 4 bits"),
        (("down_proj.weight", "down_proj.SCB"), None, "bitsandbytes, 8 bits"),
    ],
)
@pytest.mark.parametrize("of_base", [False, True])
def test_a_quantised_side_is_refused_by_what_it_is(
    packed: tuple[str, ...], method: str | None, said: str, of_base: bool, tmp_path: Path
) -> None:
    weights = base_weights()
    quantised = {name: tensor for name, tensor in weights.items() if "mlp.down_proj" not in name}
    for layer in (0, 1):
        quantised |= {f"model.layers.{layer}.mlp.{name}": torch.zeros(8, dtype=torch.uint8) for name in packed}
    sides = [write_model(tmp_path / "plain", weights), write_model(tmp_path / "quantised", quantised)]
    if method is not None:
        config = json.loads((sides[1] / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
        (sides[1] / "config.json").write_text(json.dumps(config))
    base = open_checkpoint(sides[of_base])
    with pytest.raises(CheckpointError, match=rf"quantised is quantised \({said}\): its packed weights, such as "):
        pair_tensors(base, open_checkpoint(sides[not of_base], base))
    same = open_checkpoint(sides[1])
    assert pair_tensors(same, open_checkpoint(sides[1], same), strict=True).tensors
