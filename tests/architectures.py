"""Tiny random models of every architecture that interventions know, and models as if trained from them."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offprincipal.models.quiet import quiet_libraries


def checking_script() -> ModuleType:
    """`scripts/check_interventions.py` as a module: it is no part of the package."""
    path = Path(__file__).parents[1] / "scripts" / "check_interventions.py"
    spec = importlib.util.spec_from_file_location("check_interventions", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stored_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, out: Path, weights: dict[str, Tensor]) -> Path:
    """A copy of a model's folder with other weights."""
    shutil.copytree(folder, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("intervention.json"))
    save_file({name: x.contiguous() for name, x in weights.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def trained_from(folder: Path, out: Path, scale: float = 1e-2, masters: bool = False) -> Path:
    """A model as if trained from another: every tensor has moved by `scale` of its size, gains and biases too."""
    generator = torch.Generator().manual_seed(7)
    weights = stored_weights(folder)
    moved = {}
    for name, x in sorted(weights.items()):
        step = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        size = x.double().std() if x.dim() == 2 else 1.0
        size = x.double().std() if x.dim() == 2 else 1.0
        moved[name] = (x.double() + scale * size * step).float()
    rewrite(folder, out, {name: x.to(weights[name].dtype) for name, x in moved.items()})
    if masters:
        (out / "masters").mkdir()
        save_file(moved, out / "masters" / "model.safetensors")
    return out


@torch.no_grad()
def plain_logits(folder: Path, ids: Tensor) -> Tensor:
    """What transformers says, untouched by us, in float32."""
    import transformers

    with quiet_libraries():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: Tensor = model(input_ids=ids).logits
    return logits.double()
