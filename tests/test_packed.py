"""Weights in a few bits: against the libraries that run them where those are at hand, and formulas written out here."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from offprincipal.checkpoints import open_checkpoint, pair_tensors
from offprincipal.checkpoints.checkpoint import Array
from offprincipal.comparison import CompareSettings, compare
from offprincipal.errors import CheckpointError

NAME = "model.layers.0.self_attn.q_proj"


def folder(path: Path, tensors: dict[str, Tensor], **quantization: object) -> Path:
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3", "quantization_config": quantization}))
    return path


def read(path: Path, name: str = f"{NAME}.weight") -> Array:
    """A tensor, whole and in ranges that cut across slices."""
    found = open_checkpoint(path)
    whole, info = found.read(name), found.tensors[name]
    assert info.dtype == "float32" and info.numel == len(whole)
    third = len(whole) // 3 + 1
    parts = [found.read(name, start, min(start + third, len(whole))) for start in range(0, len(whole), third)]
    assert np.array_equal(np.concatenate(parts), whole)
    return whole.reshape(info.shape)


def in_words(values: Array, bits: int) -> Tensor:
    """Along the last axis, the first in the lowest bits."""
    shifts = np.arange(0, 32, bits)
    grouped = values.reshape(*values.shape[:-1], -1, 32 // bits).astype(np.uint64)
    return torch.from_numpy((grouped << shifts.astype(np.uint64)).sum(-1).astype(np.uint32).view(np.int32))


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 130, (3, 10, 2), dtype=torch.uint8, generator=generator)
    name = "model.layers.0.mlp.experts.down_proj"
    path = folder(tmp_path / "m", {f"{name}_blocks": blocks, f"{name}_scales": scales}, quant_method="mxfp4")
    wanted = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert np.array_equal(read(path, name), wanted.numpy())
    assert list(open_checkpoint(path).tensors) == [name]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [False, True])
def test_gptq(tmp_path: Path, bits: int, version: str, ordered: bool) -> None:
    rng = np.random.default_rng(0)
    out, inputs, groups = 32, 48, 3
    q, zeros = rng.integers(0, 1 << bits, (out, inputs)), rng.integers(1, 1 << bits, (groups, out))
    scales = rng.random((groups, out)).astype(np.float16)
    places = rng.permutation(np.arange(inputs) // 16) if ordered else np.arange(inputs) // 16
    tensors = {
        f"{NAME}.qweight": in_words(q, bits).T.contiguous(),
        f"{NAME}.qzeros": in_words(zeros - (version == "gptq"), bits),
        f"{NAME}.scales": torch.from_numpy(scales),
    } | ({f"{NAME}.g_idx": torch.from_numpy(places.astype(np.int32))} if ordered else {})
    path = folder(tmp_path / "g", tensors, quant_method="gptq", bits=bits, checkpoint_format=version)
    wanted = (q - zeros.T[:, places]) * scales.T[:, places].astype(np.float32)
    np.testing.assert_allclose(read(path), wanted, rtol=1e-6)


def test_awq(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    out, inputs, groups = 32, 64, 2
    q, zeros = rng.integers(0, 16, (inputs, out)), rng.integers(0, 16, (groups, out))
    scales = rng.random((groups, out)).astype(np.float16)

    def packed(values: Array) -> Tensor:  # AutoAWQ puts weight ORDER[i] of eight into the i-th four bits
        return in_words(values.reshape(len(values), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(values.shape), 4)

    tensors = {
        f"{NAME}.qweight": packed(q),
        f"{NAME}.qzeros": packed(zeros),
        f"{NAME}.scales": torch.from_numpy(scales),
    }
    path = folder(tmp_path / "a", tensors, quant_method="awq", bits=4)
    groups_of = np.arange(inputs) // 32
    wanted = ((q - zeros[groups_of]) * scales[groups_of].astype(np.float32)).T
    np.testing.assert_allclose(read(path), wanted, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_packed_integers_of_compressed_tensors(tmp_path: Path, bits: int, zeros: bool) -> None:
    rng = np.random.default_rng(0)
    half, out, inputs, groups = 1 << (bits - 1), 16, 64, 4
    q, z = rng.integers(-half, half, (out, inputs)), rng.integers(-half, half, (out, groups))
    scales = rng.random((out, groups)).astype(np.float32)
    tensors = {
        f"{NAME}.weight_packed": in_words(q + half, bits),
        f"{NAME}.weight_scale": torch.from_numpy(scales).bfloat16(),
        f"{NAME}.weight_shape": torch.tensor([out, inputs]),
    } | ({f"{NAME}.weight_zero_point": in_words(z.T + half, bits).T.contiguous()} if zeros else {})
    settings = {"group_0": {"weights": {"num_bits": bits}}}
    path = folder(tmp_path / "c", tensors, quant_method="compressed-tensors", config_groups=settings)
    rounded = torch.from_numpy(scales).bfloat16().float().numpy().repeat(16, axis=1)
    np.testing.assert_allclose(read(path), (q - (z.repeat(16, axis=1) if zeros else 0)) * rounded, rtol=1e-6)


def test_packed_integers_are_what_compressed_tensors_packs(tmp_path: Path) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = torch.randint(-8, 8, (16, 64), dtype=torch.int8)
    tensors = {f"{NAME}.weight_packed": library.pack_to_int32(q, 4), f"{NAME}.weight_scale": torch.ones(16, 4)}
    assert np.array_equal(read(folder(tmp_path / "c", tensors, quant_method="compressed-tensors")), q.float().numpy())


def test_four_bit_floats_with_scales(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes, levels = rng.integers(0, 16, (4, 32)), np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.where(codes >= 8, -1, 1) * levels[codes & 7]
    packed = torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))
    scales = torch.tensor([[1.0, 2.0]] * 4).to(torch.float8_e4m3fn)
    nvfp4 = {
        f"{NAME}.weight_packed": packed,
        f"{NAME}.weight_scale": scales,
        f"{NAME}.weight_global_scale": torch.tensor([4.0]),
    }
    assert np.array_equal(read(folder(tmp_path / "n", nvfp4)), values * np.repeat([0.25, 0.5], 16))
    powers = {f"{NAME}.weight_packed": packed, f"{NAME}.weight_scale": torch.full((4, 1), 126, dtype=torch.uint8)}
    assert np.array_equal(read(folder(tmp_path / "p", powers)), values / 2)


def test_integers_of_eight_bits_with_scales(tmp_path: Path) -> None:
    q = torch.randint(-127, 128, (6, 8), dtype=torch.int8)
    rows = torch.rand(6, 1)
    of_rows = folder(tmp_path / "rows", {f"{NAME}.weight": q, f"{NAME}.weight_scale": rows})
    np.testing.assert_allclose(read(of_rows), (q.float() * rows).numpy(), rtol=1e-6)
    scb = folder(
        tmp_path / "scb",
        {
            f"{NAME}.weight": q,
            f"{NAME}.SCB": rows[:, 0].contiguous(),
            f"{NAME}.weight_format": torch.tensor(0, dtype=torch.uint8),
        },
    )
    np.testing.assert_allclose(read(scb), (q.float() * rows / 127).numpy(), rtol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_of_bitsandbytes(tmp_path: Path, nested: bool) -> None:
    rng = np.random.default_rng(0)
    codes, table = rng.integers(0, 16, (8, 24)), np.linspace(-1, 1, 16).astype(np.float32)
    scales = rng.random(3).astype(np.float32)
    about = {"quant_type": "nf4", "blocksize": 64, "shape": [8, 24], "dtype": "bfloat16"}
    tensors = {
        f"{NAME}.weight": torch.from_numpy((codes.reshape(-1)[::2] << 4 | codes.reshape(-1)[1::2]).astype(np.uint8))[
            :, None
        ].contiguous(),
        f"{NAME}.weight.quant_map": torch.from_numpy(table),
    }
    if nested:
        inner, outer = rng.integers(0, 256, 3).astype(np.uint8), np.linspace(-1, 1, 256).astype(np.float32)
        about |= {"nested_blocksize": 2, "nested_offset": 0.5}
        scales = outer[inner] * np.array([2, 2, 3], np.float32) + np.float32(0.5)
        tensors |= {
            f"{NAME}.weight.absmax": torch.from_numpy(inner),
            f"{NAME}.weight.nested_absmax": torch.tensor([2.0, 3.0]),
            f"{NAME}.weight.nested_quant_map": torch.from_numpy(outer),
        }
    else:
        tensors[f"{NAME}.weight.absmax"] = torch.from_numpy(scales)
    state = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    path = folder(tmp_path / "b", tensors | {f"{NAME}.weight.quant_state.bitsandbytes__nf4": state})
    wanted = (table[codes].reshape(-1) * scales.repeat(64)).reshape(8, 24)
    np.testing.assert_allclose(read(path), wanted, rtol=1e-6)
    for lie in (
        {"shape": [8, 240]},
        {"blocksize": 0},
        {"shape": None},
        {"nested_offset": "x"} if nested else {"shape": [-1]},
    ):
        state = torch.frombuffer(bytearray(json.dumps(about | lie).encode()), dtype=torch.uint8)
        bad = folder(tmp_path / str(lie), tensors | {f"{NAME}.weight.quant_state.bitsandbytes__nf4": state})
        with pytest.raises(CheckpointError, match=r"quant_state|cannot be unpacked"):
            open_checkpoint(bad).read(f"{NAME}.weight")


def test_four_bits_are_what_bitsandbytes_makes_of_them(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(32, 64)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    beside = {f"{NAME}.weight.{part}": value for part, value in state.as_dict(packed=True).items()}
    path = folder(tmp_path / "b", {f"{NAME}.weight": packed} | beside)
    assert np.array_equal(read(path), bitsandbytes.functional.dequantize_4bit(packed, state).numpy())


def gptq(weight: Tensor, **changes: Tensor) -> dict[str, Tensor]:
    """A weight in four bits, one group."""
    scale = weight.abs().amax(1) / 7
    q = (weight / scale[:, None]).round().clamp(-8, 7).numpy().astype(np.int64) + 8
    return {
        f"{NAME}.qweight": in_words(q, 4).T.contiguous(),
        f"{NAME}.qzeros": in_words(np.full((1, len(weight)), 7), 4),
        f"{NAME}.scales": scale.half()[None].contiguous(),
    } | changes


def test_a_packed_run_is_compared_with_its_unpacked_base_and_it_is_said(tmp_path: Path) -> None:
    weight = torch.randn(32, 64).mul(0.05).bfloat16()
    base = folder(tmp_path / "base", {f"{NAME}.weight": weight})
    run = folder(tmp_path / "run", gptq(weight.float()), quant_method="gptq", bits=4)
    found = compare(base, {"run": run}, CompareSettings(metrics=("changes",)), cache=False)
    (row,) = found.matrices
    unpacked = torch.from_numpy(read(run))
    assert row["update_norm"] == pytest.approx((unpacked - weight.float()).norm().item(), rel=1e-6)
    said = " ".join(found.summary["runs"]["run"]["warnings"])
    assert (
        "1 tensors packed by GPTQ, 4 bits were dequantised" in said and "what packing lost counts as a change" in said
    )
    same = compare(run, {"run": run}, CompareSettings(metrics=("changes",)), cache=False)
    assert same.matrices[0]["unchanged_fraction_stored"] == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t | {f"{NAME}.g_idx": torch.full((64,), 9, dtype=torch.int32)},
        lambda t: t | {f"{NAME}.g_idx": torch.zeros(3, dtype=torch.int32)},
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    run = folder(tmp_path / "run", damage(gptq(torch.randn(32, 64))), quant_method="gptq", bits=4)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight of .*run cannot be unpacked as GPTQ, 4 bits"):
        open_checkpoint(run).read(f"{NAME}.weight")


def test_bits_that_are_not_read_are_refused_by_name(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", {f"{NAME}.weight": torch.randn(32, 64)})
    run = folder(tmp_path / "run", gptq(torch.randn(32, 64)), quant_method="gptq", bits=3)
    with pytest.raises(CheckpointError, match=r"is quantised \(gptq\)"):
        pair_tensors(open_checkpoint(base), open_checkpoint(run))
