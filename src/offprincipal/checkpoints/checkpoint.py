"""One interface for every kind of checkpoint: names, shapes and stored types at once, tensors one by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from offprincipal.errors import CheckpointError

_NAMED = 5


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says of a tensor before it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def floating(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype.startswith(("float", "bfloat"))


class Checkpoint(Protocol):
    """A model's tensors, read one at a time."""

    @property
    def source(self) -> str:
        """Where it is, as the user named it."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> shape and stored type, in the order of the names; tied tensors once."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, in its stored type, finite.

        Raises:
            CheckpointError: it cannot be read, or holds NaN or infinity.
        """
        ...

    def masters(self) -> "Checkpoint | None":
        """The float32 master weights kept beside the stored ones, if any."""
        ...


def require_same_tensors(base: Checkpoint, tuned: Checkpoint) -> None:
    """Check that two checkpoints have the same tensors, of the same shapes.

    Raises:
        CheckpointError: one has a tensor that the other has not, or shapes differ; the message names them.
    """
    missing = [name for name in base.tensors if name not in tuned.tensors]
    extra = [name for name in tuned.tensors if name not in base.tensors]
    for names, has, lacks in ((missing, base, tuned), (extra, tuned, base)):
        if names:
            raise CheckpointError(
                f"{lacks.source} lacks {_listed(names)}, which {has.source} has: "
                "compare a base with checkpoints that were trained from it"
            )
    recast = [name for name, info in base.tensors.items() if info.floating != tuned.tensors[name].floating]
    if recast:
        here, there = tuned.tensors[recast[0]].dtype, base.tensors[recast[0]].dtype
        raise CheckpointError(
            f"{tuned.source} stores {_listed(recast)} as {here}, {base.source} as {there}: dequantise it first"
        )
    differing = [
        f"{name} ({_shape(info)} in the base, {_shape(tuned.tensors[name])} here)"
        for name, info in base.tensors.items()
        if info.shape != tuned.tensors[name].shape
    ]
    if differing:
        raise CheckpointError(
            f"{tuned.source} has other shapes than {base.source}: {_listed(differing)}. Compare one architecture"
        )


def _shape(info: TensorInfo) -> str:
    return " × ".join(map(str, info.shape)) or "a scalar"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    noun = "tensor" if len(names) == 1 else f"{len(names)} tensors:"
    return f"{noun} {', '.join(names[:_NAMED])}{more}"
