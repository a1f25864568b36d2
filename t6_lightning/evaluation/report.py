"""Scores as a table for a terminal, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from t6_lightning.evaluation.downstream import TaskScores, averages
from t6_lightning.evaluation.scores import Mean

COLUMNS = ("task", "examples", "n", "metric", "score", "answer bits per byte", "margin", "")


def _figure(mean: Mean, digits: int) -> str:
    error = "" if mean.standard_error is None else f" ± {mean.standard_error:.{digits}f}"
    return f"{mean.value:.{digits}f}{error}"


def rows(scores: Sequence[TaskScores]) -> list[list[str]]:
    """One line a task and number of examples, then the averages over tasks."""
    found = [
        [
            each.task,
            str(each.num_fewshot),
            f"{each.score.n:,}",
            each.metric,
            _figure(each.score, 4),
            _figure(each.measures["answer_bits_per_byte"], 3),
            _figure(each.measures["margin"], 3),
            each.note,
        ]
        for each in scores
    ]
    for shots, average in averages(scores).items():
        n = sum(each.num_fewshot == shots for each in scores)
        found.append(
            [
                f"average of {n}",
                str(shots),
                f"{average['score'].n:,}",
                "",
                _figure(average["score"], 4),
                _figure(average["answer_bits_per_byte"], 3),
                _figure(average["margin"], 3),
                "",
            ]
        )
    return found


def table(scores: Sequence[TaskScores], title: str) -> Table:
    """For a terminal. Errors are standard errors over items."""
    made = Table(title=title, title_justify="left")
    for column in COLUMNS:
        made.add_column(column, justify="left" if column in ("task", "metric", "") else "right")
    for row in rows(scores):
        made.add_row(*row)
    return made


def markdown(scores: Sequence[TaskScores], title: str) -> str:
    """The same as a Markdown table under a heading."""
    lines = [f"## {title}", "", f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(scores)]
    return "\n".join(lines) + "\n"


def as_dict(scores: Sequence[TaskScores]) -> dict[str, Any]:
    """What JSON holds: each task's measures and the averages, with standard errors and n."""
    return {
        "tasks": [each.as_dict() for each in scores],
        "averages": {
            str(shots): {
                name: {"value": mean.value, "standard_error": mean.standard_error, "n": mean.n}
                for name, mean in average.items()
            }
            for shots, average in averages(scores).items()
        },
    }
