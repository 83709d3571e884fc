"""Small Hugging Face folders on disk, for the tests of checkpoints, comparisons and the command line."""

import json
from pathlib import Path

import torch
from matrices import gaussian
from safetensors.torch import save_file
from torch import Tensor

COMPARISON_FILES = ("matrices.parquet", "masks.parquet", "pairs.parquet", "curves.parquet", "summary.json")
LAYERS = 2
SHAPES = {
    "self_attn.q_proj": (32, 24),
    "self_attn.k_proj": (16, 24),
    "mlp.down_proj": (24, 48),
}


def base_weights(seed: int = 0) -> dict[str, Tensor]:
    """Two layers of three matrices, a norm and an embedding, in bfloat16."""
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(LAYERS) for part in SHAPES]
    weights = {
        name: (0.05 * gaussian(*SHAPES[name.split(".", 3)[3].removesuffix(".weight")], seed=seed + i)).bfloat16()
        for i, name in enumerate(names)
    }
    weights["model.norm.weight"] = torch.ones(24).bfloat16()
    weights["model.embed_tokens.weight"] = gaussian(40, 24, seed=seed + 99).bfloat16()
    return weights


def moved(weights: dict[str, Tensor], size: float, seed: int) -> dict[str, Tensor]:
    """Float32 weights after a Gaussian update of every entry."""
    return {
        name: (tensor.double() + size * gaussian(*tensor.shape, seed=seed + i)).float()
        for i, (name, tensor) in enumerate(weights.items())
    }


def stored(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


def write_model(folder: Path, weights: dict[str, Tensor], masters: dict[str, Tensor] | None = None) -> Path:
    """A folder with config.json and model.safetensors, and masters beside them where given."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "qwen3", "tie_word_embeddings": true}')
    save_file(weights, folder / "model.safetensors")
    if masters is not None:
        (folder / "masters").mkdir()
        save_file(masters, folder / "masters" / "model.safetensors")
    return folder


def base_and_two_runs(folder: Path) -> tuple[Path, dict[str, Path]]:
    """A base and the runs `a` and `b`, written to a folder."""
    weights = base_weights()
    runs = {name: write_model(folder / name, stored(moved(weights, 1e-3, seed))) for name, seed in (("a", 5), ("b", 6))}
    return write_model(folder / "base", weights), runs


def tables_in(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a comparison but its report."""
    return {name: (folder / name).read_bytes() for name in COMPARISON_FILES}


def write_shards(folder: Path, weights: dict[str, Tensor]) -> Path:
    """The same model in two shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "qwen3", "tie_word_embeddings": true}')
    names = sorted(weights)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
