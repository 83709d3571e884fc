"""Change a model's weights but not its function, verify that, and write the model with a record of the change."""

from collections.abc import Iterable
from operator import index
from pathlib import Path
from typing import Any

import torch

from offprincipal.errors import InterventionError
from offprincipal.file_names import INTERVENTION, UNDONE
from offprincipal.files import new_folder, write_json
from offprincipal.interventions.folders import write_model
from offprincipal.interventions.layers import parse_layers
from offprincipal.interventions.opened import OpenedModel, open_model, require_own_layers
from offprincipal.interventions.plan import Request, plan_of
from offprincipal.interventions.proof import (
    SEQUENCES,
    divergence,
    logits,
    random_tokens,
    require_equal,
    sampled_tokens,
)
from offprincipal.interventions.record import DTYPES, InterventionRecord, require_request
from offprincipal.interventions.rounding import rounded
from offprincipal.models import hash_of, open_language_model
from offprincipal.versions import versions


def intervene(
    model: str | Path,
    out: str | Path,
    *,
    rotate: Iterable[int] | int | str = (),
    permute: Iterable[int] | int | str = (),
    residual: bool = False,
    matrix: str = "haar",
    seed: int = 0,
    dtype: str | None = None,
    overwrite: bool = False,
) -> InterventionRecord:
    """Rotate or reorder a model's weights without changing its function, and write it as a Hugging Face folder.

    Heads and neurons are reordered first, then values are rotated, then the residual stream. Everything is computed in
    float64 and rounded once.

    Args:
        model: a folder, a Hub id, or `embedded`; of the type Llama, Mistral, Qwen2, Qwen3, or Gemma.
        out: folder of the result; absent, empty, or with `overwrite` one that was written by an intervention.
        rotate: layers whose attention values are rotated, with one random rotation per key-value head: numbers from 0,
            or a string such as "0,4-7" or "all".
        permute: layers whose heads and MLP neurons are reordered, in the same form.
        residual: rotate the residual stream. The gains of norms are folded into the matrices that read their output,
            and a head that was tied to the embedding is stored separately.
        matrix: `haar` (uniform) or `hadamard` (with random signs).
        seed: random seed; each layer and kind uses its own stream.
        dtype: dtype of the stored result: float32, bfloat16 or float16; by default that of the model.
        overwrite: replace an intervention in the folder.

    Returns:
        The record, as in `intervention.json`.

    Raises:
        InterventionError: nothing is requested, a setting is unknown or out of range, the architecture is not supported
            or does not allow the request, layers share weights, a weight is NaN, infinite or too large for `dtype`, or
            the float64 logits differ from those of the model. Nothing is written then.
        FileError: the folder is not free or cannot be written.
        ModelError, CheckpointError: the model cannot be opened.

    Source: the interventions of arXiv 2511.08567, section on causal evidence; the residual rotation of QuaRot
    (arXiv 2404.00456) and SliceGPT (arXiv 2401.15024).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     record = intervene("embedded", Path(folder) / "turned", permute=[0])
    >>> record.proof["logits_relative_difference"] < 1e-9
    True
    """
    rotated, permuted = _listed(rotate), _listed(permute)
    require_request(Request(rotated or (), permuted or (), residual or None in (rotated, permuted), matrix, seed))
    require_dtype(dtype)
    opened = open_model(model)
    require_dtype(dtype or opened.dtype)
    everything = tuple(range(opened.architecture.layers))
    rotated, permuted = (everything if layers is None else layers for layers in (rotated, permuted))
    request = Request(rotated, permuted, residual, matrix, seed)
    require_request(request, len(everything))
    require_own_layers(opened, set(everything if residual else request.rotate + request.permute))
    with new_folder(Path(out), (INTERVENTION, UNDONE), overwrite, (opened.folder,), "an intervention") as part:
        record = _written(part, opened, request, dtype or opened.dtype)
        write_json(part / INTERVENTION, record.as_json())
    return record


DECISIVE = ("python", "offprincipal", "torch", "transformers")  # packages on which the figures depend


def require_dtype(dtype: str | None) -> None:
    """Raise InterventionError if `dtype` is not None and weights cannot be stored in it."""
    if dtype is not None and dtype not in DTYPES:
        raise InterventionError(f"cannot store weights in dtype {dtype!r}: choose one of {', '.join(DTYPES)}")


def _written(part: Path, opened: OpenedModel, request: Request, dtype: str) -> InterventionRecord:
    """Check that the function is unchanged, write the model, and measure the written model."""
    model = opened.language_model.model
    uniform = random_tokens(opened.vocabulary, opened.length, request.seed)
    before = logits(model, opened.weights, uniform)
    plan = plan_of(request, opened.architecture, opened.weights)
    after = plan.apply(opened.weights)
    difference = require_equal(logits(model, after, uniform), before, "this intervention")
    write_model(part, opened.language_model, rounded(after, dtype), dtype)
    del after

    stored = open_language_model(part, "cpu", tokenizer=False).model.state_dict()
    sampled = sampled_tokens(model, opened.length, request.seed)
    exact = logits(model, opened.weights, sampled)
    proof = {
        "logits_relative_difference": difference,
        "kl_stored": divergence(exact, logits(model, stored, sampled)),
        "kl_computed": divergence(exact, logits(model, opened.weights, sampled, getattr(torch, dtype))),
        "sequences": SEQUENCES,
        "length": opened.length,
    }
    result = {"weights_blake2b": hash_of(stored)}
    return InterventionRecord(
        opened.identity, opened.architecture.kind, request, dtype, result, proof, versions(*DECISIVE)
    )


def _listed(layers: Any) -> tuple[int, ...] | None:
    """Layers in ascending order, without repeats; None for all."""
    if isinstance(layers, str):
        layers = parse_layers(layers)
    if isinstance(layers, str):
        return None
    try:
        if hasattr(layers, "__index__") and not getattr(layers, "ndim", 0):
            return (index(layers),)
        return tuple(sorted({index(layer) for layer in layers}))
    except TypeError as error:
        raise InterventionError(f"layers {layers!r} are not all whole numbers: give whole numbers, or 'all'") from error
