"""Scores of continuations against the full forward of each request by itself."""

from __future__ import annotations

import random

import pytest
import torch
from variants import random_model, shrunk, variants

from t6_lightning.common.errors import BadInput
from t6_lightning.evaluation.scoring import Score, score
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6

VARIANTS = variants()


def requests(rng: random.Random, longest: int) -> list[tuple[list[int], list[int]]]:
    """Questions with one to four answers of different lengths, among them empty ones and single tokens."""

    def tokens(n: int) -> list[int]:
        return [rng.randrange(61) for _ in range(n)]

    found = []
    for _ in range(7):
        context = tokens(rng.randint(1, longest // 2))
        found += [(context, tokens(rng.randint(1, longest // 2))) for _ in range(rng.randint(1, 4))]
    found += [(tokens(3), []), (tokens(1), tokens(1))]
    rng.shuffle(found)
    return found


@torch.no_grad()
def one_by_one(model: T6, context: list[int], continuation: list[int]) -> Score:
    if not continuation:
        return Score(0.0, True)
    logits = model(torch.tensor([[*context, *continuation]])[:, :-1])[0, len(context) - 1 :]
    targets = torch.tensor(continuation)
    of_targets = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    return Score(of_targets.sum().item(), bool((logits.argmax(-1) == targets).all()))


@pytest.mark.parametrize("name", VARIANTS)
def test_shared_contexts_give_the_full_forwards_scores(name: str) -> None:
    model = random_model(shrunk(VARIANTS[name])).eval()
    asked = requests(random.Random(name), model.config.context)
    expected = [one_by_one(model, *request) for request in asked]
    for batch_size in (1, 5):
        got = score(model, asked, batch_size)
        for a, b in zip(got, expected, strict=True):
            assert a is not None
            assert abs(a.log_probability - b.log_probability) < 1e-10
            assert a.is_greedy == b.is_greedy


def small() -> T6:
    return random_model(shrunk(T6Config(attention=TPAConfig(n_heads=3, head_dim=16)))).eval()


def test_long_contexts_lose_their_first_tokens() -> None:
    model, rng = small(), random.Random(0)
    context = [rng.randrange(61) for _ in range(100)]
    answers = [[5], [7, 8, 9], [3] * 32]
    got = score(model, [(context, answer) for answer in answers], 8)
    expected = [one_by_one(model, context[-(33 - len(answer)) :], answer) for answer in answers]
    for a, b in zip(got, expected, strict=True):
        assert a is not None
        assert abs(a.log_probability - b.log_probability) < 1e-10


def test_the_likeliest_continuation_is_greedy() -> None:
    model = small()
    context = [1, 2, 3]
    with torch.no_grad():
        for _ in range(4):
            context.append(int(model(torch.tensor([context]))[0, -1].argmax()))
    likeliest, other = context[3:], [*context[3:-1], (context[-1] + 1) % 61]
    got = score(model, [([1, 2, 3], likeliest), ([1, 2, 3], other)], 8)
    assert [value and value.is_greedy for value in got] == [True, False]


def test_batches_can_be_shared_between_processes() -> None:
    model, asked = small(), requests(random.Random(1), 32)
    whole = score(model, asked, 2)
    parts = [score(model, asked, 2, mine=lambda batch, r=rank: batch % 3 == r) for rank in range(3)]
    merged = [[value for value in values if value is not None] for values in zip(*parts, strict=True)]
    assert [values[0] for values in merged] == whole
    assert all(len(values) == 1 for values in merged)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (([], [1]), "context='' is not possible"),
        (([1], [1] * 33), "continuation='33 tokens' is not possible"),
    ],
)
def test_requests_that_cannot_be_scored(request_: tuple[list[int], list[int]], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        score(small(), [request_], 1)
