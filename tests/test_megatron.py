"""Megatron's `torch_dist`: by its own writer where that is installed, else in its layout."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron_ranks
import numpy as np
import pytest
import torch
from megatron_ranks import EXPERTS, LAYERS, megatrons, usual, usual_folder, write_megatron
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from offprincipal import CompareSettings, compare
from offprincipal.checkpoints import open_checkpoint
from offprincipal.checkpoints.masters import masters_of
from offprincipal.checkpoints.pairing import pair_tensors
from offprincipal.errors import CheckpointError


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_it_is_read_under_the_bases_names_entry_by_entry(ranks: int, bias: bool, tmp_path: Path) -> None:
    tuned = usual(1, bias)
    base = open_checkpoint(usual_folder(tmp_path / "base", usual(0, bias)))
    write_megatron(tmp_path / "run" / "iter_0000007", megatrons(tuned), ranks)
    found = open_checkpoint(tmp_path / "run", base)
    pairing = pair_tensors(base, found)
    assert (set(pairing.tensors), pairing.only_in_base, pairing.only_in_tuned) == (set(tuned), (), ())
    for name, info in pairing.tensors.items():
        np.testing.assert_array_equal(found.read(name, 0, info.numel), tuned[name].numpy().reshape(-1), err_msg=name)
        middle = slice(info.numel // 3, info.numel // 2)
        np.testing.assert_array_equal(
            found.read(name, middle.start, middle.stop), tuned[name].numpy().reshape(-1)[middle]
        )


def test_two_of_them_are_compared_matrix_by_matrix_by_what_their_arguments_say(tmp_path: Path) -> None:
    for name, seed in (("base", 0), ("run", 1)):
        write_megatron(tmp_path / name, megatrons(usual(seed, bias=True)))
    settings = CompareSettings(metrics=("changes",))
    rows = compare(tmp_path / "base", {"run": tmp_path / "run"}, settings, out=tmp_path / "out").matrices
    roles = [row["role"] for row in rows]
    per_layer = {"q": 1, "k": 1, "v": 1, "o": 1, "gate": EXPERTS, "up": EXPERTS, "down": EXPERTS, "router": 1}
    assert {role: roles.count(role) for role in per_layer} == {role: LAYERS * n for role, n in per_layer.items()}
    assert "other" not in roles
    assert {row["layer"] for row in rows} == {None, *range(LAYERS)}


def test_its_optimizers_weights_are_the_masters(tmp_path: Path) -> None:
    base = open_checkpoint(usual_folder(tmp_path / "base", usual(0)))
    masters = usual(1)
    stored = {name: tensor.bfloat16() for name, tensor in megatrons(masters).items()}
    state = {f"optimizer.state.fp32_param.{name}": tensor for name, tensor in megatrons(masters).items()}
    moments = {f"optimizer.state.exp_avg.{name}": tensor for name, tensor in megatrons(masters).items()}
    for chained in ("", "chained_0."):
        folder = write_megatron(
            tmp_path / f"run{chained}", stored | {chained + name: t for name, t in (state | moments).items()}
        )
        found = masters_of(open_checkpoint(folder, base))
        assert found is not None
        for name in usual(0):
            wanted = masters[name].numpy().reshape(-1)
            np.testing.assert_array_equal(found.read(name, 0, wanted.size), wanted, err_msg=name)
    flat = {name: tensor.reshape(-1) for name, tensor in state.items() if "embedding" in name}
    assert masters_of(open_checkpoint(write_megatron(tmp_path / "flat", stored | flat), base)) is None


def test_layers_that_are_stacked_otherwise_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_ranks, "boxes", lambda name, shape, ranks: [(tuple(0 for _ in shape), shape)])
    folder = write_megatron(tmp_path / "run", megatrons(usual(0)))
    with pytest.raises(CheckpointError, match="does not have one layer per chunk, as Megatron writes them"):
        open_checkpoint(folder)


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("the checkpoint's code was run",)


def test_what_its_metadata_or_arguments_would_run_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match=r"names builtins\.print"):
        open_checkpoint(write_megatron(tmp_path / "run", megatrons(usual(0)), extra=Harmful()))
    folder = write_megatron(tmp_path / "other", megatrons(usual(0)))
    torch.save({"args": Harmful()}, folder / "common.pt")
    assert open_checkpoint(folder).config == {}
    assert capsys.readouterr().out == ""


WRITTEN = [
    (1, 1, "dense"),
    (1, 1, "layers"),
    (1, 1, "apart,bias"),
    (1, 1, "experts"),
    (2, 1, "bias"),
    (2, 2, "experts"),
]


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
@pytest.mark.parametrize(("ranks", "stages", "kind"), WRITTEN)
def test_what_its_own_writer_wrote_is_its_own_model(ranks: int, stages: int, kind: str, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("write_megatron.py")), str(ranks), str(stages), kind]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    if "experts" in kind:
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
    model_type = "qwen3_moe" if "experts" in kind else "qwen2" if "bias" in kind else "qwen3"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    model.save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    found = open_checkpoint(tmp_path / "iter_0000001", base)
    pairing = pair_tensors(base, found)
    assert (pairing.only_in_base, pairing.only_in_tuned) == ((), ())
    read = {n: torch.from_numpy(found.read(n, 0, i.numel).copy()).reshape(i.shape) for n, i in base.tensors.items()}
    save_file(read, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if (tmp_path / "logits.pt").exists():
        tokens, logits = torch.load(tmp_path / "logits.pt")
        torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-4)
    held = torch.cat(
        [t.float().reshape(-1) for n in range(ranks * stages) for t in torch.load(tmp_path / f"state_{n}.pt").values()]
    )
    ours = torch.cat([tensor.reshape(-1) for tensor in read.values()])
    assert set(ours.tolist()) == set(held.tolist())  # every number that any rank holds, and no other


def test_experts_that_its_own_writer_wrote_are_each_their_own(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    command = [sys.executable, str(Path(__file__).with_name("write_megatron.py")), "1", "1", "experts", str(tmp_path)]
    subprocess.run(command, capture_output=True, check=True)
    held = torch.load(tmp_path / "state_0.pt")
    found = open_checkpoint(tmp_path / "iter_0000001")
    for layer in range(4):
        for expert in range(4):
            for theirs, ours in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
                wanted = held[f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.{theirs}.weight"]
                name = f"model.layers.{layer}.mlp.experts.{expert}.{ours}.weight"
                np.testing.assert_array_equal(found.read(name), wanted.numpy().reshape(-1))
