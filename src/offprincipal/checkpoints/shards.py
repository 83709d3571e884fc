"""An index of shards, `{"weight_map": {name: file}}`, checked before any file that it names is opened."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol, TypeVar

from offprincipal.checkpoints.checkpoint import TensorInfo
from offprincipal.checkpoints.hostile import is_file, read_json
from offprincipal.errors import CheckpointError

INDEX = ".index.json"
_NUMBERED = re.compile(r"(.*?)([0-9]{1,6})[-_]of[-_]([0-9]{1,6})(.*)")
_NO_MODEL = re.compile(r"(?:adapter_model|monitor|optimizer|optim|scheduler|training_args|rng_state|scaler|masks)\b")
_SHOWN = 5


class OpenedFile(Protocol):
    """A file of tensors, by name."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...


F = TypeVar("F", bound=OpenedFile)


def read_index(path: Path) -> dict[str, Path]:
    """Name -> the file that holds it; every file exists and lies inside the index's folder.

    Raises:
        CheckpointError: it is not an index, or a file is missing or elsewhere.
    """
    weight_map = _weight_map(path)
    for shard in weight_map.values():
        if not is_file(path.parent / shard):
            raise CheckpointError(
                f"{path.parent / shard} is missing, though {path.name} names it: download the checkpoint again"
            )
    return {name: path.parent / shard for name, shard in weight_map.items()}


def shards_of(path: Path) -> list[str]:
    """The files that an index names, in its folder, whether they are there or not.

    Raises:
        CheckpointError: it is not an index, or names a file elsewhere.
    """
    return list(dict.fromkeys(_weight_map(path).values()))


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map: download or save the checkpoint again")
    for name, shard in weight_map.items():
        if not is_inside(shard):
            raise CheckpointError(
                f"{path} places {name} in {shard!r}, which is not a file inside its folder. Do not trust it"
            )
    return weight_map


def open_files(paths: Sequence[Path], opened: Callable[[Path], F]) -> dict[str, F]:
    """Name -> the opened file that holds it: of an index, of one file, or of several that make up a model.

    Raises:
        CheckpointError: a file cannot be opened, the index is bad, a file lacks what the index places there, or two
            files hold one tensor.
    """
    if len(paths) == 1 and paths[0].name.endswith(INDEX):
        return _open_indexed(paths[0], opened)
    found: dict[str, F] = {}
    for path in paths:
        file = opened(path)
        twice = found.keys() & file.tensors.keys()
        if twice:
            raise CheckpointError(
                f"{path} and another file in its folder both contain {min(twice)}: they are not shards of one model. "
                "Give one of the files"
            )
        found |= dict.fromkeys(file.tensors, file)
    return found


def files_of(folder: Path, suffix: str, firsts: Sequence[str]) -> list[Path]:
    """The files that a model in a folder is read from: an index alone, one file, or shards; [] where there is no model.

    Args:
        suffix: of weights, such as `.safetensors`.
        firsts: what the one file, or an index, is usually called; then any other index, shards that are numbered, and
            the only file of that kind are looked for.

    Raises:
        CheckpointError: some of the numbered shards are missing, or there are several files to choose from.
    """
    for first in firsts:
        if is_file(folder / first):
            return [folder / first]
    names = sorted(path.name for path in folder.glob(f"*{suffix}*") if is_file(path))
    indexes = [name for name in names if name.endswith(f"{suffix}{INDEX}")]
    if len(indexes) == 1:
        return [folder / indexes[0]]
    own = [name for name in names if name.endswith(suffix) and not _NO_MODEL.match(name)]
    numbered = {match: name for name in own if (match := _NUMBERED.fullmatch(name))}
    if own and len(numbered) == len(own) and len({(match[1], match[3], match[4]) for match in numbered}) == 1:
        wanted, there = int(next(iter(numbered))[3]), {int(match[2]) for match in numbered}
        if len(there) != wanted or max(there) - min(there) != wanted - 1:
            raise CheckpointError(
                f"{folder} has {len(there)} of the {wanted} shards that the name {own[0]} implies: download it again"
            )
        return [folder / name for name in own]
    if len(own) > 1:
        more = f" and {len(own) - _SHOWN} more" if len(own) > _SHOWN else ""
        raise CheckpointError(
            f"{folder} has {len(own)} files of weights and no index, {', '.join(own[:_SHOWN])}{more}: give one of the "
            "files"
        )
    return [folder / name for name in own]


def is_numbered(name: str) -> bool:
    """Whether a file is called as one shard of several.

    >>> is_numbered("model-00001-of-00002.safetensors"), is_numbered("model.safetensors")
    (True, False)
    """
    return _NUMBERED.fullmatch(name) is not None


def _open_indexed(index: Path, opened: Callable[[Path], F]) -> dict[str, F]:
    paths = read_index(index)
    files = {path: opened(path) for path in sorted(set(paths.values()))}
    for name, path in paths.items():
        if name not in files[path].tensors:
            raise CheckpointError(f"{path} lacks {name}, which {index.name} places there: download it again")
    return {name: files[path] for name, path in paths.items()}


def is_inside(shard: object) -> bool:
    """Whether a shard's name stays inside the folder, on any system."""
    if not isinstance(shard, str) or not shard or "\0" in shard:
        return False
    paths = (PurePosixPath(shard), PureWindowsPath(shard))
    return not any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)
