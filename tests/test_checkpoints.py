"""Checkpoints are hostile input: every fault gets a message that says what, where and what to do."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from checkpoint_folders import base_weights, write_model, write_shards
from safetensors.torch import save_file
from torch import Tensor

from offprincipal.assets import embedded_base
from offprincipal.checkpoints import Checkpoint, open_checkpoint, pair_tensors, place_of
from offprincipal.comparison import CompareSettings, compare
from offprincipal.errors import CheckpointError
from offprincipal.reports import words


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
    assert pair_tensors(one, shards).tensors == one.tensors
    assert list(one.tensors) == list(shards.tensors) == sorted(weights)
    for name, tensor in weights.items():
        for checkpoint in (one, shards):
            entries = checkpoint.read(name)
            assert entries.dtype == ml_dtypes.bfloat16
            assert np.array_equal(entries.view(np.int16), tensor.view(torch.int16).numpy().ravel())
            assert np.array_equal(checkpoint.read(name, 5, 17), entries[5:17])
        assert one.tensors[name].shape == tuple(tensor.shape)
        assert one.tensors[name].dtype == "bfloat16"


def test_tied_heads_are_counted_once(tmp_path: Path) -> None:
    weights = base_weights()
    with_head = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    tied = open_checkpoint(write_model(tmp_path / "tied", with_head))
    pairing = pair_tensors(open_checkpoint(write_model(tmp_path / "plain", weights)), tied)
    assert "lm_head.weight" not in tied.tensors
    assert "lm_head.weight" not in pairing.tensors
    assert pairing.notes == ()


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
    found["file"] = (file, "is not a file of weights")
    empty = tmp_path / "empty"
    empty.mkdir()
    found["empty"] = (empty, "is not a model")

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
    (only_pickle / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark"), protocol=2))
    found["a pickle that runs code"] = (only_pickle, "could run code")

    state = tmp_path / "state"
    state.mkdir()
    torch.save(weights, state / "state.pt")
    found["only a pickle"] = (state, "contains only files of torch.save")

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    found["adapter"] = (adapter, "adapter_")

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
    with pytest.raises(CheckpointError, match="is not a model"):
        open_checkpoint(tmp_path)


def test_a_quantised_run_is_not_compared_as_if_it_were_numbers(tmp_path: Path) -> None:
    weights = base_weights()
    base = open_checkpoint(write_model(tmp_path / "base", weights))
    name = "model.layers.0.mlp.down_proj.weight"
    quantised = open_checkpoint(write_model(tmp_path / "int8", weights | {name: weights[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"down_proj.weight as int8"):
        pair_tensors(base, quantised)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "transformer.h.0.attn.masked_bias",
        "transformer.h.0.attn.bias",
        "freqs_cis",
        "embeddings.position_ids",
    ],
)
def test_buffers_that_one_side_stores_are_no_weights(tmp_path: Path, name: str) -> None:
    weights = base_weights()
    plain = open_checkpoint(write_model(tmp_path / "plain", weights))
    older = open_checkpoint(write_model(tmp_path / "older", weights | {name: torch.ones(4)}))
    for pairing in (pair_tensors(plain, older), pair_tensors(older, plain)):
        assert set(pairing.tensors) == set(weights)
    assert set(pair_tensors(older, older).tensors) == set(weights)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    weights = base_weights()
    base = open_checkpoint(write_model(tmp_path / "base", weights))
    without = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"without lacks tensor model.norm.weight"):
        pair_tensors(base, open_checkpoint(write_model(tmp_path / "without", without)), strict=True)
    extra = weights | {"model.extra.weight": torch.ones(2, 2).bfloat16()}
    with pytest.raises(CheckpointError, match=r"base lacks tensor model.extra.weight"):
        pair_tensors(base, open_checkpoint(write_model(tmp_path / "extra", extra)), strict=True)
    wide = weights | {"model.norm.weight": torch.ones(25).bfloat16()}
    with pytest.raises(CheckpointError, match=r"model.norm.weight \(24 in the base, 25 here\)"):
        pair_tensors(base, open_checkpoint(write_model(tmp_path / "wide", wide)))


def untied(folder: Path, weights: dict[str, Tensor]) -> Checkpoint:
    write_model(folder, weights)
    (folder / "config.json").write_text('{"model_type": "qwen3", "tie_word_embeddings": false}')
    return open_checkpoint(folder)


@pytest.mark.parametrize("rows", [37, 43])
def test_a_grown_or_shrunk_vocabulary_is_compared_by_its_common_rows(tmp_path: Path, rows: int) -> None:
    weights = base_weights()
    head = torch.randn(40, 24).bfloat16()
    base = untied(tmp_path / "base", weights | {"lm_head.weight": head})
    resized = {"model.embed_tokens.weight": torch.ones(rows, 24).bfloat16(), "lm_head.weight": torch.ones(rows, 24)}
    pairing = pair_tensors(base, untied(tmp_path / "tuned", weights | resized))
    for name in resized:
        assert pairing.tensors[name].shape == (min(rows, 40), 24)
    assert pairing.tensors["model.norm.weight"] == base.tensors["model.norm.weight"]
    assert len(pairing.notes) == 2
    assert f"40 rows in {tmp_path / 'base'} and {rows} in {tmp_path / 'tuned'}" in pairing.notes[0]


def test_no_other_tensor_may_have_grown(tmp_path: Path) -> None:
    weights, name = base_weights(), "model.layers.0.mlp.down_proj.weight"
    base = open_checkpoint(write_model(tmp_path / "base", weights))
    for shape in ((25, 48), (24, 49)):
        grown = write_model(tmp_path / str(shape), weights | {name: torch.ones(shape).bfloat16()})
        with pytest.raises(CheckpointError, match=r"down_proj.weight"):
            pair_tensors(base, open_checkpoint(grown))
    wide = weights | {"model.embed_tokens.weight": torch.ones(41, 25).bfloat16()}
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight"):
        pair_tensors(base, open_checkpoint(write_model(tmp_path / "wide", wide)))


@pytest.mark.parametrize("turned", [False, True])
def test_a_head_that_only_one_side_stores_is_compared_with_the_others_embedding(tmp_path: Path, turned: bool) -> None:
    weights = base_weights()
    embedding = weights["model.embed_tokens.weight"]
    tied = open_checkpoint(write_model(tmp_path / "tied", weights))
    for folder, head, says in (
        ("same", embedding.clone(), ["it is counted once"]),
        ("own", embedding + 1, ["is a head of its own"]),
        ("wide", torch.ones(44, 24).bfloat16(), ["is a head of its own", "the first 40 are compared"]),
    ):
        with_head = untied(tmp_path / folder, weights | {"lm_head.weight": head})
        pairing = pair_tensors(with_head, tied) if turned else pair_tensors(tied, with_head)
        own = {"lm_head.weight"} if folder != "same" else set()
        assert set(pairing.tensors) == set(weights) | own == set(weights) | set(pairing.tied)
        assert all(pairing.tensors[name].shape == (40, 24) for name in own)
        assert [said in note and folder in note for said, note in zip(says, pairing.notes, strict=True)] == [
            True
        ] * len(says)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "dcp"])
def test_a_stored_head_decides_whatever_the_configuration_says(tmp_path: Path, kind: str) -> None:
    """`tie_word_embeddings` beside a head that was trained alone, as old versions wrote it; transformers reads it."""
    weights = base_weights()
    tuned = weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 0.5}
    base = write_model(tmp_path / "base", weights)
    run = write_model(tmp_path / "run", tuned)  # the configuration says tied
    if kind != "safetensors":
        (run / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(tuned, run / "pytorch_model.bin")
    elif kind == "dcp":
        torch.distributed.checkpoint.save({"model": tuned}, checkpoint_id=str(run))
    still = write_model(tmp_path / "still", weights)
    result = compare(base, {"run": run, "still": still}, CompareSettings(metrics=("location", "spectrum")), cache=False)
    rows = {(row["run"], row["tensor"]): row for row in result.matrices}
    expected = torch.linalg.norm(tuned["lm_head.weight"].double() - weights["model.embed_tokens.weight"].double())
    assert rows["run", "lm_head.weight"]["update_norm"] == pytest.approx(expected.item(), rel=1e-6)
    assert rows["run", "lm_head.weight"]["role"] == "head"
    assert (
        rows["still", "lm_head.weight"]["update_norm"] == rows["run", "model.embed_tokens.weight"]["update_norm"] == 0
    )
    warnings = result.summary["runs"]["run"]["warnings"]
    assert not any("equals the base" in warning for warning in warnings)
    assert any("head of its own" in warning for warning in warnings)


def test_nothing_is_called_identical_of_which_something_was_not_compared(tmp_path: Path) -> None:
    """Packed weights are integers: two checkpoints may differ in all of them, and in nothing that is measured."""
    packed = {f"model.layers.0.mlp.experts.{i}_blocks": torch.full((4, 8), i, dtype=torch.uint8) for i in range(2)}
    base = write_model(tmp_path / "base", base_weights() | packed)
    other = {name: tensor + 1 for name, tensor in packed.items()}
    runs = {"same": packed, "other": other}
    folders = {run: write_model(tmp_path / run, base_weights() | tensors) for run, tensors in runs.items()}
    summary = compare(base, folders, CompareSettings(metrics=("location",)), cache=False).summary
    said = words.run_paragraphs(summary)
    assert "same is identical to the base" in said["same"] and "other is not the base: 2 tensors" in said["other"]
    assert words.answers(summary)["Neither"].startswith("no weight that was measured changed")
    warnings = {run: " ".join(entry["warnings"]) for run, entry in summary["runs"].items()}
    assert "equals the base" in warnings["same"] and "equals the base" not in warnings["other"]
    assert "2 of them differ from the base's, such as model.layers.0.mlp.experts.0_blocks" in warnings["other"]


def test_a_head_is_not_taken_for_tied_where_there_is_no_embedding(tmp_path: Path) -> None:
    weights = base_weights() | {"lm_head.weight": torch.ones(40, 24).bfloat16()}
    bare = {name: tensor for name, tensor in base_weights().items() if name != "model.embed_tokens.weight"}
    pairing = pair_tensors(untied(tmp_path / "base", weights), untied(tmp_path / "bare", bare))
    assert pairing.only_in_base == ("lm_head.weight", "model.embed_tokens.weight") and not pairing.tied


def test_heads_that_both_store_untied_are_compared(tmp_path: Path) -> None:
    weights = base_weights() | {"lm_head.weight": torch.ones(40, 24).bfloat16()}
    pairing = pair_tensors(untied(tmp_path / "one", weights), untied(tmp_path / "two", weights))
    assert set(pairing.tensors) == set(weights)
    assert pairing.notes == ()


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
        ("transformer.h.4.attn.c_proj.weight", "o", 4, None),
        ("transformer.h.4.mlp.c_proj.weight", "down", 4, None),
        ("model.layers.1.mlp.shared_expert_gate.weight", "router", 1, None),
        ("model.layers.1.mlp.experts.gate_up_proj_bias", "bias", 1, None),
    ],
)
def test_names_say_what_a_tensor_is_for(name: str, role: str, layer: int | None, expert: int | None) -> None:
    place = place_of(name)
    assert (place.role, place.layer, place.expert) == (role, layer, expert)


def test_the_embedded_base_is_opened_by_its_name() -> None:
    assert open_checkpoint("embedded").tensors == open_checkpoint(embedded_base()).tensors
