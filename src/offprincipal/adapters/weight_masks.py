"""Masks of a model, which say what entries of its parameters may be trained, and the file that stores them.

A mask is stored as bits, 64 entries to a word. Masks hold a hash of the weights that they were made from, because they
are meaningless for another base. Knows nothing of how entries are chosen or trained.
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
    """A mapping from parameter names to bool tensors of the parameter's shape, true where an entry may be trained.

    `make_masks` makes them. Masks are stored as bits, and unpacked when read.

    Args:
        words: parameter name -> uint64, (⌈entries/64⌉,), the mask as packed by `offprincipal.geometry.bits.pack`.
        shapes: parameter name -> its shape.
        base: hash of the weights of these parameters from which the masks were made.
        about: how they were made, such as kind and density; stored in the file as information.

    >>> masks = packed({"weight": torch.tensor([[True, False], [True, True]])}, base="", about={"kind": "random"})
    >>> masks
    Masks(random, 1 parameters, density 0.75)
    >>> masks["weight"]
    tensor([[ True, False],
            [ True,  True]])
    """

    words: Mapping[str, Words]
    shapes: Mapping[str, tuple[int, ...]]
    base: str
    about: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Masks({self.about.get('kind', 'custom')}, {len(self)} parameters, density {self.density:.3g})"

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(unpack(self.words[name], math.prod(self.shapes[name]))).view(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __len__(self) -> int:
        return len(self.words)

    def active(self, name: str) -> int:
        """The number of entries of a parameter that may be trained."""
        return int(np.bitwise_count(self.words[name]).sum())

    @property
    def density(self) -> float:
        """The fraction of entries that may be trained, over all parameters that have a mask."""
        return sum(map(self.active, self)) / sum(map(math.prod, self.shapes.values()))

    @property
    def densities(self) -> dict[str, float]:
        """Parameter name -> the density of its mask."""
        return {name: self.active(name) / math.prod(shape) for name, shape in self.shapes.items()}

    def require_base(self, model: torch.nn.Module) -> None:
        """Check that a model has the weights from which these masks were made.

        With FSDP2 the weights are gathered one by one, so every process must call this.

        Args:
            model: also compiled or wrapped.

        Raises:
            AdapterError: it lacks one of the parameters, or has other weights.
        """
        if base_hash(model, self) != self.base:
            raise AdapterError(
                f"these masks were made from another base: the weights of the {len(self)} parameters that they name "
                "differ from the model's. Open the base that they were made from, or make masks of this one"
            )

    def freeze_others(self, model: torch.nn.Module) -> None:
        """Set `requires_grad` of every parameter: true if it has a mask, otherwise false.

        Args:
            model: that has the parameters with a mask; also compiled or wrapped.

        Raises:
            AdapterError: the model lacks a parameter that has a mask.
        """
        masked = {id(parameter) for parameter in parameters_of(model, self).values()}
        for parameter in unwrapped(model).parameters():
            parameter.requires_grad_(id(parameter) in masked)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: packed bits, and in its metadata the shapes, `base` and `about`.

        Args:
            path: of the file; an existing one is replaced.

        Raises:
            FileError: the file cannot be written.

        >>> import tempfile
        >>> from offprincipal.adapters import make_masks
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
        >>> masks = make_masks(model, "low_magnitude", 0.25)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     masks.save(f"{folder}/masks.safetensors")
        ...     Masks.load(f"{folder}/masks.safetensors", model)
        Masks(low_magnitude, 1 parameters, density 0.25)
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
        """Read masks for a model that has the weights from which they were made.

        Args:
            path: of a file that `save` wrote.
            model: the base before training. To resume training, load the masks with the base before the checkpoint.

        Returns:
            The masks.

        Raises:
            FileError: the file cannot be read, or holds no masks.
            AdapterError: the masks were made from another base.

        >>> import tempfile
        >>> from offprincipal.adapters import make_masks
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     make_masks(base, "random", 0.5).save(f"{folder}/masks.safetensors")
        ...     Masks.load(f"{folder}/masks.safetensors", base)["0.weight"].sum()
        tensor(4)
        """
        masks = _read(Path(path))
        try:
            masks.require_base(model)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from error
        return masks


def packed(masks: Mapping[str, Tensor], base: str, about: Mapping[str, Any]) -> Masks:
    """Masks from bool tensors.

    Args:
        masks: parameter name -> bool tensor of its shape, on the CPU.
        base, about: as in `Masks`.

    >>> masks = packed({"weight": torch.tensor([[True, False], [True, True]])}, base="", about={})
    >>> masks.density, masks["weight"].tolist()
    (0.75, [[True, False], [True, True]])
    """
    words = {name: pack(mask.numpy()) for name, mask in masks.items()}
    return Masks(words, {name: tuple(mask.shape) for name, mask in masks.items()}, base, about)


def base_hash(model: torch.nn.Module, names: Iterable[str]) -> str:
    """A hash of the names, shapes and float32 values of some of a model's parameters.

    Args:
        model: also compiled, wrapped or sharded.
        names: of the parameters.

    Raises:
        AdapterError: the model lacks one of them, or its weights are not loaded.
    """
    parameters = parameters_of(model, names)
    for name, parameter in parameters.items():
        require_loaded(name, parameter)
    return hash_of({name: whole(parameter) for name, parameter in parameters.items()})


def require_loaded(name: str, weight: Tensor) -> None:
    """Check that a weight has values. Tensor subclasses are not checked, because they may hold values themselves.

    Raises:
        AdapterError: it is a plain tensor on the meta device.
    """
    if weight.is_meta and type(weight.data) is Tensor:
        raise AdapterError(f"the weights of {name} are not loaded (meta device): open the model with its weights")


def parameters_of(model: torch.nn.Module, names: Iterable[str]) -> dict[str, torch.nn.Parameter]:
    """Parameters of a model by name.

    Args:
        model: also compiled or wrapped.
        names: as the model has them, or as it had them before its modules were wrapped.

    Returns:
        The given name -> parameter.

    Raises:
        AdapterError: the model lacks one of them.
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
    """The masks in a file, after a check that they are complete."""
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
            raise ValueError("its masks and its shapes have different names")
        for name, bits in words.items():
            _require_whole(name, bits, shapes[name])
        return Masks({name: words[name] for name in shapes}, shapes, base, about)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FileError(f"{path} holds no masks: {error}. Give a mask file that offprincipal wrote") from error


def _require_whole(name: str, words: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError if the words are not those of a mask of that shape."""
    numel = math.prod(shape)
    if min(shape, default=0) < 1 or words.dtype != np.uint64 or words.shape != (-(-numel // 64),):
        raise ValueError(f"the mask of {name} is not of shape {shape}")
    if numel % 64 and int(words[-1]) >> (numel % 64):
        raise ValueError(f"the mask of {name} has entries beyond its shape {shape}")
