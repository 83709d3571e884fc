"""What of a model is trained, and by which optimizer: all of it, masked entries, an adapter, or singular frames.

Knows models and the package's adapters; knows nothing of tasks, trainers or folders.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from offprincipal.adapter_methods import ADAPTER_METHODS
from offprincipal.adapters import Masks, SparseAdamW, adapt, make_masks, shira
from offprincipal.defaults import DENSITY
from offprincipal.models import LanguageModel, model_name
from offprincipal.training.adapter_settings import AdapterSettings
from offprincipal.training.settings import TrainSettings

ADAPTER = "adapter"
MASKS = "masks.safetensors"


@dataclass(frozen=True)
class Trained:
    """What a trainer is given.

    Args:
        model: a transformers model, or a PEFT model around it.
        base_parameters: how many numbers the base has.
        optimizer: None: the trainer's own AdamW.
        masks: which entries are trained; None: no mask.
    """

    model: Any
    base_parameters: int
    optimizer: Optimizer | None = None
    masks: Masks | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether a PEFT adapter is trained, and the base is left as it is."""
        return hasattr(self.model, "peft_config")

    @property
    def parameters(self) -> int:
        """How many numbers are trained: weights, active entries of masks, or those of an adapter."""
        if self.masks is not None:
            return sum(map(self.masks.active, self.masks))
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def as_base(self) -> AbstractContextManager[Any]:
        """While it lasts, the model answers as its base."""
        found: AbstractContextManager[Any] = self.model.disable_adapter() if self.is_adapter else nullcontext()
        return found

    def merged(self) -> Any:
        """The plain transformers model that acts as what was trained; an adapter is used up by it."""
        return self.model.merge_and_unload() if self.is_adapter else self.model

    def save_parts(self, folder: Path, base: str) -> None:
        """Write what a plain model cannot tell: the adapter, or the masks.

        Args:
            base: what the adapter names as its base, so that it names no folder of this machine that nobody gave.
        """
        if self.is_adapter:
            for config in self.model.peft_config.values():
                config.base_model_name_or_path = base
            self.model.save_pretrained(folder / ADAPTER)
            (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a card
        if self.masks is not None:
            self.masks.save(folder / MASKS)


@dataclass(frozen=True)
class RunModels:
    """The models of a run.

    Args:
        base: the model and its tokenizer, float32; an adapter was put into it in place.
        trained: what is trained of it.
        teacher: of `distill`, float32, with the base's vocabulary.
    """

    base: LanguageModel
    trained: Trained
    teacher: LanguageModel | None = None


def prepare(settings: TrainSettings, model: Any) -> Trained:
    """What is trained of an open base, which an adapter is put into in place.

    Raises:
        AdapterError: the method does not cover the model, or a setting does not fit it; the model is unchanged then.
    """
    chosen = settings.adapter
    numel = sum(p.numel() for p in model.parameters())
    if chosen is None:
        return Trained(model, numel)
    given = chosen.model_dump(exclude_none=True)
    name = given.pop("method")
    method = ADAPTER_METHODS[name]
    if method.trains == "factors":
        return Trained(adapt(model, name, seed=settings.seed, **given), numel)
    optimizer: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.adam_betas,
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }
    if method.trains == "frames":
        return Trained(model, numel, method.code()(model, **optimizer, **given))
    return _masked(settings, chosen, Trained(model, numel), optimizer)


def _masked(settings: TrainSettings, chosen: AdapterSettings, base: Trained, optimizer: dict[str, Any]) -> Trained:
    model = base.model
    options = chosen.model_dump(exclude_none=True, exclude={"method", "mask", "density", "mask_run", "mask_file"})
    options["seed"] = settings.seed
    if chosen.mask_run is not None:
        options["run"] = (model_name(settings.model), chosen.mask_run)
    if chosen.method == "shira":
        return replace(base, model=shira(model, chosen.kind, chosen.density or DENSITY, **options))
    if chosen.mask_file is not None:
        masks = Masks.load(chosen.mask_file, model)
    else:
        masks = make_masks(model, chosen.kind, chosen.density, **options)
    masks.freeze_others(model)
    return replace(base, optimizer=SparseAdamW(model.named_parameters(), masks, **optimizer), masks=masks)
