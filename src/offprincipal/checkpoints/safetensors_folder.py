"""A Hugging Face folder with safetensors: `model.safetensors`, or shards with `model.safetensors.index.json`.

Everything in the folder is hostile input: no pickle is opened, no path leaves the folder, every read can fail.
"""

import json
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from offprincipal.checkpoints.checkpoint import TensorInfo
from offprincipal.errors import CheckpointError, NonFiniteTensor
from offprincipal.geometry.precision import require_finite

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MASTERS = "masters"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_MOST_DIMENSIONS = 16
_COMPARABLE = {"float64", "float32", "float16", "bfloat16"}


class SafetensorsFolder:
    """A `Checkpoint` over one folder.

    Raises:
        CheckpointError: the folder is no model, a file is truncated, corrupt, a pickle or missing, or the index is bad.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config = self._read_config()
        self._files = self._locate()

    @property
    def source(self) -> str:
        return str(self.folder)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        infos = {name: self._info(name, file) for name, file in sorted(self._files.items())}
        if self._config.get("tie_word_embeddings") and any(name.endswith("embed_tokens.weight") for name in infos):
            infos.pop("lm_head.weight", None)
        return infos

    def read(self, name: str) -> Tensor:
        path = self._files[name]
        try:
            with _open(path) as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot read {name} from {path}: {error}. Download or save the file again"
            ) from error
        try:
            return require_finite(tensor)
        except NonFiniteTensor as error:
            raise CheckpointError(
                f"{name} in {path}: {error}. The checkpoint is damaged or its training diverged"
            ) from error

    def masters(self) -> "SafetensorsFolder | None":
        folder = self.folder / MASTERS
        return SafetensorsFolder(folder) if _is_file(folder / WEIGHTS) or _is_file(folder / INDEX) else None

    def _read_config(self) -> dict[str, Any]:
        if not self.folder.is_dir():
            if _is_file(self.folder):
                raise CheckpointError(f"{self.folder} is a file: give the folder that holds config.json and {WEIGHTS}")
            raise CheckpointError(f"{self.folder} does not exist: give the folder of a Hugging Face model")
        path = self.folder / "config.json"
        return _read_json(path) if _is_file(path) else {}

    def _locate(self) -> dict[str, Path]:
        """Name -> file, from the one file or the index."""
        if _is_file(self.folder / WEIGHTS):
            with _open(self.folder / WEIGHTS) as file:
                return dict.fromkeys(file.keys(), self.folder / WEIGHTS)
        if _is_file(self.folder / INDEX):
            return self._locate_shards()
        if _is_file(self.folder / "adapter_config.json"):
            raise CheckpointError(
                f"{self.folder} is an adapter, not a model: merge it into its base and save that first"
            )
        pickles = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.folder} holds only pickles ({pickles[0]}), which can run code when opened and are not read: "
                "convert it with save_pretrained(…, safe_serialization=True)"
            )
        raise CheckpointError(f"{self.folder} is no model: it has neither {WEIGHTS} nor {INDEX}")

    def _locate_shards(self) -> dict[str, Path]:
        path = self.folder / INDEX
        weight_map = _read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path} has no weight_map: download or save the checkpoint again")
        files: dict[str, Path] = {}
        for name, shard in weight_map.items():
            if not _is_inside(shard):
                raise CheckpointError(
                    f"{path} places {name} in {shard!r}, which is not a file inside its folder. Do not trust it"
                )
            files[name] = self.folder / shard
        for shard_path in sorted(set(files.values())):
            if not _is_file(shard_path):
                raise CheckpointError(
                    f"{shard_path} is missing, though {path.name} names it: download the checkpoint again"
                )
            with _open(shard_path) as file:
                held = set(file.keys())
            absent = [name for name, file_path in files.items() if file_path == shard_path and name not in held]
            if absent:
                raise CheckpointError(
                    f"{shard_path} lacks {absent[0]}, which {path.name} places there: download it again"
                )
        return files

    def _info(self, name: str, path: Path) -> TensorInfo:
        try:
            with _open(path) as file:
                part = file.get_slice(name)
                shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
        except SafetensorError as error:
            raise CheckpointError(f"cannot read {name} from {path}: {error}") from error
        info = TensorInfo(name, shape, _DTYPES.get(dtype, dtype))
        if len(shape) > _MOST_DIMENSIONS:
            raise CheckpointError(f"{name} in {path} has {len(shape)} dimensions: it is no weight. Do not trust it")
        if info.floating and info.dtype not in _COMPARABLE:
            raise CheckpointError(
                f"{name} in {path} is stored as {info.dtype}, which is not read yet: convert it to bfloat16"
            )
        return info


def _open(path: Path) -> Any:
    """The opened file; its header is checked, its data not read. Nothing here can run a pickle."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        if _looks_like_pickle(path):
            raise CheckpointError(
                f"{path} is a pickle under the name of a safetensors file, and was not opened. Do not trust it"
            ) from error
        raise CheckpointError(f"{path} is truncated or corrupt ({error}): download or save it again") from error
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error.strerror or error}") from error


def _looks_like_pickle(path: Path) -> bool:
    """Whether a file that is no safetensors starts as `pickle.dump` or `torch.save` starts one."""
    with path.open("rb") as file:
        start = file.read(2)
    return start == b"PK" or start[:1] == b"\x80"


def _is_file(path: Path) -> bool:
    """Whether there is an ordinary file, not a pipe or device; no where the path cannot even be asked for."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable as JSON ({error}): download or save the checkpoint again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: download or save the checkpoint again")
    return content


def _is_inside(shard: object) -> bool:
    """Whether a shard's name stays inside the folder, on any system."""
    if not isinstance(shard, str) or not shard or "\0" in shard:
        return False
    paths = (PurePosixPath(shard), PureWindowsPath(shard))
    return not any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)
