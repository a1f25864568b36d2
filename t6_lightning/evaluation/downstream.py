"""Multiple-choice tasks on a model in memory: scores, their standard errors, averages, and paired comparison."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t6_lightning.evaluation import tasks
from t6_lightning.evaluation.language_model import T6LM
from t6_lightning.evaluation.scores import MEASURES, Item, Mean, macro_average, mean

IN_CLOZE_FORM = ("answer_bits_per_byte", "margin", "acc_bytes")
"""Measures that are taken of the cloze form of the tasks that have one."""


@dataclass(frozen=True)
class TaskScores:
    """One task's scores with one number of examples.

    Attributes:
        metric: the one of `measures` that the paper reports.
        measures: mean and standard error over items, by the names of `MEASURES`.
        items: what `metric` was taken of.
        answers: what `IN_CLOZE_FORM` was taken of; `items`, where the task has one form.
        note: what is unusual about the rows.
    """

    task: str
    num_fewshot: int
    metric: str
    measures: dict[str, Mean]
    items: list[Item]
    answers: list[Item]
    note: str = ""

    @property
    def score(self) -> Mean:
        """The paper's metric."""
        return self.measures[self.metric]

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds: no items."""
        figures = {
            name: {"value": each.value, "standard_error": each.standard_error, "n": each.n}
            for name, each in self.measures.items()
        }
        return {
            "task": self.task,
            "num_fewshot": self.num_fewshot,
            "metric": self.metric,
            **figures,
            "note": self.note,
        }


def evaluate_tasks(
    model: T6LM,
    names: Sequence[str],
    data: Path | None = None,
    num_fewshot: Sequence[int] = (0,),
    limit: int | None = None,
) -> list[TaskScores]:
    """Scores of each task with each number of examples; every rank must call it.

    All questions go to the model at once, so that batches are filled across tasks. All random generators are left as
    they were.

    Args:
        model: what answers.
        names: of `tasks.TASKS`.
        data: folder of local files, None: the hub.
        num_fewshot: solved examples before each question.
        limit: questions a task, the first ones; a task with subjects takes as many of each subject.

    Raises:
        BadInput: rows that cannot be had.
    """
    with untouched_generators():
        wanted: list[tuple[str, int, bool, list[tasks.Part]]] = []
        for name in names:
            for shots in num_fewshot:
                wanted.append((name, shots, False, tasks.build(name, data, shots)))
            if name in tasks.CLOZE:
                wanted.append((name, 0, True, tasks.build(name, data, 0, cloze=True)))
        questions = [
            [question for part in parts for question in part.questions(limit and ceil(limit / len(parts)))]
            for _, _, _, parts in wanted
        ]
        requests = [request for each in questions for question in each for request in question.requests]
        answers = iter(model.loglikelihood(requests, disable_tqdm=True))
        items = [[_item(question, answers) for question in each] for each in questions]
    cloze = {name: found for (name, _, is_cloze, _), found in zip(wanted, items, strict=True) if is_cloze}
    return [
        _scores(name, shots, found, cloze.get(name, found), parts[0].note)
        for (name, shots, is_cloze, parts), found in zip(wanted, items, strict=True)
        if not is_cloze
    ]


def _item(question: tasks.Question, answers: Iterator[tuple[float, bool]]) -> Item:
    scored = [request.args[1] for request in question.requests]
    return Item(
        question.id,
        question.gold,
        tuple(next(answers)[0] for _ in scored),
        tuple(len(text.encode()) for text in scored),
        tuple(len(choice) for choice in question.choices),
    )


def _scores(name: str, shots: int, items: list[Item], answers: list[Item], note: str) -> TaskScores:
    measures = {
        measure: mean([of(item) for item in (answers if measure in IN_CLOZE_FORM else items)])
        for measure, of in MEASURES.items()
    }
    return TaskScores(name, shots, tasks.TASKS[name].metric, measures, items, answers, note)


def averages(scores: Sequence[TaskScores]) -> dict[int, dict[str, Mean]]:
    """Macro averages over tasks by number of examples: `score` (each task's metric) and the measures of answers."""
    found = {}
    for shots in dict.fromkeys(each.num_fewshot for each in scores):
        chosen = [each for each in scores if each.num_fewshot == shots]
        found[shots] = {"score": macro_average([each.score for each in chosen])} | {
            name: macro_average([each.measures[name] for each in chosen]) for name in IN_CLOZE_FORM
        }
    return found


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Put the global random generators of Python, NumPy and torch (CPU and GPUs) back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
