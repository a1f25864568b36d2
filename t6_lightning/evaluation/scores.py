"""Downstream scores with standard errors, and measures that tell small models apart where accuracy cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, norm

from t6_lightning.common.errors import require

DRAWS, DRAWS_AT_ONCE = 10_000, 100
"""Of a bootstrap."""


class Item(NamedTuple):
    """How one question was answered."""

    id: str
    """Task and number of the question: equal between two models that were asked the same."""
    gold: int
    log_probabilities: tuple[float, ...]
    """Of each answer, in nats."""
    n_bytes: tuple[int, ...]
    """UTF-8 bytes of each answer as it was scored, the blank before it included."""
    n_characters: tuple[int, ...]
    """Characters of each answer without that blank, which acc_norm divides by."""

    @property
    def acc(self) -> float:
        """1 where the likeliest answer is right."""
        return float(np.argmax(self.log_probabilities) == self.gold)

    @property
    def acc_norm(self) -> float:
        """The same by log-probability per character, as lm-eval has it."""
        return float(np.argmax(np.divide(self.log_probabilities, self.n_characters)) == self.gold)

    @property
    def acc_bytes(self) -> float:
        """The same by log-probability per byte."""
        return float(np.argmax(np.divide(self.log_probabilities, self.n_bytes)) == self.gold)

    @property
    def answer_bits_per_byte(self) -> float:
        """−log2 p(right answer) over its bytes."""
        return -self.log_probabilities[self.gold] / (self.n_bytes[self.gold] * log(2))

    @property
    def margin(self) -> float:
        """Bits per byte by which the right answer is likelier than the likeliest wrong one; below 0 where it is not."""
        rates = np.divide(self.log_probabilities, self.n_bytes) / log(2)
        return float(rates[self.gold] - np.delete(rates, self.gold).max())


MEASURES: dict[str, Callable[[Item], float]] = {
    "acc": lambda item: item.acc,
    "acc_norm": lambda item: item.acc_norm,
    "acc_bytes": lambda item: item.acc_bytes,
    "answer_bits_per_byte": lambda item: item.answer_bits_per_byte,
    "margin": lambda item: item.margin,
}


@dataclass(frozen=True)
class Mean:
    """A mean over items and its standard error; the error of a single item is unknown."""

    value: float
    standard_error: float | None
    n: int


def mean(values: Sequence[float]) -> Mean:
    """Of independent values."""
    n = len(values)
    error = float(np.std(values, ddof=1) / n**0.5) if n > 1 else None
    return Mean(float(np.mean(values)), error, n)


def macro_average(means: Sequence[Mean]) -> Mean:
    """Average over tasks that count alike; its error is that of the items, the tasks being fixed."""
    errors = [each.standard_error for each in means]
    known = [error for error in errors if error is not None]
    total = float(np.sqrt(np.sum(np.square(known))) / len(means)) if len(known) == len(means) else None
    return Mean(float(np.mean([each.value for each in means])), total, sum(each.n for each in means))


class Difference(NamedTuple):
    """Of a mean over the same items between two models, first minus second.

    Attributes:
        value: the difference.
        interval: 95 % interval of a bootstrap over items, which keeps the pairs.
        p_value: exact McNemar test for accuracies, paired bootstrap for others; two-sided.
        smallest: that this many items show with 80 % power at 5 % (2.8 standard errors of the paired difference).
        n: items that both answered.
    """

    value: float
    interval: tuple[float, float]
    p_value: float
    smallest: float
    n: int


def compare(first: Sequence[Item], second: Sequence[Item], measure: str, seed: int = 0) -> Difference:
    """Two models on the same questions, paired by item.

    Args:
        first, second: items; those with equal ids are compared.
        measure: of `MEASURES`.
        seed: of the bootstrap.

    Raises:
        BadInput: fewer than two common questions.
    """
    of = MEASURES[measure]
    others = {item.id: of(item) for item in second}
    pairs = np.array([(of(item), others[item.id]) for item in first if item.id in others]).reshape(-1, 2)
    n = len(pairs)
    require(n >= 2, "compare", f"{n} common questions", "at least 2 are needed")
    differences = pairs[:, 0] - pairs[:, 1]
    value = float(differences.mean())
    generator = np.random.default_rng(seed)
    # In parts, so that memory does not grow with the number of items times that of the draws.
    draws = np.concatenate(
        [
            differences[generator.integers(0, n, (DRAWS_AT_ONCE, n))].mean(1)
            for _ in range(DRAWS // DRAWS_AT_ONCE)
        ]
    )
    low, high = np.quantile(draws, (0.025, 0.975))
    if measure.startswith("acc"):
        wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
        p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    else:
        # How often a draw around a true difference of 0 is as far from it as the one seen.
        p_value = float((1 + (np.abs(draws - value) >= abs(value)).sum()) / (1 + len(draws)))
    smallest = (norm.ppf(0.975) + norm.ppf(0.8)) * float(differences.std(ddof=1)) / n**0.5
    return Difference(value, (float(low), float(high)), p_value, float(smallest), n)
