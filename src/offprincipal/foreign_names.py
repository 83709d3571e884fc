"""What transformers, TRL and PEFT call what is called otherwise here: told wherever one of their names is given.

Light, so that the command line can ask without the libraries.
"""

import re
from collections.abc import Callable

from offprincipal.recipes import recipes_that

_BATCH = "{batch}, which is of the whole step, and {micro_batch}, which is of one pass"
_MEASURED = "nothing: a run is measured before and after, on {eval_prompts} prompts"
_BETA = f"{{beta}} for {' and '.join(recipes_that(lambda recipe: 'beta' in recipe.takes))}, and {{trl.beta}} for others"
_ONE_HELD = "nothing: the last checkpoint alone is kept, until the run is complete"
_UPLOADED = "nothing: the folder of {out} is a model that can be uploaded"
_LOGGED = "nothing: every step is logged"
_WHOLE = "nothing: weights are float32 in training; {compute} is of the passes"
_WITHOUT = "nothing: `train --list adapters` has what there is"

# their name -> what it is here, our settings in braces; or why it is nothing
_OURS = {
    # where and what
    "output_dir": "{out}",
    "out_dir": "{out}",
    "save_dir": "{out}",
    "output": "{out}",
    "output_path": "{out}",
    "logging_dir": "{out}",
    "run_name": "{out}, as a run is called after its folder",
    "overwrite_output_dir": "{overwrite}",
    "resume_from_checkpoint": "nothing: the same command continues a run",
    "model_name_or_path": "{model}",
    "model_name": "{model}",
    "model_id": "{model}",
    "base_model": "{model}",
    "base_model_name_or_path": "{model}",
    "pretrained_model_name_or_path": "{model}",
    "teacher_model": "{teacher}",
    "teacher_model_name_or_path": "{teacher}",
    "dataset": "{tasks=hf:DATASET}",
    "dataset_name": "{tasks=hf:DATASET}",
    "train_dataset": "{tasks=hf:DATASET}",
    "reward_funcs": "nothing: the tasks' verifiers give the reward",
    # steps and batches
    "max_steps": "{steps}",
    "num_train_epochs": "{steps}, as a run is counted in steps",
    "num_epochs": "{steps}, as a run is counted in steps",
    "epochs": "{steps}, as a run is counted in steps",
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "train_batch_size": _BATCH,
    "batch_size": _BATCH,
    # the optimizer
    "lr": "{learning_rate}",
    "adam_beta1": "{adam_betas}",
    "adam_beta2": "{adam_betas}",
    "warmup_ratio": "{warmup_steps}, a number of steps",
    "lr_scheduler_type": "{trl.lr_scheduler_type}",
    "lr_scheduler_kwargs": "{trl.lr_scheduler_kwargs}",
    "optim": "{trl.optim}",
    # numbers, and where they are computed
    "bf16": "{compute=bfloat16}",
    "fp16": "{compute}, which is float32 or bfloat16",
    "torch_dtype": _WHOLE,
    "dtype": _WHOLE,
    "load_in_4bit": _WHOLE,
    "load_in_8bit": _WHOLE,
    "use_cpu": "{device=cpu}",
    "device_map": "{device}",
    # saving, measuring and logging
    "save_steps": "{save_every}",
    "save_strategy": "{save_every}",
    "save_total_limit": _ONE_HELD,
    "logging_steps": _LOGGED,
    "logging_strategy": _LOGGED,
    "eval_steps": _MEASURED,
    "eval_strategy": _MEASURED,
    "do_eval": _MEASURED,
    "push_to_hub": _UPLOADED,
    "hub_model_id": _UPLOADED,
    # sampling and losses
    "num_generations": "{rollouts_per_prompt}",
    "max_completion_length": "{max_new_tokens}",
    "max_length": "{max_new_tokens}",
    "max_seq_length": "{max_new_tokens}",
    "max_prompt_length": "nothing: a prompt that is too long is refused by name",
    "use_vllm": "{vllm=colocate} or {vllm=server}",
    "vllm_mode": "{vllm}",
    "kl_coef": _BETA,
    "beta": _BETA,
    # adapters
    "use_peft": "{adapter.method=lora}",
    "peft_type": "{adapter.method}",
    "peft_config": "{adapter.method}, with its own settings as {adapter.rank}",
    "init_lora_weights": "{adapter.method=pissa} and others",
    "r": "{adapter.rank}",
    "lora_r": "{adapter.rank}",
    "lora_rank": "{adapter.rank}",
    "lora_alpha": "{adapter.alpha}",
    "lora_dropout": "{adapter.dropout}",
    "target_modules": "{adapter.target_modules}",
    "lora_target_modules": "{adapter.target_modules}",
    "use_dora": _WITHOUT,
    "use_rslora": _WITHOUT,
    "modules_to_save": _WITHOUT,
}
# options of TRL's configurations that go by their own names, under `trl.`
_PASSED = (
    *("epsilon", "epsilon_high", "loss_type", "scale_rewards", "num_iterations", "steps_per_generation", "delta"),
    *("importance_sampling_level", "mask_truncated_completions", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("packing", "label_smoothing", "label_smoothing_factor", "desirable_weight", "undesirable_weight"),
)
# TRL's names that settings are taken by too
TAKEN = {
    name: _OURS[name].strip("{}")
    for name in ("max_steps", "num_generations", "max_completion_length", "save_steps", "lr")
}
_OPTIONS = ("out", "overwrite")  # of `train`, that are no settings
_NOTHING = "nothing: "
_NAMED = re.compile(r"\{([\w.]+)((?:=[\w:]+)?)\}")


def called_here(name: str, write: Callable[[str, str], str]) -> str | None:
    """What a name of another library's is here, as the end of a message; None if it is not known.

    Args:
        name: with underscores or hyphens.
        write: our setting's name, and `=VALUE` or nothing -> how it is given where the name was.

    >>> called_here("per-device-train-batch-size", lambda name, value: name + value)
    'here it is batch, which is of the whole step, and micro_batch, which is of one pass'
    >>> called_here("epsilon", lambda name, value: name + value)
    'here it is trl.epsilon'
    """
    name = name.replace("-", "_")
    found = "{trl." + name + "}" if name in _PASSED else _OURS.get(name)
    if found is None:
        return None
    told = _NAMED.sub(lambda each: write(each[1], each[2]), found)
    return told.removeprefix(_NOTHING) if told.startswith(_NOTHING) else f"here it is {told}"


def setting_called(name: str, under: str = "") -> str | None:
    """The same in terms of settings, as `--set` and Python take them.

    Args:
        under: what settings stand under, as `training.` in a profile.

    >>> setting_called("output_dir"), setting_called("bf16")
    ('here it is --out', 'here it is compute=bfloat16')
    >>> setting_called("logging_steps")
    'every step is logged'
    """
    return called_here(name, lambda ours, value: f"--{ours}" if ours in _OPTIONS else f"{under}{ours}{value}")
