"""Deltas: nothing is lost, whatever changed; nothing is believed that hashes do not bear out; what it costs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoint_folders import base_weights, moved, stored, write_model, write_shards
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from offprincipal.assets import embedded_base
from offprincipal.checkpoints import open_checkpoint
from offprincipal.checkpoints.checkpoint import FLOATS, INTEGERS, Array
from offprincipal.checkpoints.delta import read_index
from offprincipal.checkpoints.delta_codec import DamagedDelta, Encoded, compressed, decode, encode
from offprincipal.comparison import CompareSettings, compare
from offprincipal.deltas import apply_delta, make_delta
from offprincipal.errors import ArgumentError, CheckpointError, FileError

TYPES = FLOATS | INTEGERS


def some_bits(dtype: str, count: int, rng: np.random.Generator) -> Array:
    """Any bits at all: NaN and infinities of every kind among them."""
    return rng.integers(0, 256, count * TYPES[dtype].itemsize, np.uint8).view(TYPES[dtype])


@given(
    st.sampled_from([name for name in TYPES if name != "bool"]),
    st.integers(0, 300),
    st.sampled_from([0.0, 0.01, 0.3, 0.7, 1.0]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_any_two_tensors_lead_to_each_other(dtype: str, count: int, share: float, near: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base, tuned = some_bits(dtype, count, rng), some_bits(dtype, count, rng)
    if near:  # by one or two in the last place, as training does
        words = base.view(f"u{base.dtype.itemsize}")
        tuned = (words + rng.integers(-2, 3, count).astype(words.dtype)).view(base.dtype)
    before, after = (side.view(f"u{side.dtype.itemsize}") for side in (base, tuned))
    after = np.where(rng.random(count) < share, after, before)
    tuned = after.view(base.dtype)
    found = encode(tuned, base, dtype)
    assert np.array_equal(decode(found, base, dtype, count), after)
    assert found.changed == np.count_nonzero(before != after)
    assert np.array_equal(decode(encode(tuned, None, dtype), None, dtype, count), after)


@pytest.mark.parametrize("learning_rate", [2e-7, 1e-6, 1e-5])
def test_places_of_short_steps_cost_less_than_three_bits(learning_rate: float) -> None:
    """Where AdamW's steps are short only small weights change, and the base tells which are small."""
    rng = np.random.default_rng(0)
    base = (0.03 * rng.standard_normal(400_000)).astype(ml_dtypes.bfloat16)
    steps = learning_rate * rng.choice([-1, 1], len(base)) * rng.uniform(0.2, 1.2, len(base))
    found = encode((base.astype(np.float32) + steps).astype(ml_dtypes.bfloat16), base, "bfloat16")
    share = found.changed / len(base)
    blind = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) / share
    places = 8 * (len(found.parts["gaps"]) + len(found.parts["classes"])) / found.changed
    assert found.kind == "sparse" and places < 3 and places < blind


@given(st.integers(0, 10**6), st.data())
def test_damaged_bytes_are_refused_or_harmless(seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    base = (0.03 * rng.standard_normal(200)).astype(ml_dtypes.bfloat16)
    tuned = np.where(rng.random(200) < 0.3, base * ml_dtypes.bfloat16(1.01), base).astype(ml_dtypes.bfloat16)
    found = encode(tuned, base, "bfloat16")
    part = data.draw(st.sampled_from(sorted(found.parts)))
    content = bytearray(found.parts[part])
    for _ in range(data.draw(st.integers(1, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    try:
        after = decode(Encoded(found.kind, found.parts | {part: bytes(content)}, found.changed), base, "bfloat16", 200)
    except DamagedDelta:
        return
    assert after.shape == (200,)


def test_steps_of_the_code_that_are_too_long_are_refused() -> None:
    """A gap of 2^47 would wrap around."""
    base = np.zeros(64, np.float32)
    parts = {
        "classes": compressed(np.array([1, 47], "<i8").view(np.uint8).reshape(2, 8).T.tobytes()),
        "gaps": b"\x01" + b"\xff" * 40,
        "signs": compressed(b"\x00"),
        "sizes": compressed(b"\x00" * 4),
    }
    with pytest.raises(DamagedDelta):
        decode(Encoded("sparse", parts, 1), base, "float32", 64)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    weights = base_weights()
    base = write_model(tmp_path / "base", weights)
    tuned = write_model(tmp_path / "tuned", stored(moved(weights, 2e-4, 100)))
    (tuned / "tokenizer.json").write_text('{"a": "ü"}')
    return base, tuned


def test_a_model_comes_back_byte_for_byte(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    made = make_delta(base, tuned, tmp_path / "run.delta")
    assert 0 < made.changed < made.entries and made.path.stat().st_size == made.bytes < made.whole
    again = apply_delta(base, made.path, tmp_path / "again")
    assert sorted(path.name for path in again.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    for name in ("config.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (tuned / name).read_bytes()
    before, after = load_file(tuned / "model.safetensors"), load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(
            tensor.view(torch.uint8), after[name].view(torch.uint8)
        )


def test_tensors_of_all_sorts_come_back(tmp_path: Path) -> None:
    """Other names, shapes and types, what one side alone has, scalars, empty ones, float8 with its scales, NaN."""
    scale = torch.rand(2, 2)
    float8 = torch.randn(4, 4).to(torch.float8_e4m3fn)
    base = {
        "model.layers.0.mlp.up_proj.weight": torch.randn(8, 8),
        "model.layers.0.mlp.up_proj.weight_scale_inv": scale,
        "model.norm.weight": torch.ones(8).bfloat16(),
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False, True]),
        "float8": float8,
    }
    tuned = {
        "module.model.layers.0.mlp.up_proj.weight": base["model.layers.0.mlp.up_proj.weight"] + 0.1,
        "model.layers.0.mlp.up_proj.weight_scale_inv": scale * 2,
        "model.norm.weight": torch.full((8,), float("nan")).bfloat16(),
        "ids": torch.arange(5) + 1,
        "mask": torch.tensor([True, True, False]),
        "float8": (float8.float() * 1.5).to(torch.float8_e4m3fn),
        "new.weight": torch.randn(3, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    for name, weights in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "run.delta")
    entries = read_index(tmp_path / "run.delta").tensors
    assert entries["module.model.layers.0.mlp.up_proj.weight"].source == "model.layers.0.mlp.up_proj.weight"
    assert entries["new.weight"].kind == "whole" and entries["new.weight"].source is None
    after = load_file(apply_delta(tmp_path / "base", tmp_path / "run.delta", tmp_path / "out") / "model.safetensors")
    assert after.keys() == tuned.keys()
    for name, tensor in tuned.items():
        assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape, name
        assert after[name].flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist(), name


def test_a_delta_is_a_checkpoint(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    make_delta(base, tuned, tmp_path / "run.delta")
    settings = CompareSettings(metrics=("location",))
    whole = compare(base, {"run": tuned}, settings, cache=False)
    told = compare(base, {"run": tmp_path / "run.delta"}, settings, cache=False)
    assert told.matrices == whole.matrices and told.masks == whole.masks
    assert "is a delta, applied to the given base" in told.summary["runs"]["run"]["warnings"][0]
    with pytest.raises(CheckpointError, match=r"is a delta: give the base that it starts from, '.*base'"):
        open_checkpoint(tmp_path / "run.delta")


def test_shards_are_written_as_an_index_says(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pair
    make_delta(base, tuned, tmp_path / "run.delta")
    monkeypatch.setattr("offprincipal.checkpoints.writing._SHARD", 2000)
    folder = apply_delta(base, tmp_path / "run.delta", tmp_path / "out")
    placed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(placed.values())) > 1
    again, wanted = open_checkpoint(folder), open_checkpoint(tuned)
    assert all(np.array_equal(again.read(name), wanted.read(name)) for name in wanted.tensors)


def test_another_base_is_refused_by_the_name_of_what_differs(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    make_delta(base, tuned, tmp_path / "run.delta")
    weights = load_file(base / "model.safetensors")
    name = next(iter(weights))
    other = write_model(tmp_path / "other", weights | {name: -weights[name]})
    with pytest.raises(CheckpointError, match=rf"starts from another {name} .* made from, '.*base'"):
        apply_delta(other, tmp_path / "run.delta", tmp_path / "out")
    smaller = write_model(tmp_path / "smaller", {n: w for n, w in weights.items() if n != name})
    with pytest.raises(CheckpointError, match=f"starts from {name} .* lacks"):
        apply_delta(smaller, tmp_path / "run.delta", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_file_is_refused_and_nothing_is_written(tmp_path: Path, pair: tuple[Path, Path], seed: int) -> None:
    base, tuned = pair
    path, rng = tmp_path / "run.delta", np.random.default_rng(seed)
    make_delta(base, tuned, path)
    content = bytearray(path.read_bytes())
    if seed % 3 == 0:
        content = content[: rng.integers(len(content))]
    else:
        reach = len(content) if seed % 3 == 1 else int.from_bytes(content[:8], "little") + 8
        for place in rng.integers(0, reach, 1 + seed % 4):
            content[place] ^= rng.integers(1, 256)
    path.write_bytes(bytes(content))
    try:
        again = apply_delta(base, path, tmp_path / "out")
    except CheckpointError:
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
        return
    after, wanted = open_checkpoint(again), open_checkpoint(tuned)  # what was flipped is about no weight
    assert all(np.array_equal(after.read(name), wanted.read(name)) for name in wanted.tensors if name in after.tensors)


def with_index(path: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a delta with another index."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    index = json.loads(metadata["index"])
    change(index)
    save_file(tensors, out, metadata | {"index": json.dumps(index)})
    return out


def test_an_index_that_lies_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    make_delta(base, tuned, tmp_path / "run.delta")
    name = "model.layers.0.self_attn.q_proj.weight"

    def grown(index: dict[str, Any]) -> None:
        index["tensors"][name] |= {"kind": "whole", "shape": [1 << 20, 1 << 20]}
        del index["tensors"][name]["source"], index["tensors"][name]["base"]

    lies: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
        "path": (lambda i: i["files"].update({"../evil.json": 3}), "names a file"),
        "hidden": (lambda i: i["files"].update({".bashrc": 3}), "names a file"),
        "large": (lambda i: i["files"].update({"config.json": 1 << 40}), "names a file"),
        "kind": (lambda i: i["tensors"][name].update({"kind": "pickle"}), "index of .* is damaged"),
        "count": (lambda i: i["tensors"][name].update({"changed": 5}), "is damaged"),
        "hash": (lambda i: i["tensors"][name].update({"tuned": "0" * 32}), "other bits"),
        "shape": (lambda i: i["tensors"][name].update({"shape": [2, 2]}), "lacks"),
        "type": (lambda i: i["tensors"][name].update({"dtype": "object"}), "shape or type is wrong|lacks"),
        "bomb": (grown, "wrong|grow beyond belief"),
    }
    for lie, (change, says) in lies.items():
        path = with_index(tmp_path / "run.delta", tmp_path / f"{lie}.delta", change)
        with pytest.raises(CheckpointError, match=says):
            apply_delta(base, path, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / "evil.json").exists()
    shutil.copy(tuned / "model.safetensors", tmp_path / "no.delta")
    with pytest.raises(CheckpointError, match="not a delta made by offprincipal"):
        apply_delta(base, tmp_path / "no.delta", tmp_path / "out")


def test_places_and_values_are_written_as_trl_exchanges_them(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    made = make_delta(base, tuned, tmp_path / "run.safetensors", "sparse-safetensors")
    before, after, patch = (
        load_file(path) for path in (base / "model.safetensors", tuned / "model.safetensors", made.path)
    )
    for name, weight in before.items():
        patched = weight.flatten().clone()
        if f"{name}.idx" in patch:
            assert patch[f"{name}.idx"].dtype == torch.int32
            patched[patch[f"{name}.idx"].long()] = patch[f"{name}.val"]
        assert torch.equal(patched.view(weight.shape), after[name])
    assert sum(len(tensor) for name, tensor in patch.items() if name.endswith(".val")) == made.changed
    (tmp_path / "more").mkdir()
    save_file(after | {"head": torch.ones(3)}, tmp_path / "more" / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no head of that shape and type: use --format delta"):
        make_delta(base, tmp_path / "more", tmp_path / "more.safetensors", "sparse-safetensors")


def test_the_commands(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "offprincipal", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    made = run("delta", base, tuned, "--out", tmp_path / "run.delta")
    assert made.returncode == 0 and "bits for its place" in made.stdout
    assert (
        run("apply", base, tmp_path / "run.delta", "--out", tmp_path / "out").stdout == f"model: {tmp_path / 'out'}\n"
    )
    there = run("apply", base, tmp_path / "run.delta", "--out", tmp_path / "out")
    assert there.returncode == 2 and "--overwrite" in there.stderr
    assert run("apply", base, tmp_path / "run.delta", "--out", tmp_path / "out", "--overwrite").returncode == 0
    for arguments in (
        ("delta", base, tuned, "--out", tmp_path / "run.bin"),
        ("delta", base, tuned, "--out", tmp_path / "run.delta", "--format", "zip"),
        ("apply", base, tuned, "--out", tmp_path / "other"),
    ):
        assert run(*arguments).returncode == 2, arguments
    with pytest.raises(ArgumentError, match=r"ends in \.safetensors"):
        make_delta(base, tuned, tmp_path / "run.delta", "sparse-safetensors")
    with pytest.raises(FileError, match="contains a model: choose another"):
        apply_delta(base, tmp_path / "run.delta", tmp_path / "out")


def test_nothing_but_a_model_that_is_not_read_is_replaced(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    make_delta(base, tuned, tmp_path / "run.delta")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    for out, says in (
        (tmp_path / "work", "other files than a model"),
        (base, "a model that is being read"),
        (tmp_path, "that is being read"),
    ):
        with pytest.raises(FileError, match=says):
            apply_delta(base, tmp_path / "run.delta", out, overwrite=True)
    assert (tmp_path / "work" / "thesis.tex").read_text() == "years"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "run.delta", "work"}


def test_a_sharded_model_and_an_adapter_are_told_too(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    shards = write_shards(tmp_path / "shards", load_file(tuned / "model.safetensors"))
    make_delta(base, shards, tmp_path / "run.delta")
    again = load_file(apply_delta(base, tmp_path / "run.delta", tmp_path / "out") / "model.safetensors")
    for name, tensor in load_file(tuned / "model.safetensors").items():
        assert torch.equal(again[name], tensor)


def test_the_same_delta_has_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """safetensors writes several metadata in an order that is another in every process."""
    base, run = (
        write_model(tmp_path / name, stored(moved(base_weights(), size, 1))) for name, size in (("b", 0), ("r", 1e-3))
    )
    code = "import sys; from offprincipal import make_delta; make_delta(*sys.argv[1:4], format=sys.argv[4])"
    for form in ("delta", "sparse-safetensors"):
        written = []
        for turn in range(4):
            out = tmp_path / f"{turn}.{'delta' if form == 'delta' else 'safetensors'}"
            subprocess.run([sys.executable, "-c", code, str(base), str(run), str(out), form], check=True)
            written.append(out.read_bytes())
        assert len(set(written)) == 1, form


def test_no_file_that_is_not_a_models_is_packed(tmp_path: Path) -> None:
    """A delta is made to be shared."""
    weights = base_weights()
    base, run = write_model(tmp_path / "base", weights), write_model(tmp_path / "run", stored(moved(weights, 1e-3, 1)))
    for name in ("secrets.json", "notes.txt", "trainer_state.json", "wandb.jinja", "requirements.txt"):
        (run / name).write_text('{"token": "hf_x"}')
    (run / "tokenizer_config.json").write_text("{}")
    make_delta(base, run, tmp_path / "run.delta")
    out = apply_delta(base, tmp_path / "run.delta", tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"config.json", "tokenizer_config.json", "model.safetensors"}


def test_no_delta_is_made_of_an_adapter_or_of_another_model(tmp_path: Path) -> None:
    weights = base_weights()
    base = write_model(tmp_path / "base", weights)
    other = write_model(tmp_path / "other", {"transformer.h.0.attn.weight": torch.ones(4, 4)})
    with pytest.raises(CheckpointError, match="is this the base it was trained from"):
        make_delta(base, other, tmp_path / "a.delta")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null, "r": 2}')
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"is an adapter, which is smaller than a delta.*merge_and_unload"):
        make_delta(base, adapter, tmp_path / "b.delta")
    assert not list(tmp_path.glob("*.delta"))


def test_what_a_killed_process_left_of_a_file_goes_and_the_rest_stays(tmp_path: Path) -> None:
    left, other = tmp_path / ".a.delta.0123abc_", tmp_path / ".b.delta.0123abc_"
    for path in (left, other):
        path.write_bytes(b"half")
    make_delta(embedded_base(), embedded_base(), tmp_path / "a.delta")
    assert {path.name for path in tmp_path.iterdir()} == {"a.delta", other.name}
