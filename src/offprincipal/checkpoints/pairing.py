"""Which tensors of two checkpoints are compared: the same names and shapes, but for vocabularies and tied heads.

And which parameter of an open model is which stored tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offprincipal.checkpoints.checkpoint import Checkpoint, TensorInfo
from offprincipal.checkpoints.roles import place_of
from offprincipal.errors import CheckpointError

_NAMED = 5
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Pairing:
    """What two checkpoints have in common.

    Args:
        tensors: the base's tensors that are compared; where a vocabulary has grown, with the rows that both have.
        notes: what a reader of the results should know of it.
    """

    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...] = ()


def pair_tensors(base: Checkpoint, tuned: Checkpoint) -> Pairing:
    """The tensors that two checkpoints have in common.

    The rows of a grown or shrunk vocabulary are compared as far as both have them. A head that is tied to the embedding
    in either, or that one does not store, is left out of both: the embedding stands for it.

    Raises:
        CheckpointError: one has a tensor that the other has not, or shapes differ; the message names them.
    """
    heads, notes = _tied_heads(base, tuned)
    ours = {name: info for name, info in base.tensors.items() if name not in heads}
    theirs = {name: info for name, info in tuned.tensors.items() if name not in heads}
    _require_same_names(base, ours, tuned, theirs)
    tensors = {name: _common(info, theirs[name]) for name, info in ours.items()}
    for name, info in ours.items():
        if info.shape != theirs[name].shape:
            notes.append(
                f"{name} has {info.shape[0]} rows in {base.source} and {theirs[name].shape[0]} in {tuned.source}: "
                f"the first {tensors[name].shape[0]} are compared"
            )
    return Pairing(tensors, tuple(notes))


def parameter_of(name: str, parameters: Mapping[str, Any], prefix: str) -> str | None:
    """The model's name for a stored tensor, which may have or lack the prefix of the decoder; None where there is none.

    >>> parameter_of("h.0.ln_1.weight", {"transformer.h.0.ln_1.weight": ...}, "transformer")
    'transformer.h.0.ln_1.weight'
    """
    spellings = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((spelling for spelling in spellings if spelling in parameters), None)


def _tied_heads(base: Checkpoint, tuned: Checkpoint) -> tuple[set[str], list[str]]:
    """The heads that are left out, and what is to be said of them."""
    heads, notes = set(), []
    for name, info in {**tuned.tensors, **base.tensors}.items():
        if place_of(name).role != "head" or name.endswith("score.weight"):
            continue
        lacking = [checkpoint for checkpoint in (base, tuned) if name not in checkpoint.tensors]
        if any(_embedding(checkpoint, info) is None for checkpoint in lacking):
            continue
        if lacking or _ties(base) or _ties(tuned):
            heads.add(name)
            for owner, other in ((base, tuned), (tuned, base)):
                if name in owner.tensors and not _ties(owner):
                    notes.append(_of_own_head(owner, other, name))
    return heads, notes


def _of_own_head(owner: Checkpoint, other: Checkpoint, name: str) -> str:
    """What is to be said where one checkpoint stores a head and the other ties it."""
    embedding = _embedding(owner, owner.tensors[name])
    if embedding is not None and _equal(owner, name, embedding):
        return f"{name} in {owner.source} equals {embedding}, to which {other.source} ties it: it is counted once"
    return (
        f"{name} in {owner.source} is untied and differs from its embedding, to which {other.source} ties it: "
        "this head is not compared"
    )


def _ties(checkpoint: Checkpoint) -> bool:
    """Whether the configuration says that the head is the embedding."""
    nested = checkpoint.config.get("text_config")
    settings = (checkpoint.config, nested if isinstance(nested, dict) else {})
    return any(setting.get("tie_word_embeddings") is True for setting in settings)


def _embedding(checkpoint: Checkpoint, head: TensorInfo) -> str | None:
    """The embedding to which a head of that width can be tied."""
    found = (
        name
        for name, info in checkpoint.tensors.items()
        if place_of(name).role == "embedding" and info.shape[1:] == head.shape[1:] and "position" not in name
    )
    return next((name for name in found if not name.endswith("wpe.weight")), None)


def _equal(checkpoint: Checkpoint, one: str, two: str) -> bool:
    """Whether two tensors of a checkpoint hold the same bits."""
    info = checkpoint.tensors[one]
    if not info.floating or (info.shape, info.dtype) != (checkpoint.tensors[two].shape, checkpoint.tensors[two].dtype):
        return False
    ranges = ((start, min(start + _CHUNK, info.numel)) for start in range(0, info.numel, _CHUNK))
    return all(
        np.array_equal(checkpoint.read(one, *span).view(np.uint8), checkpoint.read(two, *span).view(np.uint8))
        for span in ranges
    )


def _require_same_names(
    base: Checkpoint, ours: Mapping[str, TensorInfo], tuned: Checkpoint, theirs: Mapping[str, TensorInfo]
) -> None:
    missing = [name for name in ours if name not in theirs]
    extra = [name for name in theirs if name not in ours]
    for names, has, lacks in ((missing, base, tuned), (extra, tuned, base)):
        if names:
            raise CheckpointError(
                f"{lacks.source} lacks {_listed(names)}, which {has.source} has: "
                "compare a base with checkpoints that were trained from it"
            )
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
            f"{tuned.source} has other shapes than {base.source}: {_listed(differing)}. Compare one architecture"
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


def _shape(info: TensorInfo) -> str:
    return " × ".join(map(str, info.shape)) or "a scalar"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    noun = "tensor" if len(names) == 1 else f"{len(names)} tensors:"
    return f"{noun} {', '.join(names[:_NAMED])}{more}"
