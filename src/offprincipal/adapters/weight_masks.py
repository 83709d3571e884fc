"""Masks of a model: for some of its parameters, which entries may be trained; and the file that keeps them.

A mask is kept as bits, 64 entries to a word. Masks remember a hash of the weights that they were made from, because a
mask means nothing on another base. Knows nothing of how entries are chosen or trained.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from offprincipal.adapters.given import unwrapped
from offprincipal.checkpoints.matrices import whole
from offprincipal.checkpoints.roles import WRAPPERS
from offprincipal.errors import AdapterError, FileError
from offprincipal.files import write_atomically
from offprincipal.geometry.bits import pack, unpack
from offprincipal.models import hash_of

_FORMAT = 1
_METADATA = "offprincipal_masks"
Words = NDArray[np.uint64]


@dataclass(frozen=True, repr=False)
class Masks(Mapping[str, Tensor]):
    """Parameter name -> bool tensor of its shape, true where an entry may be trained; unpacked when asked for.

    Args:
        words: parameter name -> its mask as `geometry.scan.pack` packs it.
        shapes: parameter name -> its shape.
        base: a hash of the weights of these parameters that the masks were made from.
        about: how they were made: kind, density and the like; kept in the file for its reader.
    """

    words: Mapping[str, Words]
    shapes: Mapping[str, tuple[int, ...]]
    base: str
    about: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Masks({self.about.get('kind', 'of its own')}, {len(self)} parameters, density {self.density:.3g})"

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(unpack(self.words[name], math.prod(self.shapes[name]))).view(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __len__(self) -> int:
        return len(self.words)

    def active(self, name: str) -> int:
        """How many entries of a parameter may be trained."""
        return int(np.bitwise_count(self.words[name]).sum())

    @property
    def density(self) -> float:
        """Trainable entries over all entries of the parameters that have a mask."""
        return sum(map(self.active, self)) / sum(map(math.prod, self.shapes.values()))

    @property
    def densities(self) -> dict[str, float]:
        """Parameter name -> the density of its mask."""
        return {name: self.active(name) / math.prod(shape) for name, shape in self.shapes.items()}

    def require_base(self, model: torch.nn.Module) -> None:
        """Check that a model has the weights that these masks were made from.

        Under FSDP2 the weights are gathered one by one, so every process must call this.

        Raises:
            AdapterError: it lacks one of the parameters, or has other weights.
        """
        if base_hash(model, self) != self.base:
            raise AdapterError(
                f"these masks were made from another base: the weights of the {len(self)} parameters that they name "
                "differ from the model's. Open the base that they were made from, or make masks of this one"
            )

    def freeze_others(self, model: torch.nn.Module) -> None:
        """Let no gradient be computed for parameters without a mask, which `SparseAdamW` does not train either.

        Raises:
            AdapterError: the model lacks a parameter that has a mask.
        """
        masked = {id(parameter) for parameter in parameters_of(model, self).values()}
        for parameter in unwrapped(model).parameters():
            parameter.requires_grad_(id(parameter) in masked)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: packed bits, and as metadata the shapes, the base's hash and how they were made.

        Raises:
            FileError: the file cannot be written.
        """
        content = {
            "format": _FORMAT,
            "base": self.base,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "about": dict(self.about),
        }
        metadata = {_METADATA: json.dumps(content, allow_nan=False)}  # safetensors keeps no order of several keys
        write_atomically(Path(path), lambda temporary: save_file(dict(self.words), temporary, metadata))

    @staticmethod
    def load(path: str | Path, model: torch.nn.Module) -> "Masks":
        """Read masks for a model that still has the weights that they were made from.

        Args:
            model: the base, before training; to continue a training, load the masks on the base first.

        Raises:
            FileError: the file cannot be read, or holds no masks.
            AdapterError: they were made from another base.
        """
        masks = _read(Path(path))
        try:
            masks.require_base(model)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from error
        return masks


def packed(masks: Mapping[str, Tensor], base: str, about: Mapping[str, Any]) -> Masks:
    """Masks from bool tensors.

    >>> masks = packed({"weight": torch.tensor([[True, False], [True, True]])}, base="", about={})
    >>> masks.density, masks["weight"].tolist()
    (0.75, [[True, False], [True, True]])
    """
    words = {name: pack(mask.numpy()) for name, mask in masks.items()}
    return Masks(words, {name: tuple(mask.shape) for name, mask in masks.items()}, base, about)


def base_hash(model: torch.nn.Module, names: Iterable[str]) -> str:
    """A hash of the names, shapes and float32 values of some of a model's parameters.

    Raises:
        AdapterError: the model lacks one of them, or its weights are not loaded.
    """
    parameters = parameters_of(model, names)
    for name, parameter in parameters.items():
        require_loaded(name, parameter)
    return hash_of({name: whole(parameter) for name, parameter in parameters.items()})


def require_loaded(name: str, weight: Tensor) -> None:
    """Raises AdapterError if a tensor is on the meta device and so has no values; a subclass may hold them itself."""
    if weight.is_meta and type(weight.data) is Tensor:
        raise AdapterError(f"the weights of {name} are not loaded (meta device): open the model with its weights")


def parameters_of(model: torch.nn.Module, names: Iterable[str]) -> dict[str, torch.nn.Parameter]:
    """The named parameters of a model, by its own names of them, or those that they had before it was wrapped.

    Raises:
        AdapterError: it lacks one of them.
    """
    model = unwrapped(model)
    named = dict(model.named_parameters())
    parameters = {WRAPPERS.sub("", name): parameter for name, parameter in named.items()} | named
    wanted = list(names)
    absent = [name for name in wanted if name not in parameters]
    if absent:
        raise AdapterError(
            f"{len(absent)} of {len(wanted)} masks name no parameter of this {type(model).__name__}, the first "
            f"{absent[0]}: give masks made from this model"
        )
    return {name: parameters[name] for name in wanted}


def _read(path: Path) -> Masks:
    """The masks in a file, checked for being whole."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            words = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise FileError(f"cannot read {path}: {error}. Give a mask file that offprincipal wrote") from error
    try:
        content = json.loads(metadata[_METADATA])
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {_FORMAT!r}")
        shapes = {str(name): tuple(map(int, shape)) for name, shape in content["shapes"].items()}
        about, base = dict(content["about"]), str(content["base"])
        if not words or shapes.keys() != words.keys():
            raise ValueError("its masks and their shapes do not belong together")
        for name, bits in words.items():
            _require_whole(name, bits, shapes[name])
        return Masks({name: words[name] for name in shapes}, shapes, base, about)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FileError(f"{path} holds no masks: {error}. Give a mask file that offprincipal wrote") from error


def _require_whole(name: str, words: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError where the words are not those of a mask of that shape."""
    numel = math.prod(shape)
    if min(shape, default=0) < 1 or words.dtype != np.uint64 or words.shape != (-(-numel // 64),):
        raise ValueError(f"the mask of {name} is not of shape {shape}")
    if numel % 64 and int(words[-1]) >> (numel % 64):
        raise ValueError(f"the mask of {name} has entries beyond its shape {shape}")
