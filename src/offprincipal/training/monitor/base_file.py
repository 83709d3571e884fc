"""The file in which a monitor keeps the model before training, so that a resumed run is measured against it."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from offprincipal.errors import FileError
from offprincipal.files import write_atomically
from offprincipal.training.monitor.divergence import PaddedSequences

NAME = "monitor.base.safetensors"
_WEIGHT, _IDS, _LENGTHS, _COUNTED, _LOG_P = "weight:", "ids", "lengths", "counted", "log_probabilities"


@dataclass
class Remembered:
    """What a monitor keeps of the base of a run.

    Args:
        weights: name -> watched matrix, (n, m).
        sequences: on which divergences are measured; None: they are not measured.
        log_p: (positions, vocabulary), the base's log-probabilities at the counted tokens of the sequences.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    sequences: PaddedSequences | None = None
    log_p: Tensor | None = None

    def write(self, folder: Path) -> None:
        """Write the file into a folder.

        Raises:
            FileError: the file cannot be written.
        """
        tensors = {_WEIGHT + name: weight for name, weight in self.weights.items()}
        if self.sequences is not None and self.log_p is not None:
            tensors |= {_IDS: self.sequences.ids, _LENGTHS: self.sequences.lengths, _COUNTED: self.sequences.counted}
            tensors[_LOG_P] = self.log_p
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(folder / NAME, partial(save_file, on_cpu))


def remembered(folder: Path, names: list[str]) -> Remembered:
    """Read the base that a monitor kept in a folder.

    Args:
        folder: of the monitor.
        names: of the matrices that are watched now.

    Raises:
        FileError: the file cannot be read, or holds other matrices.
    """
    path = folder / NAME
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"cannot read {path}, the base that a continued run is measured against: {error}. Monitor the run from its "
            "first step on, or call start() with the base model before training"
        ) from error
    weights = {name.removeprefix(_WEIGHT): tensor for name, tensor in tensors.items() if name.startswith(_WEIGHT)}
    if sorted(weights) != sorted(names):
        raise FileError(
            f"{path} holds other matrices than are watched now: choose the same matrices, or another folder"
        )
    if _LOG_P not in tensors:
        return Remembered(weights)
    return Remembered(weights, PaddedSequences(tensors[_IDS], tensors[_LENGTHS], tensors[_COUNTED]), tensors[_LOG_P])
