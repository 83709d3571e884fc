"""Isospectral optimizers: the singular values of a matrix stay fixed, and only its singular vectors are trained.

W = U Σ0 Vᵀ. A base optimizer updates the frames U and V like ordinary parameters, and a polar retraction then makes
their columns orthonormal again. Parameter names decide which matrices are trained this way; AdamW trains all other
parameters. Knows nothing of trainers.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from offprincipal.adapters.given import module_of
from offprincipal.adapters.sparse_adamw import require_settings
from offprincipal.adapters.weight_masks import require_loaded
from offprincipal.checkpoints.checkpoint import TensorInfo
from offprincipal.checkpoints.parts import parts_of
from offprincipal.checkpoints.roles import LINEAR_ROLES, place_of
from offprincipal.errors import AdapterError
from offprincipal.geometry.polar import newton_schulz, orthogonality_error, polar_factor, tangent

Retraction = Literal["svd", "newton-schulz"]
Build = Callable[[list[dict[str, Any]]], Optimizer]
_RETRACTIONS: dict[str, Callable[[Tensor], Tensor]] = {"svd": polar_factor, "newton-schulz": newton_schulz}
_KEY = "isospectral"
_BASE = "frames_optimizer"  # key of the base optimizer's name in every group; states of another one are refused
_SAME = 1e-6  # accepted distance of a matrix from the product of its frames, relative to its norm: float32 rounding
LOG = logging.getLogger("offprincipal")


@dataclass
class Frames:
    """The singular value decomposition of one matrix, W = U diag(S) Vᵀ, with r = min(n, m).

    Args:
        U: (n, r), float32, orthonormal columns; trained.
        S: (r,), float64; fixed.
        V: (m, r), float32, orthonormal columns; trained.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @staticmethod
    def of(W: Tensor) -> "Frames":
        """The frames of a matrix (n, m), by LAPACK in float64.

        Raises:
            AdapterError: the matrix holds NaN or infinity.
        """
        if not bool(torch.isfinite(W).all()):
            raise AdapterError(f"a matrix of shape {tuple(W.shape)} holds NaN or infinity: use another base")
        U, S, Vh = torch.linalg.svd(W.detach().double(), full_matrices=False)
        return Frames(U.float().contiguous(), S, Vh.T.float().contiguous())

    def product(self) -> Tensor:
        """U diag(S) Vᵀ; (n, m), float64."""
        return (self.U.double() * self.S) @ self.V.double().T

    def take_gradient(self, G: Tensor | None) -> None:
        """Set the gradients of U and V from G (n, m), the gradient of their product; None clears them."""
        if G is None:
            self.U.grad = self.V.grad = None
            return
        G, S = G.float(), self.S.float()
        self.U.grad = tangent(self.U, (G @ self.V) * S)
        self.V.grad = tangent(self.V, (G.T @ self.U) * S)

    def retract(self, retraction: Callable[[Tensor], Tensor]) -> float:
        """Make the columns of U and V orthonormal again; the larger of ‖UᵀU − I‖_F and ‖VᵀV − I‖_F after that."""
        for frame in (self.U, self.V):
            frame.copy_(retraction(frame))
        return max(orthogonality_error(self.U), orthogonality_error(self.V))


class Isospectral(Optimizer):
    """Train matrices with fixed singular values, and all other parameters by AdamW.

    The weights at the first step are decomposed into frames. At every step a base optimizer updates U and V, and each
    is then replaced by its polar factor, so that the singular values of W stay those of the base to float32 rounding.
    `IsospectralAdamW` and `IsospectralMuon` derive from this class.

    Args:
        params: a module or its `named_parameters()`, whose attention and MLP projections keep their singular values;
            or a list of parameters or of groups, whose matrices all keep them, except in groups with
            `isospectral=False`. A group of named parameters without `isospectral` is divided by names, as a module is.
        frames: builds the base optimizer from parameter groups of frames; its state must consist of tensors, by
            parameter.
        lr: learning rate of frames and of all other parameters; schedulers change it through `param_groups`.
        betas, eps, weight_decay: of AdamW on all other parameters, with torch's defaults; a group may set its own.
        retraction: `svd`, by LAPACK in float64; or `newton-schulz`, by matrix products only.

    Attributes:
        state: for each matrix its frames `U`, `S` and `V`, and the base optimizer's state of U and V under names such
            as `U_exp_avg`; for every other parameter the state of AdamW.
        orthogonality_error: the largest ‖UᵀU − I‖_F or ‖VᵀV − I‖_F after the last retraction; 0 before the first step.

    Raises:
        AdapterError: no matrix would keep its singular values; a matrix is not in float32 or float64, is sharded or is
            not loaded; a setting is unknown or out of range; or `params` is an iterator without names, such as
            `model.parameters()`, in which embeddings and heads cannot be recognised.

    Source: arXiv 2607.19331 (ISO), for frames, fixed spectrum and base optimizer; it released no optimizer. The polar
    retraction is from Absil, Mahony and Sepulchre 2008, 4.1.1.

    >>> layer = torch.nn.Linear(8, 6, bias=False)
    >>> before = torch.linalg.svdvals(layer.weight)
    >>> optimizer = Isospectral([layer.weight], torch.optim.SGD, lr=1e-2)
    >>> layer(torch.ones(1, 8)).square().sum().backward()
    >>> optimizer.step()
    >>> torch.allclose(torch.linalg.svdvals(layer.weight), before, atol=1e-6)
    True
    """

    def __init__(
        self,
        params: Any,
        frames: Build,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        retraction: Retraction = "svd",
    ) -> None:
        if retraction not in _RETRACTIONS:
            raise AdapterError(f"no retraction '{retraction}': choose one of {', '.join(_RETRACTIONS)}")
        require_settings(lr, betas, eps, weight_decay)
        self._inner: list[Optimizer] = []
        base = type(frames([{"params": [torch.zeros(1, 1)]}])).__name__
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, _KEY: True, _BASE: base}
        super().__init__(_groups(params), defaults)
        for group in self.param_groups:
            require_settings(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        self.retraction: Retraction = retraction
        self.orthogonality_error = 0.0
        self._build = frames
        self._frames: list[Frames] = []
        self._written: list[
            Tensor | None
        ] = []  # copy of each matrix after our last step, to notice writes through `.data`
        if not self._matrices():
            raise AdapterError(
                "no matrix to keep the singular values of: give a model with attention or MLP "
                "projections, or parameters of two dimensions"
            )
        for W in self._matrices():
            _require_whole(W)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in any torch optimizer, but only before the first step.

        Raises:
            AdapterError: the optimizer has stepped, so its frames and moments are those of the existing groups.
        """
        if self._inner:
            raise AdapterError("groups cannot be added after the first step: make a new optimizer of all of them")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the frames by the base optimizer and all other parameters by AdamW, then retract and write weights.

        At a learning rate of 0 every weight stays bit-identical.

        Args:
            closure: computes the loss again, as in torch.

        Returns:
            The loss of the closure, or None.

        Raises:
            AdapterError: something else wrote to a matrix, so it is not the product of its frames; a weight holds NaN
                or infinity; or a gradient holds them or is sparse. Nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._inner:
            self._prepare([Frames.of(W) for W in self._matrices()])
        for place, (W, frames) in enumerate(zip(self._matrices(), self._frames, strict=True)):
            _require_own(W, frames, self._written[place])
            frames.take_gradient(W.grad)
        self._require_gradients()
        self._follow_schedule()
        for inner in self._inner:
            inner.step()
        retraction = _RETRACTIONS[self.retraction]
        moved = [(W, f) for W, f, lr in self._with_rates() if W.grad is not None and lr != 0]
        self.orthogonality_error = max((f.retract(retraction) for _, f in moved), default=self.orthogonality_error)
        for W, frames in moved:
            W.copy_(frames.product())
        self._written = [W.detach().clone() for W in self._matrices()]
        self._share_state()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; the model must have the weights that belong to it.

        Raises:
            AdapterError: the state belongs to another optimizer, or to other matrices or parameters.
        """
        theirs = {group.get(_BASE) for group in state_dict["param_groups"]}
        if theirs != {self.defaults[_BASE]}:
            named = " and ".join(map(str, theirs - {None})) or "nothing"
            raise AdapterError(
                f"this state is of another optimizer, which trained frames by {named} and not by "
                f"{self.defaults[_BASE]}: begin a new run"
            )
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        saved: dict[int, Mapping[str, Tensor]] = {
            id(p): state_dict["state"][i] for i, p in zip(ids, own, strict=False) if i in state_dict["state"]
        }
        matrices = self._matrices()
        kept = [saved.get(id(W), {}) for W in matrices]
        if state_dict["state"] and [_shape_of(state) for state in kept] != [tuple(W.shape) for W in matrices]:
            shapes = [_shape_of(state) for state in kept][:3], [tuple(W.shape) for W in matrices][:3]
            raise AdapterError(f"this state is of other matrices: shapes {shapes[0]}…, and here {shapes[1]}…")
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise AdapterError(f"this state is of other parameters: {error}") from error
        others = {p: {key: _copied(value) for key, value in state.items()} for p, state in self.state.items()}
        self.state.clear()
        self._inner, self._frames, self._written = [], [], []
        if not state_dict["state"]:
            return  # saved before the first step: frames are made at the first step here
        frames = [  # from state_dict itself: super().load_state_dict has cast its own copy to the dtype of W
            Frames(*(state[name].to(W.device, copy=True) for name in ("U", "S", "V")))
            for state, W in zip(kept, matrices, strict=True)
        ]
        self._prepare(frames)
        for state, of in zip(kept, frames, strict=True):
            for side, frame in (("U", of.U), ("V", of.V)):
                momenta = {
                    key.removeprefix(f"{side}_"): value for key, value in state.items() if key.startswith(f"{side}_")
                }
                self._inner[0].state[frame].update(
                    {key: _copied(x if x.dim() == 0 else x.to(frame.device)) for key, x in momenta.items()}
                )
        for p in self._others():
            if p in others:
                self._inner[1].state[p].update(others[p])
        self._share_state()

    def __getstate__(self) -> dict[str, Any]:
        """The optimizer's state for copies and pickles, with the attributes of this class."""
        own = {
            name: self.__dict__[name] for name in ("retraction", "orthogonality_error", "_build", "_frames", "_inner")
        }
        return {**super().__getstate__(), **own, "_written": [None] * len(self._frames)}

    def _matrices(self) -> list[Tensor]:
        return [W for group in self.param_groups if group[_KEY] for W in group["params"] if W.dim() == 2]

    def _others(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if not (group[_KEY] and p.dim() == 2)]

    def _with_rates(self) -> Iterator[tuple[Tensor, Frames, float]]:
        """Every matrix with its frames and learning rate."""
        rates = [
            float(group["lr"]) for group in self.param_groups if group[_KEY] for W in group["params"] if W.dim() == 2
        ]
        yield from zip(self._matrices(), self._frames, rates, strict=True)

    def _require_gradients(self) -> None:
        """Raise AdapterError if a gradient, of a frame or of another parameter, is sparse or not finite."""
        for inner in self._inner:
            for p in (p for group in inner.param_groups for p in group["params"] if p.grad is not None):
                if p.grad.is_sparse or not bool(torch.isfinite(p.grad).all()):
                    raise AdapterError(
                        f"the gradient of a parameter of shape {tuple(p.shape)} is sparse, or holds NaN or infinity: "
                        "nothing was moved; leave the step out, or look at the loss"
                    )

    def _share_state(self) -> None:
        """Put the tensors of frames and inner optimizers into `state`, without copies."""
        for W, frames in zip(self._matrices(), self._frames, strict=True):
            self.state[W] = {"U": frames.U, "S": frames.S, "V": frames.V}
            for side, frame in (("U", frames.U), ("V", frames.V)):
                momenta = self._inner[0].state.get(frame, {})
                self.state[W] |= {f"{side}_{key}": value for key, value in momenta.items()}
        for p in self._others():
            if p in self._inner[1].state:
                self.state[p] = self._inner[1].state[p]

    def _prepare(self, frames: list[Frames]) -> None:
        """Make the inner optimizers, of frames and of all other parameters, with one group for each of ours."""
        self._frames, self._inner, self._written = frames, [], [None] * len(frames)
        left = iter(frames)
        inside: list[dict[str, Any]] = []
        beside: list[dict[str, Any]] = []
        for group in self.param_groups:
            matrices = [W for W in group["params"] if group[_KEY] and W.dim() == 2]
            others = [p for p in group["params"] if not (group[_KEY] and p.dim() == 2)]
            inside.append({"params": [x for _ in matrices for f in (next(left),) for x in (f.U, f.V)]})
            beside.append({"params": others})
        self._inner.append(self._build(inside))
        if any(group["params"] for group in beside):
            self._inner.append(torch.optim.AdamW(beside))
        self._follow_schedule()

    def _follow_schedule(self) -> None:
        """Copy settings of each group to the inner optimizers; frames have no weight decay."""
        for inner in self._inner:
            followed = ("lr", "betas", "eps") if inner is self._inner[0] else ("lr", "betas", "eps", "weight_decay")
            for ours, theirs in zip(self.param_groups, inner.param_groups, strict=True):
                theirs.update({key: ours[key] for key in followed if key in theirs})


class IsospectralAdamW(Isospectral):
    """Train matrices with fixed singular values by AdamW on their frames, and all other parameters by AdamW.

    Args:
        params: as in `Isospectral`: a module, its `named_parameters()`, or a list of parameters or groups.
        lr: learning rate of frames, whose entries are about 1/√n, and of all other parameters.
        betas, eps: of AdamW on frames and on all other parameters.
        weight_decay: of AdamW on all other parameters; frames have none, since the retraction would undo it.
        retraction: `svd`, by LAPACK in float64; or `newton-schulz`, by matrix products only.

    Attributes:
        state, orthogonality_error: as in `Isospectral`.

    Raises:
        AdapterError: as in `Isospectral`.

    Source: arXiv 2607.19331 (ISO); see `Isospectral`.

    >>> layer = torch.nn.Linear(8, 6, bias=False)
    >>> before = torch.linalg.svdvals(layer.weight)
    >>> optimizer = IsospectralAdamW([layer.weight], lr=1e-2)
    >>> layer(torch.ones(1, 8)).square().sum().backward()
    >>> optimizer.step()
    >>> torch.allclose(torch.linalg.svdvals(layer.weight), before, atol=1e-6)
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        retraction: Retraction = "svd",
    ) -> None:
        build = partial(torch.optim.AdamW, betas=betas, eps=eps, weight_decay=0.0)
        super().__init__(params, build, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, retraction=retraction)


class IsospectralMuon(Isospectral):
    """Train matrices with fixed singular values by torch's Muon on their frames, and all other parameters by AdamW.

    Args:
        params, lr, retraction: as in `IsospectralAdamW`.
        momentum: of Muon.
        betas, eps, weight_decay: of AdamW on all other parameters; frames have no weight decay.

    Attributes:
        state, orthogonality_error: as in `Isospectral`.

    Raises:
        AdapterError: as in `Isospectral`, or torch is older than 2.9 and has no Muon.

    Source: arXiv 2607.19331 (ISO); see `Isospectral`.

    >>> layer = torch.nn.Linear(8, 6, bias=False)
    >>> before = torch.linalg.svdvals(layer.weight)
    >>> optimizer = IsospectralMuon([layer.weight], lr=1e-2, retraction="newton-schulz")
    >>> layer(torch.ones(1, 8)).square().sum().backward()
    >>> optimizer.step()
    >>> torch.allclose(torch.linalg.svdvals(layer.weight), before, atol=1e-6)
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        retraction: Retraction = "svd",
    ) -> None:
        muon: Any = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise AdapterError(f"torch {torch.__version__} has no Muon: take torch 2.9 or later, or IsospectralAdamW")

        build = partial(muon, momentum=momentum, weight_decay=0.0)
        super().__init__(params, build, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, retraction=retraction)


def _groups(params: Any) -> list[Any]:
    """Parameter groups, or plain parameters, from any form of `params`."""
    if isinstance(params, torch.nn.Module) or isinstance(getattr(params, "model", None), torch.nn.Module):
        return isospectral_groups(module_of(params).named_parameters())
    if not isinstance(params, Iterable) or isinstance(params, Tensor):
        raise AdapterError(f"params is a {type(params).__name__}: give a torch.nn.Module, or its named_parameters()")
    given = list(params)
    if given and isinstance(given[0], tuple):
        return isospectral_groups(given)
    if given and isinstance(given[0], dict):
        return [part for group in given for part in _parts_of(group)]
    if given and isinstance(params, Iterator) and isinstance(given[0], Tensor):
        raise AdapterError(
            "model.parameters() has no names to tell projections from embeddings and heads by: give the model, "
            "model.named_parameters(), or a list of the weights that you mean"
        )
    if any(p.dim() != 2 for p in given):
        LOG.warning(
            "a list of parameters has no names: all its matrices keep their singular values, embeddings and heads too. "
            "Give the model, or model.named_parameters(), to keep those of the projections alone"
        )
    return given


def _parts_of(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group; divided in two by names if its parameters have names and it does not set `isospectral`."""
    members = group["params"]
    members = [members] if isinstance(members, Tensor) else list(members)
    if not members or not isinstance(members[0], tuple):
        return [group | {"params": members}]
    if _KEY in group:
        return [group | {"params": [p for _, p in members]}]
    return [group | part for part in isospectral_groups(members)]


def isospectral_groups(named: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Parameter groups of a model's trainable parameters: attention and MLP projections, and all others.

    Args:
        named: names and parameters, as from `named_parameters()`.

    Returns:
        A group with `isospectral=True` and one with `isospectral=False`; empty ones are left out.

    >>> layer = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4), "norm": torch.nn.LayerNorm(4)})
    >>> [(group["isospectral"], len(group["params"])) for group in isospectral_groups(layer.named_parameters())]
    [(True, 1), (False, 3)]
    """
    trained = [(name, p) for name, p in named if p.requires_grad]
    kept = [p for name, p in trained if p.dim() == 2 and place_of(name).role in LINEAR_ROLES]
    inside = {id(p) for p in kept}
    rest = [p for _, p in trained if id(p) not in inside]
    stacked = [name for name, p in trained if p.dim() > 2 and _holds_projections(name, p)]
    if stacked:
        LOG.warning(
            "%d parameters are stacks of expert matrices, the first %s: their singular values are not kept, they are "
            "trained by AdamW",
            len(stacked),
            stacked[0],
        )
    groups: Iterable[tuple[bool, list[Any]]] = ((True, kept), (False, rest))
    return [{"params": members, _KEY: isospectral} for isospectral, members in groups if members]


def _holds_projections(name: str, p: Tensor) -> bool:
    """Whether a parameter holds linear matrices, as stacked experts do."""
    return any(part.is_linear for part in parts_of(TensorInfo(name, tuple(p.shape), str(p.dtype)), {}))


def _shape_of(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Shape of the matrix whose frames a saved state holds; None if it holds no frames."""
    return (len(state["U"]), len(state["V"])) if {"U", "S", "V"} <= state.keys() else None


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _require_own(W: Tensor, frames: Frames, written: Tensor | None) -> None:
    """Raise AdapterError if a matrix changed since our last step, or is not the product of frames that were loaded."""
    if written is not None:
        ours = torch.equal(W, written)
    else:
        away = torch.linalg.vector_norm(W.double() - frames.product())
        ours = bool(away <= _SAME * torch.linalg.vector_norm(frames.S))
    if not ours:
        raise AdapterError(
            f"a matrix of shape {tuple(W.shape)} is not the one that this optimizer left: load the model's weights "
            "together with the optimizer's state, or make a new optimizer for the weights as they are"
        )


def _require_whole(W: Tensor) -> None:
    """Raise AdapterError if a matrix is not loaded, is sharded, or is not in float32 or float64."""
    require_loaded(f"a matrix of shape {tuple(W.shape)}", W)
    if hasattr(W, "full_tensor"):
        raise AdapterError("a matrix is sharded, and its singular values belong to the whole: train without FSDP")
    if W.dtype not in (torch.float32, torch.float64):
        raise AdapterError(
            f"a matrix is stored as {W.dtype}, whose rounding alone shifts singular values: train float32 weights, and "
            "compute in bfloat16 with autocast"
        )
