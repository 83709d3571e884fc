"""Give a checkpoint another's names and layout, so that tensors are matched by their function.

Trainers add prefixes to names, libraries rename modules between versions, and tensors that are separate in one file are
fused or stacked in another. `aligned` gives a checkpoint the names and the layout of a base, as far as the two tables
of names below cover them; other tensors keep their names. Names that agree already are never changed.
"""

import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offprincipal.checkpoints.checkpoint import Array, Checkpoint, TensorInfo
from offprincipal.checkpoints.parts import Part, parts_of
from offprincipal.checkpoints.roles import WRAPPERS, place_of
from offprincipal.errors import CheckpointError

# What stands in front of a decoder's names: trainers' wrappers, and the modules that models keep their decoder in.
_CONTAINERS = re.compile(
    r"^(?:_orig_mod|_forward_module|module|model|transformer|language_model|text_model|base_model|pretrained_model"
    r"|actor|policy|app|state|state_dict|llm|bert|roberta|gpt_neox)\."
)
# What the same thing is called elsewhere, in turn: wrappers inside of names, fused and stacked parts, Meta's names, and
# those of other libraries and versions.
_SYNONYMS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (WRAPPERS, ""),
        (r"\boriginal_module\.", ""),
        (r"\bmodules_to_save\.default\.", ""),
        (r"\b(?:qkv_proj|query_key_value|c_attn|linear_qkv)\.(weight|bias):([qkv])$", r"\2_proj.\1"),
        (r"\bgate_up_proj\.weight:(gate|up)$", r"\1_proj.weight"),
        (r"\bexperts\.gate_up_proj\[([0-9]+)\]:(gate|up)$", r"experts.\1.\2_proj.weight"),
        (r"\bblock_sparse_moe\.input_linear\.weight\[([0-9]+)\]:(gate|up)$", r"mlp.experts.\1.\2_proj.weight"),
        (r"\bblock_sparse_moe\.output_linear\.weight\[([0-9]+)\]$", r"mlp.experts.\1.down_proj.weight"),
        (r"\bexperts\.(\w+)\[([0-9]+)\]$", r"experts.\2.\1.weight"),
        (r"\b(?:block_sparse_moe|feed_forward|moe)\.", "mlp."),
        (r"\bmlp\.router\.gate\.", "mlp.gate."),
        (r"\bw1\.weight$", "gate_proj.weight"),
        (r"\bw2\.weight$", "down_proj.weight"),
        (r"\bw3\.weight$", "up_proj.weight"),
        (r"\battention\.w([qkvo])\.", r"self_attn.\1_proj."),
        (r"\battention\.([qk])_norm\.", r"self_attn.\1_norm."),
        (r"\battention_norm\.", "input_layernorm."),
        (r"\bffn_norm\.", "post_attention_layernorm."),
        (r"^tok_embeddings\.", "embed_tokens."),
        (r"^(?:output|embed_out)\.", "lm_head."),
        (r"\bLayerNorm\.gamma$", "LayerNorm.weight"),
        (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
    )
)
_META = re.compile(r"\battention\.w([qk])\.weight$")
# Models whose queries and keys Meta's files and torchtitan hold in another order of rows than Hugging Face.
_ROTATED_IN_PAIRS = frozenset({"llama", "mistral", "mixtral", "ministral"})


def aligned(tuned: Checkpoint, base: Checkpoint) -> Checkpoint:
    """A checkpoint under the names and in the layout of a base, or itself if there is nothing to do.

    Raises:
        CheckpointError: rows are in the order of Meta's rotary embedding, and the base's configuration does not say
            how many heads there are.
    """
    ours = {name: info for name, info in base.tensors.items() if name not in tuned.tensors}
    theirs = {name: info for name, info in tuned.tensors.items() if name not in base.tensors}
    if not ours or not theirs:
        return tuned
    wanted = [(info, parts_of(info, base.config)) for info in ours.values()]
    single = _by_key(part for _, parts in wanted for part in parts)
    found = _by_key(part for info in theirs.values() for part in parts_of(info, tuned.config or base.config))
    sources: dict[str, _Source] = {}
    for info, parts in wanted:
        pieces = [
            found.get(key) if single.get(key) is part else None
            for part, key in zip(parts, map(_key, parts), strict=True)
        ]
        if all(piece is not None for piece in pieces):
            source = _source(info, parts, [piece for piece in pieces if piece is not None], theirs, base.config)
            if source is not None:
                sources[info.name] = source
    sources |= _without_prefix(tuned, sources, base)
    return Aligned(tuned, sources) if sources else tuned


def key_of(name: str) -> str:
    """What a tensor or part is called once wrappers, layouts and libraries are looked through.

    >>> key_of("model.language_model.layers.0.mlp.experts.gate_up_proj[3]:up")
    'layers.0.mlp.experts.3.up_proj.weight'
    >>> key_of("model.layers.0.block_sparse_moe.experts.3.w3.weight")
    'layers.0.mlp.experts.3.up_proj.weight'
    """
    before = ""
    while name != before:
        before, name = name, _CONTAINERS.sub("", name)
    for pattern, replacement in _SYNONYMS:
        name = pattern.sub(replacement, name)
    return name


@dataclass(frozen=True)
class _Source:
    """Where a tensor under the base's name comes from.

    Args:
        info: as it is given; pieces: (where it goes, what is read), one where the tensor has another name alone.
        heads: of Meta's queries and keys, whose rows are put in Hugging Face's order; 0 elsewhere.
    """

    info: TensorInfo
    pieces: tuple[tuple[Part, Part], ...]
    heads: int = 0

    @property
    def renamed(self) -> str | None:
        """The stored tensor that this is, entry by entry."""
        ((_, stored), *more) = self.pieces
        whole = not more and not stored.transposed and stored.name == stored.tensor and not self.heads
        return stored.tensor if whole else None


class Aligned:
    """A `Checkpoint` under a base's names.

    Args:
        stored: as it is; sources: the base's name -> where that tensor comes from.
    """

    def __init__(self, stored: Checkpoint, sources: Mapping[str, _Source]) -> None:
        self.stored, self._sources = stored, sources
        self.tensors: Mapping[str, TensorInfo] = dict(sorted(_infos(stored, sources).items()))
        self._last = threading.local()  # each thread reads a tensor of its own

    @property
    def source(self) -> str:
        return self.stored.source

    @property
    def folders(self) -> Sequence[Path]:
        return self.stored.folders

    @property
    def files(self) -> Sequence[Path]:
        return self.stored.files

    @property
    def config(self) -> Mapping[str, Any]:
        return self.stored.config

    @property
    def notes(self) -> Sequence[str]:
        kinds = {
            "under another name": [(n, s.renamed) for n, s in self._sources.items() if s.renamed],
            "in another layout": [(n, s.pieces[0][1].name) for n, s in self._sources.items() if not s.renamed],
        }
        said = [
            f"{len(found)} tensors are stored {words}: {found[0][1]} for {found[0][0]}"
            for words, found in kinds.items()
            if found
        ]
        turned = sum(source.heads > 0 for source in self._sources.values())
        if turned:
            said.append(
                f"rows of {turned} tensors are put from the order of Meta's rotary embedding into Hugging Face's"
            )
        return [*self.stored.notes, *said]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        source = self._sources.get(name)
        if source is None or source.renamed:
            return self.stored.read(name if source is None else str(source.renamed), start, stop)
        if getattr(self._last, "name", None) != name:
            self._last.name, self._last.entries = name, self._put_together(source)
        entries: Array = self._last.entries[start:stop]
        return entries

    def masters(self) -> "Checkpoint | None":
        found = self.stored.masters()
        if found is None:
            return None
        missing = {part.tensor for source in self._sources.values() for _, part in source.pieces} - found.tensors.keys()
        if missing:
            raise CheckpointError(
                f"the masters of {self.source} lack {min(missing)}: save both again, or remove its masters folder"
            )
        types = {name: found.tensors[source.pieces[0][1].tensor].dtype for name, source in self._sources.items()}
        return Aligned(found, {name: _typed(source, types[name]) for name, source in self._sources.items()})

    def _put_together(self, source: _Source) -> Array:
        read = [stored.of(self.stored.read(stored.tensor, stored.start, stored.stop)) for _, stored in source.pieces]
        whole = np.empty(source.info.shape, read[0].dtype)
        for (place, _), values in zip(source.pieces, read, strict=True):
            place.put(whole, values)
        if source.heads:
            by_pairs = whole.reshape(source.heads, -1, 2, whole.shape[1])
            whole = np.ascontiguousarray(by_pairs.swapaxes(1, 2))
        return whole.reshape(-1)


def _infos(stored: Checkpoint, sources: Mapping[str, _Source]) -> dict[str, TensorInfo]:
    """The tensors under the base's names, and the rest under their own."""
    used = {part.tensor for source in sources.values() for _, part in source.pieces}
    rest = {name: info for name, info in stored.tensors.items() if name not in used}
    return rest | {name: source.info for name, source in sources.items()}


def _without_prefix(tuned: Checkpoint, sources: Mapping[str, _Source], base: Checkpoint) -> dict[str, _Source]:
    """What is left of a checkpoint without the prefix that stands in front of most of its other names."""
    renamed = [(name, source.renamed) for name, source in sources.items() if source.renamed]
    prefixes = Counter(str(stored).removesuffix(name) for name, stored in renamed if str(stored).endswith(name))
    prefix, count = prefixes.most_common(1)[0] if prefixes else ("", 0)
    found, taken = {}, base.tensors.keys() | tuned.tensors.keys()
    for name, info in _infos(tuned, sources).items() if 2 * count > len(renamed) else ():
        short = name.removeprefix(prefix)
        if name not in base.tensors and short not in ("", name) and short not in taken:
            part = Part(name, name, place_of(name), 0, info.shape)
            found[short] = _Source(TensorInfo(short, info.shape, info.dtype), ((part, part),))
    return found


def _typed(source: _Source, dtype: str) -> _Source:
    return _Source(TensorInfo(source.info.name, source.info.shape, dtype), source.pieces, source.heads)


def _source(
    info: TensorInfo,
    places: Sequence[Part],
    stored: Sequence[Part],
    theirs: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
) -> _Source | None:
    """Where a tensor of the base comes from; None if the parts that are called alike do not fit."""
    dtypes = {theirs[part.tensor].dtype for part in stored}
    if len(dtypes) != 1:
        return None
    named = TensorInfo(info.name, info.shape, dtypes.pop())
    heads = _heads(info.name, stored[0].tensor, info.shape, config)
    whole = len(stored) == 1 and stored[0].name == stored[0].tensor and not stored[0].transposed
    if whole and not places[0].transposed and not heads:  # of whatever shape: the pairing says where that differs
        return _Source(TensorInfo(info.name, theirs[stored[0].tensor].shape, named.dtype), ((places[0], stored[0]),))
    if any(place.matrix_shape != part.matrix_shape for place, part in zip(places, stored, strict=True)):
        return None
    return _Source(named, tuple(zip(places, stored, strict=True)), heads)


def _heads(name: str, stored: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> int:
    """Heads whose rows are to be put in Hugging Face's order; 0 if they are in it."""
    meta = _META.search(stored)
    if meta is None or _META.search(name) or config.get("model_type", "llama") not in _ROTATED_IN_PAIRS:
        return 0
    queries = config.get("num_attention_heads")
    count = queries if meta[1] == "q" else config.get("num_key_value_heads", queries)
    if type(count) is not int or count < 1 or len(shape) != 2 or shape[0] % (2 * count):
        raise CheckpointError(
            f"{stored} has Meta's name, and its rows cannot be put in Hugging Face's order: the base's config.json "
            "must give num_attention_heads and num_key_value_heads"
        )
    return count


def _by_key(parts: Iterable[Part]) -> dict[str, Part]:
    """Parts by what they are; those that are called alike are left out."""
    listed = [(_key(part), part) for part in parts]
    counts = Counter(key for key, _ in listed)
    return {key: part for key, part in listed if counts[key] == 1}


def _key(part: Part) -> str:
    return key_of(part.name)
