"""A T6 as lm-eval's model, against lm-eval's own Hugging Face model with the same weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_rows import byte_level, words, write_rows
from llama_twin import llama_twin
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaForCausalLM

from t6_lightning.common.errors import BadInput
from t6_lightning.evaluation import downstream, tasks
from t6_lightning.evaluation.language_model import T6LM
from t6_lightning.model.attention.mha import MHAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.model.rope import Rope
from t6_lightning.model.t6 import T6

WIDTH, LAYERS, HEADS, CONTEXT, HIDDEN = 48, 2, 3, 256, 96
SCORED = ("arc_easy", "hellaswag", "boolq", "winogrande", "openbookqa", "piqa")


@pytest.fixture(scope="module")
def twins() -> tuple[T6, LlamaForCausalLM]:
    """One model of random weights in both forms."""
    attention = MHAConfig(HEADS, WIDTH // HEADS, rope=Rope(direction="llama"))
    return llama_twin(T6Config(257, WIDTH, LAYERS, CONTEXT, attention, ffn_hidden=HIDDEN), eot=256)


@pytest.fixture(scope="module")
def pair(twins: tuple[T6, LlamaForCausalLM]) -> tuple[T6LM, HFLM]:
    ours, theirs = twins
    mine, others = byte_level()
    reference = HFLM(theirs, tokenizer=others, batch_size=1, max_length=CONTEXT, device="cpu")
    return T6LM(ours, mine, batch_size=16), reference


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name in tasks.PAPER:
        scored = {"boolq": "validation", "hellaswag": "validation", "piqa": "validation"}
        write_rows(folder, name, scored.get(name, "validation" if name == "winogrande" else "test"), 14)
        examples = {"winogrande": "train_xl", "mmlu": "dev"}.get(name, "train")
        write_rows(folder, name, examples, 12, seed=1)
    return folder


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]  # pyright: ignore[reportArgumentType]


def through_lm_eval(model: Any, name: str, data: Path) -> dict[str, Any]:
    parts = tasks.build(name, data, 2)
    results = simple_evaluate(
        model,
        tasks=[part.task for part in parts],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        fewshot_random_seed=tasks.FEWSHOT_SEED,
    )
    assert results is not None
    return results


@pytest.mark.parametrize("name", SCORED)
def test_scores_equal_those_of_lm_evals_own_model(pair: tuple[T6LM, HFLM], data: Path, name: str) -> None:
    ours, theirs = (through_lm_eval(model, name, data) for model in pair)
    mine, others = ours["samples"][name], theirs["samples"][name]
    assert len(mine) == 14
    for a, b in zip(mine, others, strict=True):
        assert a["arguments"] == b["arguments"]
        for (got, is_greedy), (expected, was_greedy) in zip(
            a["filtered_resps"], b["filtered_resps"], strict=True
        ):
            assert abs(got - expected) < 1e-4
            assert is_greedy == was_greedy
    assert ours["results"] == theirs["results"]
    # And this project's own loop over the same questions.
    (scores,) = downstream.evaluate_tasks(pair[0], [name], data, [2])
    for measure in ("acc", "acc_norm"):
        if f"{measure},none" in ours["results"][name]:
            assert scores.measures[measure].value == pytest.approx(ours["results"][name][f"{measure},none"])


def test_every_kind_of_request_and_batch_size(pair: tuple[T6LM, HFLM]) -> None:
    ours, theirs = pair
    alone = T6LM(ours.model, ours.text, batch_size=1)
    rng = random.Random(0)
    contexts = [words(rng, 1, 60) for _ in range(5)]
    scored = requests(
        "loglikelihood",
        *((context, f" {words(rng, 1, 4)}") for context in contexts for _ in range(2)),
        ("", "without context"),
    )
    rolling = requests("loglikelihood_rolling", *((words(rng, 1, 120),) for _ in range(4)))
    until = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    generated = requests("generate_until", *((context, dict(until)) for context in contexts))
    expected = theirs.loglikelihood(scored, disable_tqdm=True)
    totals = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    texts = theirs.generate_until(generated, disable_tqdm=True)
    assert len({len(context) for context in contexts}) > 1
    for model in (ours, alone):
        got = model.loglikelihood(scored, disable_tqdm=True)
        np.testing.assert_allclose([a for a, _ in got], [a for a, _ in expected], atol=1e-4)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
        np.testing.assert_allclose(model.loglikelihood_rolling(rolling), totals, atol=5e-4)
        assert model.generate_until(generated) == texts


def test_an_answer_longer_than_the_context_is_scored_in_parts(pair: tuple[T6LM, HFLM]) -> None:
    whole = pair[0]
    short = T6LM(whole.model, whole.text, max_length=8)
    (request,) = requests("loglikelihood", ("seven", " red blue stone"))
    got = short.loglikelihood([request], disable_tqdm=True)[0][0]
    tokens, expected = whole.tok_encode("seven red blue stone"), 0.0
    for first in range(5, len(tokens), 4):
        part = tokens[first : first + 4]
        before = tokens[:first][-(9 - len(part)) :]
        with torch.no_grad():
            log_p = whole.model(torch.tensor([[*before, *part[:-1]]]))[0].log_softmax(-1)
        expected += log_p[len(before) - 1 :].gather(1, torch.tensor(part)[:, None]).sum().item()
    assert got == pytest.approx(expected, abs=1e-4)


def test_generators_and_training_mode_are_left_as_they_were(pair: tuple[T6LM, HFLM], data: Path) -> None:
    model = pair[0]
    model.model.train()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    downstream.evaluate_tasks(model, ["arc_easy"], data, [0, 2], limit=3)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert all(np.array_equal(a, b) for a, b in zip(before[2], after[2], strict=True))
    assert model.model.training
    model.model.eval()


def test_tasks_of_one_table(pair: tuple[T6LM, HFLM], data: Path) -> None:
    scores = downstream.evaluate_tasks(pair[0], tasks.names(["paper"])[:-2], data, [0], limit=6)
    assert [each.task for each in scores] == list(tasks.PAPER[:-2])
    average = downstream.averages(scores)[0]
    assert average["score"].value == pytest.approx(np.mean([each.score.value for each in scores]))
    errors = [each.score.standard_error or 0 for each in scores]
    assert average["score"].standard_error == pytest.approx(np.sqrt(np.square(errors).sum()) / len(scores))


def test_answers_in_bits_per_byte(pair: tuple[T6LM, HFLM], data: Path) -> None:
    """By hand, of the first question."""
    model = pair[0]
    (scores,) = downstream.evaluate_tasks(model, ["arc_easy"], data, [0], limit=1)
    row = json.loads((data / "arc_easy/test.jsonl").read_text().splitlines()[0])
    context = f"Question: {row['question']}\nAnswer:"
    bits = []
    for answer in row["choices"]["text"]:
        ids = torch.tensor([model.tok_encode(f"{context} {answer}")])
        with torch.no_grad():
            log_p = model.model(ids[:, :-1])[0].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        n = len(model.tok_encode(f" {answer}"))
        assert n == len(f" {answer}".encode())
        bits.append(-log_p[-n:].sum().item() / np.log(2) / n)
    right = "ABCD".index(row["answerKey"])
    assert scores.measures["answer_bits_per_byte"].value == pytest.approx(bits[right], abs=1e-5)
    best_wrong = min(bits[:right] + bits[right + 1 :])
    assert scores.measures["margin"].value == pytest.approx(best_wrong - bits[right], abs=1e-5)
    assert scores.measures["answer_bits_per_byte"].standard_error is None


def test_two_tasks_have_answers_in_cloze_form(pair: tuple[T6LM, HFLM], data: Path) -> None:
    (scores,) = downstream.evaluate_tasks(pair[0], ["boolq"], data, [0], limit=5)
    row = json.loads((data / "boolq/validation.jsonl").read_text().splitlines()[0])
    assert scores.items[0].n_bytes == (len(" no"), len(" yes"))
    assert scores.answers[0].n_bytes == (len(f" {row['question']}?".encode()),) * 2
    assert scores.answers[0].gold == row["label"] == scores.items[0].gold


def test_what_is_missing_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^--tasks='hellswag' is not possible: choose paper or of arc_easy, "):
        tasks.names(["hellswag"])
    with pytest.raises(BadInput, match=r"arc_easy/test.jsonl \(or .jsonl.gz\) is missing$"):
        tasks.build("arc_easy", tmp_path)
    file = write_rows(tmp_path, "arc_easy", "test", 3)
    file.write_text(file.read_text() + "{")
    with pytest.raises(BadInput, match=r"arc_easy/test.jsonl, line 4: JSONDecodeError: "):
        tasks.build("arc_easy", tmp_path)
    empty = write_rows(tmp_path, "piqa", "validation", 1)
    empty.write_text("")
    with pytest.raises(BadInput, match=r"piqa/validation.jsonl holds no rows$"):
        tasks.build("piqa", tmp_path)
    other = write_rows(tmp_path, "sciq", "test", 2)
    other.write_text(other.read_text().replace("support", "help"))
    with pytest.raises(BadInput, match=r"sciq/test.jsonl lacks the column support$"):
        tasks.build("sciq", tmp_path)


def test_stand_ins_are_said(tmp_path: Path) -> None:
    write_rows(tmp_path, "sciq", "validation", 5)
    (part,) = tasks.build("sciq", tmp_path, 2)
    assert part.note == "validation stands in for test; examples of validation, as there is no train"
    for question in part.questions(None):
        examples, asked = question.requests[0].args[0].rsplit("\n\n", 1)
        assert asked not in examples
