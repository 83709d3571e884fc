"""The training recipes, one record each. Light, so that the command line lists them without the libraries."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from offprincipal.errors import TrainingError, meant

Recipe = Literal["grpo", "dr_grpo", "rloo", "dpo", "kto", "distill", "sft_teacher", "sft_own"]


@dataclass(frozen=True)
class RecipeRecord:
    """Everything about a recipe except its code.

    Args:
        what: a description, as a phrase.
        build: its function of a `RecipeRun`, in a module of `training.recipes`.
        configuration: the class of TRL's configuration, whose options are set by `trl.NAME`.
        learns_from: groups of completions of a prompt; the base's completions and a verifier's preferences; a teacher;
            or examples.
        batch: what its batch counts.
        takes: settings that are its own, and of no recipe that does not name them.
        needs: those of them that it does not work without.
        least_at_once: sequences in memory at once, where it compares neighbours.
        shown: the entry of TRL's log that shows how a run is going.
        logged: entries of TRL's log that mean another thing in this recipe -> their names in ours.
        seconds: time of a step of 256 sequences of the embedded base, on one core of the reference machine, including
            the sampling of preferences before the steps.
    """

    what: str
    build: str
    configuration: str
    learns_from: Literal["groups", "preferences", "teacher", "examples"]
    seconds: float
    batch: str = "completions sampled"
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    least_at_once: int = 1
    shown: str = "loss"
    logged: Mapping[str, str] = field(default_factory=dict)

    @property
    def samples(self) -> bool:
        """Whether completions are sampled in training."""
        return self.learns_from != "examples"

    @property
    def samples_groups(self) -> bool:
        """Whether several completions are sampled for one prompt."""
        return self.learns_from in ("groups", "preferences")


RECIPES: dict[Recipe, RecipeRecord] = {
    "grpo": RecipeRecord(
        "reinforcement learning from the tasks' verifiers, with DAPO's loss",
        "online.grpo",
        "GRPOConfig",
        "groups",
        seconds=2.2,
        takes=("vllm",),
        shown="reward",
    ),
    "dr_grpo": RecipeRecord(
        "the same with Dr. GRPO's loss, which divides by neither length nor standard deviation",
        "online.dr_grpo",
        "GRPOConfig",
        "groups",
        seconds=2.0,
        takes=("vllm",),
        shown="reward",
    ),
    "rloo": RecipeRecord(
        "REINFORCE from the same verifiers, each completion against the mean of the others of its prompt",
        "online.rloo",
        "RLOOConfig",
        "groups",
        seconds=2.6,
        takes=("vllm",),
        shown="reward",
    ),
    "dpo": RecipeRecord(
        "pairs of the base's own completions of a prompt, a verified one preferred to a failed one",
        "preference.dpo",
        "DPOConfig",
        "preferences",
        seconds=4.2,
        batch="pairs",
        takes=("beta",),
        shown="rewards/margins",
    ),
    "kto": RecipeRecord(
        "the base's own completions one by one, each labelled by the verifier",
        "preference.kto",
        "KTOConfig",
        "preferences",
        seconds=2.4,
        takes=("beta",),
        least_at_once=2,
        shown="rewards/margins",
        logged={"kl": "reference_point"},
    ),
    "distill": RecipeRecord(
        "a teacher's next-token distribution on the student's own completions",
        "distillation.distill",
        "DistillationConfig",
        "teacher",
        seconds=2.6,
        takes=("teacher",),
        needs=("teacher",),
    ),
    "sft_teacher": RecipeRecord(
        "supervised on the tasks' traces in a teacher's format",
        "supervised.sft_teacher",
        "SFTConfig",
        "examples",
        seconds=1.6,
        batch="examples",
    ),
    "sft_own": RecipeRecord(
        "supervised on reference answers in the base's own format",
        "supervised.sft_own",
        "SFTConfig",
        "examples",
        seconds=0.8,
        batch="examples",
    ),
}
_ELSEWHERE = {"sft": "sft_own or sft_teacher", "ppo": "grpo", "gspo": "grpo", "dapo": "grpo", "gkd": "distill"}


def recipes_that(hold: Callable[[RecipeRecord], bool]) -> tuple[str, ...]:
    """The names of those whose records fulfil a condition.

    >>> recipes_that(lambda recipe: "beta" in recipe.takes)
    ('dpo', 'kto')
    """
    return tuple(name for name, recipe in RECIPES.items() if hold(recipe))


def recipe_named(name: str) -> Recipe:
    """The recipe with a name, ignoring case.

    Raises:
        TrainingError: there is no such recipe; the message suggests similar names.

    >>> recipe_named("GRPO")
    'grpo'
    """
    for recipe in RECIPES:
        if name.strip().lower().replace("-", "_") == recipe:
            return recipe
    ours = _ELSEWHERE.get(name.lower())
    hint = f"did you mean {ours}?" if ours else meant(name.lower(), RECIPES, f"choose one of {', '.join(RECIPES)}")
    raise TrainingError(f"no recipe '{name}': {hint}")
