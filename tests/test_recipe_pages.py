"""Every command of docs/recipes runs as it stands there, but for the models, the data, their sizes and the GPU."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from documented import blocks, commands, made_small
from ranks import write_ranks
from test_cli import call
from test_prompting import model_at
from torch.distributed.tensor import Shard
from zero_ranks import write_zero

from offprincipal.checkpoints import open_checkpoint

PAGES = sorted((Path(__file__).parents[1] / "docs" / "recipes").glob("*.md"))


def as_verl_leaves_it(model: Path, folder: Path) -> None:
    opened = open_checkpoint(model)
    for step in (100, 200):
        tensors = {
            name: torch.from_numpy(opened.read(name).astype("float32")).reshape(info.shape) * (1 + step * 1e-6)
            for name, info in opened.tensors.items()
        }
        actor = folder / f"global_step_{step}" / "actor"
        write_ranks(actor, tensors, (2,), {name: [Shard(0)] for name in tensors})
        (actor / "huggingface").mkdir()
        (actor / "huggingface" / "config.json").write_text((model / "config.json").read_text())


def as_other_trainers_leave_it(model: Path, runs: Path) -> None:
    """torch.distributed.checkpoint, accelerate's folder of it, and DeepSpeed's."""
    opened = open_checkpoint(model)
    moved = {
        name: torch.from_numpy(opened.read(name).astype("float32")).reshape(info.shape) * (1 + 1e-4)
        for name, info in opened.tensors.items()
    }
    for folder, state in (
        ("fsdp/step_100", moved),
        ("accelerate/checkpoint-100/pytorch_model_fsdp_0", {"model": moved}),
    ):
        dcp.save(dict(state), checkpoint_id=runs / folder, no_dist=True)
        (runs / folder / "config.json").write_text((model / "config.json").read_text())
    write_zero(runs / "deepspeed", [moved], 2, 2)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_at(tmp_path / "model", chat=True)
    rows = [{"question": f"{i}+1=", "answer": f"{i}+1\n#### {i + 1}"} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    as_verl_leaves_it(model, tmp_path / "checkpoints" / "gsm8k")
    as_other_trainers_leave_it(model, tmp_path / "runs")
    folders = {"Qwen/Qwen3-0.6B": str(model), "Qwen/Qwen3-1.7B": str(model)}
    folders["hf:openai/gsm8k?config=main"] = f"hf:{tmp_path / 'data.jsonl'}"
    assert commands(page)
    for arguments in commands(page):
        given = made_small(arguments, folders)
        assert call(monkeypatch, *given) == 0, shlex.join(given)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_configurations_of_a_page_are_accelerates(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "yaml"):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        config = ClusterConfig.from_yaml_file(str(path))
        given = yaml.safe_load(text)
        assert config.fsdp_config == given.get("fsdp_config", {})
        assert config.deepspeed_config == given.get("deepspeed_config", {})
        assert config.num_processes == 8 and config.mixed_precision == "bf16"


def test_there_are_configurations_and_they_ask_for_fsdp2_or_a_zero_that_is_not_refused() -> None:
    found = [yaml.safe_load(text) for page in PAGES for text in blocks(page, "yaml")]
    assert {config["distributed_type"] for config in found} == {"FSDP", "DEEPSPEED"}
    for config in found:
        assert config.get("fsdp_config", {}).get("fsdp_version") == 2 or config["deepspeed_config"]["zero_stage"] == 2
