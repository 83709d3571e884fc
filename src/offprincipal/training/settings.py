"""Settings of a training run: one set of defaults for every recipe, so that runs are matched unless told otherwise."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from offprincipal.assets import EMBEDDED
from offprincipal.errors import TrainingError, meant
from offprincipal.plain_settings import PlainSettings
from offprincipal.recipes import RECIPES, Recipe, recipe_named
from offprincipal.tasks import task_names
from offprincipal.tasks.prompt_settings import PromptSettings
from offprincipal.training.adapter_settings import AdapterSettings
from offprincipal.training.monitor.verdicts import parse_watch

_REWARDED = tuple(name for name, recipe in RECIPES.items() if recipe.learns_from == "groups")
_PREFERRING = tuple(name for name, recipe in RECIPES.items() if recipe.learns_from == "preferences")
# which older runs have not
_LATER = (
    *(
        "teacher",
        "beta",
        "monitor",
        "stop_if",
        "warn_if",
        "adapter",
        "trust_remote_code",
        "keep_deltas",
        "keep_masters",
    ),
    *("prompt", "compute", "vllm", "trl"),
)


_AS_TRL_HAS_IT = {
    "max_steps": "steps",
    "num_generations": "rollouts_per_prompt",
    "max_completion_length": "max_new_tokens",
    "save_steps": "save_every",
    "lr": "learning_rate",
}
_TRLS = {  # what these are called here, or why they are not
    "per_device_train_batch_size": "micro_batch, and batch, which is of the whole step",
    "gradient_accumulation_steps": "batch, of the whole step, and micro_batch, of which it is made",
    "num_train_epochs": "steps",
    "max_prompt_length": "nothing: a prompt that is too long is refused by name",
    "bf16": "compute=bfloat16",
    "fp16": "compute",
    "logging_steps": "nothing: every step is logged",
    "save_strategy": "save_every",
    "max_length": "max_new_tokens",
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.target_modules",
    "use_peft": "adapter.method=lora",
    "use_vllm": "vllm=colocate or vllm=server",
    "output_dir": "--out",
    "model_name_or_path": "model",
    "dataset_name": "tasks, as in hf:DATASET",
}


def _recipe(value: Any) -> Any:
    return recipe_named(value) if isinstance(value, str) else value


def _several(value: Any) -> Any:
    """One is as good as a list of one."""
    return [value] if isinstance(value, str) else value


def _tasks(value: Any) -> Any:
    """Several in one text are as good as a list."""
    several = _several(value)
    listed = isinstance(several, list | tuple) and all(isinstance(name, str) for name in several)
    return task_names(several) if listed else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_several)]
Tasks = Annotated[tuple[str, ...], BeforeValidator(_tasks)]


class TrainSettings(PlainSettings):
    """Everything that decides a run's weights, but for the machine; TRL's own names for some settings are taken too.

    Raises:
        TrainingError: a value is missing, unknown, of the wrong kind or given under both names, which the message
            names; the batch does not divide as it must, or the recipe lacks a setting or has one of another's.

    >>> TrainSettings(recipe="grpo", tasks=("add",)).learning_rate
    1e-05
    """

    called: ClassVar = "training settings"
    refusal: ClassVar = TrainingError

    recipe: Annotated[Recipe, BeforeValidator(_recipe)] = Field(
        description="; ".join(f"{name}: {recipe.what}" for name, recipe in RECIPES.items())
    )
    model: str = Field(EMBEDDED, description="base model: a folder, a Hugging Face id, or 'embedded'")
    tasks: Tasks = Field(
        min_length=1, description="tasks, in equal shares: add, sort@2, rg:NAME, hf:DATASET; `--list tasks` has some"
    )
    steps: int = Field(80, ge=1, description="optimizer steps")
    batch: int = Field(
        240,
        ge=1,
        description="sequences a step: completions sampled for grpo, dr_grpo, rloo, distill and kto; pairs for dpo; "
        "examples for sft",
    )
    micro_batch: int | None = Field(
        None, ge=1, description="at most so many sequences in memory at once; None: the whole batch"
    )
    rollouts_per_prompt: int = Field(
        8, ge=2, description="completions sampled for one prompt (all but distill and sft)"
    )
    learning_rate: float = Field(1e-5, gt=0, description="learning rate of AdamW, constant after the warm-up")
    adam_betas: tuple[float, float] = Field((0.9, 0.999), description="decay of AdamW's first and second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    temperature: float = Field(1.0, gt=0, description="sampling temperature (all but sft)")
    max_new_tokens: int = Field(
        8,
        ge=1,
        description="longest completion that is sampled in training (all but sft); where it is not given, 32 after few "
        "shots and 512 in chat",
    )
    teacher: str | None = Field(
        None, description="model that distill learns from, with the base's vocabulary: a folder, an id, or 'embedded'"
    )
    beta: float | None = Field(
        None, gt=0, description="how closely dpo and kto hold to the base; None: TRL's default, 0.1"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, slower steps")
    seed: int = Field(0, ge=0, lt=2**32, description="decides training prompts and samples, not the measuring")
    eval_prompts: int = Field(768, ge=0, description="held-out prompts to measure on, before and after; 0: none")
    eval_samples: int = Field(8, ge=1, description="samples for each held-out prompt")
    eval_max_new_tokens: int = Field(
        40, ge=1, description="longest completion that is sampled in measuring; where it is not given, 512 in chat"
    )
    save_every: int = Field(
        16, ge=1, description="steps between the checkpoints that a killed run continues from, or 5 minutes if sooner"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    report_to: Texts = Field((), description="where the Trainer also logs to: trackio, tensorboard, wandb; or [a,b]")
    monitor: Literal["auto"] | Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="steps between looks at weights and policy, written to monitor.parquet; auto: within 3 % of the "
        "step time; None: never",
    )
    stop_if: Texts | None = Field(
        None, description="conditions of the monitor that end the training, as 'spectral_shift_per_norm > .5'"
    )
    warn_if: Texts | None = Field(None, description="conditions of the monitor that are only reported")
    keep_deltas: int | None = Field(
        None,
        ge=1,
        description="steps between the weights that are kept, stored in bfloat16, as deltas from the model: "
        "deltas/step_N.delta, for `offprincipal trajectory`; None: none",
    )
    keep_masters: bool = Field(
        False,
        description="keep the float32 weights of those steps too, in deltas/masters, for `trajectory --masters`, which "
        "sees what storing in bfloat16 hides",
    )
    trust_remote_code: bool = Field(
        False, description="execute Python that comes with the model or teacher, where it asks for that"
    )
    prompt: PromptSettings | None = Field(
        None, description="how problems are put to the model and answers read; None: as the tokenizer suggests"
    )
    compute: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="of the passes, the weights staying float32; None: bfloat16 on GPUs, float32 on CPUs, of which "
        "some can do either",
    )
    vllm: Literal["colocate", "server"] | None = Field(
        None,
        description="sample with vLLM, in the training process or from a server (grpo, dr_grpo, rloo); None: without",
    )
    trl: dict[str, Any] = Field(
        default_factory=dict, description="any option of TRL's configuration for the recipe, as trl.beta=0.04"
    )
    adapter: AdapterSettings | None = Field(
        None, description="train an adapter, masked entries or singular frames; None: all weights, by AdamW"
    )

    @classmethod
    def _by_our_names(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        twice = [name for name in given if _AS_TRL_HAS_IT.get(name) in given]
        if twice:
            raise TrainingError(f"{twice[0]} is TRL's name for {_AS_TRL_HAS_IT[twice[0]]}: give one of the two")
        return {_AS_TRL_HAS_IT.get(name, name): value for name, value in given.items()}

    @classmethod
    def _unknown(cls, name: str) -> str:
        if ours := _TRLS.get(name):
            return f"there is no such setting; here it is {ours}"
        otherwise = "`train --list settings` has all, and an option of TRL's is trl.NAME"
        return f"there is no such setting: {meant(name, [*setting_fields(), *_AS_TRL_HAS_IT], otherwise)}"

    @model_validator(mode="after")
    def _batch_divides(self) -> "TrainSettings":
        if self.recipe in _REWARDED and self.batch % self.rollouts_per_prompt:
            raise TrainingError(
                f"batch {self.batch} is not divisible by rollouts_per_prompt {self.rollouts_per_prompt}: "
                f"choose a batch of {max(1, self.batch // self.rollouts_per_prompt) * self.rollouts_per_prompt}"
            )
        return self

    @model_validator(mode="after")
    def _settings_belong_to_the_recipe(self) -> "TrainSettings":
        if self.teacher is None and self.recipe == "distill":
            raise TrainingError(
                "distill learns from a teacher: set teacher to a folder, a Hugging Face id or 'embedded'"
            )
        for name, recipes in (("teacher", ("distill",)), ("beta", _PREFERRING)):
            if getattr(self, name) is not None and self.recipe not in recipes:
                raise TrainingError(
                    f"{name} is a setting of {' and '.join(recipes)}, not of {self.recipe}: leave it out"
                )
        if self.keep_deltas is not None and self.adapter is not None:
            raise TrainingError("keep_deltas is not supported with an adapter: leave it out")
        if self.vllm is not None and self.recipe not in _REWARDED:
            raise TrainingError(f"vllm samples for {', '.join(_REWARDED)}, not for {self.recipe}: leave it out")
        if self.keep_masters and self.keep_deltas is None:
            raise TrainingError("keep_masters keeps the float32 weights of the steps of keep_deltas: set that too")
        if self.recipe == "kto" and self.sequences_at_once() == 1:
            raise TrainingError(
                "kto compares sequences with their neighbours: choose a micro_batch that allows 2 at once"
            )
        return self

    @model_validator(mode="after")
    def _conditions_are_watched(self) -> "TrainSettings":
        conditions = (*(self.stop_if or ()), *(self.warn_if or ()))
        for text in conditions:
            parse_watch(text)
        if conditions and self.monitor is None:
            raise TrainingError("stop_if and warn_if are conditions of the monitor: set monitor too, to auto say")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_unset(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A run without a monitor, say, is the same run, under the same key, as before there was one."""
        values: dict[str, Any] = whole(self)
        return {name: value for name, value in values.items() if value not in (None, False, {}) or name not in _LATER}

    def sequences_at_once(self, processes: int = 1) -> int:
        """The largest divisor of a process's share of the batch that is at most `micro_batch`.

        Raises:
            TrainingError: the processes cannot share the batch equally.

        >>> TrainSettings(recipe="grpo", tasks=("add",), batch=240, micro_batch=64).sequences_at_once()
        60
        """
        share, left = divmod(self.batch, processes)
        if left or not share:
            raise TrainingError(
                f"{processes} processes cannot share a batch of {self.batch} equally: choose a multiple of {processes}"
            )
        most = min(self.micro_batch or share, share)
        return next(size for size in range(most, 0, -1) if share % size == 0)

    @property
    def prompts_per_step(self) -> int:
        """Different prompts in one step."""
        return self.batch // self.rollouts_per_prompt if self.recipe in _REWARDED else self.batch


def setting_fields() -> dict[str, Any]:
    """Every setting by the name that it is set by, and its pydantic field.

    >>> "adapter.rank" in setting_fields()
    True
    """
    nested: dict[str, type[BaseModel]] = {"adapter": AdapterSettings, "prompt": PromptSettings}
    inner = {f"{of}.{name}": field for of, kind in nested.items() for name, field in kind.model_fields.items()}
    return {**TrainSettings.model_fields, **inner}


def parse_settings(values: Mapping[str, Any]) -> TrainSettings:
    """Settings from a file's or a command line's values.

    Raises:
        TrainingError: as `TrainSettings` raises it.

    >>> parse_settings({"recipe": "sft_own", "tasks": "add,sort", "steps": "8"}).tasks
    ('add', 'sort')
    """
    return TrainSettings.model_validate(values)
