"""Losses of a language-model head without the float32 logits of all tokens."""

from kernels.loss.plain import linear_cross_entropy
from kernels.loss.summed import linear_cross_entropy_sum

__all__ = ["linear_cross_entropy", "linear_cross_entropy_sum"]
