"""Means over seeds and paired comparisons between cells."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

ALPHA = 0.05
# With two pairs the spread of the differences has one degree of freedom: it is near 0 by luck too often.
MIN_PAIRS = 3


@dataclass(frozen=True)
class Comparison:
    """The paired difference `other - best` of a metric over the seeds that both have.

    p: two-sided p-value of the paired t-test; None below MIN_PAIRS pairs.
    """

    best: str
    other: str
    mean: float
    n_pairs: int
    p: float | None

    @property
    def significant(self) -> bool:
        return self.p is not None and self.p < ALPHA


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); the latter is None for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def compare_with_best(values: Mapping[str, Mapping[int, float]]) -> list[Comparison]:
    """Compare the cell of lowest mean with each other cell; `values` maps cell to seed to metric.

    The best is better than all when it differs significantly from each. Asking for all of them needs no
    correction for many tests: Gutmann and Maymin, Annals of Statistics 15 (1987), show that testing the
    selected best against its runner-up at level alpha keeps that level.
    """
    measured = {cell: by_seed for cell, by_seed in values.items() if by_seed}
    if len(measured) < 2:
        return []
    best = min(measured, key=lambda cell: fmean(measured[cell].values()))
    return [_compare(best, other, measured[best], measured[other]) for other in measured if other != best]


def _compare(
    best: str, other: str, of_best: Mapping[int, float], of_other: Mapping[int, float]
) -> Comparison:
    differences = [of_other[seed] - of_best[seed] for seed in of_best if seed in of_other]
    mean = fmean(differences) if differences else math.nan
    return Comparison(best, other, mean, len(differences), _paired_p(differences))


def _paired_p(differences: list[float]) -> float | None:
    if len(differences) < MIN_PAIRS:
        return None
    mean, spread = mean_and_spread(differences)
    if not spread:
        return 1.0 if mean == 0 else 0.0
    from scipy.stats import t  # slow to import

    return float(2 * t.sf(abs(mean) / (spread / math.sqrt(len(differences))), df=len(differences) - 1))
