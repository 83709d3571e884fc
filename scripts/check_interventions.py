"""Do interventions leave the function as it is? Float64 equality for every architecture, and what rounding costs.

    python scripts/check_interventions.py [--model embedded]

Prints two tables in Markdown. The first: the largest relative difference of float64 logits, before and after each
intervention on all layers, for tiny random models of every architecture, whose biases and norms' gains are random too.
The second: the same for one model, and the KL per token that storing it costs in its own type.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from offprincipal import intervene
from offprincipal.assets import embedded_base
from offprincipal.errors import InterventionError
from offprincipal.models import open_tokenizer
from offprincipal.models.quiet import quiet_libraries

SIZES = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# Architecture -> the class of its configuration, and what differs from the sizes above.
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, all biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 1}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 8, "sliding_window": 16}),
}
INTERVENTIONS: Mapping[str, Mapping[str, Any]] = {
    "rotate (Haar)": {"rotate": "all"},
    "rotate (Hadamard)": {"rotate": "all", "matrix": "hadamard"},
    "permute": {"permute": "all"},
    "rotate residual (Haar)": {"residual": True},
    "rotate residual (Hadamard)": {"residual": True, "matrix": "hadamard"},
    "all three (Haar)": {"rotate": "all", "permute": "all", "residual": True},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", default="embedded")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print_architectures(Path(folder))
        print()
        print_model(given.model, Path(folder))


def print_architectures(folder: Path) -> None:
    """The table of float64 equality."""
    models = {name: write_model(folder / name, name) for name in MODELS}
    print("|".join(("", "float64 logits", *INTERVENTIONS, "")))
    print("|".join(("", "---", *("---" for _ in INTERVENTIONS), "")))
    for name, model in models.items():
        cells = [difference(model, folder / "out", asked) for asked in INTERVENTIONS.values()]
        print("|".join(("", name, *cells, "")), flush=True)


def difference(model: Path, out: Path, asked: Mapping[str, Any]) -> str:
    try:
        return f"{intervene(model, out, **asked, overwrite=True).proof['logits_relative_difference']:.1e}"
    except InterventionError:
        return "refused"


def print_model(model: str, folder: Path) -> None:
    """The table of what rounding costs."""
    print(f"|{model}|float64 logits|KL of storing|KL of computing in that type|\n|---|---|---|---|")
    for name, asked in INTERVENTIONS.items():
        record = intervene(model, folder / "out", **asked, overwrite=True)
        figures = [record.proof[key] for key in ("logits_relative_difference", "kl_stored", "kl_computed")]
        print("|".join(("", name, *(f"{figure:.1e}" for figure in figures), "")), flush=True)


def write_model(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny random model of an architecture: a Hugging Face folder with the embedded base's tokenizer.

    Biases are no zeros and gains no ones, so that a mistake in either shows.
    """
    import transformers

    torch.manual_seed(sum(map(ord, name)))
    kind, own = MODELS[name]
    config = getattr(transformers, kind)(**{**SIZES, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        else:
            offset = 0.0 if name.startswith("gemma") else 1.0
            torch.nn.init.uniform_(parameter, offset - 0.5, offset + 0.5)
    with quiet_libraries():
        model.to(dtype).save_pretrained(folder)
        open_tokenizer(embedded_base()).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
