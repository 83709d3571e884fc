"""The work of a comparison: opened checkpoints, the plan over their tensors, and the rows of one tensor at a time.

A `Work` is made anew from sources and settings wherever tensors are measured: in threads of this process, or in workers
on other machines.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from offprincipal.checkpoints import (
    Array,
    Checkpoint,
    Pairing,
    Part,
    TensorInfo,
    open_checkpoint,
    pair_tensors,
    parts_of,
)
from offprincipal.checkpoints.checkpoint import same_bits
from offprincipal.checkpoints.masters import open_masters, require_all_masters
from offprincipal.comparison.cache import BaseCache
from offprincipal.comparison.measure import TensorRows, measure_matrix, measure_tensor
from offprincipal.errors import CheckpointError, NonFiniteTensor
from offprincipal.geometry.bits import require_storable
from offprincipal.measures.changes import Block
from offprincipal.measures.columns import decomposes_base
from offprincipal.measures.compare_settings import CompareSettings
from offprincipal.measures.contract import require_matches

_LINE = 1 << 12  # entries per row when a tensor that is not a matrix is laid out in rows
_BLOCK = 1 << 20  # entries of it that are read at once


@dataclass(frozen=True)
class Work:
    """The checkpoints to compare, and how to compare them.

    Args:
        base: source of the base; tuned: run name -> source; as for `open_checkpoint`.
        cache: folder of the cache of base decompositions; None for no cache.
        given_masters: run name -> source of its float32 masters, if they are not in the run's folder.

    Raises:
        CheckpointError: on first use, if a checkpoint cannot be read or the tensors do not match.
    """

    base: Any
    tuned: Mapping[str, Any]
    settings: CompareSettings
    cache: Path | None = None
    given_masters: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def base_checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.base)

    @cached_property
    def runs(self) -> dict[str, Checkpoint]:
        return {name: open_checkpoint(source, self.base_checkpoint) for name, source in self.tuned.items()}

    @cached_property
    def masters(self) -> dict[str, Checkpoint]:
        """Run name -> float32 masters, if they were given or kept."""
        found = {}
        for name, run in self.runs.items():
            source = self.given_masters.get(name)
            masters = run.masters() if source is None else open_masters(source, self.base_checkpoint)
            if masters is not None:
                found[name] = masters
        return found

    @property
    def in_memory(self) -> bool:
        """Whether a side of it is a model that is open here, which no other process sees."""
        return not all(isinstance(source, str | Path) for source in (self.base, *self.tuned.values()))

    @property
    def files(self) -> list[Path]:
        """Every local file that is read."""
        checkpoints = (self.base_checkpoint, *self.runs.values(), *self.masters.values())
        return list(dict.fromkeys(path for checkpoint in checkpoints for path in checkpoint.files))

    @cached_property
    def notes(self) -> dict[str, list[str]]:
        """Run name -> warnings about how it was read and paired."""
        own = self.base_checkpoint.notes
        notes = {name: [*own, *run.notes, *self._pairings[name].notes] for name, run in self.runs.items()}
        return {name: list(dict.fromkeys(said)) for name, said in notes.items()}

    @cached_property
    def parts(self) -> list[Part]:
        """Every floating-point part that all checkpoints have."""
        parts = [
            part
            for info in self.common.values()
            if info.floating
            for part in parts_of(info, self.base_checkpoint.config)
        ]
        if not parts:
            raise CheckpointError(
                f"{self.base_checkpoint.source} has no floating-point tensors: there is nothing to compare"
            )
        for name in (part.name for part in parts):
            if name.encode("utf-8", "replace").decode() != name:
                source = self.base_checkpoint.source
                raise CheckpointError(f"{source} names a tensor {name[:80]!r}, which is not text. Do not trust it")
        packed = [name for run in self.runs for name in self.packed(run)] if self.settings.expect else []
        alone = [*self.only_in_base, *(name for run in self.runs for name in self.only_in_run(run))]
        require_matches(self.settings.contract, [*(part.name for part in parts), *packed, *alone])
        return parts

    def is_linear(self, part: Part) -> bool:
        """Whether a part is measured and pooled as a linear matrix."""
        return part.is_matrix if self.settings.include_embeddings else part.is_linear

    def measure(self, part: Part, known: Collection[str] = ()) -> TensorRows:
        """All rows of one part.

        Args:
            known: runs whose own rows are known.

        Raises:
            CheckpointError: it cannot be read, holds NaN or infinity, or masters are another checkpoint's.
        """
        try:
            linear = self.is_linear(part)
            if not linear or self.settings.metrics == ("changes",):
                blocks = {run: partial(self._blocks, part, run) for run in self.runs if run not in known}
                return measure_tensor(part, blocks, self.settings.metrics, linear)
            return self._measure_matrix(part, known)
        except NonFiniteTensor as error:
            raise self.not_finite(part, error) from error

    def called(self, run: str) -> str:
        """The name of a run in messages."""
        return run

    def not_finite(self, part: Part, error: NonFiniteTensor) -> CheckpointError:
        """In which checkpoint a part cannot be measured, and where in it; of masters alone, as `error` says."""
        advice = "Check how it was trained or converted"
        runs = {self.called(run): checkpoint for run, checkpoint in self.runs.items()}
        for who, checkpoint in {"the base": self.base_checkpoint, **runs}.items():
            try:
                require_storable(self.read(checkpoint, part))
            except NonFiniteTensor as found:
                alone = "" if who == "the base" else f", or omit {who}"
                return CheckpointError(f"{part.name} of {who} ({checkpoint.source}): {found}. {advice}{alone}")
        return CheckpointError(f"{part.name}: {error}. {advice}")

    def _measure_matrix(self, part: Part, known: Collection[str]) -> TensorRows:
        read = {run: self.read(checkpoint, part) for run, checkpoint in self.runs.items()}
        masters = {run: self.read(checkpoint, part) for run, checkpoint in self.masters.items()}
        weight = self.read(self.base_checkpoint, part)
        matrix = self.settings.matrix
        cache = BaseCache(self.cache) if self.cache else None
        measure = partial(measure_matrix, part, weight, read, masters, self.settings.metrics, known=known)
        if matrix.device == "cpu":
            return measure(settings=matrix, cache=cache)
        import torch

        try:
            return measure(settings=matrix, cache=cache)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            found = measure(settings=replace(matrix, device="cpu"), cache=cache)
            return replace(found, fallbacks=dict.fromkeys(self.runs.keys() - set(known), "memory"))

    def bytes_needed(self, part: Part) -> int:
        """Upper bound on the memory for measuring one tensor, in addition to that of every comparison.

        Measured on matrices of 1 to 45 million entries (`benchmarks/RESULTS.md`, e), and rounded up. It decides how
        many are measured at once, never how.
        """
        if not self.is_linear(part) or self.settings.metrics == ("changes",):
            return 1 << 26  # read in blocks
        if decomposes_base(self.settings.metrics):
            entry, each = 48, 8
        elif "update" in self.settings.metrics:
            entry, each = 18, 8
        else:
            entry, each = 10, 6
        return part.numel * (entry + (each + 2) * len(self.runs) + 12 * len(self.masters))

    def read(self, checkpoint: Checkpoint, part: Part) -> Array:
        """A part as one checkpoint stores it."""
        return part.of(checkpoint.read(self.stored_as(checkpoint, part.tensor), part.start, part.stop))

    def kept(
        self, run: str, rows: Sequence[Mapping[str, Any]], packed: Sequence[str], differing: Sequence[str]
    ) -> list[dict[str, Any]]:
        """The contract, checked for a run.

        Args:
            rows: of `matrices.parquet`, that run's; packed, differing: as `unmeasured` gives them.
        """
        if not self.settings.expect:
            return []
        alone = dict.fromkeys(self._pairings[run].only_in_base, "in the base alone")
        alone |= dict.fromkeys(self.only_in_run(run), "in the run alone")
        compared = {part.tensor for part in self.parts}
        alone |= {name: "not in every run" for name in self.only_in_base if name not in alone and name not in compared}
        same = {name: name not in differing for name in packed}
        return [expectation.judge(rows, alone, same) for expectation in self.settings.contract]

    def unmeasured(self, run: str) -> tuple[list[str], list[str]]:
        """Tensors without floating-point numbers, which are not measured: all of them, and those whose bits differ.

        They include packed weights, so a checkpoint whose measured tensors equal the base's may still differ.
        """
        base, tuned, names = self.base_checkpoint, self.runs[run], self.packed(run)
        return names, [name for name in names if not self._same_bits(base, tuned, name)]

    def packed(self, run: str) -> list[str]:
        """Tensors of both sides without floating-point numbers."""
        theirs = self.runs[run].tensors
        return [name for name, info in self.base_checkpoint.tensors.items() if not info.floating and name in theirs]

    @staticmethod
    def _same_bits(base: Checkpoint, tuned: Checkpoint, name: str) -> bool:
        try:
            return same_bits(base.tensors[name], tuned.tensors[name], base.read, tuned.read)
        except CheckpointError:  # an unsupported type: tensors not known to be equal count as different
            return False

    def _blocks(self, part: Part, run: str) -> Iterator[Block]:
        masters = self.masters.get(run)
        sides = [self.base_checkpoint, self.runs[run], *([masters] if masters else [])]
        if part.numel != part.stop - part.start or not part.numel:  # interleaved with others, or empty
            yield _block([self.read(side, part).reshape(1, -1) for side in sides])
            return
        for start in range(part.start, part.stop, _BLOCK):
            stop = min(start + _BLOCK, part.stop)
            read = [side.read(self.stored_as(side, part.tensor), start, stop) for side in sides]
            whole = len(read[0]) // _LINE * _LINE
            if whole:
                yield _block([entries[:whole].reshape(-1, _LINE) for entries in read])
            if whole < len(read[0]):
                yield _block([entries[whole:].reshape(1, -1) for entries in read])

    @cached_property
    def _pairings(self) -> dict[str, Pairing]:
        base = self.base_checkpoint
        found = {name: pair_tensors(base, run, self.settings.strict) for name, run in self.runs.items()}
        for name, masters in self.masters.items():
            require_all_masters(self.runs[name], masters, found[name].tensors)
        return found

    @property
    def only_in_base(self) -> list[str]:
        """Tensors of the base that some run lacks, so that they are not compared in any."""
        alone = {name for pairing in self._pairings.values() for name in pairing.only_in_base}
        return [name for name in self.base_checkpoint.tensors if name in alone]

    def only_in_run(self, run: str) -> list[str]:
        """Tensors of a run that the base lacks."""
        return list(self._pairings[run].only_in_tuned)

    def left_out(self, run: str) -> list[str]:
        """Floating-point tensors that a run shares with the base but another run lacks, which are not compared."""
        return [name for name, info in self._pairings[run].tensors.items() if info.floating and name not in self.common]

    @cached_property
    def common(self) -> dict[str, TensorInfo]:
        """The base's tensors that every run has, with the rows that all of them have."""
        paired = [pairing.tensors for pairing in self._pairings.values()]
        names = {name: None for tensors in paired for name in tensors}
        found = {name: [tensors[name] for tensors in paired if name in tensors] for name in names}
        return {
            name: min(infos, key=lambda info: info.numel)
            for name, infos in found.items()
            if len(infos) == len(paired) or name in self._tied
        }

    @cached_property
    def _tied(self) -> dict[str, str]:
        """Heads that some checkpoint stores and another does not -> the embedding that stands for it there."""
        return {head: name for pairing in self._pairings.values() for head, name in pairing.tied.items()}

    def stored_as(self, checkpoint: Checkpoint, name: str) -> str:
        """The name of the tensor that a checkpoint stores for a name; its embedding for a tied head."""
        return name if name in checkpoint.tensors else self._tied[name]


def _block(sides: list[Array]) -> Block:
    return Block(sides[0], sides[1], sides[2] if len(sides) > 2 else None)
