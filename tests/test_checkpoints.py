"""Checkpoints are hostile input: every fault gets a message that says what, where and what to do."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_folders import base_weights, write_model, write_shards
from safetensors.torch import save_file

from offprincipal.checkpoints import open_checkpoint, place_of, require_same_tensors
from offprincipal.errors import CheckpointError


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.mark,)


def test_one_file_and_shards_are_the_same_checkpoint(tmp_path: Path) -> None:
    weights = base_weights()
    one = open_checkpoint(write_model(tmp_path / "one", weights))
    shards = open_checkpoint(write_shards(tmp_path / "shards", weights))
    require_same_tensors(one, shards)
    assert list(one.tensors) == list(shards.tensors) == sorted(weights)
    for name, tensor in weights.items():
        assert torch.equal(one.read(name), tensor)
        assert torch.equal(shards.read(name), tensor)
        assert one.tensors[name].shape == tuple(tensor.shape)
        assert one.tensors[name].dtype == "bfloat16"


def test_tied_heads_are_counted_once(tmp_path: Path) -> None:
    weights = base_weights()
    with_head = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    tied = open_checkpoint(write_model(tmp_path / "tied", with_head))
    require_same_tensors(open_checkpoint(write_model(tmp_path / "plain", weights)), tied)
    assert "lm_head.weight" not in tied.tensors


def test_masters_are_found_beside_the_stored_weights(tmp_path: Path) -> None:
    weights = base_weights()
    masters = {name: tensor.float() for name, tensor in weights.items()}
    found = open_checkpoint(write_model(tmp_path / "run", weights, masters)).masters()
    assert found is not None
    assert found.tensors["model.norm.weight"].dtype == "float32"
    assert open_checkpoint(write_model(tmp_path / "plain", weights)).masters() is None


def bad_folders(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Fault -> (folder, what the message must say)."""
    weights = base_weights()
    found: dict[str, tuple[Path, str]] = {"absent": (tmp_path / "nowhere", "does not exist")}

    def model(name: str) -> Path:
        return write_model(tmp_path / name, weights)

    file = tmp_path / "file"
    file.write_text("no folder")
    found["file"] = (file, "is a file")
    empty = tmp_path / "empty"
    empty.mkdir()
    found["empty"] = (empty, "is no model")

    truncated = model("truncated")
    path = truncated / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    found["truncated"] = (truncated, "truncated or corrupt")

    corrupt = model("corrupt")
    (corrupt / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    found["corrupt"] = (corrupt, "truncated or corrupt")

    nothing = model("nothing")
    (nothing / "model.safetensors").write_bytes(b"")
    found["no bytes"] = (nothing, "truncated or corrupt")

    disguised = model("disguised")
    (disguised / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    found["disguised pickle"] = (disguised, "is a pickle")

    zipped = model("zipped")
    torch.save({"x": torch.ones(1)}, zipped / "model.safetensors")
    found["disguised torch.save"] = (zipped, "is a pickle")

    only_pickle = model("only_pickle")
    (only_pickle / "model.safetensors").rename(only_pickle / "pytorch_model.bin")
    (only_pickle / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    found["only a pickle"] = (only_pickle, "holds only pickles")

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    found["adapter"] = (adapter, "is an adapter")

    for fault, shard in {
        "parent": "../one/model.safetensors",
        "absolute": "/etc/passwd",
        "windows": "C:\\model.safetensors",
        "windows parent": "..\\model.safetensors",
        "number": 7,
        "empty name": "",
        "null byte": "a\0b",
        "too long": "x" * 5000,
    }.items():
        folder = write_shards(tmp_path / f"index {fault}", weights)
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["model.norm.weight"] = shard
        index.write_text(json.dumps(content))
        found[f"index: {fault}"] = (folder, "is missing" if fault == "too long" else "not a file inside its folder")

    for fault, text in {"garbage": "{", "list": "[]", "deep": "[" * 100_000, "no map": "{}"}.items():
        folder = write_shards(tmp_path / f"index {fault}", weights)
        (folder / "model.safetensors.index.json").write_text(text)
        found[f"index: {fault}"] = (folder, "model.safetensors.index.json")

    lost = write_shards(tmp_path / "lost", weights)
    (lost / "model-00002-of-00002.safetensors").unlink()
    found["lost shard"] = (lost, "is missing")

    swapped = write_shards(tmp_path / "swapped", weights)
    save_file({"other": torch.ones(1)}, swapped / "model-00002-of-00002.safetensors")
    found["shard without its tensor"] = (swapped, "lacks")

    config = model("config")
    (config / "config.json").write_text("not json")
    found["bad config"] = (config, "config.json")

    eight = tmp_path / "eight"
    write_model(eight, {"x.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)})
    found["fp8"] = (eight, "float8_e4m3fn")
    return found


def test_every_bad_folder_is_refused_by_name(tmp_path: Path) -> None:
    for fault, (folder, says) in bad_folders(tmp_path).items():
        with pytest.raises(CheckpointError) as error:
            checkpoint = open_checkpoint(folder)
            assert checkpoint.tensors, fault
        assert says in str(error.value), fault
        assert folder.name in str(error.value), fault
    assert not (tmp_path / "mark").exists(), "a pickle was run"


def test_no_header_length_is_taken_for_a_pickle(tmp_path: Path) -> None:
    """A safetensors file starts with its header's length, whose first byte may be 0x80, as a pickle's is."""
    first_bytes = set()
    for padding in range(0, 2048, 8):
        folder = tmp_path / str(padding)
        folder.mkdir()
        save_file({"a.weight": torch.ones(2, 2)}, folder / "model.safetensors", metadata={"x": "y" * padding})
        first_bytes.add((folder / "model.safetensors").read_bytes()[0])
        assert list(open_checkpoint(folder).tensors) == ["a.weight"]
    assert 0x80 in first_bytes


def test_a_pipe_in_place_of_the_weights_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is no model"):
        open_checkpoint(tmp_path)


def test_a_quantised_run_is_not_compared_as_if_it_were_numbers(tmp_path: Path) -> None:
    weights = base_weights()
    base = open_checkpoint(write_model(tmp_path / "base", weights))
    name = "model.layers.0.mlp.down_proj.weight"
    quantised = open_checkpoint(write_model(tmp_path / "int8", weights | {name: weights[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"down_proj.weight as I8"):
        require_same_tensors(base, quantised)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_names_its_tensor(tmp_path: Path, bad: float) -> None:
    weights = base_weights()
    weights["model.norm.weight"][3] = bad
    checkpoint = open_checkpoint(write_model(tmp_path / "run", weights))
    with pytest.raises(CheckpointError, match=r"model.norm.weight.*1 of 24 entries.*\[3\]"):
        checkpoint.read("model.norm.weight")


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    weights = base_weights()
    base = open_checkpoint(write_model(tmp_path / "base", weights))
    without = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"without lacks tensor model.norm.weight"):
        require_same_tensors(base, open_checkpoint(write_model(tmp_path / "without", without)))
    extra = weights | {"model.extra.weight": torch.ones(2, 2).bfloat16()}
    with pytest.raises(CheckpointError, match=r"base lacks tensor model.extra.weight"):
        require_same_tensors(base, open_checkpoint(write_model(tmp_path / "extra", extra)))
    wide = weights | {"model.norm.weight": torch.ones(25).bfloat16()}
    with pytest.raises(CheckpointError, match=r"model.norm.weight \(24 in the base, 25 here\)"):
        require_same_tensors(base, open_checkpoint(write_model(tmp_path / "wide", wide)))


@pytest.mark.parametrize(
    ("name", "role", "layer", "expert"),
    [
        ("model.layers.11.self_attn.k_proj.weight", "k", 11, None),
        ("model.layers.0.mlp.gate_proj.weight", "gate", 0, None),
        ("model.layers.2.mlp.experts.17.down_proj.weight", "down", 2, 17),
        ("model.layers.2.self_attn.q_norm.weight", "norm", 2, None),
        ("model.layers.2.self_attn.q_proj.bias", "bias", 2, None),
        ("model.embed_tokens.weight", "embedding", None, None),
        ("lm_head.weight", "head", None, None),
        ("gpt_neox.embed_in.weight", "embedding", None, None),
        ("transformer.wpe.weight", "embedding", None, None),
        ("transformer.word_embeddings.weight", "embedding", None, None),
        ("gpt_neox.embed_out.weight", "head", None, None),
        ("model.layers.1.mlp.gate.weight", "router", 1, None),
        ("layers." + "9" * 30 + ".q_proj.weight", "q", None, None),
        ("transformer.h.4.attn.c_attn.weight", "other", 4, None),
    ],
)
def test_names_say_what_a_tensor_is_for(name: str, role: str, layer: int | None, expert: int | None) -> None:
    place = place_of(name)
    assert (place.role, place.layer, place.expert) == (role, layer, expert)
