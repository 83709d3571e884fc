"""`adapt` turns a model into a PEFT model, by any of the low-rank methods; if it fails, the model is unchanged.

All checks and all matrix decompositions are done before the model is modified. Knows nothing of trainers.
"""

import importlib
import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offprincipal.adapter_methods import ADAPTER_METHODS, LOW_RANK
from offprincipal.adapters.choosing import ALL_LINEAR, is_target, require_names
from offprincipal.adapters.factors import FrozenFactor, OffsetFactor
from offprincipal.adapters.given import module_of, require_no_adapter, require_number, unwrapped
from offprincipal.adapters.initialisations import Start, StartSettings
from offprincipal.adapters.off_principal import ProjectedFactor
from offprincipal.checkpoints.matrices import matrices_of
from offprincipal.defaults import DENSITY, RANK_FRACTION
from offprincipal.errors import AdapterError, install_command, meant
from offprincipal.geometry.principal import principal_rank
from offprincipal.models.opening import hash_of

LOG = logging.getLogger("offprincipal")
_ADAPTER = "default"
_HEADS = ("score", "classifier", "classification_head", "qa_outputs")  # names of classification heads in transformers
_UNSUPPORTED = {  # options of peft.LoraConfig that `adapt` does not take
    "use_rslora": "is not needed: it is alpha = rank ** 0.5 times the alpha that you would give otherwise",
    "init_lora_weights": "is the method here: method='pissa', 'olora' and so on",
    "use_dora": "is not supported: use peft.get_peft_model for it",
    "modules_to_save": "is not supported: only the adapted layers are trained and saved",
    "task_type": "is derived from the model",
    "bias": "is not supported: biases are not trained",
}
PEFT_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}  # PEFT's name -> ours


def adapt(
    model: nn.Module,
    method: str = "off_principal",
    *,
    rank: int = 8,
    target_modules: str | Sequence[str] | None = ALL_LINEAR,
    alpha: float | None = None,
    dropout: float = 0.0,
    rank_fraction: float | None = None,
    density: float | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    **others: Any,
) -> Any:
    """A PEFT model that trains a low-rank update ΔW = s·B A of the chosen layers, by the chosen method.

    The update is zero at the start. The base weights are never changed, so `disable_adapter` gives the original model.
    `save_pretrained`, and therefore a Trainer's checkpoints, write a plain LoRA adapter for the original base, which
    PEFT and vLLM load and merge without this package.

    Args:
        model: on one device, unsharded, in float64, float32, float16 or bfloat16; wrapped in place, as PEFT does.
        method: `off_principal` (the update stays orthogonal to the base's principal subspaces on both sides), or an
            initialisation of the factors: `lora`, `pissa`, `milora`, `mica`, `olora`, `rlpo`, `rlmo`, `geora`. Each is
            defined in `offprincipal.adapters.initialisations`.
        rank: r. The saved adapter of `pissa`, `milora`, `olora` and `geora` has rank 2r: `[B, −B0] [A; A0]`.
        target_modules: a list of layer names or of their endings after a dot, such as `q_proj`; or a string: one such
            ending, a regular expression that matches whole names, or `all-linear`. `all-linear` and None choose every
            linear layer except the output or classification head and the output projection of
            `nn.MultiheadAttention`. Matrices that are not linear layers, such as stacked experts, are not covered; a
            warning is logged if there are any.
        alpha: the scale is s = alpha/rank; None means alpha = rank, so s = 1.
        dropout: probability of dropping an input of the update; the base's output is not affected.
        rank_fraction: share of min(n, m): k = max(1, round(rank_fraction · min(n, m))) is the rank of the principal
            subspaces; only for `off_principal` and `geora`; None means 0.125.
        density: fraction of entries in each mask of `geora`; only for `geora`; None means 0.5.
        seed: of random initial values.
        resume: a folder that `save_pretrained` of such a model wrote; training continues from its factors. The settings
            and the base must be the same.
        others: not accepted; an error names the equivalent here of an option of `peft.LoraConfig`.

    Returns:
        A `peft.PeftModel`, as `peft.get_peft_model` returns it, for any trainer.

    Raises:
        AdapterError: peft is not installed; a setting is unknown, out of range or not used by the method; no layer has
            a requested name; the method does not cover a layer, or the rank is too large for it; both factors of a
            layer would start at zero and never get a gradient; the adapter to resume has other settings or another
            base; or the model is compiled or wrapped. The model is unchanged then.

    >>> layers = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> adapted = adapt(layers, "off_principal", rank=2, target_modules=["0"])
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    96
    """
    if importlib.util.find_spec("peft") is None:
        raise AdapterError(f"adapters need peft: {install_command('train')}")
    for name in others:
        reason = f"is called {PEFT_NAMES[name]} here" if name in PEFT_NAMES else _UNSUPPORTED.get(name)
        known = "rank, alpha, dropout, target_modules, rank_fraction, density, seed, resume"
        raise AdapterError(f"adapt: {name} {reason or f'is no setting of it: there are {known}'}")
    model, target_modules = module_of(model), ALL_LINEAR if target_modules is None else target_modules
    if unwrapped(model) is not model:
        raise AdapterError(
            f"the model is wrapped ({type(model).__name__}): adapt the one inside, then compile or wrap the result"
        )
    _check_method(method, rank_fraction=rank_fraction, density=density)
    rank_fraction, density = rank_fraction or RANK_FRACTION, density or DENSITY
    _check_settings(rank, alpha, dropout, seed)
    layers = target_layers(model, method, target_modules)
    _check_ranks(layers, method, rank, rank_fraction)
    own = ADAPTER_METHODS[method].settings
    records: Any = importlib.import_module("offprincipal.adapters.record")
    record = records.AdapterRecord(
        method=method,
        rank=rank,
        alpha=float(rank if alpha is None else alpha),
        dropout=dropout,
        seed=seed,
        rank_fraction=rank_fraction if "rank_fraction" in own else None,
        density=density if "density" in own else None,
        modules=tuple(sorted(layers)),
        base_blake2b=hash_of({name: weight_of(layer) for name, layer in layers.items()}),
    )
    saved = None if resume is None else records.read_adapter(Path(resume), record, _saved_shapes(layers, record))
    with _seeded(seed):
        placements = {name: _placement(name, layer, record) for name, layer in layers.items()}
        config = records.RecordedLoraConfig(
            r=_saved_rank(record),
            lora_alpha=(rank if alpha is None else alpha) * (_saved_rank(record) // rank),
            lora_dropout=dropout,
            target_modules=sorted(layers) if isinstance(target_modules, str) else list(target_modules),
            task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        )
        config.record = record
        if method != "lora":
            layer: Any = importlib.import_module("offprincipal.adapters.layer")
            config._register_custom_module({nn.Linear: layer.AdaptedLinear})
        peft: Any = importlib.import_module("peft")
        adapted = peft.get_peft_model(model, config)
    for name, placement in placements.items():
        _place(adapted.base_model.model.get_submodule(name), placement, ADAPTER_METHODS[method].from_the_base)
    if saved is not None:
        _load(adapted, saved, peft)
    return adapted


def target_layers(model: nn.Module, method: str, target_modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """The layers that `target_modules` chooses.

    Args:
        model: without an adapter.
        method: a low-rank method; must cover each of the layers.
        target_modules: as in `adapt`, except None.

    Returns:
        Name in the model -> layer.

    Raises:
        AdapterError: a name matches no module, nothing is chosen, the method does not cover one of the layers, or the
            model already has an adapter.

    >>> layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Embedding(3, 2))
    >>> list(target_layers(layers, "off_principal", ["0"]))
    ['0']
    """
    require_no_adapter(model)
    require_names(target_modules)
    modules = {name: module for name, module in model.named_modules() if name}
    if target_modules == ALL_LINEAR:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        heads = [head, *(modules.get(name) for name in _HEADS)]
        linear = [name for name, module in modules.items() if _is_linear(module) and module not in heads]
        chosen = [name for name in linear if not _is_never_called(modules[name])]
        _warn_of_others(model, [modules[name] for name in chosen] + heads)
    elif isinstance(target_modules, str):
        chosen = [name for name in modules if is_target(name, target_modules)]
    else:
        chosen = []
        for wanted in target_modules:
            matching = [name for name in modules if is_target(name, [wanted])]
            if not matching:
                raise AdapterError(_unmatched(wanted, modules))
            chosen += [name for name in matching if name not in chosen]
    if not chosen:
        raise AdapterError(_unmatched(target_modules, modules))
    layers = {name: modules[name] for name in chosen}
    for name, layer in layers.items():
        _check_layer(name, layer, method)
    return layers


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear layer or embedding, detached from autograd."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _warn_of_others(model: nn.Module, considered: list[nn.Module | None]) -> None:
    """Log a warning if there are linear matrices outside of linear layers, such as stacked experts: not covered."""
    others = {
        matrix.parameter_name: matrix.parameter.numel()
        for matrix in matrices_of(model)
        if matrix.part.is_linear and not isinstance(matrix.module, nn.Embedding) and matrix.module not in considered
    }
    if others:
        LOG.warning(
            "%d parameters with %d entries are not covered, the first %s: their matrices are not linear layers that "
            "LoRA can wrap",
            len(others),
            sum(others.values()),
            next(iter(others)),
        )


def _check_method(method: str, **shares: float | None) -> None:
    """Refuse an unknown method, and a share that is out of range or that the method does not use."""
    if method not in LOW_RANK:
        hint = meant(str(method), LOW_RANK, f"choose one of {', '.join(LOW_RANK)}")
        raise AdapterError(f"there is no method {method!r}: {hint}")
    own = ADAPTER_METHODS[method].settings
    for name, value in shares.items():
        if value is None:
            continue
        if name not in own:
            raise AdapterError(f"{method} has no setting {name}: it has {', '.join(own)}")
        whole = name == "density"
        if not 0 < require_number(name, value) <= 1 or (value == 1 and not whole):
            raise AdapterError(f"{name} is {value}: give a share above 0, {'at most' if whole else 'below'} 1")


def _check_settings(rank: int, alpha: float | None, dropout: float, seed: int) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise AdapterError(f"seed is {seed!r}: give a whole number")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"rank is {rank!r}: give a whole number, 1 or more")
    if alpha is not None and not (math.isfinite(require_number("alpha", alpha)) and alpha > 0):
        raise AdapterError(f"alpha is {alpha}: give a positive number, or None for alpha = rank")
    if not 0 <= require_number("dropout", dropout) < 1:
        raise AdapterError(f"dropout is {dropout}: give a probability below 1")


def _check_layer(name: str, layer: nn.Module, method: str) -> None:
    """Refuse a layer that the method does not cover, or whose weights are not plain, finite floats in memory."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and (not weight.is_floating_point() or weight.dtype.itemsize < 2):
        raise AdapterError(
            f"{name} ({type(layer).__name__}) is quantised, its weights are {weight.dtype}: open the base with float "
            "weights, or name other layers in target_modules"
        )
    if _is_never_called(layer):
        raise AdapterError(
            f"{name} belongs to nn.MultiheadAttention, which reads its weight and never calls it, so an adapter "
            "around it would have no effect: name other layers in target_modules"
        )
    lora_only = method == "lora" and (_is_linear(layer) or isinstance(layer, nn.Embedding))
    if not isinstance(weight, Tensor) or not (lora_only or isinstance(layer, nn.Linear)):
        kinds = "nn.Linear, nn.Embedding and Conv1D" if method == "lora" else "nn.Linear"
        raise AdapterError(
            f"{name} is {type(layer).__name__}; {method} covers {kinds}: name other layers in target_modules"
        )
    if type(weight.data) is not Tensor or weight.is_meta:
        raise AdapterError(
            f"the weights of {name} are {'not loaded' if weight.is_meta else type(weight.data).__name__}: adapt the "
            "model before it is sharded or quantised, with its weights in memory"
        )
    if not bool(torch.isfinite(weight).all()):
        raise AdapterError(f"the weights of {name} hold NaN or infinity: use another base")


def _check_ranks(layers: dict[str, nn.Module], method: str, rank: int, rank_fraction: float) -> None:
    for name, layer in layers.items():
        shape = weight_of(layer).shape
        most = min(shape)
        if rank > most:
            raise AdapterError(f"rank {rank} is above min(n, m) = {most} of {name} {tuple(shape)}: lower it")
        k = principal_rank(shape, rank_fraction)
        if method == "off_principal" and rank > most - k:
            raise AdapterError(
                f"rank {rank} is above the {most - k} dimensions of {name} {tuple(shape)} that are not among its {k} "
                "principal ones: lower rank or rank_fraction"
            )


def _saved_rank(record: Any) -> int:
    """The rank of the saved plain adapter: 2r for an update B A − B0 A0, else r."""
    return int(record.rank) * (2 if ADAPTER_METHODS[record.method].from_the_base else 1)


def _saved_shapes(layers: dict[str, nn.Module], record: Any) -> dict[str, tuple[int, ...]]:
    """The tensors in a saved adapter with these settings: name -> shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    r = _saved_rank(record)
    for name, layer in layers.items():
        n, m = weight_of(layer).shape
        if isinstance(layer, nn.Embedding):
            factors = {"lora_embedding_A": (r, n), "lora_embedding_B": (m, r)}
        else:
            n, m = (n, m) if isinstance(layer, nn.Linear) else (m, n)
            factors = {"lora_A.weight": (r, m), "lora_B.weight": (n, r)}
        shapes |= {f"base_model.model.{name}.{factor}": shape for factor, shape in factors.items()}
    return shapes


def _load(adapted: Any, saved: dict[str, Tensor], peft: Any) -> None:
    """Load a saved adapter into a new one; if that fails, the new one is removed from the model."""
    try:
        peft.set_peft_model_state_dict(adapted, saved)
    except RuntimeError as error:
        adapted.unload()
        raise AdapterError(f"the adapter cannot be resumed: {error}") from error


def _placement(name: str, layer: nn.Module, record: Any) -> Start | tuple[Tensor, Tensor] | None:
    """The initial factors of a layer's adapter; for `off_principal` its principal subspaces; for `lora` None."""
    method = ADAPTER_METHODS[record.method]
    if not method.build:
        return None
    settings = StartSettings(record.rank, record.alpha / record.rank, record.rank_fraction, record.density)
    try:
        start: Start | tuple[Tensor, Tensor] = method.code()(weight_of(layer), settings)
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from error
    if isinstance(start, Start) and not bool(start.A.any() or start.B.any()):
        raise AdapterError(
            f"{record.method} starts both factors of {name} at zero, so that neither would ever get a gradient, as "
            "the part of the base that it starts from is zero: leave the layer out of target_modules, or use lora"
        )
    return start


def _place(layer: Any, placement: Start | tuple[Tensor, Tensor] | None, from_the_base: bool) -> None:
    """Replace the factors of a PEFT layer, keeping their dtype and device."""
    if placement is None:
        return
    A, B = layer.lora_A[_ADAPTER].weight.detach(), layer.lora_B[_ADAPTER].weight.detach()
    if not isinstance(placement, Start):
        U, V = placement
        layer.lora_A[_ADAPTER] = ProjectedFactor(A, V.to(A.device), "right")
        layer.lora_B[_ADAPTER] = ProjectedFactor(B, U.to(B.device), "left")
        return
    A0, B0 = placement.A.to(A), placement.B.to(B)
    if from_the_base:
        layer.lora_A[_ADAPTER] = OffsetFactor(A0, A0, 0)
        layer.lora_B[_ADAPTER] = OffsetFactor(B0, -B0, 1)
        return
    A.copy_(A0)
    B.copy_(B0)
    if placement.train_a_only:
        layer.lora_B[_ADAPTER] = FrozenFactor(B)


def _is_linear(module: nn.Module) -> bool:
    """Whether it is `nn.Linear` or GPT-2's `Conv1D`, whose weight is transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_never_called(module: nn.Module) -> bool:
    """Whether it is the output projection of `nn.MultiheadAttention`, which reads its weight but never calls it."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _unmatched(wanted: Any, modules: dict[str, nn.Module]) -> str:
    """The error message for a name that matches no module."""
    linear = [name for name, module in modules.items() if _is_linear(module)]
    if wanted == ALL_LINEAR:
        return "the model holds no linear layer inside: give the module that contains the layers"
    example = f"linear layers are such as '{linear[0]}'" if linear else "the model has no linear layer"
    whole = "; a regular expression has to match the whole name" if set("|*+?()[]\\") & set(str(wanted)) else ""
    return f"target_modules: no module is named {wanted!r}{whole}; {example}"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block, and restore the caller's random state after it."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
