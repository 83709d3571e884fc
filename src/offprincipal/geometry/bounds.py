"""Bounds: what any update of a given size can do to a spectrum. True of every pair, so they test us too.

Each function returns measured/bound, never above 1 but for rounding; None if the bound does not apply, and where
measured or bound are within `error`, by how much both sides' decompositions together may be off.
Knows nothing of files, models or layers.
"""

import math

import torch
from torch import Tensor


def weyl_tightness(S_base: Tensor, S_tuned: Tensor, update_norm_2: float, error: float = 0.0) -> float | None:
    """max_i |σ_i(W1) − σ_i(W0)| / ‖ΔW‖₂.

    Source: Weyl's inequality; arXiv 2511.08567, corollary 3.4.

    >>> weyl_tightness(torch.tensor([2.0, 1.0]), torch.tensor([2.5, 1.0]), 1.0)
    0.5
    """
    return _ratio((S_tuned - S_base).abs().max().item(), update_norm_2, error)


def mirsky_tightness(S_base: Tensor, S_tuned: Tensor, update_norm: float, error: float = 0.0) -> float | None:
    """‖σ(W1) − σ(W0)‖₂ / ‖ΔW‖_F.

    Source: Mirsky's inequality; arXiv 2511.08567, corollary 3.4.

    >>> mirsky_tightness(torch.tensor([2.0, 1.0]), torch.tensor([2.5, 1.0]), 1.0)
    0.5
    """
    return _ratio(torch.linalg.vector_norm(S_tuned - S_base).item(), update_norm, error * math.sqrt(len(S_base)))


def ky_fan_tightness(S_base: Tensor, S_tuned: Tensor, k: int, update_norm_2: float, error: float = 0.0) -> float | None:
    """|Σ_{i≤k} σ_i(W1) − Σ_{i≤k} σ_i(W0)| / (k‖ΔW‖₂).

    Source: Ky Fan's k-norm and Weyl's inequality; arXiv 2511.08567, corollary 3.5.

    >>> ky_fan_tightness(torch.tensor([2.0, 1.0]), torch.tensor([2.5, 1.5]), 2, 1.0)
    0.5
    """
    return _ratio(abs((S_tuned[:k] - S_base[:k]).sum().item()), k * update_norm_2, k * error)


def wedin_tightness(
    kth_base: float,
    next_tuned: float,
    update_norm_2: float,
    max_angles_deg: tuple[float, float],
    sine_error: float = 0.0,
    error: float = 0.0,
) -> float | None:
    """max(‖sin Θ_U‖, ‖sin Θ_V‖) γ / ‖ΔW‖₂ with γ = σ_k(W0) − σ_{k+1}(W1); None where γ ≤ 0.

    Args:
        kth_base, next_tuned: σ_k(W0) and σ_{k+1}(W1), 0 if there is none.
        max_angles_deg: the largest left and right principal angle of the top-k subspaces, degrees.
        sine_error: by how much the sine of an angle may be off; error: the same of the singular values.

    Source: Wedin's sin Θ theorem; arXiv 2511.08567, theorem 3.3.

    >>> round(wedin_tightness(2.0, 1.0, 1.0, (30.0, 0.0)), 6)
    0.5
    """
    gap = kth_base - next_tuned
    sine = max(math.sin(math.radians(angle)) for angle in max_angles_deg)
    if gap <= error or sine <= sine_error:
        return None
    return _ratio(sine * gap, update_norm_2, error)


def _ratio(measured: float, bound: float, error: float) -> float | None:
    return measured / bound if bound > 0 and min(measured, bound) > error else None
