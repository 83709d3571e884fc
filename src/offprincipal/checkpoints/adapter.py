"""A PEFT adapter on its base, as the model that it is: LoRA and its initialisations, rsLoRA, DoRA, PiSSA, SHiRA.

`adapter_config.json` and `adapter_model.safetensors` give the update. The base's rows are read as they are asked for
and the sum is never stored: its entries are float32, not rounded. PEFT itself is not needed.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from offprincipal.checkpoints.adapter_changes import (
    Change,
    Directed,
    LowRank,
    Offset,
    Sparse,
    on_residual,
    with_start,
)
from offprincipal.checkpoints.adapter_settings import CONFIG, AdapterSettings, read_settings
from offprincipal.checkpoints.alignment import key_of
from offprincipal.checkpoints.checkpoint import FLOATS, Array, Checkpoint, TensorInfo
from offprincipal.checkpoints.hostile import is_file
from offprincipal.checkpoints.parts import stored_transposed
from offprincipal.checkpoints.safetensors_file import SafetensorsFile
from offprincipal.checkpoints.torch_files import TorchFile
from offprincipal.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<what>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|shira_weight"
    r"|shira_indices)(?:\.(?!bias$)\w+)*?(?P<bias>\.bias)?"
)
_WRAPPERS = re.compile(r"\.base_layer(?=\.)|\.modules_to_save(?:\.default)?(?=\.)")
_RECOMPUTABLE = ("pissa", "olora")
_LONGEST_KEY = 500
_ROWS_AT_ONCE = 4096
_KEPT = 8

Factors = dict[str, str]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds one."""
    return is_file(folder / CONFIG)


def open_adapter(
    folder: Path, source: str, base: Checkpoint | None, open_model: Callable[[str], Checkpoint]
) -> "Adapter":
    """The adapter in a folder, on a base, or on the one that it names.

    Args:
        open_model: opens the base that the adapter names; no adapter, so that none can name itself.

    Raises:
        CheckpointError: the adapter or its base cannot be read, or they do not fit together.
    """
    settings, file = read_settings(folder), _open_weights(folder)
    named = settings.base_model_name_or_path

    def open_named() -> Checkpoint:
        if not named:
            raise CheckpointError(f"{folder} is an adapter that names no base: give its base too")
        try:
            return open_model(named)
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder} is an adapter on {named[:200]!r}, which cannot be opened: {error}"
            ) from error

    own = named is not None and base is not None and _is_other_folder(named, base)
    init = settings.residual_init
    if init is None:
        adapter = Adapter(folder, source, base or open_named(), settings, file)
        if own and base is not None:
            adapter.notes.append(f"adapter read on the given base, {base.source}, though it names {named}")
        return adapter
    bases = [*([open_named()] if own else []), *([base] if base else [])] or [open_named()]
    return _on_residual(init, [Adapter(folder, source, each, settings, file) for each in bases], own or base is None)


class Adapter:
    """A `Checkpoint` that is a base and an adapter's update.

    Raises:
        CheckpointError: the adapter changes what the base has not, or its shapes do not fit.
    """

    def __init__(
        self,
        folder: Path,
        source: str,
        base: Checkpoint,
        settings: AdapterSettings,
        file: SafetensorsFile | TorchFile,
        start: str | None = None,
    ) -> None:
        self.folder, self.source, self.base, self.settings, self.start = folder, source, base, settings, start
        self.folders = (folder, *base.folders)
        self.notes: list[str] = [*base.notes, f"{settings.peft_type} adapter on {base.source}, summed in float32"]
        self._file = file
        self._changes: dict[str, tuple[str, Factors]] = {}
        self._biases: dict[str, tuple[str, str]] = {}
        self._saved: dict[str, str] = {}
        self._enter()
        self.tensors: dict[str, TensorInfo] = {name: self._info(name) for name in base.tensors}
        for name, (module, factors) in self._changes.items():
            self._require_fit(name, module, factors)
        for name, (_, key) in self._biases.items():
            if file.tensors[key].shape != self.tensors[name].shape:
                raise self._misfit(key, name)
        self._change_of = lru_cache(maxsize=_KEPT)(self._prepare)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.base.config

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        info = self.tensors[name]
        stop = info.numel if stop is None else stop
        if name not in self._changes and name not in self._biases:
            return self._stored(name, start, stop)
        if stop <= start:
            return np.empty(0, np.float32)
        width = info.shape[1] if len(info.shape) == 2 else 1
        first, last = start // width, -(-stop // width)
        with np.errstate(all="ignore"):
            rows = self._change_of(name).of(self._rows(name, first, last), first)
        return np.asarray(rows, np.float32).reshape(-1)[start - first * width : stop - first * width]

    def masters(self) -> None:
        return None

    def on_residual(self, init: str) -> bool:
        """Whether the base is already what an initialisation left of it, judged by the smallest adapted matrix."""
        name = min(self._changes, key=lambda name: self.tensors[name].numel)
        rows = self._rows(name, 0, self.tensors[name].shape[0])
        with self._decomposing(name):
            return on_residual(rows, self._low_rank_change(name), init)

    def started(self, init: str) -> "Adapter":
        """The same adapter, its initialisation taken out of the base as PEFT does when it loads it."""
        return Adapter(self.folder, self.source, self.base, self.settings, self._file, start=init)

    def _enter(self) -> None:
        """Sort the file's keys into changes, biases and tensors that are saved whole."""
        found: dict[str, Factors] = {}
        for key in self._file.tensors:
            if len(key) > _LONGEST_KEY:
                raise CheckpointError(f"{self._file.path} has a key of {len(key)} characters. Do not trust it")
            bare = key.removeprefix("base_model.model.")
            match = _KEY.fullmatch(bare)
            if match is None:
                self._enter_saved(key, _WRAPPERS.sub("", bare))
            elif match["bias"]:
                name = self._in_base(f"{match['module']}.bias", key)
                self._biases[name] = (match["module"], key)
            else:
                factors = found.setdefault(match["module"].removesuffix(".base_layer"), {})
                if match["what"] in factors:
                    raise self._twice(match["module"])
                factors[match["what"]] = key
        if not found:
            raise CheckpointError(f"{self._file.path} holds no weights of an adapter that is read: save it again")
        for module, factors in found.items():
            name = self._in_base(f"{module}.weight", next(iter(factors.values())))
            if name in self._changes:
                raise self._twice(module)
            self._changes[name] = (module, factors)

    def _enter_saved(self, key: str, name: str) -> None:
        embedding = None
        if name.endswith("lm_head.weight") and name not in self.base.tensors:
            embedding = next((other for other in self._file.tensors if other.endswith("embed_tokens.weight")), None)
        if embedding is not None:
            if np.array_equal(self._file.read(key), self._file.read(embedding)):
                return
            raise CheckpointError(
                f"{self.folder} gives {self.base.source} a head of its own, though there it is the embedding: merge "
                "the adapter into its base and give the merged model"
            )
        self._saved[self._in_base(name, key)] = key

    def _in_base(self, name: str, key: str) -> str:
        """What the base calls a tensor: that, or the only one that is the same through wrappers and other layouts."""
        if name in self.base.tensors:
            return name
        alike = self._by_key.get(key_of(name), ())
        if len(alike) == 1:
            return alike[0]
        raise CheckpointError(
            f"{self.folder} adapts {name} ({key}), which {self.base.source} has not: give the base it was trained on"
        )

    @cached_property
    def _by_key(self) -> dict[str, list[str]]:
        """The base's tensors by what they are."""
        found: dict[str, list[str]] = {}
        for name in self.base.tensors:
            found.setdefault(key_of(name), []).append(name)
        return found

    def _info(self, name: str) -> TensorInfo:
        key = self._saved.get(name)
        info = self.base.tensors[name] if key is None else self._file.tensors[key]
        changed = name in self._changes or name in self._biases
        if changed and info.dtype not in FLOATS:
            raise CheckpointError(
                f"{name} in {self.base.source} is stored as {info.dtype}, to which {self.folder} cannot be added: "
                "give the base in bfloat16"
            )
        return TensorInfo(name, info.shape, "float32" if changed else info.dtype)

    def _require_fit(self, name: str, module: str, factors: Factors) -> None:
        shapes = {what: self._file.tensors[key].shape for what, key in factors.items()}
        shape = self.tensors[name].shape
        if len(shape) != 2:
            raise CheckpointError(f"{self.folder} adapts {name}, which is no matrix: merge it into its base first")
        if ("shira_weight" in shapes) != (self.settings.peft_type == "SHIRA"):
            raise CheckpointError(f"{module} in {self._file.path} is not of the peft_type that {CONFIG} gives")
        if "shira_weight" in shapes:
            count = shapes["shira_weight"]
            if shapes.get("shira_indices") != (2, *count):
                raise CheckpointError(f"{self._file.path} lacks the places of {module}.shira_weight: save it again")
            return
        embedding, (left, right) = self._names(factors)
        if left not in factors or right not in factors:
            raise CheckpointError(
                f"{self._file.path} has one of {left} and {right} of {module}, not both: save it again"
            )
        B, A = shapes[left], shapes[right]
        rank = self.settings.rank(module)
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or A[0] != rank:
            raise CheckpointError(
                f"{module} in {self._file.path} has factors {B} and {A}, which are not of the rank {rank} that "
                f"{CONFIG} gives: save the adapter again"
            )
        if (B[0], A[1]) not in ([shape[::-1]] if embedding else [shape, shape[::-1]]):
            raise self._misfit(factors[right], name)
        magnitude = shapes.get("lora_magnitude_vector")
        if magnitude is None and self.settings.use_dora:
            raise CheckpointError(f"{self._file.path} lacks lora_magnitude_vector of {module}: save the adapter again")
        if magnitude is not None and magnitude != (B[0],):
            raise self._misfit(factors["lora_magnitude_vector"], name)

    def _twice(self, module: str) -> CheckpointError:
        return CheckpointError(f"{self._file.path} adapts {module[:200]} twice: save one adapter alone")

    def _misfit(self, key: str, name: str) -> CheckpointError:
        return CheckpointError(
            f"{key} in {self._file.path} is {self._file.tensors[key].shape}, which does not fit {name} of "
            f"{self.base.source}, {self.tensors[name].shape}: give the base it was trained on"
        )

    def _prepare(self, name: str) -> Change:
        if name in self._biases:
            module, key = self._biases[name]
            return Offset(self._float32(key), self._scale(module))
        _, factors = self._changes[name]
        if "shira_weight" in factors:
            return self._sparse(name, factors)
        change = self._low_rank_change(name)
        rows, _ = self.tensors[name].shape
        if self.start is not None:
            stored = FLOATS[self.base.tensors[name].dtype]
            with self._decomposing(name):
                change = with_start(self._rows(name, 0, rows), change, self.start, stored)
        if "lora_magnitude_vector" not in factors:
            return change
        magnitude = self._float32(factors["lora_magnitude_vector"])
        if not self._transposed(name):
            return Directed(change, magnitude)
        squares = np.zeros(len(magnitude), np.float64)
        for first in range(0, rows, _ROWS_AT_ONCE):
            last = min(first + _ROWS_AT_ONCE, rows)
            squares += np.square(change.of(self._rows(name, first, last), first), dtype=np.float64).sum(axis=0)
        return Directed(change, magnitude, np.sqrt(squares).astype(np.float32))

    def _low_rank_change(self, name: str) -> LowRank:
        module, factors = self._changes[name]
        _, (left, right) = self._names(factors)
        shapes = [self._file.tensors[factors[what]].shape for what in (left, right)]
        B, A = (self._float32(factors[what]).reshape(shape) for what, shape in zip((left, right), shapes, strict=True))
        factors_here = (A.T, B.T) if self._transposed(name) else (B, A)
        return LowRank(*factors_here, self._scale(module))

    def _sparse(self, name: str, factors: Factors) -> Sparse:
        shape = self.tensors[name].shape
        places = self._integers(factors["shira_indices"])
        if places.size and not all(
            axis.min() >= 0 and axis.max() < size for axis, size in zip(places, shape, strict=True)
        ):
            raise CheckpointError(
                f"{factors['shira_indices']} in {self._file.path} points outside {name}: do not trust it"
            )
        flat = places[0].astype(np.int64) * shape[1] + places[1]
        order = np.argsort(flat, kind="stable")
        return Sparse(flat[order], self._float32(factors["shira_weight"])[order])

    def _names(self, factors: Iterable[str]) -> tuple[bool, tuple[str, str]]:
        """Whether the adapted module is an embedding, and what its factors are called."""
        embedding = any(what.startswith("lora_embedding") for what in factors)
        return embedding, ("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_B", "lora_A")

    def _transposed(self, name: str) -> bool:
        """Whether a matrix is stored as (in, out): an embedding's is, and a Conv1D's."""
        _, factors = self._changes[name]
        embedding, (left, right) = self._names(factors)
        out, width = self._file.tensors[factors[left]].shape[0], self._file.tensors[factors[right]].shape[1]
        if embedding or out != width:
            return embedding or self.tensors[name].shape != (out, width)
        by_type = stored_transposed(self.tensors[name], self.config)  # PEFT writes one `fan_in_fan_out` for all layers
        return bool(self.settings.fan_in_fan_out) if by_type is None else by_type

    @contextmanager
    def _decomposing(self, name: str) -> Iterator[None]:
        try:
            yield
        except np.linalg.LinAlgError as error:
            raise CheckpointError(f"{name} in {self.base.source} has no SVD ({error}): is it finite?") from error

    def _scale(self, module: str) -> float:
        return self.settings.scale(module, self.settings.rank(module))

    def _stored(self, name: str, start: int, stop: int) -> Array:
        """Entries before the change: the base's, or those that the adapter saved in their place."""
        key = self._saved.get(name)
        return self.base.read(name, start, stop) if key is None else self._file.read(key, start, stop)

    def _rows(self, name: str, first: int, last: int) -> Array:
        shape = self.tensors[name].shape
        width = shape[1] if len(shape) == 2 else 1
        return self._stored(name, first * width, last * width).astype(np.float32).reshape(-1, width)

    def _float32(self, key: str) -> Array:
        if self._file.tensors[key].dtype not in FLOATS:
            raise CheckpointError(f"{key} in {self._file.path} holds no floating-point numbers: save the adapter again")
        return self._file.read(key).astype(np.float32)

    def _integers(self, key: str) -> Array:
        """Places; PEFT stores them as float32 on Windows."""
        shape = self._file.tensors[key].shape
        if isinstance(self._file, SafetensorsFile) and self._file.tensors[key].dtype not in FLOATS:
            try:
                with safe_open(self._file.path, framework="np") as file:
                    entries = np.asarray(file.get_tensor(key))
            except (SafetensorError, OSError, TypeError) as error:
                raise CheckpointError(f"cannot read {key} from {self._file.path} ({error}): save it again") from error
        else:
            entries = self._file.read(key)
        with np.errstate(invalid="ignore"):
            return entries.astype(np.int64).reshape(shape)


def _on_residual(init: str, candidates: Sequence[Adapter], first_is_named: bool) -> Adapter:
    """A raw adapter of PiSSA or its kin belongs to what its initialisation left of the base: find or recompute that.

    Args:
        candidates: the adapter on the base that it names, if that is another, and on the given one.
        first_is_named: whether the first is on the base that the adapter names.
    """
    named, given = candidates[0], candidates[-1]
    if init.lower().startswith(_RECOMPUTABLE):
        for adapter in candidates:
            if adapter.on_residual(init.lower()):
                adapter.notes.append(f"raw {init} adapter on its residual base, {adapter.base.source}")
                return adapter
        if init.lower() in _RECOMPUTABLE:
            adapter = given.started(init.lower())
            adapter.notes.append(
                f"raw {init} adapter: its residual base was recomputed from {adapter.base.source}, as PEFT does"
            )
            return adapter
    elif first_is_named:
        named.notes.append(f"raw {init} adapter: {named.base.source}, which it names, is taken for its residual base")
        return named
    raise CheckpointError(
        f"{given.folder} is a raw {init} adapter, which belongs to what its initialisation left of the base, and "
        f"{given.base.source} is not that: save it with path_initial_model_for_weight_conversion, or merge it"
    )


def _open_weights(folder: Path) -> SafetensorsFile | TorchFile:
    if is_file(folder / WEIGHTS):
        return SafetensorsFile(folder / WEIGHTS)
    if is_file(folder / PICKLED):
        return TorchFile(folder / PICKLED)
    raise CheckpointError(f"{folder} has {CONFIG} but no {WEIGHTS}: download or save the adapter again")


def _is_other_folder(named: str, base: Checkpoint) -> bool:
    """Whether the base that an adapter names is a local folder, and not the given base."""
    try:
        return Path(named).is_dir() and Path(named).resolve() != Path(base.source).resolve()
    except (OSError, ValueError, RuntimeError):
        return False
