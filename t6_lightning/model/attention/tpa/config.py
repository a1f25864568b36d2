"""Tensor Product Attention as a value."""

from __future__ import annotations

from dataclasses import dataclass

from t6_lightning.model.attention.tpa.factorization import Factorization
from t6_lightning.model.attention.tpa.layer import TensorProductAttention


@dataclass(frozen=True)
class TPAConfig(Factorization):
    """Q, K and V are (1/R) Σ_r a_r ⊗ vec(b_r ⊗ c_r ⊗ ...), sums of R products of small factors of the token.

    Attributes:
        n_heads: heads; n_heads * head_dim need not equal d_model.
        head_dim: dimension of each head.
        rank_q: rank of Q, R_Q; without effect where Q is not factorized.
        rank_k: rank of K, R_K.
        rank_v: rank of V, R_V.
        factorize_q: False makes Q one plain linear map (TPA-KVonly).
        order: 2 is a ⊗ b; order n has n - 1 feature factors.
        feature_dims: their sizes, with product head_dim; from order 3 on they must be said.
        shared_b: K and V have the same b. It is cached unrotated, and rotated for K when read.
        shared_c: Q, K and V (K and V where Q is plain) have the same c and further factors.
        noncontextual_a: which of q, k, v have learned vectors for a instead of maps of the token, e.g. "qkv".
        noncontextual_b: the same for b. A b of K that is a parameter is rotated when read.
        noncontextual_c: the same for c and further factors.
        rope: how positions enter Q and K.
        rope_at: "factors" turns b, which is what theorems 3.1 and C.1 factorize; "product" turns the whole head
            dimension. At order 2 both are the same function; the first caches rotated factors.
        nonlinearity: φ of head factors, a = φ(W x / temperature): none, sigmoid, softmax_heads (H · softmax
            over heads), softmax_ranks (R · softmax over ranks), relu2 (relu(·)²), topk_heads (softmax_heads cut to
            the top_k largest heads of each rank, with straight-through gradients).
        nonlinear_on: which of q, k, v it acts on, e.g. "kv"; None is all that are factorized.
        temperature: divides what φ is taken of.
        top_k: heads that topk_heads keeps.
        init: initialization of the factors, see `t6_lightning.model.init`.
        init_std: σ of init "normal".
        init_q: how the matrix of Q starts where Q is not factorized (elsewhere without effect): "linear", nn.Linear's
            default as MHA's, or "xavier", Xavier uniform as the public code.
        gain_a: factor on the initial spread of a.
        gain_b: the same for b.
        gain_c: the same for c and further factors.
        output_norm: RMSNorm of each head's output, with one learned weight of head_dim and eps 1e-5.
        output_gate: o ⊙ σ(x W_g), "head": one gate per head, W_g (d_model, h); "element": one per number,
            W_g (d_model, h · head_dim) (Qiu et al., 2025).
        kv_shift: K'_t = α_h K_t + β_h K_{t-1} per head, with learned α = 1, β = 0 at first, and V likewise (after
            Xu et al., 2024). K_{t-1} keeps the rotation of its own position, a document's first token has no
            predecessor, and the cache holds no more than without.
    """

    def build(self, d_model: int) -> TensorProductAttention:
        return TensorProductAttention(self, d_model)
