"""The trained part of a model and its optimizer: all weights, masked entries, an adapter, or singular frames.

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
    """The model and the optimizer for a trainer.

    Args:
        model: a transformers model, or a PEFT model around it.
        base_parameters: number of parameters of the base.
        optimizer: None: the trainer's own AdamW.
        masks: of the entries that are trained; None: no mask.
    """

    model: Any
    base_parameters: int
    optimizer: Optimizer | None = None
    masks: Masks | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether a PEFT adapter is trained, so that the base does not change."""
        return hasattr(self.model, "peft_config")

    @property
    def parameters(self) -> int:
        """The number of trained parameters: weights, active entries of masks, or parameters of an adapter."""
        if self.masks is not None:
            return sum(map(self.masks.active, self.masks))
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def as_base(self) -> AbstractContextManager[Any]:
        """A context in which the adapter, if there is one, is disabled."""
        context: AbstractContextManager[Any] = self.model.disable_adapter() if self.is_adapter else nullcontext()
        return context

    def merged(self) -> Any:
        """The trained model as a plain transformers model; an adapter is merged into its base and then gone."""
        return self.model.merge_and_unload() if self.is_adapter else self.model

    def save_parts(self, folder: Path, base: str) -> None:
        """Write the adapter or the masks, which the merged model does not contain.

        Args:
            folder: to write into.
            base: the name that the adapter's configuration records as its base: the one that the user gave, not a
                folder of this machine.
        """
        if self.is_adapter:
            for config in self.model.peft_config.values():
                config.base_model_name_or_path = base
            self.model.save_pretrained(folder / ADAPTER)
            (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        if self.masks is not None:
            self.masks.save(folder / MASKS)


@dataclass(frozen=True)
class RunModels:
    """The models of a run.

    Args:
        base: the model and its tokenizer, float32; an adapter is inserted into it in place.
        trained: the part that is trained.
        teacher: the model that the recipe learns from, float32, with the base's vocabulary; None without one.
    """

    base: LanguageModel
    trained: Trained
    teacher: LanguageModel | None = None


def prepare(settings: TrainSettings, model: Any) -> Trained:
    """Choose the trained part of an open base; an adapter is inserted in place.

    Args:
        settings: of the run.
        model: the base, a transformers model.

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
    """Masked entries, as a SHiRA adapter or by `SparseAdamW`."""
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
