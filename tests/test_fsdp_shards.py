"""verl's shards: put together as torch spread them, whatever the mesh, and read without running anything in them."""

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import base_weights, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import write_ranks
from test_checkpoint_kinds import Bomb, tensor_of
from torch.distributed.tensor import Placement, Replicate, Shard

from offprincipal.checkpoints import open_checkpoint, pair_tensors
from offprincipal.checkpoints.torch_objects import read_objects
from offprincipal.comparison import CompareSettings, compare
from offprincipal.errors import CheckpointError

ROWS = [Shard(0)]


def saved(folder: Path, world: int = 2) -> tuple[Path, dict[str, torch.Tensor]]:
    weights = {name: tensor + 0.25 for name, tensor in base_weights().items()}
    spread = {name: None if name.endswith("norm.weight") else ROWS for name in weights}
    return write_ranks(folder, weights, (world,), spread), weights


@pytest.mark.parametrize("world", [1, 2, 5])
def test_a_run_of_verl_is_compared_as_what_it_trained(world: int, tmp_path: Path) -> None:
    folder, weights = saved(tmp_path / "global_step_10" / "actor", world)
    torch.save({"step": 10}, folder / f"optim_world_size_{world}_rank_0.pt")
    base = write_model(tmp_path / "base", base_weights())
    (folder / "huggingface").mkdir()
    shutil.copy(base / "config.json", folder / "huggingface")
    opened = open_checkpoint(base)
    for source in (folder, tmp_path / "global_step_10"):
        tuned = open_checkpoint(source, opened)
        assert tuned.config["model_type"] == "qwen3"
        assert pair_tensors(opened, tuned, strict=True).tensors.keys() == weights.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor_of(tuned, name), tensor.float()), name
            part = tuned.read(name, 5, min(tensor.numel(), 23)).astype("float32")
            assert torch.equal(torch.from_numpy(part), tensor.flatten()[5:23].float()), name
    rows = compare(base, {"run": folder}, CompareSettings(metrics=("location",)), cache=False).matrices
    assert len(rows) == len(weights)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tensor_on_any_mesh_is_what_was_spread(tmp_path: Path, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    mesh = data.draw(st.sampled_from([(1,), (2,), (3,), (2, 2), (3, 2), (2, 1, 2)]))
    dims = st.integers(0, len(shape) - 1)
    chosen: list[Placement] = []
    for _ in mesh:  # a dimension is spread once: twice is FSDP beside tensor parallelism, in an order of its own
        left = [dim for dim in range(len(shape)) if Shard(dim) not in chosen]
        options = [Replicate(), *(Shard(dim) for dim in left)]
        chosen.append(data.draw(st.sampled_from(options)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    folder = tmp_path / str(data.draw(dims)) / str(abs(hash((shape, mesh, tuple(map(str, chosen)), dtype))))
    found = open_checkpoint(write_ranks(folder, {"a.weight": tensor}, mesh, {"a.weight": chosen}))
    assert found.tensors["a.weight"].shape == shape
    assert torch.equal(tensor_of(found, "a.weight"), tensor.float())


def test_what_is_spread_twice_over_one_dimension_is_refused(tmp_path: Path) -> None:
    """Nested in order it could be read; as FSDP with tensor parallelism lays it, it could not be told from that."""
    weights = {"a.weight": torch.arange(32.0).reshape(8, 4)}
    folder = write_ranks(tmp_path, weights, (2, 2), {"a.weight": [Shard(0), Shard(0)]})
    try:
        assert torch.equal(tensor_of(open_checkpoint(folder), "a.weight"), weights["a.weight"])
    except CheckpointError as error:
        assert "merge the shards" in str(error)


def _rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(path, weights_only=False)
    torch.save(change(content), path)


def test_what_is_wrong_with_them_is_said_and_nothing_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    second = "model_world_size_2_rank_1.pt"
    faults: dict[str, tuple[Callable[[Path], object], str]] = {
        "missing": (lambda folder: (folder / second).unlink(), "lacks the shard of rank 1"),
        "mixed": (
            lambda folder: shutil.copy(folder / second, folder / "model_world_size_4_rank_0.pt"),
            r"runs with \[2, 4\] processes",
        ),
        "truncated": (
            lambda folder: (folder / second).write_bytes((folder / second).read_bytes()[:-900]),
            "truncated or corrupt",
        ),
        "empty": (lambda folder: (folder / second).write_bytes(b""), "truncated or corrupt"),
        "bomb": (lambda folder: torch.save({"x": Bomb(mark)}, folder / second), "holds more than tensors|truncated"),
        "system": (lambda folder: torch.save({"x": os.system}, folder / second), r"posix\.system\), which could run"),
        "getattr": (
            lambda folder: torch.save({"x": getattr}, folder / second),
            r"builtin\w*\.getattr\), which could run",
        ),
        "old pickle": (lambda folder: (folder / second).write_bytes(pickle.dumps(Bomb(mark))), "truncated or corrupt"),
        "list": (lambda folder: torch.save([torch.ones(2)], folder / second), "not a dictionary of tensors"),
        "plain part": (
            lambda folder: torch.save({name: torch.ones(2, 2) for name in base_weights()}, folder / second),
            "not a DTensor in every rank",
        ),
    }
    for fault, (damage, says) in faults.items():
        folder, _ = saved(tmp_path / fault)
        damage(folder)
        with pytest.raises(CheckpointError, match=says):
            open_checkpoint(folder)
    assert not mark.exists(), "a pickle was run"


def test_a_storage_that_leads_out_of_its_file_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(64.0)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    (key,) = (name for name in content if name.endswith("data/0"))
    with zipfile.ZipFile(tmp_path / "short.pt", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data[:16] if name == key else data)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read_objects(tmp_path / "short.pt")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="compressed storage"):
        read_objects(tmp_path / "packed.pt")
