"""SparseAdamW under accelerate's FSDP2 trains as one process does, and sharded checkpoints hold all of its state."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_sparse_sharded import STEPS, optimized, started, train, weights_of

from offprincipal.adapters.sparse_index import index_of
from offprincipal.adapters.sparse_shards import gathered
from offprincipal.errors import AdapterError

PROGRAM = Path(__file__).with_name("train_sparse_sharded.py")
KINDS = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and checkpoints of two processes, and the weights of four that went on from there.

    Sums of two or of four equal gradients are exact.
    """
    folder = tmp_path_factory.mktemp("sharded")
    for mode, processes in (("save", 2), ("continue", 4)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        subprocess.run(
            [*command, str(PROGRAM), mode, str(folder)],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=180,
        )
    return folder


@pytest.mark.parametrize("kind", KINDS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("run", ["save-2", "continue-4"])
def test_processes_train_as_one_bit_for_bit(kind: torch.dtype, run: str, out: Path) -> None:
    model, masks, inputs = started(kind)
    train(model, optimized(model, masks), inputs)
    base = started(kind)[0].state_dict()
    found = torch.load(out / f"{str(kind).removeprefix('torch.')}-{run}.pt", weights_only=True)
    for name, weight in weights_of(model).items():
        assert torch.equal(found[name], weight)
        assert torch.equal(weight[~masks[name]], base[name][~masks[name]]) and not torch.equal(weight, base[name])


@pytest.mark.parametrize("kind", KINDS, ids=["float32", "bfloat16"])
def test_a_full_state_dict_of_shards_is_the_state_of_one_process(kind: torch.dtype, out: Path) -> None:
    whole = torch.load(out / f"{str(kind).removeprefix('torch.')}-whole.pt", weights_only=True)
    model, masks, inputs = started(kind)
    optimizer, fresh = optimized(model, masks), optimized(model, masks)
    train(model, optimizer, inputs[:STEPS])
    fresh.load_state_dict(whole)
    for _, parameter in model.named_parameters():
        alone, together = optimizer.state[parameter], fresh.state[parameter]
        assert alone.keys() == together.keys()
        assert all(torch.equal(alone[key], together[key]) for key in alone)
        assert all(alone[key].dtype == together[key].dtype for key in alone)


def test_state_of_another_shard_is_refused() -> None:
    state = {"index": torch.ones(4, 3, dtype=torch.uint8), "exp_avg": torch.zeros(4, 3)}
    with pytest.raises(AdapterError, match=r"w has shape \(4, 3\), this process's shard \(2, 3\)"):
        gathered(state, "w", torch.Size([2, 3]))
    assert torch.equal(gathered(state, "w", torch.Size([4, 3]))["index"], index_of(torch.ones(4, 3, dtype=torch.bool)))
