"""Rows of made-up questions in the layout of the public data sets, and a byte-level tokenizer in two forms."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules.tokenizer import Tokenizer

WORDS = (
    "red",
    "blue",
    "stone",
    "river",
    "cloud",
    "house",
    "window",
    "garden",
    "seven",
    "silver",
    "élan",
    "naïve",
)
SUBJECTS = ("abstract_algebra", "anatomy")


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def rows(task: str, n: int, rng: random.Random) -> list[dict[str, Any]]:
    """n rows of a task."""
    return [_row(task, i, rng) for i in range(n)]


def _row(task: str, number: int, rng: random.Random) -> dict[str, Any]:
    answers = [words(rng, 1, 5) for _ in range(4)]
    question = words(rng, 3, 12)
    right = rng.randrange(4)
    if task in ("arc_easy", "arc_challenge", "openbookqa"):
        asked = "question_stem" if task == "openbookqa" else "question"
        choices = {"text": answers, "label": list("ABCD")}
        return {"id": str(number), asked: question, "choices": choices, "answerKey": "ABCD"[right]}
    if task == "boolq":
        return {"question": question, "passage": words(rng, 5, 20), "idx": number, "label": right % 2}
    if task == "hellaswag":
        context = {"ctx_a": question.capitalize() + ".", "ctx_b": "the house", "ctx": question}
        return {
            "ind": number,
            "activity_label": "Walking",
            **context,
            "endings": answers,
            "label": str(right),
        }
    if task == "piqa":
        return {"goal": question, "sol1": answers[0], "sol2": answers[1], "label": right % 2}
    if task == "winogrande":
        options = {"option1": answers[0], "option2": answers[1], "answer": str(right % 2 + 1)}
        return {"sentence": f"{question} because _ {words(rng, 2, 6)}.", **options}
    if task == "mmlu":
        subject = SUBJECTS[number % len(SUBJECTS)]
        return {"question": question, "subject": subject, "choices": answers, "answer": right}
    assert task == "sciq"
    wrong = {f"distractor{i + 1}": answers[i] for i in range(3)}
    return {"question": question, **wrong, "correct_answer": answers[3], "support": words(rng, 4, 15)}


def write_rows(folder: Path, task: str, split: str, n: int, seed: int = 0) -> Path:
    """Write n made-up rows as TASK/SPLIT.jsonl."""
    file = folder / task / f"{split}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    made = rows(task, n, random.Random(f"{task}{split}{seed}"))
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def byte_level() -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """A byte-level tokenizer of 256 symbols and a separator, ours and transformers'."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)} | {"<|endoftext|>": 256}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    theirs = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
    return Tokenizer(made.to_str(), 256), theirs
