"""Token losses of a language-model head without the float32 logits of all tokens."""

from kernels.loss.plain import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
