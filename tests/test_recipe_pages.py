"""Every command of docs/recipes runs as it stands there, but for the models, the data, their sizes and the GPU."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from ranks import write_ranks
from test_cli import call
from test_prompting import model_at
from torch.distributed.tensor import Shard
from zero_ranks import write_zero

from offprincipal.checkpoints import open_checkpoint

PAGES = sorted((Path(__file__).parents[1] / "docs" / "recipes").glob("*.md"))
SMALLER = {
    "--steps": "2",
    "--batch": "8",
    "--rank": "2",
    "max_new_tokens": "3",
    "eval_max_new_tokens": "3",
    "eval_prompts": "2",
    "micro_batch": "4",
    "keep_deltas": "1",
    "monitor": "1",
}
ON_GPUS = ("vllm", "trl.vllm_gpu_memory_utilization")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `offprincipal`, whichever launcher starts it."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("offprincipal") + 1 :] for line in words if "offprincipal" in line]


def made_small(arguments: Sequence[str], folders: dict[str, str]) -> list[str]:
    """The command on a tiny model: the same options, smaller numbers, and without what only a GPU has."""
    found: list[str] = []
    for word in arguments:
        key, equals, value = word.partition("=")
        before = found[-1] if found else ""
        if before == "--set" and key in ON_GPUS:
            found.pop()
        elif before == "--set" and key in SMALLER:
            found.append(f"{key}={SMALLER[key]}")
        elif before in SMALLER:
            found.append(SMALLER[before])
        else:
            place = value if equals and before not in ("--set", "--task") else word
            root = next((root for root in folders if place == root or place.startswith(root + "/")), None)
            changed = place if root is None else folders[root] + place[len(root) :]
            found.append(f"{key}={changed}" if place is value else changed)
    return found


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
    found = commands(page)
    assert len(found) >= 1
    for arguments in found:
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
