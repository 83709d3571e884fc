"""Masks as PEFT's SHiRA adapters: the masked entries are trained as an adapter that PEFT saves and loads by itself.

SHiRA trains r·(n + m) entries of each matrix (n, m), with one whole number r for all matrices, so a density is met only
approximately. Knows nothing of how entries are chosen or trained.
"""

import importlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offprincipal.adapters.choosing import Kind, linear_matrices, make_masks, require_settings
from offprincipal.adapters.given import require_no_adapter, unwrapped
from offprincipal.defaults import RANK_FRACTION
from offprincipal.errors import AdapterError

MaskFunction = Callable[..., Tensor]
LOG = logging.getLogger("offprincipal")
_WARN_FROM = 0.01  # relative difference from the requested density above which a warning is logged


def shira(
    model: torch.nn.Module,
    kind: Kind,
    density: float,
    *,
    target_modules: str | Sequence[str] | None = None,
    rank_fraction: float = RANK_FRACTION,
    seed: int = 0,
    run: tuple[str | Path, str | Path] | None = None,
) -> Any:
    """A SHiRA adapter that trains the masked entries of each linear matrix.

    The base weights are not changed; the adapter holds the changes of the masked entries. `save_pretrained` writes an
    adapter that `PeftModel.from_pretrained` loads without this package.

    Args:
        model: the base, whose targets are `torch.nn.Linear`.
        kind, target_modules, rank_fraction, seed, run: as in `make_masks`.
        density: fraction of the entries of all targets together, 0 < density <= 1; met as closely as a whole r allows.
            A warning is logged if the difference is above 1 %. The density of one matrix is r·(n + m)/(n·m).

    Returns:
        A `peft.PeftModel`.

    Raises:
        AdapterError: peft is not installed, the model has an adapter already, a target is not a plain
            `torch.nn.Linear`, no r comes near the density, or as in `make_masks`.
        CheckpointError, NonFiniteTensor: as in `make_masks`.

    Source: Bhardwaj et al., SHiRA, arXiv 2406.13175.

    >>> layers = torch.nn.Sequential(torch.nn.Linear(16, 16))
    >>> adapted = shira(layers, "low_magnitude", 0.25)  # r = 2: 2 · (16 + 16) of 256 entries
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    64
    """
    require_settings(kind, density, "matrix", rank_fraction, run)
    if density is None:
        raise AdapterError("density is None: give the share of entries that SHiRA trains")
    model, peft = unwrapped(model), _peft()
    require_no_adapter(model)
    layers = _linear_layers(model, target_modules)
    shapes = [tuple(layer.weight.shape) for layer in layers.values()]
    r = shira_rank(density, shapes)
    held = r * sum(map(sum, shapes)) / sum(map(math.prod, shapes))
    if abs(held - density) > _WARN_FROM * density:
        LOG.warning("SHiRA trains r·(n + m) entries of a matrix: density %.4g, not %.4g, with r = %d", held, density, r)
    masks: dict[torch.nn.Module, Tensor] = {}
    for name, layer in layers.items():
        n, m = layer.weight.shape
        options: dict[str, Any] = {"rank_fraction": rank_fraction, "seed": seed, "run": run, "target_modules": [name]}
        masks[layer] = make_masks(model, kind, r * (n + m) / (n * m), **options)[f"{name}.weight"]
    config = peft.ShiraConfig(r=r, target_modules=list(layers))
    config.mask_type, config.mask_fn = kind, mask_function(masks)
    return peft.get_peft_model(model, config)


def mask_function(masks: Mapping[torch.nn.Module, Tensor]) -> MaskFunction:
    """A function for `mask_fn` of `peft.ShiraConfig`, called as `mask_fn(base_layer, r, **options)`.

    Args:
        masks: layer -> bool tensor of the shape of its weight, with r·(n + m) true entries.

    Returns:
        The function; it returns the mask of a layer, (n, m), in the dtype of its weight. It raises AdapterError if a
        layer has no mask, or one with another number of entries.

    >>> layer = torch.nn.Linear(4, 4)
    >>> mask_function({layer: torch.eye(4) > 0})(layer, 1)
    Traceback (most recent call last):
    ...
    offprincipal.errors.AdapterError: a SHiRA mask of rank 1 for a (4, 4) matrix holds 8 entries, not 4
    """

    def mask_of(base_layer: Any, r: int, **options: Any) -> Tensor:
        if base_layer not in masks:
            raise AdapterError(f"{base_layer} has no mask: give one for every target module")
        n, m = base_layer.weight.shape
        active = int(masks[base_layer].sum())
        if active != r * (n + m):
            raise AdapterError(
                f"a SHiRA mask of rank {r} for a {(n, m)} matrix holds {r * (n + m)} entries, not {active}"
            )
        return masks[base_layer].to(base_layer.weight)

    return mask_of


def shira_rank(density: float, shapes: Sequence[tuple[int, ...]]) -> int:
    """The r whose number of trained entries, r·Σ(n + m), is nearest to a fraction of all entries.

    Args:
        density: the fraction, 0 < density <= 1.
        shapes: (n, m) of each matrix.

    Returns:
        r, at least 1 and at most what SHiRA allows for the smallest matrix, n·m/(n + m).

    Raises:
        AdapterError: the nearest r gives less than 2/3 or more than 3/2 of the requested entries.

    >>> shira_rank(0.25, [(64, 64), (64, 128)])
    10
    """
    asked = density * sum(map(math.prod, shapes))
    per_rank = sum(map(sum, shapes))
    r = min(max(round(asked / per_rank), 1), min(n * m // (n + m) for n, m in shapes))
    if r == 0 or not 2 / 3 <= r * per_rank / asked <= 3 / 2:
        raise AdapterError(
            f"SHiRA trains r·(n + m) entries of a matrix, and no whole r comes near density {density} of these "
            f"{len(shapes)} matrices: the nearest is {r * per_rank / sum(map(math.prod, shapes)):.3g}. Choose that, or "
            "train under the mask with SparseAdamW"
        )
    return r


def _linear_layers(model: torch.nn.Module, target_modules: str | Sequence[str] | None) -> dict[str, torch.nn.Linear]:
    """The layers of a model's linear matrices: module name -> layer."""
    layers = {}
    for matrix in linear_matrices(model, target_modules):
        layer = matrix.module
        if not isinstance(layer, torch.nn.Linear) or matrix.part.matrix_shape != tuple(layer.weight.shape):
            raise AdapterError(
                f"SHiRA covers plain torch.nn.Linear layers, and {matrix.name} is part of another kind: leave it "
                "out of target_modules, or train under the mask with SparseAdamW"
            )
        layers[matrix.parameter_name.removesuffix(".weight")] = layer
    return layers


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise AdapterError("SHiRA needs peft: pip install peft") from error
