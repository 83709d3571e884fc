"""How a model is prompted with a problem, and how its answer is read.

Splits and problems stay those of the tasks, whose bare prompts decide them: a template only dresses them. Knows
tokenizers; knows nothing of models or runs.
"""

import importlib.util
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import SandboxedEnvironment

from offprincipal.errors import TaskError
from offprincipal.tasks.prompt_settings import FUNCTION, PLACE, PromptSettings
from offprincipal.tasks.protocol import Problem, Task
from offprincipal.tasks.split import problems

_SHOTS = 4
_TRIED = 8  # problems whose answers are looked at
_SHOTS_SEED = 2**31  # a stream of training problems of its own
_FEW_SHOT = "{% for shot in shots %}Q: {{ shot.prompt }}\nA: {{ shot.answer }}\n\n{% endfor %}Q: {{ prompt }}\nA:"
_ASKED = {
    "tag": "\n\nGive the final answer in <answer></answer>.",
    "boxed": "\n\nGive the final answer in \\boxed{}.",
    "number": "\n\nEnd with the final number.",
}
_NUMBER = re.compile(r"[-−+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_PROBE = "\u2042probe\u2042"


@dataclass(frozen=True)
class Prompting:
    """A way of asking, settled for one tokenizer and some tasks.

    Args:
        settings: resolved, as `prompting` makes them.
        tokenizer: of the model that is asked.

    Raises:
        TaskError: on use, where the template does not hold the prompt, the tokenizer lacks what the template needs, or
            a function that reads answers fails.
    """

    settings: PromptSettings
    tasks: Mapping[str, Task]
    tokenizer: Any

    def prompt(self, problem: Problem) -> str:
        """What the model reads; the tokenizer's own first token is left to the tokenizer."""
        if self.settings.template == "plain":
            return problem.prompt
        text = self._chat(problem.prompt) if self.settings.template == "chat" else self._rendered(problem)
        if problem.prompt not in text:
            raise TaskError(f"the prompt template does not contain the prompt: add {{{{ {PLACE} }}}}")
        return text

    def completion(self, text: str) -> str:
        """An answer or trace as the model would write it after the prompt."""
        if self.settings.template == "few_shot":
            return f" {text}"
        if self.settings.template == "chat" and self.settings.answer == "tag" and not _TAG.search(text):
            return f"<answer>{text}</answer>"
        if self.settings.template == "chat" and self.settings.answer == "boxed" and "\\boxed" not in text:
            return f"\\boxed{{{text}}}"
        return text

    def verify(self, problem: Problem, completion: str) -> bool:
        """Whether a completion, decoded without special tokens, answers the problem."""
        text, answer = self.cut(completion), self.settings.answer
        task = self.tasks[problem.task]
        if answer is None:
            return task.verify(problem, text)
        if answer == "math":
            return _equal_as_mathematics(problem.answer, text)
        if FUNCTION in answer:
            return _judged_by(answer, text, problem.answer)
        return task.verify(problem, read_answer(answer, text))

    def cut(self, completion: str) -> str:
        """The text before the first stop."""
        places = [place for stop in self.settings.stop or () if (place := completion.find(stop)) >= 0]
        return completion[: min(places)] if places else completion

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that a stop is in, so that none is written past it.

        Raises:
            TaskError: no token holds a stop.
        """
        found: dict[int, None] = {}
        special = set(self.tokenizer.all_special_ids)
        texts = _token_texts(self.tokenizer) if self.settings.stop else ()
        for stop in self.settings.stop or ():
            own = [i for i, text in enumerate(texts) if stop in text and i not in special]
            if not own:
                raise TaskError(
                    f"no single token of the model contains the stop {stop!r}, so no completion would end there: "
                    "choose a shorter one, such as a newline"
                )
            found |= dict.fromkeys(own)
        return tuple(found)

    @cached_property
    def end_id(self) -> int:
        """The token that ends a learned completion: a stop, the end of a turn, or the end of the text."""
        if self.settings.stop:
            texts, ids = _token_texts(self.tokenizer), self.stop_ids
            return next((i for i in ids if texts[i] == self.settings.stop[0]), ids[0])
        if self.settings.template == "chat":
            turn = self._templated([{"role": "user", "content": "."}, {"role": "assistant", "content": _PROBE}])
            ids = self.tokenizer(turn.rpartition(_PROBE)[2], add_special_tokens=False).input_ids
            special = [i for i in ids if i in set(self.tokenizer.all_special_ids)]
            if special:
                return int(special[0])
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def _solved(self) -> dict[str, list[dict[str, str]]]:
        """Task -> its shots, one more than are shown, in place of the one that is asked."""
        return {}

    def _chat(self, prompt: str) -> str:
        asked = prompt + _ASKED.get(self.settings.answer or "", "")
        system = [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        return self._templated([*system, {"role": "user", "content": asked}], add_generation_prompt=True)

    def _templated(self, messages: list[dict[str, str]], **options: Any) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise TaskError("the tokenizer has no chat template: choose prompt.template few_shot or plain")
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, **options, **(self.settings.chat_options or {})
                )
            )
        except Exception as error:  # templates raise whatever they like
            raise TaskError(f"the chat template refuses these messages: {error}. Try without prompt.system") from error
        first = self.tokenizer.bos_token
        begins = first and self.tokenizer("a").input_ids[:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(first) if begins else text

    def _rendered(self, problem: Problem) -> str:
        template = _FEW_SHOT if self.settings.template == "few_shot" else str(self.settings.template)
        count = self.settings.shots or (_SHOTS if "shots" in template else 0)
        if count and problem.task not in self._solved:
            self._solved[problem.task] = _shots_of(self.tasks[problem.task], count + 1)
        shots = [shot for shot in self._solved.get(problem.task, ()) if shot["prompt"] != problem.prompt][:count]
        try:
            return str(_compiled(template).render(prompt=problem.prompt, shots=shots))
        except TemplateError as error:
            raise TaskError(f"the prompt template fails: {error}. Fix its Jinja") from error


def prompting(settings: PromptSettings | None, tokenizer: Any, tasks: Iterable[Task]) -> Prompting:
    """Settle what is left out by the tokenizer.

    Raises:
        TaskError: the tokenizer has no template for chat or no token for a stop, or answers hold a stop themselves.
    """
    found = Prompting(resolved(settings, tokenizer), {task.name: task for task in tasks}, tokenizer)
    if found.settings.template == "chat":
        found._chat("")
    found.stop_ids  # noqa: B018  # refuses
    for task in found.tasks.values() if found.settings.stop else ():
        _require_whole_answers(task, found.settings.stop or ())
    return found


def _require_whole_answers(task: Task, stops: Sequence[str]) -> None:
    """Refuse stops that the answers of a task themselves hold; a task without reference answers has none."""
    for problem in itertools.islice(problems(task, "train", _SHOTS_SEED), _TRIED):
        held = [stop for stop in stops if stop in problem.answer]
        if held:
            raise TaskError(
                f"answers of task '{task.name}' contain the stop {held[0]!r}, e.g. {problem.answer[:60]!r}: set "
                "prompt.stop to another text, e.g. a blank line ('\\n\\n')"
            )


def resolved(settings: PromptSettings | None, tokenizer: Any) -> PromptSettings:
    """Complete settings: those that are not given follow from the tokenizer.

    >>> from offprincipal.assets import embedded_base
    >>> from transformers import AutoTokenizer
    >>> resolved(None, AutoTokenizer.from_pretrained(embedded_base(), trust_remote_code=False)).template
    'plain'
    """
    given = settings or PromptSettings.model_validate({})
    template = given.template or _template_for(tokenizer)
    more: dict[str, Any] = {"template": template}
    if template == "few_shot":
        more |= {"shots": given.shots or _SHOTS, "stop": ("\n",) if given.stop is None else given.stop}
    if template == "chat" and given.answer is None:
        more["answer"] = "tag"
    return PromptSettings.model_validate(given.model_dump() | more)


def is_character_level(tokenizer: Any) -> bool:
    """Whether every token but the special ones is one character: a model that was made for bare prompts."""
    special = set(tokenizer.all_special_tokens)
    return all(len(token) == 1 for token in tokenizer.get_vocab() if token not in special)


def read_answer(kind: str, text: str) -> str:
    r"""The answer in a completion; empty if there is none.

    >>> read_answer("number", "So 3 + 4 = 7, and 1,007 in all."), read_answer("boxed", r"\boxed{\frac{1}{2}}")
    ('1007', '\\frac{1}{2}')
    >>> read_answer("tag", "<answer>7</answer> or <answer> 8 </answer>"), read_answer("tag", "8")
    ('8', '')
    """
    if kind == "number":
        found = _NUMBER.findall(text)
        return found[-1].replace(",", "").replace("−", "-").removeprefix("+") if found else ""
    if kind == "boxed":
        return _boxed(text)
    if kind == "tag":
        tagged = _TAG.findall(text)
        return tagged[-1].strip() if tagged else ""
    return text.strip()


def _template_for(tokenizer: Any) -> str:
    if is_character_level(tokenizer):
        return "plain"
    return "chat" if getattr(tokenizer, "chat_template", None) else "few_shot"


def _boxed(text: str) -> str:
    """What the last \\boxed{…} holds, braces balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    depth, first = 0, start + len("\\boxed")
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[first + 1 : place].strip()
    return ""


def _equal_as_mathematics(answer: str, text: str) -> bool:
    from offprincipal.tasks.hub_datasets import equal_as_mathematics

    return equal_as_mathematics(answer, text)


def _judged_by(where: str, text: str, answer: str) -> bool:
    try:
        verdict = _function(where)(text, answer)
    except TaskError:
        raise
    except Exception as error:  # the user's own code
        raise TaskError(f"{where} failed on completion {text[:60]!r}: {type(error).__name__}: {error}") from error
    if isinstance(verdict, bool) or verdict in (0, 1):
        return bool(verdict)
    raise TaskError(f"{where} returned {verdict!r} for completion {text[:60]!r}: return True or False")


@lru_cache(maxsize=8)
def _function(where: str) -> Callable[[str, str], Any]:
    file, _, name = where.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise TaskError(f"{file} does not exist: give FILE.py:FUNCTION, a function of (completion, answer)")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise TaskError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise TaskError(f"{file} has no function '{name}': give FILE.py:FUNCTION, a function of (completion, answer)")
    found: Callable[[str, str], Any] = function
    return found


def _shots_of(task: Task, count: int) -> list[dict[str, str]]:
    """Solved training problems of a task: always the same ones, all different."""
    found: dict[str, str] = {}
    for problem in itertools.islice(problems(task, "train", _SHOTS_SEED), 100 * count):
        if problem.answer:
            found.setdefault(problem.prompt, problem.answer)
        if len(found) == count:
            break
    if not found:
        raise TaskError(f"task '{task.name}' has no reference answers to show: choose prompt.template plain or chat")
    return [{"prompt": prompt, "answer": answer} for prompt, answer in found.items()]


@lru_cache(maxsize=4)
def _token_texts(tokenizer: Any) -> tuple[str, ...]:
    """What each token stands for."""
    return tuple(tokenizer.batch_decode([[i] for i in range(len(tokenizer))]))


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    try:
        return SandboxedEnvironment(keep_trailing_newline=True).from_string(template)
    except TemplateError as error:
        raise TaskError(f"the prompt template is not valid Jinja: {error}") from error
