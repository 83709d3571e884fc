"""One training run in one folder: start it, resume it after a kill, write the result, and never mix two runs.

    OUT/config.json, model.safetensors, tokenizer…   the result in bfloat16, as it would be deployed
    OUT/masters/                                     the same tensors in float32, as they were trained
    OUT/adapter/                                     the adapter, if one was trained; both models above include it
    OUT/masks.safetensors                            the masks, if only masked entries were trained
    OUT/run.json                                     the record; written last, so it marks a complete run
    OUT/monitor.parquet                              the monitor's table (setting monitor)
    OUT/deltas/step_N.delta                          weights during training (setting keep_deltas)
    OUT/deltas/masters/step_N.safetensors            the same in float32 (setting keep_masters)
    OUT/checkpoints/                                 only while the run is not complete
    OUT/runs/                                        TensorBoard logs (setting report_to)

If a launcher starts several processes, they train one run together; the first locks the folder, measures and writes.

Knows nothing of what the recipes do.
"""

import json
import logging
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offprincipal.adapters import Isospectral
from offprincipal.errors import ArgumentError, FileError, TrainingError
from offprincipal.file_names import CHECKPOINTS, DELTAS, MASTERS, MONITOR, RECORD, STARTED
from offprincipal.files import (
    disk_faults_reported,
    exclusively,
    follow_umask,
    ordinary,
    read_json,
    require_folder,
    write_json,
)
from offprincipal.memory import freed_memory_kept
from offprincipal.models import LanguageModel, identify, model_name, open_language_model, require_training_extra
from offprincipal.models.quiet import quiet_libraries, send_no_telemetry
from offprincipal.recipes import RECIPES
from offprincipal.tasks import Split, open_task, require_problems
from offprincipal.tasks.prompting import prompting
from offprincipal.training.evaluation import evaluate
from offprincipal.training.monitor import Monitor, base_file
from offprincipal.training.processes import in_main, is_main, join, processes, whole_state
from offprincipal.training.progress import ShowProgress, StepReport, silent, terminal_progress
from offprincipal.training.record import RunRecord
from offprincipal.training.settings import TrainSettings, parse_settings
from offprincipal.training.settings_by_model import by_the_model
from offprincipal.training.trained import ADAPTER, MASKS, RunModels, prepare
from offprincipal.versions import versions

SCHEMA = 1
LOG = logging.getLogger("offprincipal")
TENSORBOARD = "runs"
_MEASURING_SEED = 0  # the same for all runs, so that they are measured on the same prompts with the same noise
_ONE_SHARD = 2**60
_LOGGED = {
    "loss": "loss",
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "share_of_prompts_without_signal",
    "entropy": "token_entropy",
    "grad_norm": "gradient_norm",
    "learning_rate": "learning_rate",
    "completions/mean_length": "tokens_per_completion",
    "completions/clipped_ratio": "truncated_share",
    "mean_token_accuracy": "token_accuracy",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "kl": "kl_estimate",
    "orthogonality_error": "orthogonality_error",
    "seconds": "seconds",
}


def train(
    settings: TrainSettings | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    quiet: bool = False,
    progress: ShowProgress | None = None,
    siblings: Iterable[Path] = (),
    **options: Any,
) -> RunRecord:
    """Train a model by a recipe; resume an interrupted run, or return the record of a complete one.

    Args:
        settings: of the run, as `TrainSettings` or a dictionary.
        out: folder of the run: new, empty, or of a run with the same settings.
        overwrite: discard a run that is in the folder.
        quiet: show no progress.
        progress: function that shows progress instead of the terminal.
        siblings: folders of other runs; if one evaluated the same base with the same settings, its evaluation is used.
        options: settings by name, instead of `settings`: `recipe="grpo", tasks="add", steps=40`.

    Returns:
        The record, as in `run.json`: `schema`; `settings`; `base` and, if there is one, `teacher`: where the model is
        from and a hash of its weights; the number of `parameters` of the model and of `trained_parameters`;
        `accuracy`, with `before` and `after` as `evaluate` returns them, or None; `log`, one entry per step; `seconds`
        of training, including steps before a resume; `machine`; `versions`; and `stopped`, only if a condition of
        `stop_if` ended training: the condition, value and step.

    Raises:
        TaskError: a task is not usable.
        ModelError: the model is not usable, or a prompt does not fit its context.
        AdapterError: the adapter method does not fit the model.
        TrainingError: a setting or the folder is not usable, the folder holds another run, or training diverged.
        FileError: a file cannot be read or written, or another process is training in the folder.
        ArgumentError: settings are given in two ways, or there is no folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     settings = {"recipe": "sft_own", "tasks": "add", "steps": 1, "batch": 1, "eval_prompts": 0, "device": "cpu"}
    ...     record = train(settings, f"{folder}/run", quiet=True)
    >>> record["settings"]["steps"], len(record["log"])
    (1, 1)
    """
    settings = _settings_of(settings, options)
    if out is None:
        raise ArgumentError("a run needs a folder: name one, as out='runs/mine'")
    require_training_extra("training")
    from offprincipal.training.recipes import require_usable

    send_no_telemetry()
    join(settings.device)
    needed: tuple[Split, ...] = ("train", "eval") if settings.eval_prompts else ("train",)
    for name in settings.tasks:
        require_problems(open_task(name), *needed)  # refuse unusable tasks before a model is opened
    require_usable(settings)
    settings = by_the_model(settings)
    folder = Path(out).expanduser()
    require_folder(folder.parent)
    with ExitStack() as held, disk_faults_reported(folder), freed_memory_kept():

        def take() -> dict[str, Any] | None:
            held.enter_context(exclusively(folder, beside=True))
            if overwrite:
                _discard(folder)
            return _complete_record(folder, settings)

        quiet = quiet or not is_main()
        record = in_main(take)
        if record is not None:
            if not quiet and progress is None:
                print(f"{folder}: this run is complete already")
            return RunRecord(record)
        if quiet or progress is not None:
            return RunRecord(_run(settings, folder, progress if progress and is_main() else silent, siblings))
        with terminal_progress(f"{settings.recipe} → {folder}") as show:
            return RunRecord(_run(settings, folder, show, siblings))


def _settings_of(settings: TrainSettings | Mapping[str, Any] | None, options: Mapping[str, Any]) -> TrainSettings:
    """Settings from either way to give them."""
    if settings is None:
        return parse_settings(options)
    if not isinstance(settings, TrainSettings | Mapping):
        raise ArgumentError(
            f"{settings!r} is not TrainSettings, nor a dictionary of settings: give one of them, or settings by name, "
            "as train(recipe='grpo', tasks='add', out='runs/mine')"
        )
    if options:
        raise ArgumentError(f"both settings and {next(iter(options))} are given: give one of the two")
    return settings if isinstance(settings, TrainSettings) else parse_settings(settings)


def _run(settings: TrainSettings, out: Path, show: ShowProgress, siblings: Iterable[Path]) -> dict[str, Any]:
    metric = _LOGGED[RECIPES[settings.recipe].shown]
    language_model = open_language_model(settings.model, settings.device, settings.trust_remote_code)
    asking = prompting(settings.prompt, language_model.tokenizer, map(open_task, settings.tasks))
    language_model = replace(language_model, stops=asking.stop_ids)
    teacher = _teacher(settings, language_model)

    def known() -> dict[str, dict[str, str]]:
        models = {"base": identify(settings.model, language_model.model)}
        if teacher is not None:
            models["teacher"] = identify(str(settings.teacher), teacher.model)
        return models

    models = in_main(known)  # before an adapter is inserted into the base
    with quiet_libraries():
        opened = RunModels(language_model, prepare(settings, language_model.model), teacher)

    def begun() -> dict[str, Any]:
        started = _started(out, settings, models)
        if started is not None:
            return started
        before = _measured_by(siblings, settings, models["base"])
        if before is None and settings.eval_prompts:
            show(StepReport("measuring the base", 0, settings.steps, metric))
            with opened.trained.as_base():
                before = _measure(settings, language_model, language_model)
        return {"schema": SCHEMA, "settings": settings.model_dump(mode="json"), **models, "before": before}

    started = in_main(begun)
    sizes = {"parameters": opened.trained.base_parameters, "trained_parameters": opened.trained.parameters}
    monitor = _monitor(settings, out)
    with language_model.ending():
        log, opened = _fit(settings, opened, out / CHECKPOINTS, started, show, monitor)

    def ended() -> dict[str, Any]:
        _write_result(settings, opened, out)
        after = None
        if settings.eval_prompts:
            show(StepReport("measuring the result", len(log), settings.steps, metric))
            after = _measure(settings, out, settings.model)
        record = {
            **{key: value for key, value in started.items() if key != "before"},
            **sizes,
            "accuracy": {"before": started["before"], "after": after},
            "log": log,
            "seconds": round(sum(entry.get("seconds", 0.0) for entry in log), 3),
            "machine": _machine(language_model),
            "versions": versions("python", "offprincipal", "torch", "transformers", "trl", "accelerate"),
        }
        if monitor is not None and monitor.stopped:
            record["stopped"] = monitor.stopped
        write_json(out / RECORD, record)
        _remove_checkpoints(out)
        return record

    return in_main(ended)


def _teacher(settings: TrainSettings, language_model: LanguageModel) -> LanguageModel | None:
    """Open the teacher, if there is one, and check that it fits the model, before anything is measured or written."""
    if settings.teacher is None:
        return None
    from offprincipal.training.recipes.distillation import require_one_vocabulary

    teacher = open_language_model(settings.teacher, settings.device, settings.trust_remote_code)
    require_one_vocabulary(language_model, teacher, settings.teacher)
    return teacher


def _measured_by(siblings: Iterable[Path], settings: TrainSettings, base: dict[str, str]) -> dict[str, Any] | None:
    """Another run's evaluation of the same base with the same settings; it would give the same numbers here."""
    alike = ("tasks", "eval_prompts", "eval_samples", "eval_max_new_tokens", "device", "prompt")
    asked = settings.model_dump(mode="json")
    for folder in siblings:
        record: dict[str, Any] = {}
        with suppress(FileError):  # a damaged record of another run is no error of this one
            record = _record(folder / RECORD) or {}
        theirs = record.get("settings", {})
        if record.get("base") == base and all(theirs.get(name) == asked.get(name) for name in alike):
            before: dict[str, Any] | None = record["accuracy"]["before"]
            return before
    return None


def _measure(settings: TrainSettings, model: LanguageModel | Path, reference: LanguageModel | str) -> dict[str, Any]:
    return evaluate(
        model,
        settings.tasks,
        prompts=settings.eval_prompts,
        samples=settings.eval_samples,
        seed=_MEASURING_SEED,
        reference=reference,
        max_new_tokens=settings.eval_max_new_tokens,
        device=settings.device,
        prompt=settings.prompt,
        trust_remote_code=settings.trust_remote_code,
    )


def _fit(
    settings: TrainSettings,
    opened: RunModels,
    checkpoints: Path,
    started: dict[str, Any],
    show: ShowProgress,
    monitor: Monitor | None,
) -> tuple[list[dict[str, Any]], RunModels]:
    """Train, from the last complete checkpoint if there is one; the log, one entry per step, and the trained models.

    The start of the run is recorded only after its data proved usable, so that faulty settings can be corrected in the
    same folder.
    """
    from offprincipal.training.callbacks import (
        ExactAdapter,
        FrameErrors,
        KeepDeltas,
        NoSignal,
        SaveSlowSteps,
        SpareMemory,
        Timekeeper,
    )
    from offprincipal.training.recipes import build_trainer

    key = RECIPES[settings.recipe].shown
    with quiet_libraries():
        callbacks: list[Any] = [Timekeeper(show, _LOGGED[key], key), NoSignal(), SaveSlowSteps(), SpareMemory()]
        if opened.trained.is_adapter:
            callbacks.append(ExactAdapter())
        if settings.keep_deltas is not None:
            deltas = checkpoints.parent / DELTAS
            base = model_name(settings.model)
            callbacks.append(KeepDeltas(base, deltas, settings.keep_deltas, settings.keep_masters))
        if isinstance(opened.trained.optimizer, Isospectral):
            callbacks.append(FrameErrors(opened.trained.optimizer))
        trainer = build_trainer(settings, opened, checkpoints, callbacks, show)
        if monitor is not None:
            monitor.attach(trainer)
        require_trainable_here(opened, trainer)

        def noted() -> Path | None:
            require_folder(checkpoints)
            write_json(checkpoints / STARTED, started)
            return _last_whole_checkpoint(checkpoints)

        again = (checkpoints / STARTED).is_file()
        last = in_main(noted)
        if again and is_main():
            _say_where(checkpoints.parent, last)
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"{settings.sequences_at_once(processes())} sequences at once do not fit into the GPU's memory: choose "
                "a smaller micro_batch, or gradient_checkpointing, and pass --overwrite"
            ) from error
        opened = _in_one_piece(settings, opened, trainer)
    logged = {**_LOGGED, **RECIPES[settings.recipe].logged}
    log = [
        {"step": entry["step"]} | {ours: entry[theirs] for theirs, ours in logged.items() if theirs in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return log, opened


def _say_where(run: Path, last: Path | None) -> None:
    """Log the step from which an interrupted run continues."""
    if last is None:
        LOG.warning(
            "%s was stopped before its first checkpoint and restarts from step 0. Lower save_every to lose less", run
        )
    else:
        LOG.warning("%s continues after step %s", run, last.name.rpartition("-")[2])


def require_trainable_here(opened: RunModels, trainer: Any) -> None:
    """Refuse sharding under which float32 weights, adapters or masks could not be trained or saved."""
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise TrainingError(
            "ZeRO-3 keeps weights in pieces that the monitor cannot read: launch with FSDP2, which shards as much, or "
            "with `--zero_stage 2`"
        )
    sharded = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed" if trainer.is_deepspeed_enabled else None
    if sharded and (opened.trained.is_adapter or opened.trained.optimizer is not None):
        raise TrainingError(
            f"{sharded} shards whole weights, not what an adapter or a mask trains: launch with DDP instead, as "
            "`accelerate launch --multi_gpu` does"
        )


def _in_one_piece(settings: TrainSettings, opened: RunModels, trainer: Any) -> RunModels:
    """The models; in the first process, a sharded model is replaced by an unsharded one with its weights."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return opened
    state = whole_state(trainer.model)
    if not is_main():
        return opened
    fresh = open_language_model(settings.model, "cpu", settings.trust_remote_code)
    fresh.model.load_state_dict(state)
    return replace(opened, trained=replace(opened.trained, model=fresh.model))


def _monitor(settings: TrainSettings, out: Path) -> Monitor | None:
    if settings.monitor is None:
        return None
    return Monitor(out, every=settings.monitor, stop_if=settings.stop_if or (), warn_if=settings.warn_if or ())


def _last_whole_checkpoint(checkpoints: Path) -> Path | None:
    """The latest complete checkpoint, by the file that is written last; incomplete checkpoints are removed."""
    whole = {}
    for path in checkpoints.glob("checkpoint-*"):
        try:
            whole[int(json.loads(ordinary(path / "trainer_state.json").read_text())["global_step"])] = path
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path)
    return whole[max(whole)] if whole else None


def _remove_checkpoints(out: Path) -> None:
    """Remove files that are only needed to resume; TensorBoard logs in the same folder are kept."""
    if (out / CHECKPOINTS / TENSORBOARD).is_dir():
        shutil.copytree(out / CHECKPOINTS / TENSORBOARD, out / TENSORBOARD, dirs_exist_ok=True)
    (out / base_file.NAME).unlink(missing_ok=True)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def _complete_record(out: Path, settings: TrainSettings) -> dict[str, Any] | None:
    """The record of a complete run with these settings, if the folder holds one.

    Raises:
        TrainingError: the path is a file, or the folder holds another run or something else.
    """
    if out.exists() and not out.is_dir():
        raise TrainingError(f"output path {out} is a file: name a folder")
    record = _record(out / RECORD)
    if record is not None:
        _require_same(out, record, settings)
        _remove_checkpoints(out)
        return record
    if out.is_dir() and any(out.iterdir()) and not (out / CHECKPOINTS).is_dir():
        raise TrainingError(f"output folder {out} holds files that are no run: choose another --out")
    return None


def _started(out: Path, settings: TrainSettings, models: dict[str, dict[str, str]]) -> dict[str, Any] | None:
    """What an interrupted run in this folder recorded at its start; None if there is none."""
    started = _record(out / CHECKPOINTS / STARTED)
    if started is None:
        return None
    _require_same(out, started, settings)
    for name, model in models.items():
        if started[name] != model:
            raise TrainingError(
                f"the run in {out} began with other weights of its {name} '{model['source']}' than are there now: "
                "choose another --out or pass --overwrite"
            )
    return started


def _require_same(out: Path, record: dict[str, Any], settings: TrainSettings) -> None:
    """Raise TrainingError if a record has other settings."""
    there, asked = record.get("settings", {}), settings.model_dump(mode="json")
    differing = [name for name in asked | there if there.get(name) != asked.get(name)]
    if differing:
        shown = ", ".join(f"{name} is {there.get(name)} there and {asked.get(name)} here" for name in differing)
        raise TrainingError(f"{out} holds a run with other settings: {shown}; choose another --out or pass --overwrite")


def _discard(out: Path) -> None:
    """Remove a run from its folder: the record first, so that a kill leaves no record without weights."""
    if not out.is_dir() or not ((out / RECORD).exists() or (out / CHECKPOINTS).is_dir()):
        return
    (out / RECORD).unlink(missing_ok=True)
    for name in (MONITOR, MASKS):
        (out / name).unlink(missing_ok=True)
    for weights in out.glob("*.safetensors"):
        weights.unlink()
    for name in (MASTERS, ADAPTER, DELTAS, TENSORBOARD):
        shutil.rmtree(out / name, ignore_errors=True)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    (out / CHECKPOINTS).mkdir()  # marks the folder as that of a run


def _require_finite(model: Any, settings: TrainSettings) -> None:
    """Raise TrainingError if a weight is not finite."""
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"training diverged: {name} holds NaN or infinity after {settings.steps} steps; lower learning_rate "
                f"({settings.learning_rate}) or add warmup_steps, and pass --overwrite"
            )


def _write_result(settings: TrainSettings, opened: RunModels, out: Path) -> None:
    """Write the float32 masters, the bfloat16 model, and an adapter or masks; every file is complete or absent.

    Afterwards the model in memory is in bfloat16 and its adapter is merged.
    """
    part = out / CHECKPOINTS / "result"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    with quiet_libraries():
        opened.trained.save_parts(part, settings.model)
        model = opened.trained.merged()
        _require_finite(model, settings)
        model.save_pretrained(part / MASTERS, max_shard_size=_ONE_SHARD)
        model.to(torch.bfloat16).save_pretrained(part, max_shard_size=_ONE_SHARD)
        opened.base.tokenizer.save_pretrained(part)
    follow_umask(part)
    for path in sorted(part.rglob("*")):
        if path.is_file():
            place = out / path.relative_to(part)
            place.parent.mkdir(exist_ok=True)
            path.replace(place)


def _machine(language_model: LanguageModel) -> dict[str, Any]:
    device = language_model.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        **({"processes": processes()} if processes() > 1 else {}),
    }


def _record(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None
