"""Map a model that was trained after an intervention back to the coordinates of its base.

The *update*, the trained weights minus the stored intervened weights, is mapped back and added to the base. If the
weights themselves were mapped back, the rounding of the intervention would change every entry, and each would count as
changed by training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offprincipal.checkpoints import Checkpoint, open_checkpoint
from offprincipal.errors import InterventionError, ModelError
from offprincipal.file_names import INTERVENTION, MASTERS, UNDONE
from offprincipal.files import new_folder, write_json
from offprincipal.interventions.applying import DECISIVE, require_dtype
from offprincipal.interventions.architectures import EMBEDDING, HEAD
from offprincipal.interventions.folders import write_model
from offprincipal.interventions.opened import OpenedModel, open_model
from offprincipal.interventions.plan import Plan, Weights, plan_of
from offprincipal.interventions.proof import (
    SEQUENCES,
    divergence,
    logits,
    random_tokens,
    require_equal,
    sampled_tokens,
)
from offprincipal.interventions.record import InterventionRecord, read_record, require_request
from offprincipal.interventions.rounding import rounded
from offprincipal.models import hash_of, open_language_model
from offprincipal.versions import versions

SCHEMA = 1
_LEAST_CORRELATION = 0.5  # between a trained matrix and the one from which it was trained


@dataclass(frozen=True)
class _Repeated:
    """A repeated intervention.

    Args:
        base: the weights to which it was applied.
        plan: the operations.
        exact: the result before rounding.
        stored: the stored result.
    """

    base: Weights
    plan: Plan
    exact: Weights
    stored: Weights

    def kept_all_digits(self, name: str) -> bool:
        """Whether a tensor was stored without rounding, for example because it was only reordered."""
        return torch.equal(self.exact[name].double(), self.stored[name].double())


def undo(
    record: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    exact: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model that was trained after an intervention in the coordinates of the base.

    By default the update is mapped back and added to the base: W = W0 + T⁻¹(W1 − Q(T W0)), where T is the intervention
    and Q its rounding. Tensors that the intervention did not round are mapped back themselves, bit for bit. Changes
    of folded gains cannot be moved to the base's norms; they are folded into the matrices that read the norms' output.

    If the trained model has float32 masters, they are mapped back, and the stored weights are the rounded results, as
    if training had stored its masters in the base's coordinates. Otherwise only changes that are visible in the stored
    intervened weights are mapped back.

    Args:
        record: `intervention.json`, or its folder.
        model: the trained model: a folder or a Hub id.
        out: folder of the result; absent, empty, or with `overwrite` one that was written by an intervention.
        base: the model to which the intervention was applied; by default the one that the record names.
        dtype: dtype of the stored result: float32, bfloat16 or float16; by default that of the trained model, but
            float32 if it has no masters and the intervention rounded any tensor.
        exact: map the weights themselves back. The function of the trained model is then preserved to float64
            rounding, but the intervention's rounding counts as change.
        overwrite: replace an intervention in the folder.

    Returns:
        The content of `undo.json`: `schema`, `record`, `model`, `exact`, `dtype`, `result`, `versions` and `proof`, in
        which `logits_relative_difference` compares the result in float64 with the weights that were mapped back,
        without the intervention's rounding unless `exact`; `kl_stored` is KL(trained‖stored result) in nats per token,
        over `sequences` sequences of `length` tokens sampled from the trained model.

    Raises:
        InterventionError: there is no record, it does not belong to the base or the model, the base cannot be opened
            from the source in the record, folded gains are zero, a value is too large for `dtype`, or the logits
            differ. Nothing is written then.
        FileError: the folder is not free or cannot be written.
        ModelError, CheckpointError: a model cannot be opened.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from offprincipal.interventions import intervene
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(f"{folder}/base")
    ...     _ = intervene(f"{folder}/base", f"{folder}/rotated", rotate=[0])
    ...     content = undo(f"{folder}/rotated", f"{folder}/rotated", f"{folder}/back")  # without training in between
    >>> content["result"]["weights_blake2b"] == content["record"]["base"]["weights_blake2b"]
    True
    """
    if isinstance(record, InterventionRecord):
        raise InterventionError("give the folder that `intervene` wrote: the model in it is needed too")
    written = read_record(record)
    require_dtype(dtype)
    opened = open_model(base) if base is not None else _named_base(written.base["source"])
    place = Path(record).expanduser()
    repeated = _repeated(written, opened, place if place.is_dir() else place.parent)
    trained = open_model(model)
    _require_trained_from(trained, opened, repeated)
    masters = None if trained.folder is None else _masters(open_checkpoint(trained.folder), trained)
    moved = trained.weights if masters is None else masters
    kept_all = masters is not None or all(map(repeated.kept_all_digits, repeated.stored))
    chosen = dtype or (trained.dtype if kept_all else "float32")

    result = _mapped_back(repeated, moved, exact)
    difference = _proved(trained, moved, repeated, result, exact)
    single = rounded(result, "float32")
    stored = rounded(single, chosen)  # from the masters, so that they round to it
    kept = (opened.folder, trained.folder, place if place.is_dir() else place.parent)
    with new_folder(Path(out), (INTERVENTION, UNDONE), overwrite, kept, "an intervention") as part:
        write_model(part, trained.language_model, stored, chosen)
        if masters is not None:
            write_model(part / MASTERS, trained.language_model, single, "float32", tokenizer=False)
        content = {
            "schema": SCHEMA,
            "record": written.as_json(),
            "model": trained.identity,
            "exact": exact,
            "dtype": chosen,
            "result": {"weights_blake2b": hash_of(_with_head(stored))},
            "proof": {"logits_relative_difference": difference, **_cost(trained, stored)},
            "versions": versions(*DECISIVE),
        }
        write_json(part / UNDONE, content)
    return content


def _named_base(source: str) -> OpenedModel:
    """The base that a record names."""
    try:
        return open_model(source)
    except ModelError as error:
        raise InterventionError(
            f"the base that the record names cannot be opened: {error}. If it was moved, name it with --base (base=)"
        ) from error


def _repeated(record: InterventionRecord, base: OpenedModel, folder: Path) -> _Repeated:
    """Repeat the intervention of a record.

    Args:
        record: of the intervention.
        base: the model to which it was applied.
        folder: of the record; if this machine rounds differently, the intervened model in it is used.

    Raises:
        InterventionError: the record is of another base, or its intervention cannot be repeated or undone.
    """
    if base.identity["weights_blake2b"] != record.base["weights_blake2b"]:
        raise InterventionError(
            f"the record is of other weights than those of {base.source}: the intervention was applied to "
            f"{record.base['source']}; give that model with --base"
        )
    require_request(record.request, base.architecture.layers)
    plan = plan_of(record.request, base.architecture, base.weights)
    for norm in plan.readers:
        if bool((base.weights[norm] + plan.gain_offset == 0).any()):
            raise InterventionError(
                f"gains of {norm} are zero: weights that were multiplied by them cannot be restored"
            )
    exact = plan.apply(base.weights)
    stored = rounded(exact, record.dtype)
    if hash_of(_with_head(stored)) != record.result["weights_blake2b"]:
        stored = _stored_with_record(record, folder, exact)
    return _Repeated(plan.before(base.weights), plan, exact, {name: stored[name] for name in exact})


def _stored_with_record(record: InterventionRecord, folder: Path, exact: Weights) -> Weights:
    """The intervened weights in the record's folder, if they differ from the repeated ones only by rounding."""
    if (folder / "config.json").is_file():
        weights: Weights = open_language_model(folder, "cpu", tokenizer=False).model.state_dict()
        step = torch.finfo(getattr(torch, record.dtype))
        close = (
            name in weights
            and weights[name].shape == x.shape
            and torch.allclose(weights[name].double(), x.double(), rtol=2 * step.eps, atol=step.tiny)
            for name, x in exact.items()
        )
        if hash_of(weights) == record.result["weights_blake2b"] and all(close):
            return weights
    raise InterventionError(
        f"the intervention of the record in {folder} gives other weights than it records: its seed, layers or dtype "
        "were edited, or this machine rounds differently. Keep the record in the folder of its model"
    )


def _require_trained_from(trained: OpenedModel, base: OpenedModel, repeated: _Repeated) -> None:
    """Refuse a model that cannot have been trained from the intervened one."""
    if trained.architecture.kind != base.architecture.kind:
        raise InterventionError(
            f"{trained.source} is of architecture {trained.architecture.kind}, and the record of "
            f"{base.architecture.kind}: give the record of the model that it was trained from"
        )
    for name in sorted(repeated.stored.keys() | trained.weights.keys()):
        ours, theirs = repeated.stored.get(name), trained.weights.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise InterventionError(
                f"{trained.source} does not fit the record: {name} is in only one of them, or has another shape. "
                "Give the record of the model that it was trained from"
            )
    for name, ours in repeated.stored.items():
        if ours.dim() == 2 and (correlation := _correlation(trained.weights[name], ours)) < _LEAST_CORRELATION:
            raise InterventionError(
                f"{trained.source} was not trained from the model of the record: its {name} has a correlation of "
                f"{correlation:.2f} with the intervened one. Give the record of the model that it was trained from"
            )


def _correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Uncentred correlation of two matrices; 1 if either is zero."""
    x, y = x.double().flatten(), y.double().flatten()
    return float(x @ y / (x.norm() * y.norm())) if bool(y.any()) and bool(x.any()) else 1.0


def _mapped_back(repeated: _Repeated, weights: Weights, exact: bool) -> Weights:
    """Trained weights in the base's coordinates; float64 for tensors that the intervention changed."""
    folded = repeated.plan.fold(weights)
    back = {}
    for name, x in folded.items():
        if name in repeated.plan.readers:
            back[name] = repeated.base[name]
        elif exact or repeated.kept_all_digits(name):
            back[name] = repeated.plan.take_back(name, x)
        else:
            update = x.double() - repeated.stored[name].double()
            back[name] = repeated.base[name].double() + repeated.plan.take_back(name, update)
    return back


def _proved(trained: OpenedModel, moved: Weights, repeated: _Repeated, result: Weights, exact: bool) -> float:
    """Relative difference of the result's float64 logits from those of the weights that were mapped back.

    Raises:
        InterventionError: it is larger than rounding explains.
    """
    model = trained.language_model.model
    uniform = random_tokens(trained.vocabulary, trained.length, 0)
    expected = moved
    if not exact:
        folded = repeated.plan.fold(moved)
        expected = {
            name: x.double() - repeated.stored[name].double() + repeated.exact[name] for name, x in folded.items()
        }
    return require_equal(logits(model, result, uniform), logits(model, expected, uniform), "mapping it back")


def _cost(trained: OpenedModel, stored: Weights) -> dict[str, float | int]:
    """KL divergence of the stored result from the trained model, and the tokens over which it is measured."""
    model = trained.language_model.model
    sampled = sampled_tokens(model, trained.length, 0)
    kl = divergence(logits(model, trained.weights, sampled), logits(model, stored, sampled))
    return {"kl_stored": kl, "sequences": SEQUENCES, "length": trained.length}


def _masters(checkpoint: Checkpoint, trained: OpenedModel) -> Weights | None:
    """The float32 masters of a trained model; None if there are none.

    Raises:
        InterventionError: they do not round to its weights, so they belong to another model.
    """
    masters = checkpoint.masters()
    if masters is None:
        return None
    weights = {
        name: torch.from_numpy(masters.read(name).astype("float32")).reshape(info.shape)
        for name, info in masters.tensors.items()
    }
    for name in sorted(weights.keys() | trained.weights.keys()):
        ours, theirs = weights.get(name), trained.weights.get(name)
        stored = checkpoint.tensors[name].dtype if name in checkpoint.tensors else trained.dtype
        if ours is None or theirs is None or not torch.equal(ours.to(getattr(torch, stored)).float(), theirs):
            raise InterventionError(
                f"the masters of {trained.source} do not round to its {name}, so they belong to another model: remove "
                "its masters folder, or save both again"
            )
    return weights


def _with_head(weights: Weights) -> Weights:
    """The weights as in a model's state dict, with a tied head under its own name too."""
    return weights if HEAD in weights else weights | {HEAD: weights[EMBEDDING]}
