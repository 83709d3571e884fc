"""Settings of a training run; all recipes share the same defaults, so that runs can be compared."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from offprincipal.assets import EMBEDDED
from offprincipal.defaults import BATCH, LEARNING_RATE, SEED, STEPS
from offprincipal.errors import TrainingError, meant
from offprincipal.foreign_names import TAKEN, setting_called
from offprincipal.plain_settings import PlainSettings
from offprincipal.recipes import RECIPES, Recipe, RecipeRecord, recipe_named, recipes_that
from offprincipal.tasks import task_names
from offprincipal.tasks.prompt_settings import PromptSettings
from offprincipal.training.adapter_settings import AdapterSettings
from offprincipal.training.monitor.verdicts import parse_watch

_OWN = dict.fromkeys(setting for recipe in RECIPES.values() for setting in recipe.takes)
# Added after the first version: omitted from records if unset, so that older runs are still recognised as the same.
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


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _taking(setting: str) -> str:
    """The recipes that have a setting of their own."""
    return _listed(recipes_that(lambda recipe: setting in recipe.takes))


def _batches() -> str:
    """What a batch counts, and for which recipes."""
    counted = dict.fromkeys(recipe.batch for recipe in RECIPES.values())
    of = {what: _listed(name for name, recipe in RECIPES.items() if recipe.batch == what) for what in counted}
    return "; ".join(f"{what} for {names}" for what, names in of.items())


_LEARNING = _listed(recipes_that(lambda recipe: not recipe.samples))


def _recipe(value: Any) -> Any:
    return recipe_named(value) if isinstance(value, str) else value


def _several(value: Any) -> Any:
    """A single string as a list of one."""
    return [value] if isinstance(value, str) else value


def _tasks(value: Any) -> Any:
    """A string such as "add,sort@2" as a list of names."""
    several = _several(value)
    listed = isinstance(several, list | tuple) and all(isinstance(name, str) for name in several)
    return task_names(several) if listed else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_several)]
Tasks = Annotated[tuple[str, ...], BeforeValidator(_tasks)]


class TrainSettings(PlainSettings):
    """All settings of a run; together with the machine they determine its weights.

    The description of each field says what it means; `train --list settings` prints them. TRL's names for some
    settings, such as `max_steps`, are accepted too.

    Raises:
        TrainingError: a setting is missing, unknown, invalid, or given under both names; the batch is not divisible by
            `rollouts_per_prompt`; or a setting does not belong to the recipe.

    >>> TrainSettings(recipe="grpo", tasks=("add",)).learning_rate
    1e-05
    """

    called: ClassVar = "training settings"
    refusal: ClassVar = TrainingError

    recipe: Annotated[Recipe, BeforeValidator(_recipe)] = Field(
        description=f"{_listed(RECIPES)}; `--list recipes` describes each"
    )
    model: str = Field(EMBEDDED, description="base model: a folder, a Hugging Face id, or 'embedded'")
    tasks: Tasks = Field(
        min_length=1, description="tasks, in equal shares: add, sort@2, rg:NAME, hf:DATASET; `--list tasks` lists some"
    )
    steps: int = Field(STEPS, ge=1, description="optimizer steps")
    batch: int = Field(
        BATCH,
        ge=1,
        description=f"sequences per step: {_batches()}",
    )
    micro_batch: int | None = Field(
        None, ge=1, description="largest number of sequences in memory at once; None: the whole batch"
    )
    rollouts_per_prompt: int = Field(
        8, ge=2, description=f"completions sampled per prompt ({_listed(recipes_that(lambda r: r.samples_groups))})"
    )
    learning_rate: float = Field(LEARNING_RATE, gt=0, description="learning rate of AdamW, constant after the warm-up")
    adam_betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of AdamW's first and second moments")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    temperature: float = Field(1.0, gt=0, description=f"sampling temperature (all but {_LEARNING})")
    max_new_tokens: int = Field(
        8,
        ge=1,
        description=f"longest completion in training, in tokens (all but {_LEARNING}); the default is 32 with few-shot "
        "prompts and 512 with a chat template",
    )
    teacher: str | None = Field(
        None,
        description=f"teacher of {_taking('teacher')}, with the base's vocabulary: a folder, a Hugging Face id, or "
        "'embedded'",
    )
    beta: float | None = Field(
        None,
        gt=0,
        description=f"strength of the penalty for moving from the base ({_taking('beta')}); None: TRL's default, 0.1",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, slower steps")
    seed: int = Field(SEED, ge=0, lt=2**32, description="seed of training prompts and samples, not of the evaluation")
    eval_prompts: int = Field(
        768, ge=0, description="held-out prompts of the evaluation before and after training; 0: no evaluation"
    )
    eval_samples: int = Field(8, ge=1, description="completions sampled per held-out prompt")
    eval_max_new_tokens: int = Field(
        40, ge=1, description="longest completion in the evaluation, in tokens; the default is 512 with a chat template"
    )
    save_every: int = Field(16, ge=1, description="steps between checkpoints for resuming, or 5 minutes if sooner")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is a GPU")
    report_to: Texts = Field((), description="loggers of the Trainer: trackio, tensorboard, wandb; several as [a,b]")
    monitor: Literal["auto"] | Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="steps between observations of weights and policy, written to monitor.parquet; auto: as often as "
        "takes at most 3 % of the step time; None: no monitor",
    )
    stop_if: Texts | None = Field(
        None, description="monitor conditions that stop training, such as 'spectral_shift_per_norm > .5'"
    )
    warn_if: Texts | None = Field(None, description="monitor conditions that only log a warning")
    keep_deltas: int | None = Field(
        None,
        ge=1,
        description="steps between saved weights, in bfloat16, as deltas from the model: deltas/step_N.delta, for "
        "`offprincipal trajectory`; None: none are saved",
    )
    keep_masters: bool = Field(
        False,
        description="also save the float32 weights of those steps, in deltas/masters, for `trajectory --masters`, "
        "which measures changes that bfloat16 hides",
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model or teacher, if they need it"
    )
    prompt: PromptSettings | None = Field(
        None, description="how problems are presented and answers are read; None: as the tokenizer suggests"
    )
    compute: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="precision of forward and backward passes; weights stay float32; None: bfloat16 on GPUs, float32 "
        "on CPUs, some of which support bfloat16",
    )
    vllm: Literal["colocate", "server"] | None = Field(
        None,
        description=f"sample with vLLM, in the training process or on a server ({_taking('vllm')}); None: without",
    )
    trl: dict[str, Any] = Field(
        default_factory=dict, description="any option of TRL's configuration for the recipe, such as trl.beta=0.04"
    )
    adapter: AdapterSettings | None = Field(
        None, description="train an adapter, masked entries or singular frames; None: all weights, by AdamW"
    )

    @classmethod
    def _by_our_names(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        twice = [name for name in given if TAKEN.get(name) in given]
        if twice:
            raise TrainingError(f"{twice[0]} is TRL's name for {TAKEN[twice[0]]}: give one of the two")
        return {TAKEN.get(name, name): value for name, value in given.items()}

    @classmethod
    def _unknown(cls, name: str) -> str:
        if ours := setting_called(name):
            return f"there is no such setting: {ours}"
        otherwise = "`train --list settings` has all, and an option of TRL's is trl.NAME"
        return f"there is no such setting: {meant(name, [*setting_fields(), *TAKEN], otherwise)}"

    @model_validator(mode="after")
    def _batch_divides(self) -> "TrainSettings":
        if self._record.learns_from == "groups" and self.batch % self.rollouts_per_prompt:
            raise TrainingError(
                f"batch {self.batch} is not divisible by rollouts_per_prompt {self.rollouts_per_prompt}: "
                f"choose a batch of {max(1, self.batch // self.rollouts_per_prompt) * self.rollouts_per_prompt}"
            )
        return self

    @model_validator(mode="after")
    def _settings_belong_to_the_recipe(self) -> "TrainSettings":
        recipe = self._record
        for name in recipe.needs:
            if getattr(self, name) is None:
                raise TrainingError(
                    f"{self.recipe} learns from a {name}: set {name} to a folder, a Hugging Face id or 'embedded'"
                )
        for name in _OWN:
            if getattr(self, name) is not None and name not in recipe.takes:
                instead = f" or set trl.{name}" if recipe.learns_from == "groups" and name == "beta" else ""
                raise TrainingError(
                    f"{name} is a setting of {_taking(name)}, not of {self.recipe}: leave it out{instead}"
                )
        if self.keep_deltas is not None and self.adapter is not None:
            raise TrainingError("keep_deltas is not supported with an adapter: leave it out")
        if self.keep_masters and self.keep_deltas is None:
            raise TrainingError("keep_masters keeps the float32 weights of the steps of keep_deltas: set that too")
        if self.sequences_at_once() < recipe.least_at_once:
            raise TrainingError(
                f"{self.recipe} compares sequences with their neighbours: choose a micro_batch that allows "
                f"{recipe.least_at_once} at once"
            )
        return self

    @model_validator(mode="after")
    def _conditions_are_watched(self) -> "TrainSettings":
        conditions = (*(self.stop_if or ()), *(self.warn_if or ()))
        for text in conditions:
            parse_watch(text)
        if conditions and self.monitor is None:
            raise TrainingError(
                "stop_if and warn_if are conditions of the monitor: set monitor too, for example to auto"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_unset(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit unset settings that older versions lack, so that records of older runs match."""
        values: dict[str, Any] = whole(self)
        return {name: value for name, value in values.items() if value not in (None, False, {}) or name not in _LATER}

    def sequences_at_once(self, processes: int = 1) -> int:
        """Sequences per process in one forward pass: the largest divisor of its share of the batch up to `micro_batch`.

        Args:
            processes: number of processes that share the batch.

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
    def _record(self) -> RecipeRecord:
        return RECIPES[self.recipe]

    @property
    def prompts_per_step(self) -> int:
        """Number of different prompts in one step."""
        return self.batch // self.rollouts_per_prompt if self._record.learns_from == "groups" else self.batch


def setting_fields() -> dict[str, Any]:
    """All settings: full name, such as `adapter.rank` -> pydantic field.

    >>> "adapter.rank" in setting_fields()
    True
    """
    nested: dict[str, type[BaseModel]] = {"adapter": AdapterSettings, "prompt": PromptSettings}
    inner = {f"{of}.{name}": field for of, kind in nested.items() for name, field in kind.model_fields.items()}
    return {**TrainSettings.model_fields, **inner}


def parse_settings(values: Mapping[str, Any]) -> TrainSettings:
    """Settings from the values of a file or a command line.

    Args:
        values: name -> value; values may be strings.

    Raises:
        TrainingError: as in `TrainSettings`.

    >>> parse_settings({"recipe": "sft_own", "tasks": "add,sort", "steps": "8"}).tasks
    ('add', 'sort')
    """
    return TrainSettings.model_validate(values)
