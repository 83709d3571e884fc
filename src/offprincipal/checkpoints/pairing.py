"""Which tensors of two checkpoints are compared: those with the same name, with rules for vocabularies and tied heads.

And which parameter of an open model is which stored tensor.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from offprincipal.checkpoints.checkpoint import Checkpoint, TensorInfo, equal_tensors
from offprincipal.checkpoints.roles import place_of
from offprincipal.errors import CheckpointError

_NAMED = 5
# What older libraries stored beside the weights and computed from the configuration: frequencies and causal masks.
_BUFFER = re.compile(r"(?:^|\.)(?:inv_freq|freqs_cis|masked_bias|position_ids|attn\.bias|attention\.bias)$")
# How packed weights are called, and by whom.
_PACKINGS = {
    r"_proj_(?:blocks|scales)$": "mxfp4",
    r"\.(?:qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"\.weight_packed$": "compressed-tensors",
    r"\.weight\.(?:absmax|nested_absmax|quant_map|quant_state\.\w+)$": "bitsandbytes, 4 bits",
    r"\.(?:SCB|weight_format)$": "bitsandbytes, 8 bits",
}
_PACKED = re.compile("|".join(_PACKINGS))


@dataclass(frozen=True)
class Pairing:
    """What two checkpoints have in common.

    Args:
        tensors: the base's tensors that are compared; where a vocabulary has grown, with the rows that both have.
        notes: warnings for the user, e.g. about renamed or skipped tensors.
        tied: heads that one of the two does not store -> its embedding, which is read instead.
        only_in_base, only_in_tuned: names of tensors that exist on only one side, and are not compared.
    """

    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    only_in_base: tuple[str, ...] = ()
    only_in_tuned: tuple[str, ...] = ()


def pair_tensors(base: Checkpoint, tuned: Checkpoint, strict: bool = False) -> Pairing:
    """The tensors that two checkpoints have in common, and those that exist on only one side.

    Args:
        base: the base.
        tuned: opened with the base, so that it has the base's names and layout if they could be matched.
        strict: whether a tensor that exists on only one side is an error.

    If vocabularies differ, the rows that both have are compared. If neither side stores a head, it is the embedding; if
    only one does, it is compared with the embedding to which the other ties it, unless it equals its own embedding bit
    for bit. The stored tensors decide, whatever the configuration says. Buffers that older libraries stored, such as
    frequencies of rotary embeddings and causal masks, are skipped.

    Raises:
        CheckpointError: shapes differ, less than half of their parameters are in common, or, if strict, a tensor exists
            on only one side; the message names the tensors.

    >>> from offprincipal.checkpoints import open_checkpoint
    >>> pairing = pair_tensors(open_checkpoint("embedded"), open_checkpoint("embedded"))
    >>> len(pairing.tensors), pairing.only_in_base
    (68, ())
    """
    copies, tied, notes = _tied_heads(base, tuned)
    ours, theirs = (
        {name: info for name, info in side.tensors.items() if name not in copies and not _BUFFER.search(name)}
        | {
            name: replace(side.tensors[embedding], name=name)
            for name, embedding in tied.items()
            if name not in side.tensors
        }
        for side in (base, tuned)
    )
    shared = {name: info for name, info in ours.items() if name in theirs}
    alone = _alone(ours, theirs)
    for names, has, lacks in ((alone[0], base, tuned), (alone[1], tuned, base)):
        if names and strict:
            raise CheckpointError(
                f"{lacks.source} lacks {_listed(names)}, which {has.source} has: compare a base with checkpoints that "
                "were trained from it, or omit --strict"
            )
    for names, side in ((alone[0], base), (alone[1], tuned)):
        _require_unpacked(side, names)
    _require_common(base, ours, tuned, theirs)
    _require_alike(base, shared, tuned, theirs)
    tensors = {name: _common(info, theirs[name]) for name, info in shared.items()}
    for name, info in shared.items():
        if info.shape != theirs[name].shape:
            notes.append(
                f"{name} has {info.shape[0]} rows in {base.source} and {theirs[name].shape[0]} in {tuned.source}: "
                f"the first {tensors[name].shape[0]} are compared"
            )
    for names, infos, side, other in ((alone[0], ours, base, tuned), (alone[1], theirs, tuned, base)):
        if names:
            share = _share(names, infos)
            notes.append(
                f"{side.source} alone has {_listed(names)}: {share} of its parameters are not in {other.source}"
            )
    return Pairing(tensors, tuple(notes), tied, *map(tuple, alone))


def parameter_of(name: str, parameters: Mapping[str, Any], prefix: str) -> str | None:
    """The model's name for a stored tensor, which may have or lack the prefix of the decoder; None if there is none.

    >>> parameter_of("h.0.ln_1.weight", {"transformer.h.0.ln_1.weight": ...}, "transformer")
    'transformer.h.0.ln_1.weight'
    """
    spellings = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((spelling for spelling in spellings if spelling in parameters), None)


def _tied_heads(base: Checkpoint, tuned: Checkpoint) -> tuple[set[str], dict[str, str], list[str]]:
    """Of heads that one alone stores: those that are left out, the embedding of the other for the rest, and notes."""
    copies, tied, notes = set(), {}, []
    for name, info in {**tuned.tensors, **base.tensors}.items():
        if place_of(name).role != "head" or name.endswith("score.weight"):
            continue
        owner, other = (base, tuned) if name in base.tensors else (tuned, base)
        embedding = _embedding(other, info)
        if name in other.tensors or embedding is None:
            continue
        own = _embedding(owner, info)
        if own is not None and equal_tensors(owner.tensors, owner.read, name, own):
            copies.add(name)
            notes.append(f"{name} in {owner.source} equals {own}, to which {other.source} ties it: it is counted once")
        else:
            tied[name] = embedding
            notes.append(
                f"{name} in {owner.source} is a head of its own; {other.source} ties it to {embedding}, with which it "
                "is compared"
            )
    return copies, tied, notes


def _embedding(checkpoint: Checkpoint, head: TensorInfo) -> str | None:
    """The embedding to which a head of that width can be tied."""
    found = (
        name
        for name, info in checkpoint.tensors.items()
        if place_of(name).role == "embedding" and info.shape[1:] == head.shape[1:] and "position" not in name
    )
    return next((name for name in found if not name.endswith("wpe.weight")), None)


def _require_unpacked(checkpoint: Checkpoint, alone: Sequence[str]) -> None:
    """Raises CheckpointError if a side alone has packed weights: the other has the same ones unpacked."""
    packed = [name for name in alone if _PACKED.search(name)]
    if not packed:
        return
    settings = checkpoint.config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    how = method if isinstance(method, str) else next(m for p, m in _PACKINGS.items() if re.search(p, packed[0]))
    raise CheckpointError(
        f"{checkpoint.source} is quantised ({how[:40]}): its packed weights, such as {packed[0]}, are not read, and "
        "the other side has none. Give it dequantised, or compare two that are quantised alike"
    )


def _require_common(
    base: Checkpoint, ours: Mapping[str, TensorInfo], tuned: Checkpoint, theirs: Mapping[str, TensorInfo]
) -> None:
    """Raises CheckpointError if less than half of all parameters are in both: they do not belong together."""
    common = sum(info.numel for name, info in ours.items() if name in theirs)
    whole = sum(info.numel for side in (ours, theirs) for info in side.values()) - common
    if 2 * common >= whole:
        return
    alone = _alone(ours, theirs)
    raise CheckpointError(
        f"{base.source} and {tuned.source} do not match: only {common / whole:.0%} of their parameters are in both. "
        f"Only the base has {_listed(alone[0])}; only the other has {_listed(alone[1])}. Compare a base with "
        "checkpoints that were trained from it"
    )


def _require_alike(
    base: Checkpoint, ours: Mapping[str, TensorInfo], tuned: Checkpoint, theirs: Mapping[str, TensorInfo]
) -> None:
    """Raises CheckpointError if tensors of one name cannot be compared."""
    recast = [name for name, info in ours.items() if info.floating != theirs[name].floating]
    if recast:
        raise CheckpointError(
            f"{tuned.source} stores {_listed(recast)} as {theirs[recast[0]].dtype}, {base.source} as "
            f"{ours[recast[0]].dtype}: dequantise it first"
        )
    differing = [
        f"{name} ({_shape(info)} in the base, {_shape(theirs[name])} here)"
        for name, info in ours.items()
        if info.shape != theirs[name].shape and not _differ_in_vocabulary(info, theirs[name])
    ]
    if differing:
        raise CheckpointError(
            f"{tuned.source} has other shapes than {base.source}: {_listed(differing)}. Compare models of the same "
            "architecture"
        )


def _common(ours: TensorInfo, theirs: TensorInfo) -> TensorInfo:
    """A tensor of the base, with the rows that both have."""
    if not _differ_in_vocabulary(ours, theirs):
        return ours
    return replace(ours, shape=(min(ours.shape[0], theirs.shape[0]), *ours.shape[1:]))


def _differ_in_vocabulary(ours: TensorInfo, theirs: TensorInfo) -> bool:
    """Whether two shapes differ in nothing but the number of tokens."""
    if ours.shape == theirs.shape or not ours.shape or not theirs.shape or ours.shape[1:] != theirs.shape[1:]:
        return False
    return place_of(ours.name).role in ("embedding", "head") or ours.name.endswith(("lm_head.bias", "embed_out.bias"))


def _alone(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[list[str]]:
    """The names that one side has and the other has not."""
    return [[name for name in side if name not in other] for side, other in ((ours, theirs), (theirs, ours))]


def _share(names: Sequence[str], infos: Mapping[str, TensorInfo]) -> str:
    return f"{sum(infos[name].numel for name in names) / max(sum(info.numel for info in infos.values()), 1):.2%}"


def _shape(info: TensorInfo) -> str:
    return " × ".join(map(str, info.shape)) or "a scalar"


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    noun = "tensor" if len(names) == 1 else f"{len(names)} tensors:"
    return f"{noun} {', '.join(names[:_NAMED])}{more}"
