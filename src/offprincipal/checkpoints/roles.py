"""What a tensor is for, from its name: role, layer, expert. Knows nothing of its values."""

import re
from dataclasses import dataclass

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.([0-9]{1,9})\.")
_EXPERT = re.compile(r"\.experts\.([0-9]{1,9})\.")
_ROLES = (
    ("q", r"\bq_proj\.weight$"),
    ("k", r"\bk_proj\.weight$"),
    ("v", r"\bv_proj\.weight$"),
    ("o", r"\bo_proj\.weight$"),
    ("gate", r"\bgate_proj\.weight$"),
    ("up", r"\bup_proj\.weight$"),
    ("down", r"\bdown_proj\.weight$"),
    ("bias", r"\.bias$"),
    ("norm", r"(?:norm|layernorm)\w*\.weight$"),
    ("router", r"(?:mlp|block_sparse_moe|router)\.gate\.weight$|\brouter\.weight$"),
    ("embedding", r"\b(?:embed_tokens|embed_in|embed_positions|wte|wpe|\w*embeddings?)\.weight$"),
    ("head", r"\b(?:lm_head|embed_out|score)\.weight$|(?:^|model\.)output\.weight$"),
)
LINEAR_ROLES = ("q", "k", "v", "o", "gate", "up", "down")
TABLE_ROLES = ("embedding", "head", "router")


@dataclass(frozen=True)
class Place:
    """Role, layer and expert of one tensor; layer and expert are None where it has none."""

    role: str
    layer: int | None = None
    expert: int | None = None


def place_of(name: str) -> Place:
    """What a tensor is for.

    >>> place_of("model.layers.3.self_attn.q_proj.weight")
    Place(role='q', layer=3, expert=None)
    >>> place_of("something.else").role
    'other'
    """
    role = next((role for role, pattern in _ROLES if re.search(pattern, name)), "other")
    layer, expert = _LAYER.search(name), _EXPERT.search(name)
    return Place(role, int(layer[1]) if layer else None, int(expert[1]) if expert else None)
