"""The adapter methods, one record each. Imports little, so that the command line lists them at once."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

_LORA = ("rank", "alpha", "dropout", "target_modules")
_MASK = ("mask", "density", "rank_fraction", "target_modules", "mask_run")


@dataclass(frozen=True)
class AdapterMethod:
    """Everything about a method except its code.

    Args:
        label: its name in papers and tables.
        what: a description, as a phrase.
        trains: low-rank factors added to the weights, the entries of a mask, or the singular frames of the weights.
        settings: the fields of `AdapterSettings` that it uses.
        build: its function or class, in a module of `adapters`; for low-rank factors, the one that initialises them,
            or empty for PEFT's own initialisation.
        from_the_base: its factors start at a part of the base, which is subtracted from the update: the plain adapter
            that is saved has twice the rank.
    """

    label: str
    what: str
    trains: Literal["factors", "entries", "frames"]
    settings: tuple[str, ...]
    build: str = ""
    from_the_base: bool = False

    def code(self) -> Callable[..., Any]:
        """The function or class that `build` names.

        >>> ADAPTER_METHODS["isospectral"].code().__name__
        'IsospectralAdamW'
        """
        module, _, name = self.build.partition(".")
        found: Callable[..., Any] = getattr(importlib.import_module(f"offprincipal.adapters.{module}"), name)
        return found


ADAPTER_METHODS = {
    "lora": AdapterMethod("LoRA", "a low-rank update that starts at zero", "factors", _LORA),
    "pissa": AdapterMethod(
        "PiSSA", "LoRA from the base's top singular triplets", "factors", _LORA, "initialisations.pissa", True
    ),
    "milora": AdapterMethod(
        "MiLoRA", "LoRA from the base's bottom singular triplets", "factors", _LORA, "initialisations.milora", True
    ),
    "mica": AdapterMethod(
        "MiCA", "LoRA, B frozen at the bottom left singular vectors", "factors", _LORA, "initialisations.mica"
    ),
    "olora": AdapterMethod(
        "OLoRA", "LoRA from the base's QR decomposition", "factors", _LORA, "initialisations.olora", True
    ),
    "rlpo": AdapterMethod(
        "RLPO", "LoRA whose A starts at the top right singular vectors", "factors", _LORA, "initialisations.rlpo"
    ),
    "rlmo": AdapterMethod(
        "RLMO", "LoRA whose A starts at the bottom right singular vectors", "factors", _LORA, "initialisations.rlmo"
    ),
    "geora": AdapterMethod(
        "GeoRA",
        "LoRA from the top singular triplets of the base under the safe mask",
        "factors",
        (*_LORA, "rank_fraction", "density"),
        "initialisations.geora",
        True,
    ),
    "off_principal": AdapterMethod(
        "off-principal LoRA",
        "LoRA whose update is orthogonal to the base's principal subspaces at any time",
        "factors",
        (*_LORA, "rank_fraction"),
        "off_principal.off_principal",
    ),
    "sparse": AdapterMethod(
        "SparseAdamW",
        "the weights that a mask holds, and nothing else",
        "entries",
        (*_MASK, "scope", "mask_file"),
        "sparse_adamw.SparseAdamW",
    ),
    "shira": AdapterMethod(
        "SHiRA", "PEFT's sparse adapter on the entries that a mask holds", "entries", _MASK, "shira_model.shira"
    ),
    "isospectral": AdapterMethod(
        "IsospectralAdamW",
        "AdamW that keeps every singular value of the projections",
        "frames",
        ("retraction",),
        "isospectral.IsospectralAdamW",
    ),
    "isospectral_muon": AdapterMethod(
        "IsospectralMuon",
        "Muon that keeps every singular value of the projections",
        "frames",
        ("retraction", "momentum"),
        "isospectral.IsospectralMuon",
    ),
}
LOW_RANK = tuple(name for name, method in ADAPTER_METHODS.items() if method.trains == "factors")
