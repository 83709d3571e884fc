"""Several processes that a launcher started train what one would, into one folder."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offprincipal.errors import TrainingError
from offprincipal.models import open_language_model
from offprincipal.training import parse_settings, train
from offprincipal.training.runs import require_trainable_here
from offprincipal.training.trained import RunModels, prepare

PROGRAM = Path(__file__).with_name("train_launched.py")


def start(arguments: list[str], processes: int = 2) -> list["subprocess.Popen[str]"]:
    """The processes, as a launcher would start them; `--deepspeed` for ZeRO-2."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    if "--deepspeed" in arguments:
        pytest.importorskip("deepspeed")  # not installed with the tests
        world |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def launched(arguments: list[str]) -> list["subprocess.CompletedProcess[str]"]:
    """Each process's end."""
    started = start(arguments)
    ends = [process.communicate(timeout=300) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *end)
        for process, end in zip(started, ends, strict=True)
    ]


SETTINGS = {"steps": 3, "batch": 8, "micro_batch": 2, "rollouts_per_prompt": 4, "max_new_tokens": 3, "eval_prompts": 8}
SETTINGS |= {"eval_samples": 2, "learning_rate": 1e-3, "save_every": 2, "monitor": 1, "keep_deltas": 3, "seed": 3}
SETTINGS |= {"device": "cpu", "keep_masters": True}


def arguments(model: Path, out: Path, recipe: str, *more: str) -> list[str]:
    given = ["train", recipe, "--model", str(model), "--task", "count@1", "--out", str(out)]
    sets = [*(f"{name}={value}" for name, value in SETTINGS.items()), *more]
    return [*given, *(part for text in sets for part in ("--set", text))]


def record_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found


def require_ended_well(ends: list["subprocess.CompletedProcess[str]"]) -> None:
    for rank, end in enumerate(ends):
        assert end.returncode == 0, f"process {rank}: {end.stderr[-3000:]}"


@pytest.fixture(scope="module")
def one(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    out = tmp_path_factory.mktemp("launched") / "one"
    values = SETTINGS | {"recipe": "sft_teacher", "model": str(taught_model), "tasks": ["count@1"]}
    train(parse_settings(values), out, quiet=True)
    return out


def flat(figures: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Figures by their whole names, of each task too."""
    found: dict[str, Any] = {}
    for name, value in figures.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return found


@pytest.mark.parametrize(
    ("sharding", "compute", "tolerance"),
    [([], "float32", 1e-3), (["--fsdp"], "float32", 1e-3), (["--deepspeed"], "bfloat16", 1e-2)],
)
def test_two_processes_learn_what_one_does(
    sharding: list[str], compute: str, tolerance: float, one: Path, taught_model: Path, tmp_path: Path
) -> None:
    """Of one batch, which they share; sums are taken in another order, and Adam's first steps are large."""
    two = tmp_path / "two"
    ends = launched([*sharding, *arguments(taught_model, two, "sft_teacher", f"compute={compute}")])
    require_ended_well(ends)
    assert "model:" in ends[0].stdout and "model:" not in ends[1].stdout  # one process speaks
    found, alone = record_of(two), record_of(one)
    assert found["machine"]["processes"] == 2 and "processes" not in alone["machine"]
    before, known = (flat(record["accuracy"]["before"]) for record in (found, alone))
    assert before == pytest.approx(known, rel=1e-6, abs=1e-9)  # with other threads, sums are in another order
    for ours, theirs in zip(found["log"], alone["log"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
    base = load_file(taught_model / "model.safetensors")
    masters = [load_file(out / "masters" / "model.safetensors") for out in (two, one)]
    assert masters[0].keys() == masters[1].keys()
    moved = [torch.cat([(own[n] - base[n].float()).flatten() for n in sorted(base) if n in own]) for own in masters]
    assert float(torch.cosine_similarity(*moved, dim=0)) > 1 - 20 * tolerance
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters[0].values())
    stored = load_file(two / "model.safetensors")
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in masters[0].items())
    kept = load_file(two / "deltas" / "masters" / "step_3.safetensors")
    assert all(torch.equal(masters[0][name], tensor) for name, tensor in kept.items())
    assert (two / "monitor.parquet").is_file() and not (two / "checkpoints").exists()


@pytest.mark.parametrize("sharding", ["--fsdp", "--deepspeed"])
def test_two_killed_processes_go_on_where_they_were(sharding: str, taught_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    long = [sharding, *arguments(taught_model, out, "grpo", "steps=8")]
    running = start(long)
    kept = out / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    deadline = time.monotonic() + 200
    while not kept.exists() and all(process.poll() is None for process in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in running:
        process.kill()
    errors = [process.communicate()[1] for process in running]
    assert kept.exists() and not (out / "run.json").exists(), errors[0][-2000:]
    require_ended_well(launched(long))
    record = record_of(out)
    assert [entry["step"] for entry in record["log"]] == list(range(1, 9))
    assert all(-1 <= entry["reward"] <= 1 for entry in record["log"])


@pytest.mark.parametrize(
    ("method", "sharding", "says"),
    [("lora", "fsdp", "DDP instead"), ("isospectral", "zero 2", "DDP instead"), (None, "zero 3", "ZeRO-3 keeps")],
)
def test_what_would_lose_what_is_trained_is_refused(
    method: str | None, sharding: str, says: str, tiny_model: Path
) -> None:
    values = {"recipe": "sft_own", "tasks": ["add"], "adapter": method and {"method": method}}
    base = open_language_model(tiny_model, "cpu")
    opened = RunModels(base, prepare(parse_settings(values), base.model))
    plugin = SimpleNamespace(zero_stage=int(sharding[-1])) if sharding.startswith("zero") else None
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    trainer = SimpleNamespace(
        is_fsdp_enabled=sharding == "fsdp", is_deepspeed_enabled=plugin is not None, accelerator=accelerator
    )
    with pytest.raises(TrainingError, match=says):
        require_trainable_here(opened, trainer)


@pytest.mark.parametrize(("batch", "processes", "at_once"), [(240, 1, 60), (240, 4, 60), (240, 8, 30), (6, 2, 3)])
def test_a_batch_is_shared_equally(batch: int, processes: int, at_once: int) -> None:
    settings = parse_settings({"recipe": "sft_own", "tasks": ["add"], "batch": batch, "micro_batch": 64})
    assert settings.sequences_at_once(processes) == at_once
    with pytest.raises(TrainingError, match="cannot share a batch"):
        settings.sequences_at_once(7)
