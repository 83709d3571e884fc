"""Tables for the terminal and for notebooks, from the same files as the report.

Reads and formats; computes no metric.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from offprincipal.outcomes.curves import mask_words
from offprincipal.reports.names import run_labels, short_names
from offprincipal.reports.nulls import FIGURES, MARK, RUNG_TITLES, Figure, caption, matrices_of, measured
from offprincipal.reports.numbers import as_kind, bare, number, percent, signed
from offprincipal.reports.page import html_table
from offprincipal.reports.words import decisions, metrics_of, shown
from offprincipal.tasks import Task, mixture

if TYPE_CHECKING:
    from offprincipal.deltas import Made
    from offprincipal.measures.columns import Metric
    from offprincipal.training.preview import Preview

_SCREEN = 80  # characters per line on every terminal
_WIDEST = 24  # largest width of a column, in characters
LADDER_COLUMNS = ("run", "mask", *RUNG_TITLES.values(), "z")
LADDER = "each null from left to right knows one thing more; z: how far beyond margins, in standard errors"
_VERDICTS = {
    "supported": "green",
    "contradicted": "red",
    "no effect beyond the control": "yellow",
    "inconclusive": "dim",
}


def _lean() -> Table:
    """A table with little padding."""
    return Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)


def comparison_table(summary: Mapping[str, Any]) -> Group:
    """Figures × runs, each value with its null in brackets; if that is too wide, runs × figures in several tables.

    Args:
        summary: the content of `summary.json`.
    """
    head, rows = ["", *short_names(list(summary["runs"]))], figure_rows(summary)
    if sum(_widths(head, rows)) > _SCREEN:
        head, *rows = map(list, zip(["run", *head[1:]], *rows, strict=True))
    tables = screen_tables(head, rows)
    return Group("what training did to the weights (null in brackets)", *tables, f"{caption(summary)}.")


def comparison_html(summary: Mapping[str, Any]) -> str:
    """A comparison in a notebook: the same tables, and one sentence per run, as HTML.

    Args:
        summary: the content of `summary.json`. Names in it are escaped.
    """
    parts = ["<p>What training did to the weights (null in brackets)</p>"]
    parts.append(html_table(["", *summary["runs"]], figure_rows(summary)))
    parts.append(f"<p>{caption(summary)}.</p>")
    if rungs := anatomy_rows(summary):
        parts.append(f"<p>Of the changed entries, % in the mask: {LADDER}.</p>")
        parts.append(html_table(LADDER_COLUMNS, rungs))
    parts += [f"<p>{escape(sentence)}</p>" for sentence in decisions(summary)]
    return "\n".join(parts)


def screen_tables(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Any]:
    """A table that every terminal has room for; where it is too wide as several, each with the first column."""
    return [_table_of(*block) for block in _blocks(head, rows)]


def _blocks(
    head: Sequence[str], rows: Sequence[Sequence[str]]
) -> Iterator[tuple[Sequence[str], Sequence[Sequence[str]]]]:
    """A table divided into several, each with the first column and as many others as fit on the screen."""
    widths, end = _widths(head, rows), 1
    while end < len(head):
        start, room = end, _SCREEN - widths[0]
        while end < len(head) and (end == start or widths[end] <= room):
            room -= widths[end]
            end += 1
        kept = (0, *range(start, end))
        yield [head[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _widths(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Widths of the columns with the space between them; the words of a title are stacked."""
    titles = [max(map(len, title.split()), default=0) for title in head]
    return [min(max([title, *(len(row[i]) for row in rows)]), _WIDEST) + 2 for i, title in enumerate(titles)]


def _table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table with columns as wide as their cells, or as the longest word of their title."""
    table = _lean()
    for place, (title, width) in enumerate(zip(head, _widths(head, rows), strict=True)):
        table.add_column(shown(title), justify="right" if place else "left", width=width - 2, overflow="fold")
    for row in rows:
        table.add_row(*map(shown, row))
    return table


def figure_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """For each measured figure: its title, and the value of each run with its null in brackets."""
    runs = summary["runs"].values()
    return [[_titled(figure), *(_with_null(run, figure) for run in runs)] for figure in measured(summary)]


def ladder_tables(summary: Mapping[str, Any]) -> list[Any]:
    """Tables of the overlap with each mask at every rung of the ladder of nulls, in percent; none if not measured.

    Args:
        summary: the content of `summary.json`.
    """
    labels = run_labels(summary["runs"])
    head, rows = [title for title in LADDER_COLUMNS if title != "mask"], anatomy_rows(summary)
    found: list[Any] = []
    for mask in dict.fromkeys(mask for _, mask, *_ in rows):
        of_mask = [[labels[run], *cells] for run, own, *cells in rows if own == mask]
        found += [f"of the changed entries, % on {mask} weights: as each null has it, and measured"]
        found += [_table_of(head, of_mask)]
    return [*found, f"{LADDER}."] if found else []


def anatomy_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """For each run and mask, the cells of `LADDER_COLUMNS`."""
    rows = []
    for name, run in summary["runs"].items():
        for mask in ("principal", "low_magnitude"):
            if rungs := run.get("anatomy", {}).get(mask):
                z = run["metrics"].get(f"{mask}_z", {}).get("value")
                figure = next(each for each in FIGURES if each.metric == f"{mask}_overlap")
                mark = MARK if matrices_of(run["metrics"], figure) else ""
                cells = [bare(percent(rungs[rung])) for rung in RUNG_TITLES]
                rows.append([name, mask.replace("_", "-"), *cells[:-1], f"{cells[-1]}{mark}", signed(z)])
    return rows


def proof_lines(proof: Mapping[str, float], dtype: str, *, undone: bool) -> list[str]:
    """The measured differences of an intervention or of its undoing, each with a reference value.

    Args:
        proof: from `intervention.json` or `undo.json`.
        dtype: of the stored weights.
        undone: whether the intervention was undone.
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
        study: the content of `study.json`; only `runs` is used.
    """
    table = _lean()
    table.add_column("run")
    for title in ("greedy, %", "sampled, %", "pass@k, %", "KL to base", "minutes"):
        table.add_column(title, justify="right")
    for run in study["runs"]:
        before, after = run["before"] or {}, run["after"] or {}
        accuracies = [
            f"{_in_percent(before.get(key))} → {_in_percent(after.get(key))}"
            for key in ("greedy_accuracy", "sampled_accuracy", "pass_at_k")
        ]
        kl = number(after.get("kl_to_base"))
        table.add_row(shown(run["name"]), *accuracies, kl, f"{run['seconds'] / 60:.1f}")
    return Group("training, on held-out prompts, before → after", table)


def fine_tuning_tables(figures: Mapping[str, Any]) -> list[Group]:
    """Results of fine-tuning runs: a table of masks and one of low-rank methods, each if there are such runs.

    Args:
        figures: as from `reports.fine_tuning`.
    """
    tables = {"masks": _masks_table, "sweeps": _sweeps_table}
    return [table(figures[name]) for name, table in tables.items() if name in figures]


def _masks_table(figures: Mapping[str, Any]) -> Group:
    table = _lean()
    table.add_column("mask")
    for title in ("seeds", "trained, %", "distance to the full KL curve", "accuracy, %"):
        table.add_column(title, justify="right")
    for found in figures["masks"]:
        runs, own = found["runs"], found["mask"] == "full"
        areas = _span(figures["other_seeds"]) + " (other seeds)" if own else _span(run["area"] for run in runs)
        accuracy = _span((run["accuracy"] for run in runs), _in_percent)
        name = shown(mask_words((found["mask"], found["density"])))
        table.add_row(name, str(len(runs)), _in_percent(found["trained"]), areas, accuracy)
    return Group(f"masks, lowest to highest over seeds; base {_in_percent(figures['base'])} %", table)


def _sweeps_table(figures: Mapping[str, Any]) -> Group:
    table = _lean()
    table.add_column("method")
    for title in ("rank", "seeds", "highest stable rate", "best accuracy, %"):
        table.add_column(title, justify="right")
    bounds = {None: "", "above": "≥ ", "below": "< "}
    for group in figures["groups"]:
        found = group["sweeps"]
        rates = ", ".join(dict.fromkeys(bounds[sweep["open"]] + _rate(sweep["stable"]) for sweep in found))
        best = _span((sweep["best"] for sweep in found), _in_percent)
        table.add_row(shown(group["method"]), str(group["rank"]), str(len(found)), rates, best)
    return Group(
        f"low-rank methods, lowest to highest over seeds; base {_in_percent(figures['base'])} %",
        table,
        *([_matched_table(figures["matched"])] if figures["matched"] else []),
    )


def _matched_table(matched: Iterable[Mapping[str, Any]]) -> Table:
    table = _lean()
    table.add_column("at equal step")
    for title in ("rank", "seeds", "reached", "accuracy, %", "of the matched, %"):
        table.add_column(title, justify="right")
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in matched:
        groups.setdefault((run["method"], run["like"]["method"], run["size"], run["rank"]), []).append(run)
    for (method, like, size, rank), runs in groups.items():
        accuracy, of_like = (
            _span((run["accuracy"] for run in side), _in_percent) for side in (runs, [r["like"] for r in runs])
        )
        ratio = _span(run["ratio"] for run in runs)
        table.add_row(shown(f"{method} at {size} of {like}"), str(rank), str(len(runs)), ratio, accuracy, of_like)
    return table


def claims_table(study: Mapping[str, Any]) -> Group:
    """One row per claim: verdict and effect, as published and controlled, and the blind studies that its rule decides.

    Args:
        study: the content of `study.json`.
    """
    table = _lean()
    table.add_column("claim", overflow="fold")
    for title in ("as published", "with the control"):
        table.add_column(title, no_wrap=True)
        table.add_column("blind", justify="right", no_wrap=True)
    for claim in study["claims"]:
        sides = (claim["as_published"], claim["controlled"])
        cells = [cell for side in sides for cell in (_judgement(side), _blind(side.get("negative_control")))]
        table.add_row(shown(_claim(claim)), *cells)
    return Group(
        "the paper's claims: verdict and effect; blind: studies of updates that know nothing in which the rule decides",
        table,
    )


def claims_sentences(study: Mapping[str, Any]) -> Iterator[str]:
    """For each claim its statement and control; as published and controlled, the verdict and effect with its interval.

    Args:
        study: the content of `study.json`.
    """
    for claim in study["claims"]:
        yield f"{_claim(claim)}. {claim['statement']}. Control: {claim['controlled']['control']}."
        for side, words in (("as_published", "as published"), ("controlled", "with the control")):
            judged = claim[side]
            ends = (judged["low"], judged["high"])
            interval = "" if None in ends else f" [{ends[0]:.3g}, {ends[1]:.3g}]"
            effect = "" if judged["effect"] is None else f" {judged['effect']:.3g}{interval}, {judged['measure']}"
            yield f"  {words}: {judged['verdict']}{effect}. {judged['sentence']}"


def _claim(claim: Mapping[str, Any]) -> str:
    others = [claim[key] for key in ("of", "contrast") if claim.get(key)]
    return f"{claim['id']} {claim['title']}" + (f": {', against '.join(others)}" if others else "")


def _blind(counts: Mapping[str, int] | None) -> str:
    return f"{counts['supported'] + counts['contradicted']}/{counts['draws']}" if counts else "–"


def choices_table(titles: Sequence[str], choices: Iterable[Sequence[str]]) -> Table:
    """One row per choice: its name, and its descriptions in the columns of the titles."""
    table = _lean()
    for place, title in enumerate(titles):
        table.add_column(title, no_wrap=not place, overflow="fold")
    for cells in choices:
        table.add_row(*cells)
    return table


def settings_table(fields: Mapping[str, Any]) -> Table:
    """Settings with their defaults.

    Args:
        fields: name -> pydantic field.
    """
    table = _lean()
    table.add_column("setting", no_wrap=True)
    for title in ("default", "meaning"):
        table.add_column(title, overflow="fold")
    for name, field in fields.items():
        default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
        default = {"()": "none", "{}": "none", "None": "none"}.get(default, default)
        table.add_row(name, shown(default), shown(field.description or ""))
    return table


def metrics_table(metrics: Iterable["Metric"]) -> Table:
    """All figures by group: name, meaning, unit, and the names of its nulls in short."""
    from offprincipal.measures.columns import nulls_of

    table = _lean()
    table.add_column("figure", no_wrap=True)
    table.add_column("what it is; and its nulls", overflow="fold")
    group = ""
    for metric in metrics:
        own = [column for column in metric.columns if column.null_of is None and not column.name.endswith("_sd")]
        if own and metric.group != group:
            group = metric.group
            table.add_row(f"[bold]{group}[/]", "")
        for column in own:
            unit = "" if column.unit == "1" else f" ({column.unit})"
            nulls = ", ".join(nulls_of(column.name))
            table.add_row(column.name, shown(f"{column.meaning}{unit}{f'; nulls: {nulls}' if nulls else ''}"))
    return table


def metrics_json(metrics: Iterable["Metric"]) -> dict[str, dict[str, str]]:
    """The same as data: figure -> group, meaning, unit and source."""
    return {
        column.name: {"group": metric.group, "meaning": column.meaning, "unit": column.unit, "source": metric.source}
        for metric in metrics
        for column in metric.columns
    }


def profiles_table(profiles: Iterable[tuple[str, str, str, int]]) -> Table:
    """Included studies: name, question, base, and number of training runs."""
    table = _lean()
    table.add_column("profile", no_wrap=True)
    for title in ("what it asks", "base"):
        table.add_column(title, overflow="fold")
    table.add_column("training runs", justify="right")
    for name, title, base, runs in profiles:
        table.add_row(name, shown(title), shown(base), str(runs))
    return table


def tasks_table(tasks: Iterable[Task]) -> Table:
    """Tasks, each with a held-out problem."""
    table = _lean()
    table.add_column("task", no_wrap=True)
    for title in ("prompt", "answer", "teacher's trace"):
        table.add_column(title, overflow="fold")
    for task in tasks:
        problem = mixture([task], "eval", 1)[0]
        table.add_row(
            task.name, *(shown(text) for text in (problem.prompt, problem.answer, task.teacher_trace(problem)))
        )
    return table


def preview_lines(found: "Preview") -> list[str]:
    """How problems were presented, each prompt with its completions, and the number of right ones."""
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
    verdict = judged["verdict"]
    text = f"[{_VERDICTS[verdict]}]{verdict.removesuffix(' beyond the control')}[/]"
    return text if judged["effect"] is None else f"{text} {judged['effect']:.3g}"


def _titled(figure: Figure) -> str:
    """A figure's title with its unit, which its cells leave out."""
    unit = {"percent": ", %", "degrees": ", °", "number": ""}[figure.kind]
    return f"{figure.title}{unit}"


def _with_null(run: Mapping[str, Any], figure: Figure) -> str:
    """A figure with its null in brackets; marked if it does not include every matrix."""
    metrics = metrics_of(run)
    found, null = (bare(as_kind(metrics.get(name or "", {}).get("value"), figure.kind)) for name in figure.names)
    mark = MARK if matrices_of(run["metrics"], figure) else ""
    return f"{found}{mark}" if figure.null is None else f"{found}{mark} ({null})"


def _span(values: Iterable[float | None], text: Callable[[float | None], str] = number) -> str:
    """The lowest and the highest of the defined values."""
    known = [value for value in values if value is not None]
    if not known:
        return text(None)
    low, high = text(min(known)), text(max(known))
    return low if low == high else f"{low} to {high}"


def _rate(value: float | None) -> str:
    """A learning rate as it was given."""
    return number(None) if value is None else f"{value:g}"


def _in_percent(value: float | None) -> str:
    """A share in percent without the sign, for a column whose title has it."""
    return bare(percent(value))


def delta_lines(made: "Made") -> list[str]:
    """The size of a delta and its number of changed entries."""
    share = made.changed / made.entries if made.entries else 0.0
    lines = [
        f"{made.path}: {made.bytes:,} bytes, {_beside_weights(made.bytes, made.whole)} ({made.whole:,})",
        f"changed: {made.changed:,} of {made.entries:,} entries that both have in one type, {100 * share:.3g} %",
    ]
    if not made.entries:
        lines.append(
            "no tensor has one type on both sides, so all are kept whole: convert one side, with save_pretrained after "
            "model.to(torch.bfloat16), say"
        )
    if made.places is not None:
        values = "" if made.values is None else f", {made.values:.2f} for its value"
        lines.append(f"a changed entry takes {made.places:.2f} bits for its place{values}")
    return lines


def _beside_weights(size: int, whole: int) -> str:
    """The size of a file relative to that of the weights."""
    if size <= whole:
        return f"{whole / max(size, 1):,.1f} times less than the weights take"
    return f"{size / max(whole, 1):,.2f} times what the weights take"


def as_shown_json(content: Mapping[str, Any]) -> str:
    """JSON that is safe on a terminal: characters that are not printable are written as escapes.

    >>> print(as_shown_json({"grpo\\x9b31m": "ü"}))
    {
     "grpo\\u009b31m": "ü"
    }
    """
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
