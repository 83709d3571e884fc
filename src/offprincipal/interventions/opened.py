"""Open a model for an intervention, after checks that its architecture is known and its weights are complete."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from offprincipal.assets import EMBEDDED
from offprincipal.checkpoints import Checkpoint, open_checkpoint, place_of
from offprincipal.errors import InterventionError
from offprincipal.interventions.architectures import HEAD, Architecture, architecture_of, require_kind
from offprincipal.interventions.plan import Weights
from offprincipal.interventions.proof import LENGTH, non_finite
from offprincipal.models import LanguageModel, identify, model_name, open_language_model

_BUFFER = "rotary_emb.inv_freq"  # stored by old versions of transformers, computed by new ones
_PREFIX = "model."  # missing if a model was saved without its head


@dataclass(frozen=True)
class OpenedModel:
    """A model opened for an intervention.

    Args:
        source: the name that the user gave; folders as absolute paths.
        folder: of its files; None if it is not a folder.
        language_model: in float32.
        weights: name -> tensor, float32; without the head if it is tied to the embedding.
        architecture: sizes and names.
        dtype: the dtype in which most of its weights are stored.
        identity: source and hash of its weights, as in the records of training runs.
    """

    source: str
    folder: Path | None
    language_model: LanguageModel
    weights: Weights
    architecture: Architecture
    dtype: str
    identity: dict[str, str]

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary."""
        return int(self.language_model.model.get_input_embeddings().weight.shape[0])

    @property
    def length(self) -> int:
        """Tokens of a sequence on which the model is checked."""
        return min(LENGTH, self.language_model.context or LENGTH)


def open_model(source: str | Path) -> OpenedModel:
    """Open a model.

    Args:
        source: a folder, a Hub id, or `embedded`.

    Raises:
        InterventionError: its architecture is not supported, it lacks tensors or has others, weights are stored in
            float64, or one is NaN or infinite.
        ModelError, CheckpointError: it cannot be opened, or is an adapter.
    """
    name = model_name(source)
    checkpoint = open_checkpoint(name)
    kind = require_kind(checkpoint.config, str(source))
    language_model = open_language_model(name, "cpu", tokenizer=False)
    state = language_model.model.state_dict()
    if language_model.model.config.tie_word_embeddings:
        state.pop(HEAD, None)
    _require_all_stored(checkpoint, set(state))
    if bad := next(non_finite(state), None):
        raise InterventionError(f"{bad} in {source} contains NaN or infinity: give an undamaged model")
    folder = Path(name) if Path(name).is_dir() else None
    named = str(folder.resolve()) if folder is not None and str(source) != EMBEDDED else str(source)
    return OpenedModel(
        source=named,
        folder=folder,
        language_model=language_model,
        weights=state,
        architecture=architecture_of(kind, language_model.model.config, state.keys() | {HEAD}, str(source)),
        dtype=_stored_dtype(checkpoint),
        identity=identify(named, language_model.model),
    )


def require_own_layers(opened: OpenedModel, layers: set[int]) -> None:
    """Check that layers do not share a weight matrix with another layer.

    Args:
        layers: that are to be changed.

    Raises:
        InterventionError: two matrices are identical; the message names both.
    """
    holders = defaultdict(list)
    for name, tensor in opened.weights.items():
        if tensor.dim() == 2 and place_of(name).layer is not None and bool((tensor != tensor.flatten()[0]).any()):
            holders[hashlib.blake2b(tensor.numpy().data, digest_size=16).digest()].append(name)
    for names in holders.values():
        if len(names) > 1 and any(place_of(name).layer in layers for name in names):
            raise InterventionError(
                f"{names[0]} and {names[1]} in {opened.source} are identical: a model that shares weights across "
                "layers cannot be changed in one of them. Train the layers separately first"
            )


def _require_all_stored(checkpoint: Checkpoint, names: set[str]) -> None:
    """Refuse a checkpoint that lacks tensors, which transformers would initialise, has others, or is in float64."""
    stored = {name if name in names else _PREFIX + name for name in checkpoint.tensors if not name.endswith(_BUFFER)}
    lacking = sorted(names - stored)
    if lacking:
        raise InterventionError(
            f"{checkpoint.source} does not store {lacking[0]}{_more(lacking)}: it shares weights across layers or is "
            "incomplete, and cannot be changed layer by layer"
        )
    foreign = sorted(stored - names - {HEAD})
    if foreign:
        raise InterventionError(
            f"{checkpoint.source} stores {foreign[0]}{_more(foreign)}, which is not part of the model as transformers "
            "opens it: convert it first"
        )
    double = next((info.name for info in checkpoint.tensors.values() if info.dtype == "float64"), None)
    if double is not None:
        raise InterventionError(
            f"{double} in {checkpoint.source} is stored in float64, and models are opened in float32: convert it first"
        )


def _stored_dtype(checkpoint: Checkpoint) -> str:
    counts: dict[str, int] = defaultdict(int)
    for info in checkpoint.tensors.values():
        counts[info.dtype] += info.numel
    return max(counts, key=lambda dtype: counts[dtype])


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
