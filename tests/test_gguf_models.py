"""GGUF files as models to train: dequantised once, kept in bfloat16 as a folder, and previewed like any other."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_prompting import model_at
from transformers import AutoTokenizer

from offprincipal.checkpoints import open_checkpoint
from offprincipal.checkpoints.delta import DeltaFile, as_stored
from offprincipal.errors import ModelError
from offprincipal.models import gguf as ours
from offprincipal.models import model_name, open_language_model
from offprincipal.training import parse_settings, train
from offprincipal.training.preview import preview

gguf = pytest.importorskip("gguf")
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def gguf_of(folder: Path, out: Path, without: str = "") -> Path:
    """A Qwen3 folder as llama.cpp would write it, with its byte-level tokenizer, but for one tensor."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    weights = load_file(folder / "model.safetensors")
    writer: Any = gguf.GGUFWriter(out, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted((tokenizer["model"]["vocab"] | special).items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([3 if token in special else 1 for token, _ in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(special["<eos>"])
    writer.add_bos_token_id(special["<bos>"])
    writer.add_pad_token_id(special["<pad>"])
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for n in range(config["num_hidden_layers"]):
        names |= {f"blk.{n}.{stored}.weight": f"model.layers.{n}.{name}.weight" for stored, name in LAYER.items()}
    names.pop(without, None)
    for stored, name in names.items():
        writer.add_tensor(stored, weights[name].float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they are kept."""
    monkeypatch.setenv("OFFPRINCIPAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def test_a_gguf_file_becomes_the_folder_that_it_was_made_of(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base_model = model_at(tmp_path / "base", chat=False, head_dim=128)  # which transformers takes of every Qwen3 file
    file = gguf_of(base_model, tmp_path / "small.gguf")
    found = Path(model_name(file))
    assert found.parent == models and found.name.startswith("small-")
    kept, original = (load_file(folder / "model.safetensors") for folder in (found, base_model))
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[name], original[name]) for name in kept)
    config = json.loads((found / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    text = "The answer is"  # of Qwen's every digit is a token, which the small tokenizer knows nothing of
    tokenizers = [AutoTokenizer.from_pretrained(folder, trust_remote_code=False) for folder in (found, base_model)]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for tokenizer in tokenizers]
    assert ids[0] == ids[1]
    assert preview(file, ["add@1"], count=1, max_new_tokens=4).settings.template == "few_shot"
    monkeypatch.setattr(ours, "_convert", lambda *_: pytest.fail("it is converted once"))
    assert open_language_model(file).model.dtype == torch.float32


@pytest.mark.usefixtures("models")
def test_deltas_of_a_run_from_a_gguf_file_hold_what_changed_alone(tmp_path: Path) -> None:
    file = gguf_of(model_at(tmp_path / "base", chat=False, head_dim=128), tmp_path / "small.gguf")
    values = {"recipe": "sft_own", "model": str(file), "tasks": ["reverse@1"], "steps": 1, "batch": 8}
    train(parse_settings(values | {"eval_prompts": 0, "keep_deltas": 1}), tmp_path / "run", quiet=True)
    base = as_stored(open_checkpoint(model_name(file)))
    delta = DeltaFile(tmp_path / "run" / "deltas" / "step_1.delta", base)
    assert {entry.kind for entry in delta.index.tensors.values()} <= {"same", "sparse", "dense"}


@pytest.mark.usefixtures("models")
def test_what_is_no_such_file_is_refused_and_leaves_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match=r"transformers cannot open .*broken.gguf"):
        model_name(broken)
    base_model = model_at(tmp_path / "base", chat=False, head_dim=128)
    with pytest.raises(ModelError, match=r"has no model.layers.1.mlp.up_proj.weight, which transformers would draw"):
        model_name(gguf_of(base_model, tmp_path / "short.gguf", without="blk.1.ffn_up.weight"))
    assert not [path for path in models.iterdir() if path.is_dir()]
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install .*\[gguf\]'"):
        model_name(broken)
