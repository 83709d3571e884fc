"""Tables for the terminal, from the same files as the report. Reads and formats; computes no metric."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from offprincipal.tasks import Task, mixture

_SHOWN = (
    ("unchanged", "unchanged_fraction", "unchanged_fraction_isotropic_null", "percent"),
    ("step length", "relative_update_norm", None, "number"),
    ("spectral shift", "spectral_shift", "spectral_shift_isotropic_null", "number"),
    ("angle, left", "principal_angle_left_max_deg", "principal_angle_left_max_deg_isotropic_null", "degrees"),
    ("in principal", "principal_overlap", "principal_overlap_precision_null", "percent"),
    ("in low-magnitude", "low_magnitude_overlap", "low_magnitude_overlap_precision_null", "percent"),
    ("energy × isotropic", "principal_energy_enrichment", None, "number"),
)
_VERDICTS = {
    "supported": "green",
    "contradicted": "red",
    "no effect beyond the control": "yellow",
    "inconclusive": "dim",
}


def comparison_table(summary: Mapping[str, Any]) -> Table:
    """Runs × metrics, each with its null in brackets.

    Args:
        summary: `summary.json`.
    """
    table = Table(title="what training did to the weights (null in brackets)", title_justify="left")
    table.add_column("run")
    shown = [row for row in _SHOWN if any(row[1] in run["metrics"] for run in summary["runs"].values())]
    for title, *_ in shown:
        table.add_column(title, justify="right")
    for name, run in summary["runs"].items():
        cells = [_with_null(run["metrics"], metric, null, kind) for _, metric, null, kind in shown]
        table.add_row(escape(name), *cells)
    return table


def runs_table(study: Mapping[str, Any]) -> Table:
    """Training runs with their held-out figures before and after.

    Args:
        study: `study.json`, or anything with its `runs`.
    """
    table = Table(title="training, on held-out prompts (before → after)", title_justify="left")
    for title in ("run", "recipe", "steps", "learning rate"):
        table.add_column(title)
    for title in ("greedy", "sampled", "pass@k", "entropy", "KL to base", "seconds"):
        table.add_column(title, justify="right")
    for run in study["runs"]:
        before, after = run["before"] or {}, run["after"] or {}
        accuracies = [
            f"{_format(before.get(key), 'percent')} → {_format(after.get(key), 'percent')}"
            for key in ("greedy_accuracy", "sampled_accuracy", "pass_at_k")
        ]
        entropy = f"{_format(before.get('token_entropy'), 'number')} → {_format(after.get('token_entropy'), 'number')}"
        table.add_row(
            escape(run["name"]),
            run["recipe"],
            str(run["steps"]),
            f"{run['learning_rate']:g}",
            *accuracies,
            entropy,
            _format(after.get("kl_to_base"), "number"),
            f"{run['seconds']:.0f}",
        )
    return table


def claims_table(study: Mapping[str, Any]) -> Table:
    """Claims with both verdicts and their effects.

    Args:
        study: `study.json`.
    """
    table = Table(title="the paper's claims", title_justify="left", show_lines=True)
    for title in ("claim", "as published", "with the control", "control"):
        table.add_column(title)
    for claim in study["claims"]:
        table.add_row(
            f"{claim['id']} {claim['title']}\n[dim]{escape(claim['statement'])}[/]",
            _judgement(claim["as_published"]),
            _judgement(claim["controlled"]),
            escape(claim["controlled"]["control"]),
        )
    return table


def settings_table(fields: Mapping[str, Any]) -> Table:
    """Settings with their defaults.

    Args:
        fields: name -> pydantic field.
    """
    table = Table("setting", "default", "meaning")
    for name, field in fields.items():
        default = "required" if field.is_required() else str(field.default)
        table.add_row(name, escape(default), escape(field.description or ""))
    return table


def tasks_table(tasks: Iterable[Task]) -> Table:
    """Tasks, each with a held-out problem."""
    table = Table("task", "prompt", "answer", "teacher's trace")
    for task in tasks:
        problem = mixture([task], "eval", 1)[0]
        table.add_row(
            task.name, *(escape(text) for text in (problem.prompt, problem.answer, task.teacher_trace(problem)))
        )
    return table


def _judgement(judged: Mapping[str, Any]) -> str:
    color = _VERDICTS[judged["verdict"]]
    if judged["effect"] is None:
        return f"[{color}]{judged['verdict']}[/]"
    return (
        f"[{color}]{judged['verdict']}[/]\n{judged['effect']:.3g} [dim][{judged['low']:.3g}, {judged['high']:.3g}][/]"
    )


def _with_null(metrics: Mapping[str, Any], metric: str, null: str | None, kind: str) -> str:
    text = _format(metrics.get(metric, {}).get("value"), kind)
    return text if null is None else f"{text} ({_format(metrics.get(null, {}).get('value'), kind)})"


def _format(value: float | None, kind: str) -> str:
    if value is None:
        return "–"
    return {"percent": f"{100 * value:.1f} %", "degrees": f"{value:.3g}°"}.get(kind, f"{value:.3g}")
