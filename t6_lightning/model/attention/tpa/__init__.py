"""Tensor Product Attention (Zhang et al., 2025, arXiv 2501.06425): sections 3.1 to 3.3, appendices C and G."""

from t6_lightning.model.attention.tpa.config import TPAConfig
from t6_lightning.model.attention.tpa.layer import TensorProductAttention

__all__ = ["TPAConfig", "TensorProductAttention"]
