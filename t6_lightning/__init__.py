"""T6 Lightning: train, measure and compare Tensor Product Attention (T6) and its rivals."""

__version__ = "0.1.0"
