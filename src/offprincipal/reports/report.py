"""The report: one self-contained HTML file, for readers who do not know the paper.

Reads tables, chooses what to show and renders the template. Nothing in the file refers to the network, and its content
security policy allows only the two scripts whose hashes it lists.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError
from markupsafe import Markup

from offprincipal.errors import FileError
from offprincipal.file_names import (
    CHECKPOINTS,
    GATES,
    INTERVENTION,
    PREFLIGHT,
    RECORD,
    REPORT,
    STUDY,
    SUMMARY,
    TRAJECTORY,
)
from offprincipal.files import ordinary, read_json, write_atomically
from offprincipal.plain_text import plain
from offprincipal.reports import exports, figures, names, nulls, numbers, words
from offprincipal.reports.fine_tuning import fine_tuning_figures
from offprincipal.reports.page import PLOTLY, WEB, asset
from offprincipal.reports.places import reproducing, without_paths
from offprincipal.reports.profiles import link_back, linked_profiles, other_profiles
from offprincipal.reports.terms import TERMS, anchor, defined, linked
from offprincipal.reports.theory import theory_figures
from offprincipal.tables import read_summary

COLOURS = ("#3b6fb6", "#d9772b", "#3f9a6c", "#a855a0", "#b8932c", "#c24d52", "#4aa3b8", "#7a6f5d", "#6d62c4", "#8a9a3b")
SYMBOLS = ("circle", "diamond", "triangle-up", "star")  # the next one each time the colours start again
WIDE, NARROW = 26, 18  # letters of a run's name that a figure has room for, on a wide and on a narrow screen
CHECKPOINT_KEYS = ("greedy_accuracy", "sampled_accuracy", "pass_at_k", "token_entropy", "kl_to_base")
_SCRIPTS = (
    "core.js",
    "runs.js",
    "matrices.js",
    "theory.js",
    "fine_tuning.js",
    "start.js",
)  # joined into one script, in this order
_SWEEP_COLUMNS = ("run", "mask", "alpha", "overlap", "overlap_random", "overlap_rounding_null", "changed_count")


def write_report(out: Path, comparison: Path, study: dict[str, Any] | None = None) -> Path:
    """Write the report of a comparison, or of a study with its comparison.

    Args:
        out: the HTML file to write.
        comparison: a folder that `offprincipal compare` wrote.
        study: the content of `study.json`; its claims and runs come first. Other data of its claims are read from the
            folders next to that of the comparison.

    Returns:
        `out`.

    Raises:
        FileError: the folder lacks a table, or one is damaged; or the file cannot be written.
    """
    with damage_reported(comparison):
        profile = str(study.get("profile") or "") if study else ""
        others = other_profiles(out, profile) if study else {}
        page = _render(_content(comparison, study) | {"profiles": linked_profiles(others)})
    write_atomically(out, lambda path: path.write_text(page, encoding="utf-8", errors="replace"))
    link_back(out, profile, others)
    return out


_DAMAGE = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)


@contextmanager
def damage_reported(folder: Path) -> Iterator[None]:
    """Report any error in reading tables and summaries, which are untrusted, as a FileError about damage."""
    try:
        yield
    except (*_DAMAGE, RecursionError, TemplateError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise FileError(
            f"what {folder} holds is damaged, or of another version ({type(error).__name__}: {reason}): write it again"
        ) from error


_OTHERS = {
    TRAJECTORY: "a trajectory, whose page is trajectory.html",
    RECORD: "a training run",
    CHECKPOINTS: "a training run that is not complete",
    GATES: "gates",
    PREFLIGHT: "a preflight, whose page is preflight.html",
    INTERVENTION: "an intervention",
}


def write_report_of(folder: Path) -> Path:
    """Write `report.html` into a folder that `offprincipal compare` or `offprincipal study` wrote.

    Args:
        folder: holds `summary.json`, or `study.json` and the folder of its comparison.

    Returns:
        The path of the page.

    Raises:
        FileError: the folder lacks a table, or the page cannot be written.
    """
    path = folder / STUDY
    return write_report(folder / REPORT, comparison_in(folder), read_json(path) if path.exists() else None)


def require_comparison(folder: Path) -> None:
    """Refuse a folder that holds other results and no comparison.

    Raises:
        FileError: it holds other results; the message says which.
    """
    held = next((what for name, what in _OTHERS.items() if (folder / name).exists()), None)
    if held and not (folder / SUMMARY).exists():
        raise FileError(f"{folder} holds {held}, and no comparison: `offprincipal show {folder}` prints what it holds")


def comparison_in(folder: Path) -> Path:
    """The folder itself if it holds a comparison, or the folder of the comparison of its study.

    Raises:
        FileError: `study.json` is damaged, or the folder holds other results.
    """
    path = folder / STUDY
    if not path.exists():
        require_comparison(folder)
        return folder
    with damage_reported(folder):
        return folder / Path(read_json(path)["comparison"]).name


def _content(comparison: Path, study: dict[str, Any] | None) -> dict[str, Any]:
    summary = without_paths(read_summary(comparison))
    if study and (base := study.get("base")):
        study = study | {"base": base | {"name": words.place_name(base["name"])}}
    runs = list(summary["runs"])
    training = [_trained(run) for run in study["runs"]] if study else []
    named = dict.fromkeys([*runs, *(run["name"] for run in training)])
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(named)}
    symbols = {name: SYMBOLS[i // len(COLOURS) % len(SYMBOLS)] for i, name in enumerate(named)}
    data = _figures(comparison, summary) | {
        "theory": theory_figures(comparison.parent, study),
        "fine_tuning": fine_tuning_figures(comparison.parent, study),
        "colours": [colours[name] for name in runs],
        "symbols": [symbols[name] for name in runs],
        "training": [run | {"colour": colours[run["name"]], "symbol": symbols[run["name"]]} for run in training],
        "labels": _labels(list(named)),
    }
    data["tables"] = exports.tables(summary, study, data)
    return {
        "summary": summary,
        "study": study,
        "training": training,
        "colours": colours,
        "symbols": symbols,
        "labels": {name: wide for name, wide, _ in data["labels"]},
        "beginning": names.common_beginning(list(named)),
        "data": data,
        "answers": words.answers(summary),
        "notes": words.warnings_of(summary),
        "decisions": words.decisions(summary, labels=names.run_labels(summary["runs"])),
        "paragraphs": words.run_paragraphs(summary),
        "pair_sentences": [(pair, words.pair_sentence(pair)) for pair in summary["pairs"]],
        "evaluated": [key for key in CHECKPOINT_KEYS if any(_known(run, key) for run in training)],
        "rounding_located": _rounding_known(data["overlaps"], "rounding"),
        "rounding_swept": _rounding_known(data["sweep"], "overlap_rounding_null"),
        "tally": words.tally(study["claims"]) if study else "",
        "command": reproducing(summary),
        "thresholds": {"z": words.Z_BEYOND, "tiny": words.TINY, "small": words.SMALL, "about": words.ABOUT},
    }


def _labels(runs: Sequence[str]) -> list[tuple[str, str, str]]:
    """Each run's name, and what figures call it on a wide and on a narrow screen."""
    return list(zip(runs, names.labels(runs, WIDE), names.labels(runs, NARROW), strict=True))


def _figures(comparison: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    runs = list(summary["runs"])
    matrices = read_columns(comparison, "matrices")
    curves = comparison / "curves.parquet"
    return {
        "runs": runs,
        "anatomy": figures.anatomy(summary),
        "anatomy_parts": figures.ANATOMY_PARTS,
        "overlaps": figures.overlaps(summary),
        "sweep": figures.sweep(read_columns(comparison, "masks", _SWEEP_COLUMNS), runs),
        "pairs": summary["pairs"],
        "heat": figures.heatmaps(matrices, runs),
        "spectra": figures.spectra(matrices, curves, runs),
        "stripes": figures.stripes(matrices, curves, runs),
    }


def read_columns(comparison: Path, table: str, columns: tuple[str, ...] | None = None) -> pa.Table:
    """Read a table of a comparison as columns; as dictionaries, the rows of a large model would need too much memory.

    Args:
        comparison: folder of the comparison.
        table: name of the table, such as `matrices`.
        columns: None: all.

    Raises:
        FileError: the table does not exist or is damaged.
    """
    path = comparison / f"{table}.parquet"
    try:
        return pq.read_table(ordinary(path), columns=list(columns) if columns else None)
    except (OSError, pa.ArrowException) as error:
        raise FileError(f"cannot read {path}: {error}. Give a folder that `offprincipal compare` wrote") from error


def _trained(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run of a study with every key that the page needs; None for those that the study lacks."""
    keys = ("name", "recipe", "tasks", "seed", "steps", "batch", "learning_rate", "seconds")
    ends = (*CHECKPOINT_KEYS, "sampled_accuracy_se")
    moments = {when: {key: (run.get(when) or {}).get(key) for key in ends} for when in ("before", "after")}
    return {key: run.get(key) for key in keys} | moments


def _rounding_known(masks: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether the rounding null of any mask and run is defined, alone or at some density."""
    found = [run[key] for mask in masks for run in mask["runs"]]
    return any(share is not None for each in found for share in (each if isinstance(each, list) else [each]))


def _known(run: Mapping[str, Any], *keys: str) -> bool:
    """Whether any of some figures is known of a run, before or after training."""
    return any(run[when][key] is not None for when in ("before", "after") for key in keys)


def _render(content: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("offprincipal.reports", WEB),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= _filters()
    scripts = [_script(asset(PLOTLY)), _script("\n".join(map(asset, _SCRIPTS)))]
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    return environment.get_template("report.html.j2").render(
        content,
        packed=_packed(content["data"]),
        figures=[figure for figure in nulls.FIGURES if figure.page and _is_measured(content["summary"], figure)],
        masks=[
            (figure, words.MASKS[mask])
            for figure in nulls.FIGURES
            if (mask := figure.metric.removesuffix("_overlap")) in words.MASKS
            and _is_measured(content["summary"], figure)
        ],
        rungs=list(nulls.RUNG_TITLES.values()),
        steps=list(nulls.RUNG_TITLES),
        endings=nulls.ENDINGS,
        matrices_of=nulls.matrices_of,
        beyond=words.beyond,
        known=_known,
        terms=TERMS,
        anchor=anchor,
        term=linked,
        defined=defined,
        metrics_of=words.metrics_of,
        style=Markup(asset("report.css")),
        scripts=scripts,
        hashes=Markup(hashes),
    )


def _is_measured(summary: Mapping[str, Any], figure: nulls.Figure) -> bool:
    """Whether any run has the figure."""
    return any(run["metrics"].get(figure.metric, {}).get("value") is not None for run in summary["runs"].values())


def _packed(data: Any) -> str:
    """Data as compressed, base64-encoded JSON: smaller, and names in it cannot be taken for markup."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _filters() -> dict[str, Callable[..., str]]:
    shown = (numbers.number, numbers.percent, numbers.points, numbers.degrees, numbers.signed, numbers.estimate)
    named: dict[str, Callable[..., str]] = {function.__name__: function for function in shown}
    return named | {
        "plain": plain,
        "show_as": numbers.as_kind,
        "bare": numbers.bare,
        "minus_signs": numbers.minus_signs,
    }


def _script(source: str) -> Markup:
    """A script with line feeds only, because HTML parsers convert line ends before the browser hashes it."""
    return Markup(source.replace("\r\n", "\n").replace("\r", "\n"))


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
