"""The training recipes by name, with what each is. Light, so that the command line lists them without the libraries."""

from typing import Literal

Recipe = Literal["grpo", "dr_grpo", "rloo", "dpo", "kto", "distill", "sft_teacher", "sft_own"]

RECIPES: dict[Recipe, str] = {
    "grpo": "reinforcement learning from the tasks' verifiers, with DAPO's loss",
    "dr_grpo": "the same with Dr. GRPO's loss, which divides by neither length nor standard deviation",
    "rloo": "REINFORCE from the same verifiers, each completion against the mean of the others of its prompt",
    "dpo": "pairs of the base's own completions of a prompt, a verified one preferred to a failed one",
    "kto": "the base's own completions one by one, each labelled by the verifier",
    "distill": "a teacher's next-token distribution on the student's own completions",
    "sft_teacher": "supervised on the tasks' traces in a teacher's format",
    "sft_own": "supervised on reference answers in the base's own format",
}
