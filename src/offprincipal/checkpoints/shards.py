"""An index of shards, `{"weight_map": {name: file}}`, checked before any file that it names is opened."""

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol, TypeVar

from offprincipal.checkpoints.checkpoint import TensorInfo
from offprincipal.checkpoints.hostile import is_file, read_json
from offprincipal.errors import CheckpointError


class OpenedFile(Protocol):
    """A file of tensors, by name."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...


F = TypeVar("F", bound=OpenedFile)


def read_index(path: Path) -> dict[str, Path]:
    """Name -> the file that holds it; every file exists and lies inside the index's folder.

    Raises:
        CheckpointError: it is no index, or a file is missing or elsewhere.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map: download or save the checkpoint again")
    for name, shard in weight_map.items():
        if not is_inside(shard):
            raise CheckpointError(
                f"{path} places {name} in {shard!r}, which is not a file inside its folder. Do not trust it"
            )
        if not is_file(path.parent / shard):
            raise CheckpointError(
                f"{path.parent / shard} is missing, though {path.name} names it: download the checkpoint again"
            )
    return {name: path.parent / shard for name, shard in weight_map.items()}


def open_files(folder: Path, weights: str, index: str, opened: Callable[[Path], F]) -> dict[str, F]:
    """Name -> the opened file that holds it: one file, or the shards of an index, each opened once.

    Args:
        weights, index: what the one file, and the index, are called.

    Raises:
        CheckpointError: a file cannot be opened, the index is bad, or a file lacks what the index places there.
    """
    if is_file(folder / weights):
        file = opened(folder / weights)
        return dict.fromkeys(file.tensors, file)
    paths = read_index(folder / index)
    files = {path: opened(path) for path in sorted(set(paths.values()))}
    for name, path in paths.items():
        if name not in files[path].tensors:
            raise CheckpointError(f"{path} lacks {name}, which {index} places there: download it again")
    return {name: files[path] for name, path in paths.items()}


def is_inside(shard: object) -> bool:
    """Whether a shard's name stays inside the folder, on any system."""
    if not isinstance(shard, str) or not shard or "\0" in shard:
        return False
    paths = (PurePosixPath(shard), PureWindowsPath(shard))
    return not any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)
