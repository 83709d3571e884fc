"""Choose the entries of a mask: by magnitude, by principal weight, at random, or from the changes of an earlier run.

Each kind of mask orders the entries of a matrix (n, m). A mask of density α holds the first round(α·nm) entries in that
order, ties broken by index; with the scope `global` all matrices are ordered together. The orders:

- `principal`: descending |U_k S_k V_kᵀ|.
- `off_principal`: ascending |U_k S_k V_kᵀ|, so that the mask of density α is the complement of `principal` at 1 − α.
- `low_magnitude`: ascending |W0|.
- `safe`: the union of `low_magnitude` and `off_principal` at one common density, which is raised until the union holds
  α·nm entries. Without a density it is the published mask, `low_magnitude` ∪ ¬`principal` at 0.5, whose density depends
  on the weights.
- `random`: uniformly random.
- `from_run`: descending change in an earlier run, of bfloat16 values. A density above the fraction of entries that
  changed is refused; without a density all changed entries are taken.

Source: principal weights, LIFT (arXiv 2506.00772); the safe mask, arXiv 2511.08567.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from offprincipal.adapters.given import require_number, unwrapped
from offprincipal.adapters.weight_masks import Masks, base_hash, packed, require_loaded
from offprincipal.checkpoints import (
    Checkpoint,
    open_checkpoint,
    pair_tensors,
    parameter_of,
    place_of,
)
from offprincipal.checkpoints.matrices import ModelMatrix, matrices_of
from offprincipal.checkpoints.roles import LINEAR_ROLES, WRAPPERS
from offprincipal.defaults import DENSITY, RANK_FRACTION
from offprincipal.errors import AdapterError, NonFiniteTensor
from offprincipal.geometry.bits import bf16_codes, values_of_codes
from offprincipal.geometry.cuts import largest_cuts, largest_levels, mask_size
from offprincipal.geometry.draws import generator_of
from offprincipal.geometry.principal import principal_rank, principal_scores, principal_triplets

Kind = Literal["principal", "off_principal", "low_magnitude", "safe", "random", "from_run"]
Scope = Literal["matrix", "global"]
Scores = NDArray[np.float32]
KINDS: tuple[Kind, ...] = get_args(Kind)
ALL_LINEAR = "all-linear"
_LARGEST = np.uint32(0x7F7FFFFF)  # the bits of the largest finite float32
_PROBES = 24


def make_masks(
    model: torch.nn.Module,
    kind: Kind,
    density: float | None = None,
    *,
    scope: Scope = "matrix",
    target_modules: str | Sequence[str] | None = None,
    rank_fraction: float = RANK_FRACTION,
    seed: int = 0,
    run: tuple[str | Path, str | Path] | None = None,
) -> Masks:
    """Masks of the attention and MLP projections of a base; embeddings, heads, routers, norms and biases get none.

    Args:
        model: the base before training. In fused projections and stacked experts every matrix is masked separately. For
            a compiled or wrapped model, masks have the parameter names of the model inside.
        kind: `principal`, `off_principal`, `low_magnitude`, `safe`, `random` or `from_run`, as defined at the top of
            this module.
        density: fraction of entries that may be trained, 0 < density <= 1. None means 0.5; for `safe`, the density of
            `low_magnitude` ∪ ¬`principal` at 0.5; for `from_run`, all entries that the run changed.
        scope: `matrix` gives every matrix this density; `global` orders the entries of all matrices together, which
            needs 4 bytes of memory per entry, 8 for `safe`.
        target_modules: a list of module names or of their endings after a dot, such as `q_proj`; or a string: one such
            ending, a regular expression that matches whole names, or `all-linear`. None and `all-linear` choose all.
        rank_fraction: share of min(n, m): k = max(1, round(rank_fraction · min(n, m))) is the rank of the principal
            subspaces.
        seed: of the random order of `random`.
        run: only for `from_run`: the base and the tuned checkpoint of the earlier run, of any kind that `compare`
            opens.

    Returns:
        The masks, by parameter name; parameters without any chosen entry are left out.

    Raises:
        AdapterError: a setting is unknown or out of range, the density is above the fraction that the run changed, a
            name matches no matrix, weights are quantised or not loaded, or the run has another base.
        CheckpointError: the run cannot be read, or its tensors do not match.
        NonFiniteTensor: a weight is NaN or infinite.

    Source: principal weights, LIFT (arXiv 2506.00772); the safe mask, arXiv 2511.08567.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
    >>> _ = torch.nn.init.normal_(model[0].weight)
    >>> make_masks(model, "low_magnitude", 0.25).density
    0.25
    """
    require_settings(kind, density, scope, rank_fraction, run)
    model = unwrapped(model)
    matrices = linear_matrices(model, target_modules)
    orders = _orders(kind, rank_fraction, seed, run, model)
    groups = [matrices] if scope == "global" else [[matrix] for matrix in matrices]
    masks: dict[str, torch.Tensor] = {}
    for group in groups:
        for matrix, chosen in zip(group, _chosen(group, orders, kind, density), strict=True):
            name = WRAPPERS.sub("", matrix.parameter_name)
            mask = masks.setdefault(name, torch.zeros(matrix.parameter.shape, dtype=torch.bool))
            matrix.part.put(mask, torch.from_numpy(chosen))
    masks = {name: mask for name, mask in masks.items() if bool(mask.any())}
    if not masks:
        raise AdapterError(f"density {density} of {kind} leaves no entry of any matrix: choose a larger one")
    about = {"kind": kind, "density": density, "scope": scope, "rank_fraction": rank_fraction, "seed": seed}
    return packed(masks, base_hash(model, masks), about)


def linear_matrices(model: torch.nn.Module, target_modules: str | Sequence[str] | None = None) -> list[ModelMatrix]:
    """The attention and MLP projections of a model; the parts of fused projections and experts are separate matrices.

    Args:
        model: the base.
        target_modules: as in `make_masks`.

    Raises:
        AdapterError: the model has none, a name matches none, or their weights are quantised or not loaded.
    """
    target_modules = None if target_modules == ALL_LINEAR else target_modules
    require_names(target_modules)
    chosen = []
    for matrix in matrices_of(model):
        if not is_target(_module_name(matrix), target_modules):
            continue
        if place_of(matrix.part.tensor).role in LINEAR_ROLES:
            require_trainable_type(matrix.parameter_name, matrix.parameter)
        if matrix.part.is_linear and matrix.parameter.is_floating_point():
            require_loaded(matrix.parameter_name, matrix.parameter)
            chosen.append(matrix)
    asked = [target_modules] if isinstance(target_modules, str) else target_modules
    for wanted in asked or ():
        of_all = target_modules if isinstance(target_modules, str) else [wanted]
        if not any(is_target(_module_name(matrix), of_all) for matrix in chosen):
            raise AdapterError(
                f"{type(model).__name__} has no linear matrix named {wanted}: name modules of its attention or MLP"
            )
    if not chosen:
        raise AdapterError(f"{type(model).__name__} has no linear matrix: masks are of attention and MLP projections")
    return chosen


def require_names(target_modules: str | Sequence[str] | None) -> None:
    """Check that `target_modules` is None, a string or a list of names that is not empty.

    Raises:
        AdapterError: it is something else.
    """
    several = isinstance(target_modules, Collection) and all(isinstance(name, str) for name in target_modules)
    if target_modules is not None and not (several and target_modules):
        raise AdapterError(f"target_modules is {target_modules!r}: name modules, or leave it out for all")


def _module_name(matrix: ModelMatrix) -> str:
    """Name of the module whose `weight` holds the matrix; the parameter's own name if it is not called `weight`."""
    return WRAPPERS.sub("", matrix.parameter_name).removesuffix(".weight")


def require_trainable_type(name: str, parameter: torch.Tensor) -> None:
    """Check that the entries of a parameter can be trained one by one.

    Raises:
        AdapterError: it is quantised, that is not in float64, float32, bfloat16 or float16.
    """
    if parameter.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise AdapterError(
            f"{name} is quantised ({str(parameter.dtype).removeprefix('torch.')}), so its entries cannot be trained "
            "one by one: open the base in bfloat16 or float32"
        )


def require_settings(
    kind: str, density: float | None, scope: str, rank_fraction: float, run: tuple[str | Path, str | Path] | None
) -> None:
    """Check the settings of a mask; they are those of `make_masks`.

    Raises:
        AdapterError: the kind or scope is unknown, a number is out of range, or `run` does not fit the kind.
    """
    if kind not in KINDS:
        raise AdapterError(f"there is no mask {kind!r}: choose {', '.join(KINDS)}")
    if density is not None and not 0 < require_number("density", density) <= 1:
        raise AdapterError(f"density {density} is outside (0, 1]: choose the share of entries that may be trained")
    if scope not in get_args(Scope):
        raise AdapterError(f"there is no scope {scope!r}: choose matrix or global")
    if not 0 < require_number("rank_fraction", rank_fraction) <= 1:
        raise AdapterError(f"rank_fraction {rank_fraction} is outside (0, 1]: choose the principal subspace's share")
    if (kind == "from_run") != (run is not None):
        raise AdapterError("run=(base, tuned) and the mask from_run belong together: give both or neither")
    if run is not None and not (isinstance(run, tuple | list) and len(run) == 2):
        raise AdapterError(f"run is {run!r}: give the base and the tuned checkpoint of the run, run=(base, tuned)")


def first_entries(scores: Scores, size: int) -> NDArray[np.bool_]:
    """A mask of the `size` largest scores, ties broken by index.

    Args:
        scores: (numel,), not negative.
        size: number of entries, at least 1.

    Returns:
        bool, (numel,).

    >>> first_entries(np.array([1.0, 3.0, 3.0, 2.0], np.float32), 1)
    array([False,  True, False, False])
    """
    first: NDArray[np.bool_] = largest_levels(scores, *largest_cuts(scores, np.array([size]))) == 0
    return first


def first_of_either(one: Scores, two: Scores, size: int) -> NDArray[np.bool_]:
    """A mask of `size` entries: the union of the h largest of two sets of scores, at the h that gives this size.

    If no h gives exactly `size`, the rest is taken from the next larger union, by index.

    Args:
        one, two: scores, (numel,), not negative.
        size: number of entries, at least 1.

    Returns:
        bool, (numel,).

    >>> one, two = np.array([[4, 3, 2, 1], [1, 2, 3, 4]], np.float32)
    >>> first_of_either(one, two, 2), first_of_either(one, two, 3)
    (array([ True, False, False,  True]), array([ True,  True, False,  True]))
    """
    low, high = 0, size  # the union at h = low holds at most `size` entries, that at h = high at least `size`
    while high - low > 1:
        probes = np.unique(np.linspace(low, high, _PROBES + 2).astype(np.int64)[1:-1])
        probes = probes[(probes > low) & (probes < high)]
        levels = np.minimum(*(largest_levels(x, *largest_cuts(x, probes)) for x in (one, two)))
        held = np.cumsum(np.bincount(levels, minlength=len(probes) + 1))[: len(probes)]
        within = int(np.searchsorted(held, size, side="right"))
        low, high = ([low, *probes.tolist()])[within], ([*probes.tolist(), high])[within]
    inner = first_entries(one, low) | first_entries(two, low) if low else np.zeros(len(one), np.bool_)
    outer = first_entries(one, high) | first_entries(two, high)
    rest = np.flatnonzero(outer & ~inner)
    inner[rest[: size - int(inner.sum())]] = True
    return inner


Order = Callable[[ModelMatrix], Scores]


def _orders(
    kind: Kind, rank_fraction: float, seed: int, run: tuple[str | Path, str | Path] | None, model: torch.nn.Module
) -> list[Order]:
    """Functions from a matrix to its scores, (n·m,), the largest first in the order; two functions for a union."""

    def off_principal(matrix: ModelMatrix) -> Scores:
        return _reversed(_principal(matrix, rank_fraction))

    def low_magnitude(matrix: ModelMatrix) -> Scores:
        return _reversed(np.abs(_weights(matrix).reshape(-1)))

    match kind:
        case "principal":
            return [lambda matrix: _principal(matrix, rank_fraction)]
        case "off_principal":
            return [off_principal]
        case "low_magnitude":
            return [low_magnitude]
        case "safe":
            return [low_magnitude, off_principal]
        case "random":
            return [lambda matrix: _drawn(matrix, seed)]
        case "from_run":
            assert run is not None
            return [_Run(run, getattr(model, "base_model_prefix", "")).changes]


def _chosen(
    group: Sequence[ModelMatrix], orders: Sequence[Order], kind: Kind, density: float | None
) -> Iterator[NDArray[np.bool_]]:
    """The masks of matrices that are ordered together, one (n, m) for each."""
    scores = [np.concatenate([order(matrix) for matrix in group]) for order in orders]
    numel = sum(matrix.part.numel for matrix in group)
    if kind == "safe" and density is None:
        half = mask_size(numel, DENSITY)
        chosen = first_entries(scores[0], half) | first_entries(scores[1], numel - half)
    elif kind == "safe":
        chosen = first_of_either(scores[0], scores[1], mask_size(numel, density or 0.0))
    else:
        available = int(np.count_nonzero(scores[0])) if kind == "from_run" else numel
        default = available if kind == "from_run" else mask_size(numel, DENSITY)
        size = default if density is None else mask_size(numel, density)
        if size > available:
            where = group[0].part.name if len(group) == 1 else f"{len(group)} matrices"
            raise AdapterError(
                f"the run changed {available / numel:.2%} of the entries of {where}, fewer than the density {density} "
                "asks for: choose a smaller density, leave it out to take all of them, or choose the scope global"
            )
        chosen = first_entries(scores[0], size) if size else np.zeros(numel, np.bool_)
    stops = np.cumsum([matrix.part.numel for matrix in group])
    for matrix, stop in zip(group, stops, strict=True):
        yield chosen[stop - matrix.part.numel : stop].reshape(matrix.part.matrix_shape)


def _weights(matrix: ModelMatrix) -> Scores:
    """The weights of a matrix, float32, (n, m).

    Raises:
        NonFiniteTensor: a weight is NaN or infinite.
    """
    W = np.asarray(matrix.weight().to("cpu", torch.float32).numpy())
    if not np.isfinite(W).all():
        raise NonFiniteTensor(f"{matrix.name} holds NaN or infinity. Look at how the base was trained")
    return W


def _principal(matrix: ModelMatrix, rank_fraction: float) -> Scores:
    """|U_k S_k V_kᵀ|, (n·m,)."""
    W = torch.from_numpy(_weights(matrix))
    k = principal_rank(W.shape, rank_fraction)
    svd = principal_triplets(W.double(), k).top(k)
    scores: Scores = principal_scores(svd.U, svd.S, svd.Vh).float().numpy().reshape(-1)
    return scores


def _reversed(scores: Scores) -> Scores:
    """Scores in the opposite order; finite and not negative before and after, and equal scores stay equal."""
    return (_LARGEST - np.ascontiguousarray(scores).view(np.uint32)).view(np.float32)


def _drawn(matrix: ModelMatrix, seed: int) -> Scores:
    """Random scores: their bits are uniform over those of positive finite float32 numbers."""
    generator = generator_of(seed, matrix.name, "random")
    bits = torch.randint(1, int(_LARGEST), (matrix.part.numel,), generator=generator, dtype=torch.int32)
    return bits.numpy().view(np.float32)


class _Run:
    """The changes that an earlier run made, matrix by matrix.

    Args:
        run: its base and tuned checkpoint.
        prefix: name of the base model inside the model, such as `model`; names in checkpoints may lack it.
    """

    def __init__(self, run: tuple[str | Path, str | Path], prefix: str) -> None:
        self._base: Checkpoint = open_checkpoint(run[0])
        self._tuned: Checkpoint = open_checkpoint(run[1], self._base)
        self._tensors, self._prefix = pair_tensors(self._base, self._tuned).tensors, prefix

    def changes(self, matrix: ModelMatrix) -> Scores:
        """|bf16(W1) − bf16(W0)|, (n·m,), positive where they differ."""
        part = matrix.part
        name = parameter_of(part.tensor, self._tensors, self._prefix)
        if name is None or tuple(self._tensors[name].shape) != tuple(matrix.parameter.shape):
            raise AdapterError(
                f"{part.tensor} of the model is no tensor of {self._base.source}, or has another shape there: give a "
                "run of the model's own architecture"
            )
        sides = (side.read(name, part.start, part.stop) for side in (self._base, self._tuned))
        before, after = (bf16_codes(part.of(side)) for side in sides)
        if not np.array_equal(before, bf16_codes(_weights(matrix))):
            raise AdapterError(
                f"{part.tensor} of the model is not that of {self._base.source}: give run=(base, tuned) of this base, "
                "in this order"
            )
        one, two = (values_of_codes(codes) for codes in (before, after))
        if not (np.isfinite(one).all() and np.isfinite(two).all()):
            raise NonFiniteTensor(f"{name} holds NaN or infinity in the run. Look at how it was trained")
        return np.abs(np.clip(two.astype(np.float64) - one, -3e38, 3e38)).astype(np.float32).reshape(-1)


def is_target(module: str, target_modules: str | Sequence[str] | None) -> bool:
    """Whether `target_modules` chooses a module.

    Args:
        module: its name.
        target_modules: None for all modules; a list of names or of their endings after a dot; or a string: a regular
            expression that matches whole names, as in PEFT, or one such ending.

    Raises:
        AdapterError: the string is not a valid regular expression.

    >>> [is_target("model.layers.0.q_proj", asked) for asked in (["q_proj"], "q_proj", r".*\\.0\\..*", "proj", ["0"])]
    [True, True, True, False, False]
    """
    if target_modules is None:
        return True
    if isinstance(target_modules, str):
        try:
            if re.fullmatch(target_modules, module):
                return True
        except re.error as error:
            hint = (
                f"; for every name that ends so give '{target_modules.lstrip('*.')}'" if "*" in target_modules else ""
            )
            raise AdapterError(
                f"target_modules {target_modules!r} is not a regular expression: {error}{hint}"
            ) from error
        target_modules = [target_modules]
    return any(f".{module}".endswith(f".{target}") for target in target_modules)
