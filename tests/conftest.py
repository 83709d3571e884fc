"""Models small enough to train in a test, made as the embedded base is made."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from pretraining import pretraining_script

from offprincipal.training import TrainSettings, train

settings.register_profile("unhurried", deadline=None)  # the first call of a compiled function compiles it
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random character model of two layers in bfloat16: a Hugging Face folder."""
    script = pretraining_script()
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
