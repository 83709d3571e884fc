"""DeepSpeed's ZeRO checkpoints: put together at every stage, found as masters, and read without running anything."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_folders import base_weights, moved, stored, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoint_kinds import Bomb, tensor_of
from zero_ranks import write_zero

from offprincipal.checkpoints import open_checkpoint, pair_tensors
from offprincipal.comparison import CompareSettings, compare
from offprincipal.errors import CheckpointError

LOCATION = CompareSettings(metrics=("location",))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_stage_is_put_together_entry_by_entry(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    stage, world = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.integers(1, 5))
    shape = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
    shapes = data.draw(st.lists(st.lists(shape, min_size=1, max_size=4), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(0)
    groups = [
        {f"group{i}.{j}.weight": torch.randn(size, generator=generator) for j, size in enumerate(group)}
        for i, group in enumerate(shapes)
    ]
    frozen = {"frozen.weight": torch.randn(3, 5, generator=generator).bfloat16()}
    found = open_checkpoint(write_zero(tmp_path_factory.mktemp("zero"), groups, stage, world, frozen))
    whole = {name: tensor for group in groups for name, tensor in group.items()} | frozen | {"steps": torch.ones(3)}
    assert {name: info.shape for name, info in found.tensors.items()} == {n: tuple(t.shape) for n, t in whole.items()}
    for name, tensor in whole.items():
        assert torch.equal(tensor_of(found, name), tensor.float()), name
        start = data.draw(st.integers(0, tensor.numel()))
        stop = data.draw(st.integers(start, tensor.numel()))
        part = found.read(name, start, stop).astype(np.float32)
        assert torch.equal(torch.from_numpy(part), tensor.flatten()[start:stop].float()), name


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_of_deepspeed_is_compared_and_is_the_masters_of_the_model_beside_it(stage: int, tmp_path: Path) -> None:
    weights = base_weights()
    after = moved(weights, 1e-3, 5)
    base = write_model(tmp_path / "base", weights)
    kept = write_model(tmp_path / "kept", stored(after), after)
    run = write_model(tmp_path / "checkpoint-3", stored(after))
    wrapped = {f"module.{name}": tensor for name, tensor in after.items()}
    write_zero(run, [wrapped], stage, 2)
    rows = compare(base, {"kept": kept, "run": run}, LOCATION, cache=False).matrices
    ours, theirs = ([row | {"run": None} for row in rows if row["run"] == run] for run in ("kept", "run"))
    assert ours == theirs and any(row["hidden_fraction"] for row in ours)
    alone = open_checkpoint(run / "global_step3", open_checkpoint(base))
    pairing = pair_tensors(open_checkpoint(base), alone)
    assert pairing.tensors.keys() == weights.keys() and pairing.only_in_tuned == ("steps",)
    assert all(torch.equal(tensor_of(alone, name), after[name]) for name in weights)


def test_states_of_another_step_are_no_masters(tmp_path: Path) -> None:
    weights = base_weights()
    run = write_model(tmp_path / "run", stored(moved(weights, 1e-3, 5)))
    write_zero(run, [moved(weights, 1e-3, 6)], 2, 2)
    with pytest.raises(CheckpointError, match=r"do not round to its stored weights.*trainer's own states"):
        compare(write_model(tmp_path / "base", weights), {"run": run}, LOCATION, cache=False)


def test_what_is_wrong_with_them_is_said_and_nothing_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    optimizer, model = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"
    faults: dict[str, tuple[Callable[[Path], object], str]] = {
        "no optimizer": (lambda at: (at / optimizer).unlink(), "the states of 1 of 2 ranks"),
        "no first optimizer": (
            lambda at: (at / optimizer.replace("rank_1", "rank_0")).unlink(),
            "lacks the optimizer states of rank 0",
        ),
        "no model": (lambda at: [path.unlink() for path in at.glob("*model*")], "lacks the model states of rank 0"),
        "tensor parallel": (
            lambda at: (at / optimizer).rename(at / optimizer.replace("mp_rank_00", "mp_rank_01")),
            "tensor parallelism",
        ),
        "bomb": (
            lambda at: torch.save({"optimizer_state_dict": Bomb(mark)}, at / optimizer),
            "holds more than tensors|corrupt",
        ),
        "system": (lambda at: torch.save({"x": os.system}, at / model), "holds more than tensors"),
        "truncated": (
            lambda at: (at / optimizer).write_bytes((at / optimizer).read_bytes()[:-400]),
            "truncated or corrupt",
        ),
        "something else": (
            lambda at: torch.save({"x": 1}, at / optimizer.replace("rank_1", "rank_0")),
            "not have the layout of a ZeRO",
        ),
    }
    groups = [{"a.weight": torch.arange(30.0).reshape(5, 6), "b.weight": torch.arange(7.0)}]
    for fault, (damage, says) in faults.items():
        folder = write_zero(tmp_path / fault, groups, 3, 2)
        damage(folder / "global_step3")
        with pytest.raises(CheckpointError, match=says):
            open_checkpoint(folder / "global_step3")
    assert not mark.exists(), "a pickle was run"


def test_latest_leads_nowhere_else(tmp_path: Path) -> None:
    write_zero(tmp_path / "elsewhere", [{"a.weight": torch.ones(2, 2)}], 2, 1)
    (tmp_path / "run").mkdir()
    for name in ("../elsewhere/global_step3", str(tmp_path / "elsewhere" / "global_step3"), "..", "\0", "x" * 10_000):
        (tmp_path / "run" / "latest").write_text(name)
        with pytest.raises(CheckpointError, match="is not a model"):
            open_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_they_are_what_deepspeeds_own_script_makes_of_them(stage: int, tmp_path: Path) -> None:
    """Where DeepSpeed is installed, which has no wheels: trained by it, in two processes."""
    pytest.importorskip("deepspeed")
    program = Path(__file__).with_name("train_zero.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "run"), str(stage)], env=environment, check=True, capture_output=True)
    reference = torch.load(tmp_path / "run" / "reference.pt", weights_only=True)
    found = open_checkpoint(tmp_path / "run")
    assert reference.keys() <= found.tensors.keys()
    for name, tensor in reference.items():
        assert torch.equal(tensor_of(found, name), tensor.float()), name
