"""Names of runs as tables and figures have room for them: what they have in common once, and no two of them alike.

Knows nothing of figures or markup: names in, shorter names out, whatever letters they are of.
"""

from collections.abc import Iterable, Sequence
from itertools import takewhile

_LONG = 12  # letters of a common beginning that is left out
_ENDING = 8  # letters of a name's end that are kept, more where that tells names apart
CUT = "…"


def common_beginning(names: Sequence[str]) -> str:
    """The long beginning that all names share, up to where a word of it ends; empty where there is none.

    >>> common_beginning(["llama-3-8b-grpo-step-100", "llama-3-8b-grpo-step-200"])
    'llama-3-8b-grpo-step-'
    """
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False)) if len(names) > 1 else ()
    common = "".join(letters[0] for letters in alike)
    common = common[: max(map(common.rfind, "/-_.= ")) + 1]
    return common if len(common) >= _LONG else ""


def short_names(names: Sequence[str]) -> list[str]:
    """Names by what tells them apart: a long common beginning, up to where a word of it ends, becomes an ellipsis.

    >>> short_names(["llama-3-8b-grpo-step-100", "llama-3-8b-grpo-step-200"]), short_names(["grpo_1", "grpo_2"])
    (['…100', '…200'], ['grpo_1', 'grpo_2'])
    """
    common = common_beginning(names)
    return [f"{CUT}{name[len(common) :]}" for name in names] if common else list(names)


def run_labels(runs: Iterable[str]) -> dict[str, str]:
    """Run -> its short name among these.

    >>> run_labels(["grpo", "sft"])
    {'grpo': 'grpo', 'sft': 'sft'}
    """
    names = list(runs)
    return dict(zip(names, short_names(names), strict=True))


def labels(names: Sequence[str], limit: int) -> list[str]:
    """Short names of at most `limit` letters, the longer ones cut in the middle; whole where no cut tells them apart.

    >>> labels(["grpo-on-gsm8k-run01-final", "sft-on-gsm8k-run01-final", "sft-on-gsm8k-run02-final"], 18)
    ['grpo-on-g…01-final', 'sft-on-gs…01-final', 'sft-on-gs…02-final']
    """
    short = short_names(names)
    for ending in range(_ENDING, limit - 1):
        cut = [name if len(name) <= limit else f"{name[: limit - 1 - ending]}{CUT}{name[-ending:]}" for name in short]
        if len(set(cut)) == len(set(short)):
            return cut
    return short
