"""Architectures: which tensors write and read each axis of a model, and how its norms work.

There is one entry per model type; the rest follows from tensor names and the sizes in the configuration.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from offprincipal.checkpoints import place_of
from offprincipal.errors import InterventionError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
LAST_NORM = "model.norm.weight"


@dataclass(frozen=True)
class _Kind:
    """The norms of a model type.

    Args:
        gain_offset: gain minus stored weight of a norm; 1 for Gemma, which stores the gain minus one.
        norms_after_blocks: whether the output of a block is normalised before it is added to the residual stream.
    """

    gain_offset: float = 0.0
    norms_after_blocks: bool = False


_KINDS = {
    "llama": _Kind(),
    "mistral": _Kind(),
    "qwen2": _Kind(),
    "qwen3": _Kind(),
    "gemma": _Kind(gain_offset=1.0),
    "gemma2": _Kind(gain_offset=1.0, norms_after_blocks=True),
    "gemma3_text": _Kind(gain_offset=1.0, norms_after_blocks=True),
}
# In models without norms after blocks, each of these norms feeds only these projections.
_READERS = {"input_layernorm": ("q", "k", "v"), "post_attention_layernorm": ("gate", "up")}


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model, and the names of its tensors by layer and role.

    Args:
        kind: `model_type` of `config.json`.
        layers, heads, kv_heads: their numbers.
        head_size: entries of a head.
        hidden: entries of the residual stream.
        neurons: of an MLP.
        names: of all tensors.
    """

    kind: str
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    neurons: int
    names: frozenset[str]

    @property
    def gain_offset(self) -> float:
        """Gain minus stored weight of a norm."""
        return _KINDS[self.kind].gain_offset

    def rows(self, layer: int, role: str) -> list[str]:
        """The tensors whose first axis is the output of a projection: its weight and, if there is one, its bias."""
        weight = self._weight(layer, role)
        bias = weight.removesuffix(".weight") + ".bias"
        return [weight, bias] if bias in self.names else [weight]

    def columns(self, layer: int, role: str) -> list[str]:
        """The tensors whose second axis is the input of a projection."""
        return [self._weight(layer, role)]

    def readers(self) -> dict[str, list[str]]:
        """The norms that read the residual stream: name -> names of the tensors that read its output.

        Raises:
            InterventionError: outputs of blocks are normalised too, so the residual stream cannot be rotated.
        """
        if _KINDS[self.kind].norms_after_blocks:
            raise InterventionError(
                f"the residual stream of {self.kind} cannot be rotated: its norms after attention and MLP multiply "
                "each coordinate by its own gain before it is added to the stream, and these gains cannot be folded "
                "into a matrix. --rotate and --permute preserve its function"
            )
        readers = {
            f"model.layers.{layer}.{norm}.weight": [name for role in roles for name in self.columns(layer, role)]
            for layer in range(self.layers)
            for norm, roles in _READERS.items()
        }
        return {**readers, LAST_NORM: [HEAD]}

    def writers(self) -> list[str]:
        """The tensors whose first axis is added to the residual stream, except the embedding."""
        return [name for layer in range(self.layers) for role in ("o", "down") for name in self.rows(layer, role)]

    def _weight(self, layer: int, role: str) -> str:
        block = "mlp" if role in ("gate", "up", "down") else "self_attn"
        return f"model.layers.{layer}.{block}.{role}_proj.weight"


def require_kind(config: Mapping[str, Any], source: str) -> str:
    """The model type of a configuration, after a check that interventions support it.

    Args:
        config: content of `config.json`.
        source: for messages.

    Raises:
        InterventionError: the model type is not supported, or the weights are quantised.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InterventionError(
            f"{source} has architecture {kind!r}, which interventions do not support: give a model of type "
            f"{', '.join(_KINDS)}"
        )
    if config.get("quantization_config"):
        raise InterventionError(f"{source} is stored quantised: dequantise it to bfloat16 first")
    return kind


def architecture_of(kind: str, config: Any, names: Iterable[str], source: str) -> Architecture:
    """The architecture of an opened model.

    Args:
        kind: a known model type.
        config: the transformers configuration.
        names: of the model's tensors.
        source: for messages.

    Raises:
        InterventionError: tensors of the model type are missing, or there are others.
    """
    heads = int(config.num_attention_heads)
    architecture = Architecture(
        kind=kind,
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_size=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        hidden=int(config.hidden_size),
        neurons=int(config.intermediate_size),
        names=frozenset(names),
    )
    roles = ("q", "k", "v", "o", "gate", "up", "down")
    known = {name for layer in range(architecture.layers) for role in roles for name in architecture.rows(layer, role)}
    unknown = sorted(
        name for name in architecture.names - known - {EMBEDDING, HEAD, LAST_NORM} if place_of(name).role != "norm"
    )
    lacking = sorted((known | {EMBEDDING, LAST_NORM}) - architecture.names)
    if unknown or lacking:
        raise InterventionError(
            f"{source} is not a {kind} model that interventions support: it {'has' if unknown else 'lacks'} "
            f"{(unknown or lacking)[0]}"
        )
    return architecture
