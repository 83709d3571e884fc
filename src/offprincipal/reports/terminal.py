"""Tables for the terminal, from the same files as the report. Reads and formats; computes no metric."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from offprincipal.comparison.cache import CacheInfo
from offprincipal.outcomes.curves import mask_words
from offprincipal.reports.numbers import number
from offprincipal.reports.words import shown
from offprincipal.tasks import Task, mixture

if TYPE_CHECKING:
    from offprincipal.deltas import Made
    from offprincipal.measures.columns import Metric
    from offprincipal.studies import Profile
    from offprincipal.training.preview import Preview

_SHOWN = (
    ("unchanged, %", "unchanged_fraction", "unchanged_fraction_isotropic_null", 100),
    ("relative update norm", "relative_update_norm", None, 1),
    ("spectral shift", "spectral_shift", "spectral_shift_stored_null", 1),
    ("angle left, °", "principal_angle_left_max_deg", "principal_angle_left_max_deg_stored_null", 1),
    ("angle right, °", "principal_angle_right_max_deg", "principal_angle_right_max_deg_stored_null", 1),
    ("principal, %", "principal_overlap", "principal_overlap_rounding_null", 100),
    ("low-magnitude, %", "low_magnitude_overlap", "low_magnitude_overlap_rounding_null", 100),
    ("energy, %", "principal_energy", "principal_energy_stored_null", 100),
)
_ACROSS = 3  # runs beside each other, which fit 80 columns
_DOWN = 4  # figures beside each other, where runs are below each other
_LONG = 12  # letters of a common beginning that is left out
_WIDEST = 20  # letters that a column keeps for itself
LADDER_COLUMNS = ("run", "mask", "chance", "precision", "magnitude", "neurons", "measured", "z")
_VERDICTS = {
    "supported": "green",
    "contradicted": "red",
    "no effect beyond the control": "yellow",
    "inconclusive": "dim",
}


def cache_line(info: CacheInfo) -> str:
    """Where decomposed bases are kept, how many matrices, and how much they take."""
    size, limit = (f"{amount / 1024**3:.2f} GiB" for amount in (info.size, info.limit))
    return f"{info.folder}: {info.matrices:,} matrices, {size} of at most {limit}"


def comparison_table(summary: Mapping[str, Any]) -> Group:
    """Figures × runs, each value with its null in brackets; of many runs, one a row, in two tables.

    Args:
        summary: `summary.json`.
    """
    rows, labels = figure_rows(summary), short_names(list(summary["runs"]))
    if len(labels) <= _ACROSS:
        tables = [_table_of(["", *labels], rows)]
    else:
        groups = [rows[start : start + _DOWN] for start in range(0, len(rows), _DOWN)]
        tables = [_table_of(*_turned(["run", *labels], some)) for some in groups]
    return Group("what training did to the weights (null in brackets)", *tables, *anatomy_table(summary))


def _turned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the same table with its rows as columns."""
    first, *others = map(list, zip(head, *rows, strict=True))
    return first, others


def _table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Of which a title may take several lines, and a cell may not."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for place, title in enumerate(head):
        widest = max((len(row[place]) for row in rows), default=0)
        table.add_column(shown(title), justify="right" if place else "left", min_width=min(widest, _WIDEST))
    for row in rows:
        table.add_row(*map(shown, row))
    return table


def short_names(names: Sequence[str]) -> list[str]:
    """Names by what tells them apart: a long common beginning, up to where a word of it ends, becomes an ellipsis.

    >>> short_names(["llama-3-8b-grpo-step-100", "llama-3-8b-grpo-step-200"]), short_names(["grpo_1", "grpo_2"])
    (['…100', '…200'], ['grpo_1', 'grpo_2'])
    """
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False)) if len(names) > 1 else ()
    common = "".join(letters[0] for letters in alike)
    common = common[: max(map(common.rfind, "/-_.= ")) + 1]
    return [f"…{name[len(common) :]}" for name in names] if len(common) >= _LONG else list(names)


def figure_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Each figure that was measured: what it is, and for each run its value with its null in brackets."""
    found = [run["metrics"] for run in summary["runs"].values()]
    return [
        [title, *(_with_null(metrics, metric, null, factor) for metrics in found)]
        for title, metric, null, factor in _SHOWN
        if any(metric in metrics for metrics in found)
    ]


def anatomy_table(summary: Mapping[str, Any]) -> list[Any]:
    """Where the changed entries lie, rung by rung of the ladder of nulls, in percent: nothing where none was located.

    Args:
        summary: `summary.json`.
    """
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for title in LADDER_COLUMNS:
        justify: Literal["left", "right"] = "left" if title in ("run", "mask") else "right"
        table.add_column(title, justify=justify, no_wrap=title != "run", overflow="fold")
    labels = dict(zip(summary["runs"], short_names(list(summary["runs"])), strict=True))
    for name, *cells in anatomy_rows(summary):
        table.add_row(shown(labels[name]), *cells)
    said = "of the changed entries, % in the mask; each null from left to right knows one thing more"
    return [said, table] if table.row_count else []


def anatomy_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """For each run and mask the cells of `LADDER_COLUMNS`."""
    rows = []
    for name, run in summary["runs"].items():
        for mask in ("principal", "low_magnitude"):
            if rungs := run.get("anatomy", {}).get(mask):
                z = run["metrics"].get(f"{mask}_z", {}).get("value")
                cells = (_format(rungs[rung], 100) for rung in ("random", "rounding", "spacing", "margins", "measured"))
                rows.append([name, mask.replace("_", "-"), *cells, _format(z)])
    return rows


def proof_lines(proof: Mapping[str, float], dtype: str, *, undone: bool) -> list[str]:
    """What proves an intervention, or that it was undone, beside what its figures may be compared with.

    Args:
        proof: as `intervention.json` or `undo.json` holds it.
        dtype: what the weights were stored in.
        undone: whether it was undone.
    """
    stored, whose = number(proof["kl_stored"], 2), "the trained model" if undone else "the base"
    computed = "the rounding" if undone else f"computing the base in {dtype} costs {number(proof['kl_computed'], 2)}"
    return [
        f"float64 logits differ by {number(proof['logits_relative_difference'], 2)} relatively (at most 1e-9)",
        f"stored in {dtype}, the KL to {whose} is {stored} nats a token ({computed})",
    ]


def runs_table(study: Mapping[str, Any]) -> Group:
    """Training runs with their held-out figures before and after.

    Args:
        study: `study.json`, or anything with its `runs`.
    """
    table = Table(box=SIMPLE)
    table.add_column("run")
    for title in ("greedy, %", "sampled, %", "pass@k, %", "KL to base", "minutes"):
        table.add_column(title, justify="right")
    for run in study["runs"]:
        before, after = run["before"] or {}, run["after"] or {}
        accuracies = [
            f"{_format(before.get(key), 100)} → {_format(after.get(key), 100)}"
            for key in ("greedy_accuracy", "sampled_accuracy", "pass_at_k")
        ]
        kl = _format(after.get("kl_to_base"))
        table.add_row(shown(run["name"]), *accuracies, kl, f"{run['seconds'] / 60:.1f}")
    return Group("training, on held-out prompts, before → after", table)


def fine_tuning_tables(figures: Mapping[str, Any]) -> list[Group]:
    """What fine-tuning runs came to: a table of masks and one of low-rank methods, each where there are such runs.

    Args:
        figures: as of `reports.fine_tuning`.
    """
    found = {"masks": _masks_table, "sweeps": _sweeps_table}
    return [table(figures[name]) for name, table in found.items() if name in figures]


def _masks_table(figures: Mapping[str, Any]) -> Group:
    table = Table(box=SIMPLE)
    table.add_column("mask")
    for title in ("seeds", "trained, %", "distance to the full KL curve", "accuracy, %"):
        table.add_column(title, justify="right")
    for found in figures["masks"]:
        runs, own = found["runs"], found["mask"] == "full"
        areas = _span(figures["other_seeds"]) + " (other seeds)" if own else _span(run["area"] for run in runs)
        accuracy = _span((run["accuracy"] for run in runs), 100)
        name = shown(mask_words((found["mask"], found["density"])))
        table.add_row(name, str(len(runs)), _format(found["trained"], 100), areas, accuracy)
    return Group(f"masks, lowest to highest over seeds; base {_format(figures['base'], 100)} %", table)


def _sweeps_table(figures: Mapping[str, Any]) -> Group:
    table = Table(box=SIMPLE)
    table.add_column("method")
    for title in ("rank", "seeds", "highest stable rate", "best accuracy, %"):
        table.add_column(title, justify="right")
    bounds = {None: "", "above": "≥ ", "below": "< "}
    for group in figures["groups"]:
        found = group["sweeps"]
        rates = ", ".join(dict.fromkeys(bounds[sweep["open"]] + _format(sweep["stable"]) for sweep in found))
        best = _span((sweep["best"] for sweep in found), 100)
        table.add_row(shown(group["method"]), str(group["rank"]), str(len(found)), rates, best)
    return Group(
        f"low-rank methods, lowest to highest over seeds; base {_format(figures['base'], 100)} %",
        table,
        *([_matched_table(figures["matched"])] if figures["matched"] else []),
    )


def _matched_table(matched: Iterable[Mapping[str, Any]]) -> Table:
    table = Table(box=SIMPLE)
    table.add_column("at equal step")
    for title in ("rank", "seeds", "reached", "accuracy, %", "of the matched, %"):
        table.add_column(title, justify="right")
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in matched:
        groups.setdefault((run["method"], run["like"]["method"], run["size"], run["rank"]), []).append(run)
    for (method, like, size, rank), runs in groups.items():
        accuracy, of_like = (
            _span((run["accuracy"] for run in side), 100) for side in (runs, [r["like"] for r in runs])
        )
        ratio = _span(run["ratio"] for run in runs)
        table.add_row(shown(f"{method} at {size} of {like}"), str(rank), str(len(runs)), ratio, accuracy, of_like)
    return table


def claims_table(study: Mapping[str, Any]) -> Group:
    """Claims with both verdicts and their effects.

    Args:
        study: `study.json`.
    """
    table = Table(show_lines=True)
    for title in ("claim", "as published", "with the control", "control, and blind studies decided"):
        table.add_column(title)
    for claim in study["claims"]:
        table.add_row(
            f"{claim['id']} {claim['title']}{_contrast(claim)}\n[dim]{shown(claim['statement'])}[/]",
            _judgement(claim["as_published"]),
            _judgement(claim["controlled"]),
            shown(claim["controlled"]["control"]) + _blind(claim["controlled"].get("negative_control")),
        )
    return Group("the paper's claims: verdict, effect, 95 % interval over runs or matched pairs of runs", table)


def _contrast(claim: Mapping[str, Any]) -> str:
    of = f": {shown(claim['of'])}" if claim.get("of") else ""
    return of + (f", against {shown(claim['contrast'])}" if claim.get("contrast") else "")


def _blind(counts: Mapping[str, int] | None) -> str:
    if not counts:
        return ""
    return f"\n[dim]{counts['supported'] + counts['contradicted']} of {counts['draws']}[/]"


def settings_table(fields: Mapping[str, Any]) -> Table:
    """Settings with their defaults.

    Args:
        fields: name -> pydantic field.
    """
    table = Table("setting", "default", "meaning")
    for name, field in fields.items():
        default = "required" if field.is_required() else str(field.default)
        table.add_row(name, shown(default), shown(field.description or ""))
    return table


def metrics_table(metrics: Iterable["Metric"]) -> Table:
    """Every figure by group: its name, what it means, and its unit."""
    table = Table(box=SIMPLE)
    for title in ("group", "figure", "what it is", "unit"):
        table.add_column(title, no_wrap=title == "figure")
    for metric in metrics:
        for column in metric.columns:
            table.add_row(metric.group, column.name, shown(column.meaning), "" if column.unit == "1" else column.unit)
    return table


def profiles_table(profiles: Iterable["Profile"], runs_of: Callable[["Profile"], int]) -> Table:
    """Shipped studies: their names, what they ask, and how many runs they train."""
    table = Table(box=SIMPLE)
    for title in ("profile", "what it asks", "base"):
        table.add_column(title)
    table.add_column("training runs", justify="right")
    for profile in profiles:
        table.add_row(profile.name, shown(profile.title), shown(profile.base), str(runs_of(profile)))
    return table


def tasks_table(tasks: Iterable[Task]) -> Table:
    """Tasks, each with a held-out problem."""
    table = Table("task", "prompt", "answer", "teacher's trace")
    for task in tasks:
        problem = mixture([task], "eval", 1)[0]
        table.add_row(
            task.name, *(shown(text) for text in (problem.prompt, problem.answer, task.teacher_trace(problem)))
        )
    return table


def preview_lines(found: "Preview") -> list[str]:
    """How problems were put to a model, each prompt whole, what it wrote, and what that comes to."""
    how = ", ".join(f"{name} {value!r}" for name, value in found.settings.model_dump().items())
    lines = [f"asked with {how}; at most {found.max_new_tokens} tokens"]
    for one in found.shown:
        verdicts = ["right" if right else "wrong" for right in one.right]
        lines += [
            "",
            f"── {one.task}",
            *one.prompt.split("\n"),
            f"→ greedy: {one.greedy!r} ({verdicts[0]}); sampled: {one.sampled!r} ({verdicts[1]}); "
            f"answer: {one.answer!r}",
        ]
    right = sum(sum(one.right) for one in found.shown)
    lines += ["", f"{right} of {2 * len(found.shown)} completions are right"]
    cut = sum(not one.ended for one in found.shown)
    if cut:
        lines.append(
            f"{cut} of {len(found.shown)} problems had a completion that did not end by itself: raise max_new_tokens, "
            "or choose a prompt.stop that the model writes"
        )
    return lines


def _judgement(judged: Mapping[str, Any]) -> str:
    color = _VERDICTS[judged["verdict"]]
    if judged["effect"] is None:
        return f"[{color}]{judged['verdict']}[/]"
    text = f"[{color}]{judged['verdict']}[/]\n{judged['effect']:.3g}"
    if judged["low"] is None or judged["high"] is None:
        return text
    return f"{text} [dim][{judged['low']:.3g}, {judged['high']:.3g}][/]"


def _with_null(metrics: Mapping[str, Any], metric: str, null: str | None, factor: float) -> str:
    text = _format(metrics.get(metric, {}).get("value"), factor)
    return text if null is None else f"{text} ({_format(metrics.get(null, {}).get('value'), factor)})"


def _span(values: Iterable[float | None], factor: float = 1) -> str:
    """The lowest and the highest of those that are known."""
    known = [value for value in values if value is not None]
    if not known:
        return _format(None)
    low, high = (_format(end, factor) for end in (min(known), max(known)))
    return low if low == high else f"{low} to {high}"


def _format(value: float | None, factor: float = 1) -> str:
    """Three significant digits; percentages to a tenth."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if factor == 100 else f"{value:.3g}"


def delta_lines(made: "Made") -> list[str]:
    """What a delta came to."""
    share = made.changed / made.entries if made.entries else 0.0
    lines = [
        f"{made.path}: {made.bytes:,} bytes, {made.whole / max(made.bytes, 1):,.1f} times less than the weights' "
        f"{made.whole:,}",
        f"changed: {made.changed:,} of {made.entries:,} entries that both have, {100 * share:.3g} %",
    ]
    if made.places is not None:
        values = "" if made.values is None else f", {made.values:.2f} for its value"
        lines.append(f"a changed entry takes {made.places:.2f} bits for its place{values}")
    return lines


def as_shown_json(content: Mapping[str, Any]) -> str:
    """JSON that a terminal can show: what is not printable in a name is written as its number.

    >>> print(as_shown_json({"grpo\\x9b31m": "ü"}))
    {
     "grpo\\u009b31m": "ü"
    }
    """
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
