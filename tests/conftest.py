"""Models small enough to train in a test, made as the embedded base is made."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from offprincipal.training import TrainSettings, train


def _pretraining_script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "pretrain_base.py"
    spec = importlib.util.spec_from_file_location("pretrain_base", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random character model of two layers in bfloat16: a Hugging Face folder."""
    script = _pretraining_script()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    recipe = script.Recipe(hidden=32, layers=2, heads=2, key_value_heads=1, head_dim=16, intermediate=64)
    torch.manual_seed(0)
    tokenizer = script.build_tokenizer()
    script.build_model(recipe, tokenizer).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def taught_model(tiny_model: Path) -> Path:
    """The tiny model after a short lesson in counting letters: it answers in digits, and is sometimes right."""
    out = tiny_model.parent / "taught"
    settings = TrainSettings(
        recipe="sft_own",
        model=str(tiny_model),
        tasks=("count@1",),
        steps=60,
        batch=64,
        learning_rate=1e-2,
        save_every=60,
        eval_prompts=0,
        device="cpu",
    )
    train(settings, out, quiet=True)
    return out
