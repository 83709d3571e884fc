"""Settings of how a model is prompted with problems, and how its answers are read."""

from typing import Any, ClassVar

from pydantic import Field, model_validator

from offprincipal.errors import TaskError
from offprincipal.plain_settings import NestedSettings

TEMPLATES = ("plain", "few_shot", "chat")
ANSWERS = ("exact", "number", "boxed", "tag", "math")
FUNCTION = ".py:"
PLACE = "prompt"


class PromptSettings(NestedSettings):
    """How a model is prompted; omitted settings follow from the template, and the template from the model.

    Raises:
        TaskError: the template or way to read answers is unknown, or the template does not have a setting.

    >>> PromptSettings(template="few_shot", shots=2).model_dump()
    {'template': 'few_shot', 'shots': 2}
    """

    called: ClassVar = "settings of the prompt"
    under: ClassVar = "prompt."
    refusal: ClassVar = TaskError

    template: str | None = Field(
        None,
        description=f"{', '.join(TEMPLATES)}, or a Jinja template of {{{{ {PLACE} }}}} and `shots`; not given: chat "
        "if the tokenizer has a template, plain for character models such as the embedded one, else few_shot",
    )
    shots: int | None = Field(
        None, ge=1, description="number of solved problems shown before each (few_shot, Jinja); 4 if not given"
    )
    system: str | None = Field(None, description="system prompt of chat")
    chat_options: dict[str, Any] | None = Field(
        None, description="options passed to the chat template, e.g. {enable_thinking: false}"
    )
    answer: str | None = Field(
        None,
        description=f"how an answer is read: {', '.join(ANSWERS)} (the last number, \\boxed{{…}}, <answer>…</answer>; "
        "math: compared by math-verify), or FILE.py:FUNCTION of (completion, answer); not given: tag for chat, else as "
        "the task reads it",
    )
    stop: tuple[str, ...] | None = Field(
        None, description="texts that end a completion, each within one token; a line's end for few_shot if not given"
    )

    @model_validator(mode="after")
    def _fits(self) -> "PromptSettings":
        template = self.template
        if template is not None and template not in TEMPLATES and "{{" not in template:
            raise TaskError(
                f"there is no prompt template '{template}': choose one of {', '.join(TEMPLATES)}, or write Jinja with "
                f"{{{{ {PLACE} }}}}"
            )
        if self.answer is not None and self.answer not in ANSWERS and FUNCTION not in self.answer:
            raise TaskError(
                f"there is no way '{self.answer}' to read an answer: choose one of {', '.join(ANSWERS)}, or "
                "FILE.py:FUNCTION"
            )
        for name, owners in (("shots", ("few_shot",)), ("system", ("chat",)), ("chat_options", ("chat",))):
            given = getattr(self, name) is not None
            own = template is None or template in owners or (name == "shots" and template not in TEMPLATES)
            if given and not own:
                raise TaskError(f"prompt.{name} belongs to the template {owners[0]}, not to {template}: omit it")
        if self.stop is not None and not all(self.stop):
            raise TaskError("prompt.stop contains an empty text, which would end every completion: remove it")
        return self
