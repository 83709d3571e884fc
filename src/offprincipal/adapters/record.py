"""The settings of an adapter in a JSON file next to the plain LoRA adapter, so that training can be resumed.

PEFT and vLLM ignore the file. Knows nothing of models or mathematics.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from offprincipal.errors import AdapterError, FileError
from offprincipal.files import read_json, write_json

RECORD = "offprincipal_adapter.json"
WEIGHTS = "adapter_model.safetensors"
SCHEMA = 1


@dataclass(frozen=True)
class AdapterRecord:
    """The settings of one adapter and the hash of its base.

    Args:
        method, rank, alpha, dropout, seed: as in `adapt`.
        rank_fraction, density: as in `adapt`; None if the method does not use them.
        modules: names of the adapted modules, sorted.
        base_blake2b: hash of the base weights of these modules.
    """

    method: str
    rank: int
    alpha: float
    dropout: float
    seed: int
    rank_fraction: float | None
    density: float | None
    modules: tuple[str, ...]
    base_blake2b: str

    def content(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {"schema": SCHEMA, **asdict(self), "modules": list(self.modules)}


@dataclass
class RecordedLoraConfig(LoraConfig):
    """A plain LoRA configuration whose `save_pretrained` also writes the record; it has exactly PEFT's fields."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.record: AdapterRecord | None = None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        if self.record is not None:
            write_json(Path(save_directory) / RECORD, self.record.content())


def read_adapter(folder: Path, record: AdapterRecord, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read the tensors of a saved adapter, after a check that it has these settings and this base.

    Args:
        folder: that `save_pretrained` wrote.
        record: the settings and base that it must have.
        shapes: tensor name -> shape, of all tensors that it must hold.

    Returns:
        Tensor name -> tensor.

    Raises:
        AdapterError: its settings, base or tensors are others, or the folder holds no adapter with a record.
    """
    try:
        content = read_json(folder / RECORD)
    except FileError as error:
        raise AdapterError(f"cannot resume from {folder}: {error}") from error
    asked = record.content()
    for name in [*asked, *sorted(content.keys() - asked.keys())]:
        if content.get(name) != asked.get(name):
            raise AdapterError(_difference(folder, name, content.get(name), asked.get(name)))
    try:
        tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if ".lora_" in name}
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot resume from {folder}: its {WEIGHTS} cannot be read: {error}") from error
    wrong = shapes.items() ^ {name: tuple(tensor.shape) for name, tensor in tensors.items()}.items()
    if wrong:
        name = min(wrong)[0]
        raise AdapterError(
            f"cannot resume from {folder}: {name} in {WEIGHTS} is absent, unexpected or of another shape"
        )
    return tensors


def _difference(folder: Path, name: str, saved: Any, asked: Any) -> str:
    if name == "base_blake2b":
        return f"the adapter in {folder} was made for another base: load the weights that it started from"
    if name == "modules":
        return f"the adapter in {folder} is on other modules: give the target_modules that it was made with"
    shown = str(saved)[:60]
    return (
        f"the adapter in {folder} was made with {name} {shown}, not {asked}: resume with its settings, or start again"
    )
