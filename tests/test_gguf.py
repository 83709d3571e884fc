"""GGUF: written by the gguf package, read under Hugging Face's names, as what was converted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offprincipal.checkpoints import open_checkpoint
from offprincipal.checkpoints.checkpoint import Array
from offprincipal.checkpoints.gguf_file import _IN_LAYERS, _NAMES, _OWN, _READ
from offprincipal.comparison import CompareSettings, compare
from offprincipal.errors import CheckpointError

gguf = pytest.importorskip("gguf")
HEADS, GROUPS = 4, 2
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
    "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
}


def converted(name: str, weight: Array, arch: str) -> Array:
    """As llama.cpp's converter turns what it writes."""
    heads = {"q_proj": HEADS, "k_proj": GROUPS}.get(name.split(".")[-2])
    if arch == "llama" and heads:
        return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
    return weight + 1 if arch == "gemma3" and name.endswith("norm.weight") else weight


def write(path: Path, weights: dict[str, Array], arch: str = "llama", kind: Any = None, names: Any = None) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    for stored, name in (names or NAMES).items():
        values = converted(name, weights[name], arch)
        if kind is None or values.ndim < 2:
            writer.add_tensor(stored, values)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def some_weights(dtype: type = np.float32) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {
        "norm": (64,),
        "q_proj": (64, 64),
        "k_proj": (32, 64),
        "down_proj": (64, 96),
        "embed": (10, 64),
        "lm_head": (10, 64),
    }
    return {
        name: rng.standard_normal(next(shape for part, shape in shapes.items() if part in name)).astype(dtype)
        for name in NAMES.values()
    }


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_was_converted_comes_back(tmp_path: Path, arch: str, dtype: type) -> None:
    names = dict(NAMES)
    if arch == "gemma3":  # there this norm stands before the MLP
        names["blk.0.ffn_norm.weight"] = "model.layers.0.pre_feedforward_layernorm.weight"
    weights = some_weights(dtype)
    weights["model.layers.0.pre_feedforward_layernorm.weight"] = weights["model.norm.weight"] * 2
    found = open_checkpoint(write(tmp_path / "m.gguf", weights, arch, names=names))
    assert list(found.tensors) == sorted(names.values())
    for name, info in found.tensors.items():
        assert info.shape == weights[name].shape and info.dtype == np.dtype(dtype).name
        rounding = {"rtol": 0, "atol": 2e-3 if dtype is np.float16 else 1e-6} if "norm" in name else {"rtol": 0}
        np.testing.assert_allclose(found.read(name).reshape(info.shape), weights[name], **rounding)
        third = info.numel // 3 + 1
        parts = [found.read(name, start, min(start + third, info.numel)) for start in range(0, info.numel, third)]
        assert np.array_equal(np.concatenate(parts), found.read(name))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_quantised_tensors_are_dequantised_by_rows_and_it_is_said(tmp_path: Path, kind: str) -> None:
    weights, stored = some_weights(), gguf.GGMLQuantizationType[kind]
    path = write(tmp_path / "m.gguf", weights, "qwen3", stored)
    found = open_checkpoint(path)
    for name, weight in weights.items():
        wanted = weight
        if weight.ndim == 2:
            wanted = gguf.quants.dequantize(gguf.quants.quantize(weight, stored), stored)
            assert found.tensors[name].dtype == ("bfloat16" if kind == "BF16" else "float32")
        assert np.array_equal(found.read(name).astype(np.float32).reshape(weight.shape), wanted)
        assert np.array_equal(found.read(name, 7, 20), found.read(name)[7:20])
    said = "5 tensors stored in " + kind + " were dequantised"
    assert any(note.startswith(said) for note in found.notes) == (kind != "BF16")
    base = write(tmp_path / "base.gguf", weights, "qwen3")
    rows = compare(base, {"run": path}, CompareSettings(metrics=("changes",)), cache=False).matrices
    assert all((row["update_norm"] > 0) == (row["role"] not in ("norm",)) for row in rows)


@pytest.mark.parametrize("arch", _READ)
def test_names_are_those_of_the_package(arch: str) -> None:
    """Its own table, which the converter goes by, puts each of our names where we found it."""
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    table, has = gguf.get_tensor_name_map(kind, 1), gguf.MODEL_TENSORS[kind]
    written = {gguf.TENSOR_NAMES[tensor].format(bid=0): tensor for tensor in has}
    ours = _NAMES | {
        f"blk.0.{name}": f"model.layers.0.{inner}" for name, inner in (_IN_LAYERS | _OWN.get(arch, {})).items()
    }
    for name, hugging_face in ours.items():
        if name in written:
            assert table.get_name(hugging_face) == name, (arch, hugging_face)


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", some_weights(), "bloom")
    with pytest.raises(CheckpointError, match=r"has architecture 'bloom', whose GGUF layout .* converted from"):
        open_checkpoint(path)
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "m.gguf")
    with pytest.raises(CheckpointError, match=r"contains m\.gguf; give the path of that file"):
        open_checkpoint(tmp_path / "folder")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install .*\[gguf\]'"):
        open_checkpoint(tmp_path / "folder" / "m.gguf")


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_refused_or_read_within_bounds(tmp_path: Path, seed: int) -> None:
    path, rng = write(tmp_path / "m.gguf", some_weights(), "qwen3"), np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    if seed % 2:
        content = content[: rng.integers(len(content))]
    for place in rng.integers(0, min(len(content), 1200), 3):
        content[place] ^= rng.integers(1, 256)
    path.write_bytes(bytes(content))
    try:
        found = open_checkpoint(path)
        for name in found.tensors:
            assert len(found.read(name)) == found.tensors[name].numel
    except CheckpointError as error:
        assert str(path) in str(error)
