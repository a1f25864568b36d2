"""Downstream scores with standard errors, and measures that tell small models apart where accuracy cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import NamedTuple

import numpy as np


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
