"""An update as a direction in the weight space of an open model: tuned weights less the base's, by parameter name.

The base is a transformers model; the tuned weights are read by name from any checkpoint that `compare` reads, and from
their float32 masters where those were kept. Knows nothing of prompts or of what is measured.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from offprincipal.checkpoints import Checkpoint, open_checkpoint, pair_tensors, parameter_of
from offprincipal.checkpoints.hostile import is_file
from offprincipal.checkpoints.masters import require_all_masters, require_own_masters
from offprincipal.errors import CheckpointError, ModelError
from offprincipal.models import LanguageModel, open_tokenizer
from offprincipal.models.quiet import quiet_libraries

Weights = Literal["auto", "masters", "stored"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_PROBE = "The quick brown fox jumps over 12 lazy dogs; 3+4=7.\n\tÉtude №5 – 你好"


@dataclass(frozen=True)
class Update:
    """What training did to the parameters of a model.

    Args:
        tensors: parameter name -> tuned − base, in the model's type and on its device; parameters that did not move are
            left out, a tied one is named once.
        weights: `masters` or `stored`: which of the tuned weights were read.
        notes: warnings about how they were read.
    """

    tensors: Mapping[str, Tensor]
    weights: str
    notes: tuple[str, ...] = ()

    @property
    def norm(self) -> float:
        """‖Δ‖_F over all parameters."""
        return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in self.tensors.values()))


class Tuned:
    """A checkpoint that was tuned from a base, checked against it before any weight is read.

    Args:
        language_model, base: the base, open both as a model and as a checkpoint.
        source: whatever `open_checkpoint` opens, an adapter on the base included.
        weights: what `update` reads: `auto` takes float32 masters where they were kept, and the stored weights
            elsewhere.

    Raises:
        CheckpointError: the tuned checkpoint cannot be read, or is of another architecture.
        ModelError: it has another vocabulary or tokenizer.
    """

    def __init__(self, language_model: LanguageModel, base: Checkpoint, source: str | Path, weights: Weights) -> None:
        self._model, self._base = language_model.model, base
        self._stored = open_checkpoint(source, base)
        _require_same_tokenizer(language_model, self._stored)
        self._masters = self._stored.masters() if weights != "stored" else None
        if weights == "masters" and self._masters is None:
            raise CheckpointError(f"{self._stored.source} has no float32 masters: choose --weights stored, or auto")
        self._pairing = pair_tensors(base, self._stored)
        if self._masters is not None:
            require_all_masters(self._stored, self._masters, self._pairing.tensors)
        self._require_whole()
        self._require_same_vocabulary()

    @property
    def has_masters(self) -> bool:
        """Whether the update is read from float32 masters, and differs from the policy's."""
        return self._masters is not None

    def policy(self) -> Update:
        """The update of the policy as it is stored: what anyone runs who opens the checkpoint.

        Raises:
            CheckpointError, ModelError: as for `update`.
        """
        return self._read(None)

    def update(self) -> Update:
        """The update before it was stored, if masters were kept; otherwise as it is stored.

        Raises:
            CheckpointError: a tensor cannot be read, holds NaN or infinity, or the masters are another checkpoint's.
            ModelError: a tensor that moved is not a parameter of the model.
        """
        return self._read(self._masters)

    def _read(self, masters: Checkpoint | None) -> Update:
        parameters = dict(self._model.named_parameters())
        tensors: dict[str, Tensor] = {}
        for stored, info in self._pairing.tensors.items():
            if stored in self._pairing.tied:
                raise ModelError(
                    f"{stored} is separate in {self._base.source} or {self._stored.source}, and tied to the embedding "
                    "in the other: no update of one model leads from one to the other. Give two models of one kind"
                )
            name = parameter_of(stored, parameters, self._model.base_model_prefix)
            if not info.floating or (name is None and self._is_unmoved(stored)):
                continue
            if name is None or parameters[name].shape != info.shape:
                raise ModelError(
                    f"{stored} of {self._stored.source} is not a parameter of {type(self._model).__name__}: "
                    "transformers loads it under another name or shape (as it does experts), which is not measured"
                )
            moved = self._values(stored, masters).reshape(info.shape).to(parameters[name]) - parameters[name].detach()
            if bool(moved.any()):
                tensors[name] = moved
        return Update(tensors, "stored" if masters is None else "masters", (*self._stored.notes, *self._pairing.notes))

    def _require_whole(self) -> None:
        """Raises CheckpointError if the tuned checkpoint lacks a parameter of the model."""
        parameters = dict(self._model.named_parameters())
        prefix = self._model.base_model_prefix
        lost = [name for name in self._pairing.only_in_base if parameter_of(name, parameters, prefix) is not None]
        if lost:
            raise CheckpointError(
                f"{self._stored.source} lacks {len(lost)} parameters of the model, such as {lost[0]}: give a "
                "checkpoint of the whole model"
            )

    def _require_same_vocabulary(self) -> None:
        for name in self._pairing.tensors:
            ours, theirs = self._base.tensors[name], self._stored.tensors[name]
            if ours.shape != theirs.shape:
                raise ModelError(
                    f"{name} has {ours.shape[0]} rows in {self._base.source} and {theirs.shape[0]} in "
                    f"{self._stored.source}: the vocabularies differ, so distributions are not over the same tokens. "
                    "Give a model that kept its base's vocabulary"
                )

    def _is_unmoved(self, name: str) -> bool:
        ours, theirs = (side.read(name).astype(np.float64) for side in (self._base, self._stored))
        return np.array_equal(ours, theirs)

    def _values(self, name: str, masters: Checkpoint | None) -> Tensor:
        values = self._stored.read(name)
        if masters is not None:
            stored, values = values, masters.read(name)
            require_own_masters(name, self._stored.source, stored, values)
        wide = values.astype(np.float64 if values.dtype == np.float64 else np.float32)
        if not np.isfinite(wide).all():
            raise CheckpointError(f"{name} of {self._stored.source} contains NaN or infinity: check how it was trained")
        return torch.from_numpy(np.ascontiguousarray(wide))


@contextmanager
def moved_by(model: Any, update: Mapping[str, Tensor], fraction: float = 1.0) -> Iterator[None]:
    """The model at base + fraction·update inside; its own weights, bit for bit, after it.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> before = model.weight.item()
    >>> with moved_by(model, {"weight": torch.ones(1, 1)}, 0.5):
    ...     inside = model.weight.item()
    >>> round(inside - before, 6), model.weight.item() == before
    (0.5, True)
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in update}
    kept = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = kept[name] + fraction * update[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]


def _require_same_tokenizer(language_model: LanguageModel, tuned: Checkpoint) -> None:
    """Raises ModelError if tokenizer files beside the tuned weights read text otherwise than the base's do."""
    folder = tuned.folders[0]
    if language_model.tokenizer is None or not any(is_file(folder / name) for name in _TOKENIZER_FILES):
        return
    with quiet_libraries():
        try:
            theirs = open_tokenizer(folder)
        except Exception as error:  # damaged files and unknown classes all differ
            raise ModelError(
                f"the tokenizer of {tuned.source} cannot be read: {str(error)[:200]}. Copy the base's there"
            ) from error
    ours = language_model.tokenizer
    if ours.get_vocab() != theirs.get_vocab() or ours(_PROBE).input_ids != theirs(_PROBE).input_ids:
        raise ModelError(
            f"{tuned.source} has another tokenizer than the base: their distributions are not over the same tokens. "
            "Give a model that kept its base's tokenizer"
        )
