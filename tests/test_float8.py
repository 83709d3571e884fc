"""Float8 with scales beside it is read as the numbers that it stands for: W = q · scale."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from offprincipal.checkpoints import open_checkpoint, pair_tensors
from offprincipal.checkpoints.checkpoint import FLOATS
from offprincipal.checkpoints.float8 import dequantise, fit_block
from offprincipal.errors import CheckpointError

NAME = "model.layers.0.mlp.down_proj.weight"
DEEPSEEK = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}}


def write(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def float8(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def by_block(scales: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """The scale of every entry, written out."""
    wide = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_block_scales_as_deepseek_stores_them(tmp_path: Path, dtype: torch.dtype) -> None:
    q, scales = float8(10, 20, dtype=dtype), torch.rand(3, 3) + 0.5
    checkpoint = open_checkpoint(write(tmp_path / "run", {NAME: q, f"{NAME}_scale_inv": scales}, DEEPSEEK))
    expected = (q.float() * by_block(scales, (4, 8), (10, 20))).numpy()
    assert list(checkpoint.tensors) == [NAME]
    assert (checkpoint.tensors[NAME].dtype, checkpoint.tensors[NAME].shape) == ("float32", (10, 20))
    assert checkpoint.read(NAME).dtype == np.float32
    assert np.array_equal(checkpoint.read(NAME), expected.ravel())
    assert list(checkpoint.notes) == ["1 tensors stored in float8 with scales were dequantised"]


@pytest.mark.parametrize(
    ("shape", "scale_dtype"),
    [((), torch.float32), ((1,), torch.bfloat16), ((10, 1), torch.bfloat16), ((10,), torch.float32)],
)
def test_scales_of_a_tensor_or_a_row_as_compressed_tensors_stores_them(
    tmp_path: Path, shape: tuple[int, ...], scale_dtype: torch.dtype
) -> None:
    q, scales = float8(10, 20), (torch.rand(shape) + 0.5).to(scale_dtype)
    beside = {f"{NAME}_scale": scales, NAME.replace("weight", "input_scale"): torch.ones(1)}
    checkpoint = open_checkpoint(write(tmp_path / "run", {NAME: q, "norm.weight": torch.ones(3), **beside}, {}))
    assert list(checkpoint.tensors) == [NAME, "norm.weight"]
    expected = q.float() * (scales.float()[:, None] if len(shape) == 1 and shape[0] > 1 else scales.float())
    assert np.array_equal(checkpoint.read(NAME), expected.numpy().ravel())


def test_a_dequantised_run_pairs_with_its_bfloat16_base(tmp_path: Path) -> None:
    base = open_checkpoint(write(tmp_path / "base", {NAME: torch.ones(10, 20).bfloat16()}, {}))
    tuned = write(tmp_path / "tuned", {NAME: float8(10, 20), f"{NAME}_scale_inv": torch.ones(3, 3)}, DEEPSEEK)
    assert list(pair_tensors(base, open_checkpoint(tuned)).tensors) == [NAME]


def test_scales_in_another_shard_are_found(tmp_path: Path) -> None:
    q, scales = float8(10, 20), torch.rand(3, 3)
    folder = write(tmp_path / "run", {NAME: q}, DEEPSEEK)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({f"{NAME}_scale_inv": scales}, folder / "b.safetensors")
    index = {"weight_map": {NAME: "a.safetensors", f"{NAME}_scale_inv": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = (q.float() * by_block(scales, (4, 8), (10, 20))).numpy()
    assert np.array_equal(open_checkpoint(folder).read(NAME, 33, 77), expected.ravel()[33:77])


@given(
    stack=st.sampled_from([(), (3,)]),
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    data=st.data(),
)
def test_any_range_is_that_range_of_the_whole(
    stack: tuple[int, ...], rows: int, cols: int, block: tuple[int, int], data: st.DataObject
) -> None:
    shape = (*stack, rows, cols)
    q = float8(*shape).view(torch.uint8).numpy().view(FLOATS["float8_e4m3fn"]).ravel()
    scales = torch.rand(*stack, math.ceil(rows / block[0]), math.ceil(cols / block[1])) + 0.5
    found = fit_block(shape, tuple(scales.shape), block)
    assert found is not None
    whole = q.astype(np.float32) * by_block(scales, found, shape).numpy().ravel()
    stop = data.draw(st.integers(0, len(q)))
    start = data.draw(st.integers(0, stop))
    assert np.array_equal(dequantise(q[start:stop], start, shape, scales.numpy(), found), whole[start:stop])


def test_scales_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    weights = {NAME: float8(10, 20), f"{NAME}_scale_inv": torch.rand(5, 5)}
    with pytest.raises(CheckpointError, match=r"down_proj.weight_scale_inv.*weight_block_size"):
        _ = open_checkpoint(write(tmp_path / "run", weights, DEEPSEEK)).tensors


def test_float8_without_scales_is_refused_by_name(tmp_path: Path) -> None:
    weights = {NAME: float8(10, 20), f"{NAME}_scale_inv": torch.rand(3, 3), "b.weight": float8(2, 2)}
    with pytest.raises(CheckpointError, match=r"b.weight in .* float8_e4m3fn without scales.*convert it"):
        _ = open_checkpoint(write(tmp_path / "run", weights, DEEPSEEK)).tensors


@pytest.mark.parametrize("size", [None, 3, [4], [0, 8], [-4, 8], ["4", "8"], [10**40, 8], {"rows": 4}])
def test_a_useless_block_size_is_not_taken(tmp_path: Path, size: object) -> None:
    config = {"quantization_config": {"weight_block_size": size}, "text_config": [1]}
    folder = write(tmp_path / "run", {NAME: float8(10, 20), f"{NAME}_scale_inv": torch.rand(3, 3)}, config)
    with pytest.raises(CheckpointError, match="does not fit"):
        _ = open_checkpoint(folder).tensors
