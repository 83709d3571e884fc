"""Tasks from data: any Hugging Face data set, or local JSON, CSV or Parquet files, with an answer column.

Answers are compared as mathematics by math-verify where they parse as mathematics, and as text otherwise. Knows nothing
of models or splits.
"""

import functools
import importlib
import os
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from offprincipal.errors import TaskError, install_command
from offprincipal.hub_connection import asked_once
from offprincipal.tasks.protocol import Problem

PREFIX = "hf:"
FINAL_ANSWER_MARK = "####"
_OPTIONS = ("config", "prompt", "answer", "split")
# fmt: off
_BUILDERS = frozenset({
    "arrow", "audiofolder", "cache", "conll", "csv", "eval", "fasta", "fastq", "genbank", "generator", "harbor", "hdf5",
    "iceberg", "imagefolder", "json", "lance", "meshfolder", "mmcif", "niftifolder", "pandas", "parquet", "pdb",
    "pdffolder", "spark", "sql", "text", "tsfile", "videofolder", "vortex", "webdataset", "xml",
})
# fmt: on
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_ORDER_SEED = 2511_08567
_SECONDS_TO_PARSE = 5
_MOST_FILES = 10_000


@dataclass(frozen=True)
class HubTask:
    """Problems from the rows of a data set.

    Args:
        dataset: a Hugging Face data set id, or the path of a data file or of a folder of data files.
        config: the data set's configuration, where it has several.
        prompt: the column that holds the prompt.
        answer: the column that holds the answer: its text after `####` where there is one, as in GSM8K, else all of it.
        split: the data set's split to draw from; `offprincipal.tasks.split_of` decides what is held out within it.

    Raises:
        TaskError: the data set cannot be read, is empty, or lacks a column; or a package is not installed.
    """

    dataset: str
    config: str | None = None
    prompt: str = "question"
    answer: str = "answer"
    split: str = "train"

    def __post_init__(self) -> None:
        missing = [column for column in (self.prompt, self.answer) if column not in self._rows.column_names]
        if missing:
            raise TaskError(
                f"data set '{self.dataset}' has no column '{missing[0]}': it has {', '.join(self._rows.column_names)}; "
                f"choose columns as in hf:{self.dataset}?prompt=…&answer=…"
            )
        if len(self._rows) == 0:
            raise TaskError(f"data set '{self.dataset}' has no rows in its split '{self.split}': choose another split")

    @classmethod
    def parse(cls, spec: str) -> "HubTask":
        """`DATASET` or `DATASET?config=main&prompt=question&answer=answer&split=train`."""
        dataset, _, query = spec.partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        unknown = [option for option in options if option not in _OPTIONS]
        if unknown or not dataset or bool(query) != bool(options):
            what = f"no option '{unknown[0]}'" if unknown else "no data set or option in it"
            raise TaskError(f"task 'hf:{spec}' is invalid, {what}: write hf:DATASET?{'=…&'.join(_OPTIONS)}=…")
        return cls(dataset, **options)

    @property
    def name(self) -> str:
        given = {o: getattr(self, o) for o in _OPTIONS if getattr(self, o) != self.__dataclass_fields__[o].default}
        return f"{PREFIX}{self.dataset}" + (f"?{urlencode(given)}" if given else "")

    @functools.cached_property
    def _rows(self) -> Any:
        return _load(self.dataset, self.config, self.split)

    @functools.cached_property
    def _order(self) -> list[int]:
        order = list(range(len(self._rows)))
        random.Random(_ORDER_SEED).shuffle(order)
        return order

    @functools.cached_property
    def _read(self) -> dict[int, Problem]:
        """Rows by their number, as they are asked for: reading one anew takes half a millisecond."""
        return {}

    def problem(self, seed: int) -> Problem:
        index = self._order[seed % len(self._order)]
        if index not in self._read:
            self._read[index] = self._problem_of(index)
        return self._read[index]

    def _problem_of(self, index: int) -> Problem:
        row = self._rows[index]
        for column in (self.prompt, self.answer):
            if row[column] is None or not str(row[column]).strip():
                raise TaskError(f"data set '{self.dataset}', row {index}: column '{column}' is empty; remove the row")
        trace = str(row[self.answer])
        return Problem(self.name, str(row[self.prompt]), _final_answer(trace), {"trace": trace})

    def verify(self, problem: Problem, completion: str) -> bool:
        given = _final_answer(completion)
        if given.casefold() == problem.answer.casefold():
            return True
        return equal_as_mathematics(problem.answer, given)

    def teacher_trace(self, problem: Problem) -> str:
        """The whole answer column."""
        return str(problem.data["trace"])


def equal_as_mathematics(answer: str, text: str) -> bool:
    """Whether math-verify reads the same in both; not where it reads nothing in the answer.

    Raises:
        TaskError: math-verify is not installed.
    """
    reference = _parsed(answer)
    return bool(reference) and _equal(reference, _parsed(text))


def _final_answer(text: str) -> str:
    return text.rsplit(FINAL_ANSWER_MARK, 1)[-1].strip()


def _load(dataset: str, config: str | None, split: str) -> Any:
    datasets = _need("datasets")
    _need("math_verify")
    if dataset in _BUILDERS:  # would read whatever lies in the working directory, pickles too in some versions
        raise TaskError(
            f"'{dataset}' is a loader of the datasets library, not a data set: give org/name or ./{dataset}"
        )
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        path = Path(dataset)
        if path.is_file():
            return datasets.load_dataset(_reader(path), data_files=str(path), split=split)
        if path.is_dir():
            _require_few_files(path)
            return datasets.load_dataset(dataset, config, split=split)
        if path.suffix.lower() in _READERS:
            raise TaskError(f"data file {path} is not there: check its path")
        with asked_once(dataset, "dataset", TaskError):
            return datasets.load_dataset(dataset, config, split=split)
    except TaskError:
        raise
    except Exception as error:  # the library raises a dozen kinds for unknown names, bad files and lost connections
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TaskError(
            f"data set '{dataset}' (configuration {config or 'default'}, split '{split}') cannot be read: "
            f"{reason.rstrip('.')}. Check its id or path, and the network unless it is on this machine"
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _require_few_files(folder: Path) -> None:
    """The library looks through all that lies in a folder, however deep: `hf:/` would be the whole disk."""
    seen, folders = 0, [folder]
    while folders:
        for entry in os.scandir(folders.pop()):
            seen += 1
            if seen > _MOST_FILES:
                raise TaskError(
                    f"folder {folder} contains more than {_MOST_FILES:,} files, which is hardly one data set: give a "
                    "folder with only the data, or a file"
                )
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))


def _reader(path: Path) -> str:
    try:
        return _READERS[path.suffix.lower()]
    except KeyError:
        raise TaskError(f"data file {path} has an unknown ending: it must end in {', '.join(_READERS)}") from None


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TaskError(f"this needs {module.replace('_', '-')}: {install_command('train')}") from error


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    """The expressions that math-verify finds in a text; an empty list if there are none."""
    return _need("math_verify").parse(text, parsing_timeout=_timeout())


def _equal(reference: Any, given: Any) -> bool:
    return bool(_need("math_verify").verify(reference, given, timeout_seconds=_timeout()))


def _timeout() -> int | None:
    """math-verify limits its time by signals, which only the main thread has."""
    return _SECONDS_TO_PARSE if threading.current_thread() is threading.main_thread() else None
