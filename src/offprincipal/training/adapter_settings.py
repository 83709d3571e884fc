"""Settings of runs that do not train all weights: the adapter method and its options."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from offprincipal.adapter_methods import ADAPTER_METHODS
from offprincipal.adapters import KINDS, Kind
from offprincipal.adapters.choosing import Scope
from offprincipal.defaults import RANK, RANK_FRACTION
from offprincipal.errors import TrainingError, meant
from offprincipal.foreign_names import setting_called
from offprincipal.plain_settings import NestedSettings


class AdapterSettings(NestedSettings):
    """An adapter method and its settings; settings that are None have the defaults of the function in `adapters`.

    The description of each field says what it means; `train --list settings` prints them.

    Raises:
        TrainingError: the method is unknown, does not use a setting, or a value is out of range.

    >>> AdapterSettings(method="off_principal", rank=16).model_dump()
    {'method': 'off_principal', 'rank': 16}
    """

    called: ClassVar = "settings of the adapter"
    under: ClassVar = "adapter."
    refusal: ClassVar = TrainingError

    method: str = Field(description="what is trained; `train --list adapters` has every method")
    rank: int | None = Field(None, ge=1, description=f"rank of LoRA; default {RANK}")
    alpha: float | None = Field(None, gt=0, description="LoRA's update is scaled by alpha/rank; default: the rank")
    dropout: float | None = Field(None, ge=0, lt=1, description="dropout of LoRA's inputs; default 0")
    target_modules: str | tuple[str, ...] | None = Field(
        None,
        description="names of modules, their endings after a dot, or a regular expression; default: every linear layer "
        "but the head",
    )
    mask: Kind | None = Field(None, description=f"kind of mask: {', '.join(KINDS)}; default safe (sparse, shira)")
    density: float | None = Field(
        None, gt=0, le=1, description="fraction of the entries in a mask; the default depends on the mask"
    )
    scope: Scope | None = Field(
        None, description="matrix: every matrix has that density; global: all together have it (sparse)"
    )
    mask_run: str | None = Field(None, description="tuned checkpoint whose changes the mask from_run takes")
    mask_file: str | None = Field(None, description="file of saved masks of the same base, instead of mask")
    rank_fraction: float | None = Field(
        None, gt=0, le=1, description=f"rank of the principal subspaces over min(n, m); default {RANK_FRACTION}"
    )
    retraction: Literal["svd", "newton-schulz"] | None = Field(
        None, description="retraction of isospectral methods; default svd"
    )
    momentum: float | None = Field(None, ge=0, lt=1, description="momentum of Muon (isospectral_muon); default 0.95")

    @property
    def kind(self) -> Kind:
        """The kind of mask, with its default."""
        return self.mask or "safe"

    @classmethod
    def _by_our_names(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "method" not in given:
            raise TrainingError(
                "rank, mask and density are of an adapter: name it, as in --adapter lora or --adapter sparse"
            )
        return given

    @classmethod
    def _unknown(cls, name: str) -> str:
        if ours := setting_called(name.removeprefix(cls.under)):
            return f"there is no such setting: {ours}"
        return super()._unknown(name)

    @model_validator(mode="after")
    def _belong_to_the_method(self) -> "AdapterSettings":
        if self.method not in ADAPTER_METHODS:
            hint = meant(self.method, ADAPTER_METHODS, f"choose one of {', '.join(ADAPTER_METHODS)}")
            raise TrainingError(f"there is no adapter '{self.method}': {hint}")
        own = ADAPTER_METHODS[self.method].settings
        odd = self.model_dump().keys() - {"method", *own}
        if odd:
            raise TrainingError(f"adapter {self.method} has no setting '{min(odd)}': it has {', '.join(own)}")
        if self.mask_file is not None and len(self.model_dump()) > 2:
            raise TrainingError("a mask_file decides the whole mask: leave out mask, density, scope and the like")
        return self
