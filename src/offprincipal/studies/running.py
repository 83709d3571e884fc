"""Run the stages of a study, each once: training first, in processes of its own, then the rest here, as it is listed.

A finished stage leaves a record with the key that it was made under, a hash of its settings and of its inputs' content,
and the content of its own files. A stage whose record still holds is not run again; so a killed study continues, and a
profile with more stages adds to an old folder. What takes all cores waits until nothing trains, unless a run that is
still to be trained reads it. Knows nothing of what a stage does.
"""

import hashlib
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from offprincipal.errors import StudyError
from offprincipal.files import disk_faults_reported, exclusively, ordinary, require_folder, write_json
from offprincipal.studies.graph import StageGraph
from offprincipal.studies.stages import TrainStage, Workspace, content_digest
from offprincipal.training import StepReport

RECORDS = ".stages"
_RUNS_A_PROCESS = 1  # so that nothing of one run is left for the next
_PRELOADED = ("offprincipal.training.runs", "offprincipal.training.recipes", "trl.trainer.grpo_trainer")
ShowStage = Callable[[str, StepReport | str], None]


def run_profile(profile: StageGraph, out: Path, jobs: int, show: ShowStage, overwrite: bool = False) -> Workspace:
    """Run what is not yet done of a study.

    Args:
        jobs: training stages that run at once.
        show: called for each stage with a `StepReport` while it trains, or `"started"`, `"done"` or `"kept"`.
        overwrite: train again what was trained under other settings, instead of refusing.

    Raises:
        OffPrincipalError: a stage failed; what was done before it is kept.
    """
    require_folder(out)
    space = workspace(profile, out)
    graph = _Graph(profile, space)
    begun: set[str] = set()

    def seen(name: str, report: StepReport | str) -> None:
        begun.add(name)
        show(name, report)

    with exclusively(out), disk_faults_reported(out), _training_pool(jobs, seen) as pool:
        running: dict[Future[None], str] = {}
        waiting = list(profile.stages)
        trained_from = _sources_of(profile, profile.training_stages())
        while waiting or running:
            progressed = False
            for name in [name for name in waiting if graph.ready(name)]:
                if graph.keep(name):
                    show(name, "kept")
                    progressed = True
                elif isinstance(profile.stages[name], TrainStage):
                    running[pool.submit(_train, name, profile, space, overwrite)] = name
                elif progressed or (running and name not in trained_from):
                    continue
                else:
                    show(name, "started")
                    profile.stages[name].make(name, space, partial(show, name))
                    graph.finish(name)
                    show(name, "done")
                    progressed = True
                waiting.remove(name)
            if running and not progressed:
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                lost = [running[future] for future in finished if isinstance(future.exception(), BrokenProcessPool)]
                for future in finished:
                    name = running.pop(future)
                    if name not in lost:
                        future.result()
                        graph.finish(name)
                        show(name, "done")
                if lost:  # a process that dies ends all running and waiting ones
                    raise _killed([name for name in (*lost, *running.values()) if name in begun], jobs)
    return space


def pending(profile: StageGraph, out: Path) -> list[str]:
    """The stages that a run would still have to do."""
    graph = _Graph(profile, workspace(profile, out))
    return [name for name in profile.order() if not (graph.ready(name) and graph.keep(name))]


def workspace(profile: StageGraph, out: Path) -> Workspace:
    """Where the stages of a profile find each other's output."""
    return Workspace(out, profile.base, profile.training, profile.name, profile.title)


def _sources_of(profile: StageGraph, stages: list[str]) -> set[str]:
    """What these stages read, and what that was made from."""
    found: set[str] = set()
    left = list(stages)
    while left:
        new = set(profile.stages[left.pop()].inputs()) - found
        found |= new
        left += new
    return found


class _Graph:
    """Keys and records of the stages of one study."""

    def __init__(self, profile: StageGraph, space: Workspace) -> None:
        self.profile = profile
        self.space = space
        self.content: dict[str, str] = {}

    def ready(self, name: str) -> bool:
        return all(source in self.content for source in self.profile.stages[name].inputs())

    def keep(self, name: str) -> bool:
        """Whether the stage was done under its present key and its files are untouched; then it counts as done."""
        record = self._record(name)
        if record.get("key") != self._key(name) or record.get("content") != self._digest(name):
            return False
        self.content[name] = record["content"]
        return True

    def finish(self, name: str) -> None:
        """Record that the stage is done."""
        content = self._digest(name)
        if content is None:
            raise StudyError(f"stage '{name}' wrote no output to {self.space.folder(name)}: run the study again")
        (self.space.out / RECORDS).mkdir(exist_ok=True)
        write_json(
            self._record_path(name), {"key": self._key(name), "settings": self._settings(name), "content": content}
        )
        self.content[name] = content

    def _settings(self, name: str) -> dict[str, Any]:
        return self.profile.stages[name].settings(self.space)

    def _key(self, name: str) -> str:
        stage = self.profile.stages[name]
        parts = {
            "kind": stage.kind,
            "settings": self._settings(name),
            "inputs": {source: self.content[source] for source in stage.inputs()},
            "version": version("offprincipal"),
        }
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def _digest(self, name: str) -> str | None:
        files = self.profile.stages[name].files(name, self.space)
        return content_digest(*files) if all(file.is_file() for file in files) else None

    def _record_path(self, name: str) -> Path:
        return self.space.out / RECORDS / f"{name}.json"

    def _record(self, name: str) -> dict[str, Any]:
        try:
            record = json.loads(ordinary(self._record_path(name)).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}


def _killed(training: list[str], jobs: int) -> StudyError:
    less = "--jobs 1" if jobs > 1 else "--set training.micro_batch=8, say,"
    return StudyError(
        f"a process that trained {' or '.join(training) or 'a run'} was killed, perhaps for lack of memory: run the "
        f"study again to continue, with {less} if memory is short"
    )


@contextmanager
def _training_pool(jobs: int, show: ShowStage) -> Iterator[ProcessPoolExecutor]:
    """Processes for training, each with its share of the cores, whose progress reaches `show` here."""
    context = _process_context()
    reports: Any = context.Queue()

    def pass_on() -> None:
        while (item := reports.get()) is not None:
            show(*item)

    listener = threading.Thread(target=pass_on, daemon=True)
    listener.start()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=context,
        initializer=_start_worker,
        initargs=(reports, threads),
        max_tasks_per_child=_RUNS_A_PROCESS,
    )
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        reports.put(None)
        listener.join(timeout=5)


def _process_context() -> Any:
    """How processes start: forked from one that has imported what training needs; spawned on a GPU or outside Linux."""
    import torch

    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


_reports: Any = None


def _start_worker(reports: Any, threads: int) -> None:
    import torch

    global _reports
    _reports = reports
    torch.set_num_threads(threads)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed study must not leave a training run behind that writes into its folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(name: str, profile: StageGraph, space: Workspace, overwrite: bool) -> None:
    _reports.put((name, "started"))
    profile.stages[name].make(name, space, lambda report: _reports.put((name, report)), overwrite)
