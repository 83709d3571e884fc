"""A PEFT adapter on its base, as the model that it is: LoRA in its forms, AdaLoRA, MiSS, SHiRA, IA³, trained tokens.

`adapter_config.json` and `adapter_model.safetensors` give the update. The base's rows are read as they are asked for
and the sum is never stored: its entries are float32, not rounded. PEFT itself is not needed.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from offprincipal.checkpoints.adapter_changes import (
    Added,
    Change,
    Directed,
    Experts,
    LowRank,
    Offset,
    Replaced,
    Scaled,
    Sparse,
    on_residual,
    sharded,
    with_start,
)
from offprincipal.checkpoints.adapter_config import CONFIG, AdapterConfig, read_settings
from offprincipal.checkpoints.alignment import key_of
from offprincipal.checkpoints.checkpoint import FLOATS, Array, Checkpoint, TensorInfo
from offprincipal.checkpoints.hostile import is_file
from offprincipal.checkpoints.parts import Part, parts_of, stored_transposed
from offprincipal.checkpoints.roles import place_of
from offprincipal.checkpoints.safetensors_file import SafetensorsFile
from offprincipal.checkpoints.torch_files import TorchFile
from offprincipal.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<what>lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|shira_weight|shira_indices|miss_block|ia3_l|trainable_tokens_delta)(?:\.(?!bias$)\w+)*?(?P<bias>\.bias)?"
)
_WRAPPERS = re.compile(r"\.base_layer(?=\.)|\.(?:modules_to_save|ln_tuning_layers)(?:\.default)?(?=\.)")
_INNER = re.compile(r"(?:\.base_layer|\.token_adapter)+$")
_KINDS_OF = {  # kinds of adapters that have such factors
    **dict.fromkeys(("lora_A", "lora_B"), ("LORA", "ADALORA")),
    **dict.fromkeys(("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"), ("LORA",)),
    **dict.fromkeys(("shira_weight", "shira_indices"), ("SHIRA",)),
    "lora_E": ("ADALORA",),
    "miss_block": ("MISS",),
    "ia3_l": ("IA3",),
    "trainable_tokens_delta": ("LORA", "TRAINABLE_TOKENS"),
}
_RECOMPUTABLE = ("pissa", "olora")
_LONGEST_KEY = 300
_ROWS_AT_ONCE = 4096
_KEPT = 8

Factors = dict[str, str]


@dataclass(frozen=True)
class _Adapted:
    """What changes one tensor of the base.

    Args:
        module: what the patterns of ranks are about; factors: what -> key.
        expert: the part of a stack of experts that the tensor is, where the factors are of the stack.
    """

    module: str
    factors: Factors
    expert: Part | None = None


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
            raise CheckpointError(f"{folder} is an adapter whose configuration names no base: give its base too")
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
            adapter.notes.append(f"adapter applied to the given base, {base.source}, though it names {named}")
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
        settings: AdapterConfig,
        file: SafetensorsFile | TorchFile,
        start: str | None = None,
    ) -> None:
        self.folder, self.source, self.base, self.settings, self.start = folder, source, base, settings, start
        self.folders = (folder, *base.folders)
        self.notes: list[str] = [*base.notes, f"{settings.peft_type} adapter on {base.source}, summed in float32"]
        self._file = file
        self._changes: dict[str, _Adapted] = {}
        self._biases: dict[str, tuple[str, str]] = {}
        self._saved: dict[str, str] = {}
        self._heads: dict[str, str] = {}  # heads that the base ties -> its embedding
        self._enter()
        self.tensors: dict[str, TensorInfo] = {name: self._info(name) for name in (*base.tensors, *self._heads)}
        for name, adapted in self._changes.items():
            self._require_fit(name, adapted)
        for name, (_, key) in self._biases.items():
            if file.tensors[key].shape != self.tensors[name].shape:
                raise self._misfit(key, name)
        self._change_of = lru_cache(maxsize=_KEPT)(self._prepare)

    @property
    def files(self) -> list[Path]:
        return [self._file.path, self.folder / CONFIG, *self.base.files]

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
        width = self._width(name)
        first, last = start // width, -(-stop // width)
        with np.errstate(all="ignore"):
            rows = self._change_of(name).of(self._rows(name, first, last), first)
        return np.asarray(rows, np.float32).reshape(-1)[start - first * width : stop - first * width]

    def masters(self) -> None:
        return None

    def on_residual(self, init: str) -> bool:
        """Whether the base is already what an initialisation left of it, judged by the smallest adapted matrix."""
        name = min(self._changes, key=lambda name: self.tensors[name].numel)
        if any(map(self._is_stacked, self._changes)):
            raise CheckpointError(f"{self.folder} is a raw {init} adapter of stacked experts: merge it into its base")
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
                self._enter_saved(key, bare)
            elif match["bias"]:
                name = self._in_base(f"{match['module']}.bias", key)
                self._biases[name] = (match["module"], key)
            else:
                module = match["module"]
                if not self.settings.parameters(_INNER.sub("", module)):
                    module = _INNER.sub("", module)
                factors = found.setdefault(module, {})
                if match["what"] in factors:
                    raise self._twice(module)
                factors[match["what"]] = key
        if not found and not (self._saved and self.settings.peft_type == "LN_TUNING"):
            raise CheckpointError(f"{self._file.path} has no weights of a supported adapter: save it again")
        for module, factors in found.items():
            for name, adapted in self._adapted(module, factors):
                if name in self._changes:
                    raise self._twice(module)
                self._changes[name] = adapted

    def _enter_saved(self, key: str, bare: str) -> None:
        name = _WRAPPERS.sub("", bare)
        if ".original_module." in bare:
            return
        name = self._in_base(name, key)
        if name not in self._saved or ".modules_to_save." in bare:
            self._saved[name] = key

    def _adapted(self, module: str, factors: Factors) -> Iterator[tuple[str, _Adapted]]:
        """The base's tensors that a module's factors change, and how."""
        key, plain = next(iter(factors.values())), _INNER.sub("", module)
        if parameters := self.settings.parameters(plain):
            fitting = [found for name in parameters if (found := self._of_parameter(name, factors))]
            if len(fitting) != 1:
                raise CheckpointError(
                    f"{key} in {self._file.path} fits {len(fitting) or 'none'} of the target_parameters of {plain} in "
                    f"{self.base.source}: give the base it was trained on"
                )
            yield from fitting[0]
            return
        yield self._in_base(f"{plain}.weight", key), _Adapted(plain, factors)
        shape = self._file.tensors[key].shape
        if "ia3_l" in factors and shape[1:] == (1,) and f"{plain}.bias" in self.base.tensors:
            yield f"{plain}.bias", _Adapted(plain, factors)

    def _of_parameter(self, name: str, factors: Factors) -> list[tuple[str, _Adapted]]:
        """The base's tensors that are a parameter or make it up, if the factors are of its shape."""
        if not {"lora_A", "lora_B"} <= factors.keys():
            return []
        A, B = (self._file.tensors[factors[what]].shape for what in ("lora_A", "lora_B"))
        rank = self.settings.rank(name)
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or A[0] % rank:
            return []
        count, outputs, inputs = A[0] // rank, B[0], A[1]
        stored = self._found(name)
        if stored is not None:
            shape = self.base.tensors[stored].shape
            fitting = [(count, outputs, inputs), (count, inputs, outputs)] if len(shape) == 3 else [(outputs, inputs)]
            return [(stored, _Adapted(name, factors))] if tuple(shape) in fitting else []
        found = []
        for part in parts_of(TensorInfo(name, (count, outputs, inputs), "float32"), self.config):
            stored = self._found(part.name)
            if stored is None or tuple(self.base.tensors[stored].shape) != part.matrix_shape:
                return []
            found.append((stored, _Adapted(name, factors, part)))
        return found

    def _in_base(self, name: str, key: str) -> str:
        """What the base calls a tensor; the head's own name where the base ties it to its embedding."""
        found = self._found(name)
        if found is not None:
            return found
        embeddings = [other for other in self.base.tensors if place_of(other).role == "embedding"]
        if place_of(name).role == "head" and len(embeddings) == 1:
            self._heads[name] = embeddings[0]
            return name
        raise CheckpointError(
            f"{self.folder} adapts {name} ({key}), which {self.base.source} has not: give the base it was trained on"
        )

    def _found(self, name: str) -> str | None:
        """What the base calls a tensor: that, or the only one that is the same through wrappers and other layouts."""
        if name in self.base.tensors:
            return name
        alike = self._by_key.get(key_of(name), ())
        return alike[0] if len(alike) == 1 else None

    @cached_property
    def _by_key(self) -> dict[str, list[str]]:
        """The base's tensors by what they are."""
        found: dict[str, list[str]] = {}
        for name in self.base.tensors:
            found.setdefault(key_of(name), []).append(name)
        return found

    def _info(self, name: str) -> TensorInfo:
        key = self._saved.get(name)
        info = self.base.tensors[self._heads.get(name, name)] if key is None else self._file.tensors[key]
        changed = name in self._changes or name in self._biases
        if changed and info.dtype not in FLOATS:
            raise CheckpointError(
                f"{name} in {self.base.source} is stored as {info.dtype}, to which {self.folder} cannot be added: "
                "give the base in bfloat16"
            )
        return TensorInfo(name, info.shape, "float32" if changed else info.dtype)

    def _require_fit(self, name: str, adapted: _Adapted) -> None:
        module, factors = adapted.module, adapted.factors
        shapes = {what: self._file.tensors[key].shape for what, key in factors.items()}
        shape = self.tensors[name].shape
        if any(self.settings.peft_type not in _KINDS_OF[what] for what in shapes):
            raise CheckpointError(f"{module} in {self._file.path} is not of the peft_type that {CONFIG} gives")
        if "shira_weight" in shapes:
            count = shapes["shira_weight"]
            if shapes.get("shira_indices") != (2, *count):
                raise CheckpointError(f"{self._file.path} lacks the places of {module}.shira_weight: save it again")
            return
        if whole := shapes.keys() & {"trainable_tokens_delta", "miss_block", "ia3_l"}:
            if len(shapes) > 1:
                raise self._twice(module)
            if not self._fits(what := whole.pop(), shapes[what], name, module):
                raise self._misfit(factors[what], name)
            return
        embedding, (left, right) = self._names(factors)
        if left not in factors or right not in factors:
            raise CheckpointError(
                f"{self._file.path} has one of {left} and {right} of {module}, not both: save it again"
            )
        if len(shape) < 2:
            raise CheckpointError(f"{self.folder} adapts {name}, which is not a matrix: merge it into its base first")
        B, A = shapes[left], shapes[right]
        if adapted.expert is not None or self._is_stacked(name):
            return  # chosen by its shape
        rank = A[0] if self.settings.peft_type == "ADALORA" else self.settings.rank(module)
        if len(A) != len(shape) or len(B) != len(shape) or A[0] != B[1] or A[0] != rank or set(B[2:]) - {1}:
            raise CheckpointError(
                f"{module} in {self._file.path} has factors {B} and {A}, which are not of the rank {rank} that "
                f"{CONFIG} gives: save the adapter again"
            )
        if self.settings.peft_type == "ADALORA" and "lora_E" not in shapes:
            raise CheckpointError(f"{self._file.path} lacks lora_E of {module}: save the adapter again")
        made = (B[0], *A[1:])
        if made not in ([shape[::-1]] if embedding else [shape, shape[::-1]] if len(shape) == 2 else [shape]):
            raise self._misfit(factors[right], name)
        if "lora_E" in shapes and shapes["lora_E"] != (rank, 1):
            raise self._misfit(factors["lora_E"], name)
        magnitude = shapes.get("lora_magnitude_vector")
        if magnitude is None and self.settings.use_dora:
            raise CheckpointError(f"{self._file.path} lacks lora_magnitude_vector of {module}: save the adapter again")
        if magnitude is not None and (magnitude != (B[0],) or len(shape) != 2):
            raise self._misfit(factors["lora_magnitude_vector"], name)

    def _fits(self, what: str, found: tuple[int, ...], name: str, module: str) -> bool:
        """Whether the one tensor that adapts another is of its shape."""
        shape = self.tensors[name].shape
        if what == "trainable_tokens_delta":
            tokens = self.settings.tokens(module)
            return len(shape) == 2 and found == (len(tokens), shape[1]) and all(0 <= t < shape[0] for t in tokens)
        if what == "miss_block":
            whole = len(found) == 2 and len(shape) == 2 and found[0] > 0 and found[1] > 0
            return whole and shape[0] % found[1] == 0 and found[0] <= shape[1]
        if what == "ia3_l":
            across = found[::-1] if len(shape) == 2 and self._turned(name) else found
            return across == (shape[0], 1) or (len(shape) == 2 and across == (1, shape[1]))
        return False

    def _turned(self, name: str) -> bool:
        """Whether a matrix is stored as (in, out), as PEFT's `fan_in_fan_out` has it."""
        by_type = stored_transposed(self.tensors[name], self.config)  # PEFT writes one `fan_in_fan_out` for all layers
        return bool(self.settings.fan_in_fan_out) if by_type is None else by_type

    def _twice(self, module: str) -> CheckpointError:
        return CheckpointError(f"{self._file.path} adapts {module[:200]} twice: save a single adapter")

    def _misfit(self, key: str, name: str) -> CheckpointError:
        return CheckpointError(
            f"{key} in {self._file.path} is {self._file.tensors[key].shape}, which does not fit {name} of "
            f"{self.base.source}, {self.tensors[name].shape}: give the base it was trained on"
        )

    def _prepare(self, name: str) -> Change:
        if name in self._biases:
            module, key = self._biases[name]
            return Offset(self._float32(key), self._scale(module))
        adapted = self._changes[name]
        factors = adapted.factors
        if adapted.expert is not None:
            return Added(self._of_expert(adapted, adapted.expert))
        if self._is_stacked(name):
            return self._experts(adapted, self._stored_as_in_out(name, adapted))
        if "shira_weight" in factors:
            return self._sparse(name, factors)
        if "trainable_tokens_delta" in factors:
            places = np.array(self.settings.tokens(adapted.module), np.int64)
            return Replaced(places, self._matrix(factors["trainable_tokens_delta"]))
        if "miss_block" in factors:
            outputs, inputs = self.tensors[name].shape
            return sharded(self._matrix(factors["miss_block"]), inputs, outputs)
        if "ia3_l" in factors:
            scales = self._matrix(factors["ia3_l"])
            return Scaled(scales.T if self._turned(name) and len(self.tensors[name].shape) == 2 else scales)
        change = self._low_rank_change(name)
        rows = self.tensors[name].shape[0]
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

    def _is_stacked(self, name: str) -> bool:
        """Whether a tensor of the base is a stack of experts that one pair of factors adapts."""
        return bool(self.settings.parameters(self._changes[name].module.rpartition(".")[0])) and (
            len(self.tensors[name].shape) == 3
        )

    def _stored_as_in_out(self, name: str, adapted: _Adapted) -> bool:
        _, rows, columns = self.tensors[name].shape
        outputs, inputs = (self._file.tensors[adapted.factors[what]].shape for what in ("lora_B", "lora_A"))
        if rows != columns:
            return (rows, columns) != (outputs[0], inputs[1])
        return parts_of(self.tensors[name], self.config)[0].transposed

    def _experts(self, adapted: _Adapted, in_out: bool) -> Experts:
        """The change of a stack: PEFT lays A out as (experts, r, in), and B as (out, r, experts)."""
        A, B = (self._matrix(adapted.factors[what]) for what in ("lora_A", "lora_B"))
        rank = self.settings.rank(adapted.module)
        A, B = A.reshape(-1, rank, A.shape[1]), B.reshape(len(B), rank, -1).transpose(2, 0, 1)
        left, right = (A.swapaxes(1, 2), B.swapaxes(1, 2)) if in_out else (B, A)
        return Experts(np.ascontiguousarray(left), np.ascontiguousarray(right), self._scale(adapted.module))

    def _of_expert(self, adapted: _Adapted, part: Part) -> Array:
        """What is added to one expert's matrix that the base stores by itself."""
        experts = self._experts(adapted, in_out=False)
        height, width = experts.left.shape[1], experts.right.shape[2]
        first = part.start // (height * width) * height
        whole = experts.of(np.zeros((height, width), np.float32), first).reshape(-1)
        return part.of(whole[part.start - first * width : part.stop - first * width])

    def _low_rank_change(self, name: str) -> LowRank:
        adapted = self._changes[name]
        B, A = (self._matrix(adapted.factors[what]) for what in self._names(adapted.factors)[1])
        if "lora_E" in adapted.factors:
            A = A * self._matrix(adapted.factors["lora_E"])
        factors = (A.T, B.T) if self._transposed(name) else (B, A)
        return LowRank(*factors, self._scale(adapted.module))

    def _matrix(self, key: str) -> Array:
        """A factor, as rows; what a convolution's has beyond two dimensions counts as columns."""
        shape = self._file.tensors[key].shape
        return self._float32(key).reshape(shape[0], -1)

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
        factors = self._changes[name].factors
        embedding, (left, right) = self._names(factors)
        out, width = self._file.tensors[factors[left]].shape[0], self._file.tensors[factors[right]].shape[1]
        if len(self.tensors[name].shape) > 2:
            return False
        if embedding or out != width:
            return embedding or self.tensors[name].shape != (out, width)
        return self._turned(name)

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
        if key is not None:
            return self._file.read(key, start, stop)
        return self.base.read(self._heads.get(name, name), start, stop)

    def _width(self, name: str) -> int:
        """Entries of a row: of a stack's matrices, of a matrix, of a convolution's filters, one of a vector."""
        shape = self.tensors[name].shape
        return shape[-1] if name in self._changes and self._is_stacked(name) else math.prod(shape[1:])

    def _rows(self, name: str, first: int, last: int) -> Array:
        width = self._width(name)
        return self._stored(name, first * width, last * width).astype(np.float32).reshape(-1, width)

    def _float32(self, key: str) -> Array:
        if self._file.tensors[key].dtype not in FLOATS:
            raise CheckpointError(f"{key} in {self._file.path} has no floating-point numbers: save the adapter again")
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
        named.notes.append(
            f"raw {init} adapter: {named.base.source}, which it names, is assumed to be its residual base"
        )
        return named
    raise CheckpointError(
        f"{given.folder} is a raw {init} adapter, which applies to the residual that its initialisation left of the "
        f"base, and {given.base.source} is not that: save it with path_initial_model_for_weight_conversion, or merge it"
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
