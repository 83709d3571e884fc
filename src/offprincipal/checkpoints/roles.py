"""What a tensor is for, from its name: role, layer, expert. Knows nothing of its values."""

import re
from dataclasses import dataclass

# What torch and PEFT put into names around a module that they wrap.
WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.([0-9]{1,9})\.")
_EXPERT = re.compile(r"\.experts\.([0-9]{1,9})\.")
_FEED_FORWARD = r"\b(?:feed_forward|mlp|shared_experts?|experts(?:\.[0-9]+)?)\."
_T5 = r"\b(?:SelfAttention|EncDecAttention)\."
_ROLES = (
    # Scales of quantised weights and the state matrix of Mamba are numbers of their own, no weights of a linear layer.
    (
        "scale",
        r"[._](?:weight_scale(?:_inv|_2)?|input_scale|[kv]_scale|scales|qzeros|g_idx|absmax|nested_absmax|quant_map"
        r"|nested_quant_map|SCB|weight_format)$|_proj_scales$",
    ),
    ("ssm", r"\b(?:A_log|D)$"),
    ("embedding", r"\brelative_attention_bias\.weight$|(?:^|\.)shared\.weight$"),
    ("q", r"\b(?:q_proj|q_attn|wq|c_q|query)\.weight$|" + _T5 + r"q\.weight$"),
    ("k", r"\b(?:k_proj|wk|c_k|key)\.weight$|" + _T5 + r"k\.weight$"),
    ("v", r"\b(?:v_proj|wv|c_v|value)\.weight$|" + _T5 + r"v\.weight$"),
    ("down", r"\bDenseReluDense\.wo\.weight$|(?<!attention\.)\boutput\.dense\.weight$"),
    (
        "o",
        r"\b(?:o_proj|wo)\.weight$|(?:attn|attention)\.(?:dense|out_proj|c_proj|output\.dense)\.weight$|"
        + _T5
        + r"o\.weight$",
    ),
    (
        "gate",
        r"\bDenseReluDense\.wi_0\.weight$|\bgate_proj\.weight$|\bexperts\.(?:gate_proj|w1)$|"
        + _FEED_FORWARD
        + r"w1\.weight$",
    ),
    (
        "up",
        r"\b(?:up_proj|fc1|c_fc|dense_h_to_4h|intermediate\.dense|DenseReluDense\.wi(?:_1)?)\.weight$|\bexperts\.(?:up_proj|w3)$|"
        + _FEED_FORWARD
        + r"w3\.weight$",
    ),
    (
        "down",
        r"\b(?:down_proj|fc2|mlp\.c_proj|dense_4h_to_h)\.weight$|\bexperts\.(?:down_proj|w2)$|"
        + _FEED_FORWARD
        + r"w2\.weight$",
    ),
    ("bias", r"[._]bias$"),
    ("norm", r"(?:norm|layernorm|LayerNorm)\w*\.weight$|\bln_\w+\.weight$"),
    (
        "router",
        r"\b(?:mlp|block_sparse_moe|router|moe|feed_forward)\.gate\.weight$|"
        r"\b(?:router|router\.layer|shared_expert_gate)\.weight$",
    ),
    ("embedding", r"\b(?:embed_tokens|embed_in|embed_positions|wte|wpe|\w*embeddings?)\.weight$"),
    ("head", r"\b(?:lm_head|embed_out|score|predictions\.decoder)\.weight$|(?:^|model\.)output\.weight$"),
)
LINEAR_ROLES = ("q", "k", "v", "o", "gate", "up", "down")
TABLE_ROLES = ("embedding", "head", "router")
VECTOR_ROLES = ("bias", "norm", "scale", "ssm")


@dataclass(frozen=True)
class Place:
    """Role, layer and expert of one tensor; layer and expert are None if it has none."""

    role: str
    layer: int | None = None
    expert: int | None = None


def place_of(name: str) -> Place:
    """What a tensor is for.

    >>> place_of("model.layers.3.self_attn.q_proj.weight")
    Place(role='q', layer=3, expert=None)
    >>> place_of("model.layers.1.block_sparse_moe.experts.7.w2.weight")
    Place(role='down', layer=1, expert=7)
    >>> place_of("something.else").role
    'other'
    """
    role = next((role for role, pattern in _ROLES if re.search(pattern, name)), "other")
    layer, expert = _LAYER.search(name), _EXPERT.search(name)
    return Place(role, int(layer[1]) if layer else None, int(expert[1]) if expert else None)
