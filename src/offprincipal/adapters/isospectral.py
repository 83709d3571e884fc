"""Isospectral optimizers: a matrix keeps its singular values, and only its singular frames are trained.

W = U Σ0 Vᵀ. A base optimizer steps on U and V as on any parameters, and a polar retraction makes their columns
orthonormal again. Which matrices are trained so is told by names; everything else is AdamW's. Knows no trainer.
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
_BASE = "frames_optimizer"  # the base optimizer's name, in every group: states of another do not fit
_SAME = 1e-6  # of a matrix's norm: how far float32's rounding, here or elsewhere, may leave it from its frames' product
LOG = logging.getLogger("offprincipal")


@dataclass
class Frames:
    """The decomposition of one matrix: W = U diag(S) Vᵀ.

    Args:
        U: (n, r) and V: (m, r), float32, orthonormal columns; trained.
        S: (r,), float64; fixed.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @staticmethod
    def of(W: Tensor) -> "Frames":
        """Those of a matrix (n, m), by LAPACK in float64.

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
        """Give the frames the gradients that follow from that of their product."""
        if G is None:
            self.U.grad = self.V.grad = None
            return
        G, S = G.float(), self.S.float()
        self.U.grad = tangent(self.U, (G @ self.V) * S)
        self.V.grad = tangent(self.V, (G.T @ self.U) * S)

    def retract(self, retraction: Callable[[Tensor], Tensor]) -> float:
        """Make the columns orthonormal again; what then is left of ‖UᵀU − I‖_F or ‖VᵀV − I‖_F, the larger."""
        for frame in (self.U, self.V):
            frame.copy_(retraction(frame))
        return max(orthogonality_error(self.U), orthogonality_error(self.V))


class Isospectral(Optimizer):
    """Train matrices at fixed singular values, and all other parameters by AdamW.

    Frames are made at the first step, from the weights as they are then. A step of the base optimizer moves U and V;
    each is then replaced by its polar factor, so that the singular values of W stay those of the base to float32's
    rounding. This is the base of `IsospectralAdamW` and `IsospectralMuon`.

    Args:
        params: a module or its `named_parameters()`, whose attention and MLP projections are trained so; or a list of
            parameters or groups, of which all matrices are, but for groups with `isospectral=False`; groups of named
            parameters are told apart by their names too.
        frames: makes the base optimizer from groups of frames; its state is tensors, by parameter.
        lr: learning rate, of frames and of all other parameters; schedulers change it through `param_groups`.
        betas, eps, weight_decay: of AdamW on all other parameters, by default as torch has them; of each group, where
            it has its own.
        retraction: `svd`, by LAPACK in float64; or `newton-schulz`, products alone, whose `orthogonality_error` is
            measured at every step.

    Attributes:
        state: of each matrix its frames `U`, `S` and `V`, and as `U_exp_avg` and the like what the base optimizer keeps
            of them; of every other parameter AdamW's.

    Raises:
        AdapterError: nothing is to be trained so, a matrix is not stored in float32 or float64, is sharded or is not
            loaded, there is no such retraction, or parameters come without names, as `model.parameters()` has them,
            embeddings and heads among them.

    Source: arXiv 2607.19331 (ISO), which released no optimizer: frames, fixed spectrum and base optimizer are its; the
    polar retraction is Absil, Mahony and Sepulchre 2008, 4.1.1.
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
        self._written: list[Tensor | None] = []  # each matrix as we last left it; writes through `.data` leave no trace
        if not self._matrices():
            raise AdapterError(
                "no matrix to keep the singular values of: give a model with attention or MLP "
                "projections, or parameters of two dimensions"
            )
        for W in self._matrices():
            _require_whole(W)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer, before the first step.

        Raises:
            AdapterError: it has stepped, and frames and moments are those of its groups.
        """
        if self._inner:
            raise AdapterError("groups cannot be added after the first step: make a new optimizer of all of them")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of the base optimizer on frames and of AdamW on the rest, the retraction, and the new weights.

        At a learning rate of 0 no bit of a weight changes.

        Raises:
            AdapterError: a matrix is no longer what the frames make up, since something else wrote to it; or a weight
                or gradient holds NaN or infinity. Nothing has moved then.
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
        """Go on where another left off; the weights have to be those that it left.

        Raises:
            AdapterError: it is the state of another optimizer, or of other matrices.
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
            return  # that one had not stepped: frames are made anew
        frames = [  # of the saved state itself, which torch casts to the type of W
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
        """As of any optimizer, and what copies and pickles of this one need."""
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
        """Raises AdapterError where a gradient, of frames or of another parameter, cannot be stepped on."""
        for inner in self._inner:
            for p in (p for group in inner.param_groups for p in group["params"] if p.grad is not None):
                if p.grad.is_sparse or not bool(torch.isfinite(p.grad).all()):
                    raise AdapterError(
                        f"the gradient of a parameter of shape {tuple(p.shape)} is sparse, or holds NaN or infinity: "
                        "nothing was moved; leave the step out, or look at the loss"
                    )

    def _share_state(self) -> None:
        """Let `state` hold, of every parameter, the very tensors that are kept of it inside."""
        for W, frames in zip(self._matrices(), self._frames, strict=True):
            self.state[W] = {"U": frames.U, "S": frames.S, "V": frames.V}
            for side, frame in (("U", frames.U), ("V", frames.V)):
                momenta = self._inner[0].state.get(frame, {})
                self.state[W] |= {f"{side}_{key}": value for key, value in momenta.items()}
        for p in self._others():
            if p in self._inner[1].state:
                self.state[p] = self._inner[1].state[p]

    def _prepare(self, frames: list[Frames]) -> None:
        """Optimizers on the frames, and on everything else, a group for each of ours."""
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
        """Give the optimizers inside what ours say of each group; frames have no weight decay."""
        for inner in self._inner:
            followed = ("lr", "betas", "eps") if inner is self._inner[0] else ("lr", "betas", "eps", "weight_decay")
            for ours, theirs in zip(self.param_groups, inner.param_groups, strict=True):
                theirs.update({key: ours[key] for key in followed if key in theirs})


class IsospectralAdamW(Isospectral):
    """Train matrices at fixed singular values by AdamW on their frames, and all other parameters by AdamW.

    Args:
        params: a module or its `named_parameters()`, whose attention and MLP projections keep their singular values; or
            a list of parameters or groups, of which all matrices do, but for groups with `isospectral=False`.
        lr: learning rate of frames, whose entries are about 1/√n, and of all other parameters.
        betas, eps: of AdamW on frames and on all other parameters.
        weight_decay: of AdamW on all other parameters; frames have none, since a retraction would undo it.
        retraction: `svd`, by LAPACK in float64; or `newton-schulz`, products alone.

    Attributes:
        orthogonality_error: the largest ‖UᵀU − I‖_F that is left after a step's retraction; 0 before the first.

    Raises:
        AdapterError: nothing is to be trained so, a matrix is not stored in float32 or float64 or is sharded, a setting
            is out of range, or parameters come without names, as `model.parameters()` has them.

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
    """Train matrices at fixed singular values by torch's Muon on their frames, and all other parameters by AdamW.

    Args:
        params, lr, betas, eps, weight_decay, retraction: as of `IsospectralAdamW`; betas and eps of other parameters.
        momentum: of Muon.

    Raises:
        AdapterError: as of `IsospectralAdamW`, or torch is older than 2.9 and has no Muon.

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
    """A group, or its two parts, where its parameters have names and it does not say what they are."""
    members = group["params"]
    members = [members] if isinstance(members, Tensor) else list(members)
    if not members or not isinstance(members[0], tuple):
        return [group | {"params": members}]
    if _KEY in group:
        return [group | {"params": [p for _, p in members]}]
    return [group | part for part in isospectral_groups(members)]


def isospectral_groups(named: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Trainable parameters of a model: attention and MLP projections, and the rest, which AdamW trains.

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
    return any(part.is_linear for part in parts_of(TensorInfo(name, tuple(p.shape), str(p.dtype)), {}))


def _shape_of(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Of the matrix that a saved state holds the frames of; None where it holds none."""
    return (len(state["U"]), len(state["V"])) if {"U", "S", "V"} <= state.keys() else None


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _require_own(W: Tensor, frames: Frames, written: Tensor | None) -> None:
    """Raises `AdapterError` where a matrix is not what we left, or of loaded frames not what they make up."""
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
    require_loaded(f"a matrix of shape {tuple(W.shape)}", W)
    if hasattr(W, "full_tensor"):
        raise AdapterError("a matrix is sharded, and its singular values belong to the whole: train without FSDP")
    if W.dtype not in (torch.float32, torch.float64):
        raise AdapterError(
            f"a matrix is stored as {W.dtype}, whose rounding alone shifts singular values: train float32 weights, and "
            "compute in bfloat16 by autocast"
        )
