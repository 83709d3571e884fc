"""Make a delta between two checkpoints, and apply one: tensor by tensor, losslessly, checked by hashes of both."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from offprincipal.checkpoints import Checkpoint, TensorInfo, open_checkpoint
from offprincipal.checkpoints.adapter import Adapter
from offprincipal.checkpoints.alignment import key_of
from offprincipal.checkpoints.checkpoint import FLOATS, INTEGERS
from offprincipal.checkpoints.delta import (
    FORMAT,
    SUFFIX,
    VERSION,
    DeltaFile,
    Entry,
    Index,
    Stored,
    as_stored,
    digest,
)
from offprincipal.checkpoints.delta_codec import compressed, encode
from offprincipal.checkpoints.hostile import is_file
from offprincipal.checkpoints.opening import is_adapter_alone
from offprincipal.checkpoints.safetensors_folder import INDEX, WEIGHTS
from offprincipal.checkpoints.writing import Progress, as_tensor, files_beside, write_model
from offprincipal.errors import ArgumentError, CheckpointError
from offprincipal.files import exclusively, new_folder, require_folder, sweep, write_atomically

FORMATS = ("delta", "sparse-safetensors")
_STORED = FLOATS | INTEGERS


@dataclass(frozen=True)
class Made:
    """The size of a delta.

    Args:
        path: the file.
        bytes: its size; whole: the size of the tuned weights.
        entries, changed: number of entries, and of changed entries, in the tensors that both sides have.
        places, values: bits per changed entry for its index and for its value; None if nothing changed.
    """

    path: Path
    bytes: int
    whole: int
    entries: int
    changed: int
    places: float | None
    values: float | None


def make_delta(
    base: str | Path, tuned: str | Path, out: str | Path, format: str = "delta", *, progress: Progress | None = None
) -> Made:
    """Write the changes from a base to a checkpoint tuned from it into one file.

    Args:
        base, tuned: any checkpoints that `offprincipal compare` opens.
        out: the file; its name ends in `.delta`, or in `.safetensors` for the other format.
        format: `delta`, or `sparse-safetensors`: `NAME.idx` (int32, flat indices) and `NAME.val` of the changed
            entries, as TRL exchanges weights with vLLM; without hashes, and without tensors that the base lacks.
        progress: called with entries done, entries in all, and the tensor's name.

    Raises:
        CheckpointError: a checkpoint cannot be read, the two have no tensor in common, or `tuned` is an adapter.
        ArgumentError: the format is unknown, or the name of `out` has another ending.
        FileError: the file cannot be written.

    >>> import tempfile
    >>> from offprincipal.assets import embedded_base
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = make_delta(embedded_base(), embedded_base(), Path(folder) / "same.delta")
    >>> made.changed, made.bytes < made.whole / 100
    (0, True)
    """
    path = Path(out)
    if format not in FORMATS:
        raise ArgumentError(f"no format '{format}': choose one of {', '.join(FORMATS)}")
    ends = SUFFIX if format == "delta" else ".safetensors"
    if path.suffix != ends:
        raise ArgumentError(f"--out {path} has another ending than {ends}: give a file name that ends in {ends}")
    require_folder(path.parent)
    if is_adapter_alone(Path(tuned)):
        raise _of_an_adapter(tuned)
    opened = open_checkpoint(base)
    run = open_checkpoint(tuned)
    if isinstance(run, Adapter):
        raise _of_an_adapter(tuned)
    sides = as_stored(opened), as_stored(run)
    if not {key_of(name) for name in sides[0].tensors} & {key_of(name) for name in sides[1].tensors}:
        raise CheckpointError(
            f"no tensor of {run.source} has the name of one of {opened.source}: is this the base it was trained from?"
        )
    write = _write_delta if format == "delta" else _write_sparse
    with exclusively(path, beside=True):
        sweep(path.parent, path.name)
        return write(path, opened, run, sides, progress)


def apply_delta(
    base: str | Path, delta: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Path:
    """Restore the tuned checkpoint from a base and a delta, as a Hugging Face folder; on failure nothing is written.

    Args:
        base: the checkpoint that the delta was made from.
        delta: a `.delta` file.
        out: the folder.
        overwrite: replace a model in the folder.
        progress: called with entries done, entries in all, and the tensor's name.

    Returns:
        The folder.

    Raises:
        ArgumentError: `delta` is not a `.delta` file.
        CheckpointError: the base is not the one that the delta was made from, or the delta is damaged.
        FileError: the folder cannot be written.

    >>> import tempfile
    >>> from offprincipal.assets import embedded_base
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = make_delta(embedded_base(), embedded_base(), Path(folder) / "same.delta")
    ...     model = apply_delta(embedded_base(), made.path, Path(folder) / "model")
    ...     (model / "config.json").is_file()
    True
    """
    folder, path = Path(out), Path(delta)
    if path.suffix != SUFFIX or not is_file(path):
        raise ArgumentError(f"{path} is not a {SUFFIX} file")
    opened = open_checkpoint(base)
    file = DeltaFile(path, as_stored(opened))
    with new_folder(folder, (WEIGHTS, INDEX), overwrite, (*opened.folders, path.parent), "a model") as made:
        write_model(made, file.tensors, file.read, {name: file.text(name) for name in file.index.files}, progress)
    return folder


def _of_an_adapter(source: str | Path) -> CheckpointError:
    return CheckpointError(
        f"{source} is an adapter, which is smaller than a delta of what it makes: share it as it is, or give the model "
        "with the adapter merged into it (merge_and_unload, save_pretrained)"
    )


def _write_delta(
    path: Path, base: Checkpoint, run: Checkpoint, sides: tuple[Stored, Stored], progress: Progress | None
) -> Made:
    entries: dict[str, Entry] = {}
    blobs: dict[str, bytes] = {}
    counts = dict.fromkeys(("entries", "changed", "places", "values", "whole"), 0)
    for number, (info, source, before, after) in enumerate(_pairs(sides, progress)):
        encoded = encode(after, before, info.dtype)
        blobs |= {f"{number}.{part}": content for part, content in encoded.parts.items()}
        entries[info.name] = Entry(
            shape=list(info.shape),
            dtype=info.dtype,
            kind=encoded.kind,
            changed=encoded.changed,
            source=source,
            base=None if before is None else digest(before, info),
            tuned=digest(after, info),
        )
        counts["whole"] += after.nbytes
        if before is not None:
            counts["entries"] += info.numel
            counts["changed"] += encoded.changed
            places = sum(len(encoded.parts.get(part, b"")) for part in ("classes", "gaps"))
            counts["places"] += 8 * places
            counts["values"] += 8 * (encoded.size - places)
    files = files_beside(run)
    blobs |= {f"file.{name}": compressed(content) for name, content in files.items()}
    sizes = {name: len(content) for name, content in files.items()}
    index = Index(base=base.source, tuned=run.source, tensors=entries, files=sizes)
    metadata = {"format": FORMAT, "version": VERSION, "index": index.model_dump_json(exclude_none=True)}
    _write_bytes(path, blobs, metadata)
    changed = counts["changed"]
    bits = (counts[what] / changed if changed else None for what in ("places", "values"))
    return Made(path, path.stat().st_size, counts["whole"], counts["entries"], changed, *bits)


def _write_sparse(
    path: Path, base: Checkpoint, run: Checkpoint, sides: tuple[Stored, Stored], progress: Progress | None
) -> Made:
    tensors: dict[str, torch.Tensor] = {}
    entries, changed, whole = 0, 0, 0
    for info, source, before, after in _pairs(sides, progress):
        if before is None or source != info.name:
            raise CheckpointError(
                f"{base.source} has no {info.name} of that shape and type: use --format delta, which can store it"
            )
        places = np.flatnonzero(before.view(f"u{before.dtype.itemsize}") != after.view(f"u{after.dtype.itemsize}"))
        entries, changed, whole = entries + info.numel, changed + len(places), whole + after.nbytes
        if info.numel > 2**31:
            raise CheckpointError(f"{info.name} has too many entries for 32-bit indices: use --format delta")
        if len(places):
            tensors[f"{info.name}.idx"] = torch.from_numpy(places.astype(np.int32))
            tensors[f"{info.name}.val"] = as_tensor(after[places], info.dtype, (len(places),))
    about = {
        "sparse": True,
        "model_version": 0,
        "num_changed_params": len(tensors) // 2,
        "total_changed_elements": changed,
        "total_elements": entries,
        "sparsity": 1 - changed / max(entries, 1),
        "encoding": "raw",
    }
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    write_atomically(path, lambda part: _save(tensors, part, metadata))
    return Made(path, path.stat().st_size, whole, entries, changed, 32.0 if changed else None, None)


def _pairs(
    sides: tuple[Stored, Stored], progress: Progress | None
) -> Iterator[tuple[TensorInfo, str | None, Any, Any]]:
    """Every tensor of the tuned side, with the base's tensor of the same (or an equivalent) name, shape and type."""
    base, tuned = sides
    alike: dict[str, list[str]] = {}
    for name in base.tensors:
        alike.setdefault(key_of(name), []).append(name)
    total, done = sum(info.numel for info in tuned.tensors.values()), 0
    for name, info in tuned.tensors.items():
        if info.dtype not in _STORED:
            raise CheckpointError(f"{name} has type {info.dtype}, which deltas cannot store: convert it first")
        named = [name] if name in base.tensors else alike.get(key_of(name), [])
        source = named[0] if len(named) == 1 else None
        if source is not None:
            theirs = base.tensors[source]
            source = source if (theirs.shape, theirs.dtype) == (info.shape, info.dtype) else None
        yield info, source, None if source is None else base.read(source), tuned.read(name)
        done += info.numel
        if progress:
            progress(done, total, name)


def _write_bytes(path: Path, blobs: dict[str, bytes], metadata: dict[str, str]) -> None:
    tensors = {
        name: as_tensor(np.frombuffer(content, np.uint8), "uint8", (len(content),)) for name, content in blobs.items()
    }
    write_atomically(path, lambda part: _save(tensors, part, metadata))


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write safetensors with sorted metadata: the library's own order differs from process to process."""
    save_file(tensors, path, metadata)
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))
