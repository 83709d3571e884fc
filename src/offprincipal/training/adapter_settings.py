"""Settings of how a model is trained where not whole: the method, and what each method may be told."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from offprincipal.adapter_methods import ADAPTER_METHODS
from offprincipal.adapters import KINDS, Kind
from offprincipal.adapters.adapting import PEFT_NAMES
from offprincipal.adapters.choosing import Scope
from offprincipal.defaults import RANK_FRACTION
from offprincipal.errors import TrainingError, meant
from offprincipal.plain_settings import NestedSettings


class AdapterSettings(NestedSettings):
    """One method and what it is told; what is left out is as the library's own function has it.

    Raises:
        TrainingError: no such method, or a setting that the method does not have.

    >>> AdapterSettings(method="off_principal", rank=16).model_dump()
    {'method': 'off_principal', 'rank': 16}
    """

    called: ClassVar = "settings of the adapter"
    under: ClassVar = "adapter."
    refusal: ClassVar = TrainingError

    method: str = Field(description="what is trained; `train --list adapters` has every method")
    rank: int | None = Field(None, ge=1, description="of LoRA; 8 where not given")
    alpha: float | None = Field(None, gt=0, description="of LoRA, which is scaled by alpha/rank; the rank if not given")
    dropout: float | None = Field(None, ge=0, lt=1, description="of LoRA's inputs; 0 where not given")
    target_modules: str | tuple[str, ...] | None = Field(
        None,
        description="names of modules, endings of them, or a regular expression; every linear layer but the head where "
        "not given",
    )
    mask: Kind | None = Field(None, description=f"{', '.join(KINDS)}; safe where not given (sparse, shira)")
    density: float | None = Field(
        None, gt=0, le=1, description="share of entries that a mask holds; as the mask has it where not given"
    )
    scope: Scope | None = Field(None, description="matrix: each has that density; global: all together (sparse)")
    mask_run: str | None = Field(None, description="the tuned checkpoint whose changes from_run takes")
    mask_file: str | None = Field(None, description="masks that were saved, of the same base, instead of a kind")
    rank_fraction: float | None = Field(
        None, gt=0, le=1, description=f"rank of the principal subspaces over min(n, m); {RANK_FRACTION} where not given"
    )
    retraction: Literal["svd", "newton-schulz"] | None = Field(None, description="of isospectral; svd if not given")
    momentum: float | None = Field(None, ge=0, lt=1, description="of Muon (isospectral_muon); 0.95 where not given")

    @property
    def kind(self) -> Kind:
        """The kind of mask."""
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
        if ours := PEFT_NAMES.get(name.removeprefix(cls.under)):
            return f"there is no such setting: it is called {cls.under}{ours} here"
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
            raise TrainingError("a mask_file tells all of a mask: leave out mask, density, scope and the like")
        return self
