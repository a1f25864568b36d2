"""lm-eval's built-in tasks, read from the hub or from local files with the same columns.

lm-eval's own definitions are taken as they are; only where the rows come from is changed. Its task manager would read
thousands of definitions, here only those asked for are read.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from t6_lightning.common.errors import BadInput, require

SPLITS = ("training", "validation", "test", "fewshot")
FEWSHOT_SEED = 1234
"""lm-eval's default."""
SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Definition:
    """A task as it is reported: one of lm-eval's, or a family that shares one file of rows.

    Attributes:
        file: lm-eval's definition, below its folder of tasks; `*` stands for each subject.
        folder: of the local files.
        metric: the paper's.
        splits: where a local file is not called as the hub calls the split: {split: file's name}.
        stands_in: {split: another} that is used where the first one's file is not there; the table says so.
        changes: settings in place of lm-eval's.
    """

    file: str
    folder: str
    metric: str
    splits: dict[str, str] = field(default_factory=dict)
    stands_in: dict[str, str] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)


COLUMNS = {  # that each row must have, by folder
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "boolq": ("passage", "question", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "mmlu": ("question", "subject", "choices", "answer"),
    "sciq": ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"),
}

TASKS = {
    "arc_easy": Definition("arc/arc_easy.yaml", "arc_easy", "acc_norm"),
    "arc_challenge": Definition("arc/arc_challenge.yaml", "arc_challenge", "acc_norm"),
    "boolq": Definition("super_glue/boolq/default.yaml", "boolq", "acc"),
    "hellaswag": Definition("hellaswag/hellaswag.yaml", "hellaswag", "acc_norm"),
    "openbookqa": Definition("openbookqa/openbookqa.yaml", "openbookqa", "acc_norm"),
    "piqa": Definition("piqa/piqa.yaml", "piqa", "acc_norm"),
    "winogrande": Definition("winogrande/default.yaml", "winogrande", "acc", {"train": "train_xl"}),
    "mmlu": Definition("mmlu/default/mmlu_*.yaml", "mmlu", "acc"),
    "sciq": Definition("sciq/sciq.yaml", "sciq", "acc_norm", stands_in={"test": "validation"}),
}
PAPER = tuple(TASKS)
"""The nine tasks of the paper's table of downstream results."""

CLOZE = {
    "mmlu": Definition("mmlu/continuation/mmlu_*.yaml", "mmlu", "acc"),
    # The question is scored given the passage and each answer: "yes" and "no" are too short to say much.
    "boolq": Definition(
        "super_glue/boolq/default.yaml",
        "boolq",
        "acc",
        changes={
            "doc_to_text": lambda row: int(row["label"]),
            "doc_to_choice": lambda row: [
                f"{row['passage']}\nAnswer: {word}\nQuestion:" for word in ("no", "yes")
            ],
            "doc_to_target": lambda row: f"{row['question']}?",
        },
    ),
}
"""Forms of two tasks in which the answer is text: what answer bits per byte are taken of, without examples."""


class Question(NamedTuple):
    """One row of a task as requests of log-likelihoods, one an answer."""

    id: str
    """Task and hash of the row."""
    gold: int
    choices: list[str]
    requests: list[Any]
    """lm-eval's instances: (context, continuation)."""


@dataclass(frozen=True)
class Part:
    """One of lm-eval's task objects, ready to be evaluated."""

    task: Any
    """lm-eval's ConfigurableTask."""
    note: str = ""
    """What is unusual about its rows."""

    def questions(self, limit: int | None) -> list[Question]:
        """The first `limit` questions, None: all."""
        found = []
        self.task.set_fewshot_seed(FEWSHOT_SEED)
        for number, row in self.task.doc_iterator(limit=limit):
            context = self.task.fewshot_context(row, num_fewshot=self.task.config.num_fewshot)
            metadata = (self.task.config.task, number, 1)
            requests = self.task.construct_requests(doc=row, ctx=context, metadata=metadata)
            choices = self.task.doc_to_choice(row)
            gold = self.task.doc_to_text(row) if self.task.multiple_input else self.task.doc_to_target(row)
            gold = choices.index(gold) if isinstance(gold, str) else int(gold)
            digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
            found.append(Question(f"{self.task.config.task}/{digest[:16]}", gold, choices, requests))
        return found


def names(asked: list[str]) -> list[str]:
    """Task names of a list in which `paper` stands for its nine.

    Raises:
        BadInput: a name that is no task.
    """
    found: dict[str, None] = {}
    for name in asked:
        require(name == "paper" or name in TASKS, "--tasks", name, f"choose paper or of {', '.join(TASKS)}")
        found |= dict.fromkeys(PAPER if name == "paper" else [name])
    return list(found)


def build(name: str, data: Path | None, num_fewshot: int = 0, cloze: bool = False) -> list[Part]:
    """lm-eval's task objects of one task: one, or one a subject.

    Args:
        name: of `TASKS`.
        data: folder of local files, TASK/SPLIT.jsonl or .jsonl.gz; None: the Hugging Face hub.
        num_fewshot: solved examples before each question.
        cloze: the form of `CLOZE`.

    Raises:
        BadInput: a file that is missing, damaged, empty, or lacks a column; a hub that cannot be reached.
    """
    import datasets
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    definition = CLOZE[name] if cloze else TASKS[name]
    folder = Path(lm_eval.tasks.__file__).parent
    parts = []
    for file in sorted(folder.glob(definition.file)):
        config: dict[str, Any] = load_yaml(file, resolve_func=True) | definition.changes
        config = {key: value for key, value in config.items() if key not in ("tag", "group", "task_alias")}
        config["num_fewshot"] = num_fewshot
        note = ""
        if data is not None:
            config, note = _read_locally(config, definition, data)
        try:
            parts.append(Part(ConfigurableTask(config=config), note))
        except (KeyError, TypeError, ValueError, OSError) as error:
            where = "the hub" if data is None else str(data / definition.folder)
            raise BadInput(f"--tasks {name}: {where} does not give its rows: {_one_line(error)}") from error
    if not parts:
        raise BadInput(f"--tasks {name}: this lm-eval has no {definition.file}")
    return parts


def _read_locally(config: dict[str, Any], definition: Definition, data: Path) -> tuple[dict[str, Any], str]:
    """The configuration with rows of local files in place of the hub's, and what is unusual about them."""
    scored = config.get("test_split") or config.get("validation_split")
    examples = config.get("fewshot_split") or config.get("training_split") or scored
    assert isinstance(scored, str)
    assert isinstance(examples, str)
    subject = config.get("dataset_name") if "*" in definition.file else None
    process = config.pop("process_docs", None) or (lambda rows: rows)
    config = {key: value for key, value in config.items() if not key.endswith("_split")}
    found, notes = {}, []
    name = scored
    if _file(data / definition.folder, definition.splits.get(scored, scored)) is None:
        name = definition.stands_in.get(scored, scored)
        notes += [f"{name} stands in for {scored}"] if name != scored else []
    found[scored] = _dataset(definition, data, name, subject)
    if config["num_fewshot"] and examples != scored:
        if _file(data / definition.folder, definition.splits.get(examples, examples)) is None:
            notes.append(f"examples of {name}, as there is no {examples}")
            examples = scored  # lm-eval leaves out the question itself
        else:
            found[examples] = _dataset(definition, data, examples, subject)
    rows = {split: process(dataset) for split, dataset in found.items()}
    config |= {"test_split": scored, "fewshot_split": examples if config["num_fewshot"] else scored}
    config |= {"custom_dataset": lambda **_: rows, "dataset_path": "local"}
    return config, "; ".join(notes)


def _dataset(definition: Definition, data: Path, split: str, subject: str | None) -> Any:
    """Rows of a local file as a datasets.Dataset."""
    from datasets import Dataset

    name = definition.splits.get(split, split)
    file = _file(data / definition.folder, name)
    if file is None:
        raise BadInput(f"--task_data {data}: {definition.folder}/{name}.jsonl (or .jsonl.gz) is missing")
    rows = [row for row in _rows(file) if subject is None or row.get("subject") == subject]
    if not rows:
        raise BadInput(f"--task_data {data}: {file} holds no rows{f' of {subject}' if subject else ''}")
    for row in rows:
        absent = [column for column in COLUMNS[definition.folder] if column not in row]
        if absent:
            raise BadInput(f"--task_data {data}: {file} lacks the column {', '.join(absent)}")
    return Dataset.from_list(rows)


def _file(folder: Path, name: str) -> Path | None:
    return next((file for suffix in SUFFIXES if (file := folder / f"{name}{suffix}").is_file()), None)


@cache
def _rows(file: Path) -> list[dict[str, Any]]:
    def lines() -> Iterator[str]:
        opened = gzip.open if file.suffix == ".gz" else open
        with opened(file, "rt", encoding="utf-8") as stream:
            yield from stream

    rows, number = [], 0
    try:
        for number, line in enumerate(lines(), start=1):  # noqa: B007
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("a row must be a JSON object")
                rows.append(row)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise BadInput(f"{file}, line {number}: {_one_line(error)}") from error
    return rows


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
