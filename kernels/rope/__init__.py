"""Rotary position embedding."""

from kernels.rope.plain import rotate

__all__ = ["rotate"]
