"""Scores of items, their errors, and paired comparison, against formulas and against simulated truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from t6_lightning.common.errors import BadInput
from t6_lightning.evaluation.scores import MEASURES, Item, Mean, compare, macro_average, mean


def item(number: int, gold: int, *log_probabilities: float) -> Item:
    sizes = tuple(2 * i + 3 for i in range(len(log_probabilities)))
    return Item(str(number), gold, log_probabilities, sizes, tuple(size - 1 for size in sizes))


def test_measures_of_one_item_by_hand() -> None:
    one = Item("x", 1, (-4.0, -6.0, -9.0), (3, 6, 5), (2, 5, 4))
    measured = {name: of(one) for name, of in MEASURES.items()}
    assert measured["acc"] == 0
    assert measured["acc_norm"] == 1  # -2, -1.2, -2.25
    assert measured["acc_bytes"] == 1
    assert measured["answer_bits_per_byte"] == pytest.approx(6 / np.log(2) / 6)
    assert measured["margin"] == pytest.approx((-1 + 4 / 3) / np.log(2))


def test_mean_and_macro_average() -> None:
    assert mean([1.0]) == Mean(1.0, None, 1)
    one = mean([0.0, 1.0, 1.0, 0.0])
    assert one.value == 0.5
    assert one.standard_error == pytest.approx((1 / 3) ** 0.5 / 2)
    both = macro_average([one, Mean(0.7, 0.4, 9)])
    assert both == Mean(pytest.approx(0.6), pytest.approx(((1 / 12) + 0.16) ** 0.5 / 2), 13)
    assert macro_average([one, mean([1.0])]).standard_error is None


def simulated(rng: np.random.Generator, n: int, effect: float) -> tuple[list[Item], list[Item]]:
    """Answers of two models to the same questions: what they share is larger than their difference."""
    shared = rng.normal(0, 3, (n, 2))

    def answered(shift: float) -> list[Item]:
        noise = rng.normal(0, 1, (n, 2)) + np.array([shift, 0])
        values = -20 + shared + noise
        return [item(i, 0, *map(float, values[i])) for i in range(n)]

    return answered(effect), answered(0)


@pytest.mark.parametrize("measure", ["acc", "answer_bits_per_byte"])
def test_equal_models_differ_as_often_as_the_level_says(measure: str) -> None:
    rng = np.random.default_rng(0)
    found = [compare(*simulated(rng, 150, 0), measure).p_value < 0.05 for _ in range(200)]
    assert 0.0 <= np.mean(found) <= 0.09  # McNemar's exact test stays below its level


def test_the_smallest_difference_is_found_with_the_stated_power() -> None:
    rng = np.random.default_rng(1)
    truth, trials = 0.1, 150
    expected = compare(*simulated(rng, 4000, 0), "answer_bits_per_byte")
    n = round(4000 * (expected.smallest / truth) ** 2)
    effect = truth * 3 * np.log(2)  # bits per byte of an answer of 3 bytes
    found = [compare(*simulated(rng, n, -effect), "answer_bits_per_byte") for _ in range(trials)]
    power = np.mean([each.p_value < 0.05 for each in found])
    assert abs(power - 0.8) < 0.1
    covered = np.mean([each.interval[0] <= truth <= each.interval[1] for each in found])
    assert covered > 0.88


def test_mcnemar_counts_the_questions_that_one_alone_has_right() -> None:
    first = [item(i, 0, -1.0, -2.0) for i in range(12)]
    second = [item(i, 0, *((-2.0, -1.0) if i < 7 else (-1.0, -2.0))) for i in range(10)]
    found = compare(first, second, "acc")
    assert found.n == 10
    assert found.value == pytest.approx(0.7)
    assert found.p_value == pytest.approx(binomtest(7, 7).pvalue)
    with pytest.raises(BadInput, match="compare='1 common questions' is not possible"):
        compare(first[:1], second, "acc")
