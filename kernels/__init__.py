"""Attention operations, one folder each: `plain.py` (the ground truth) beside the faster backends and `bench.py`, the
rows of its benchmark (`kernels.bench.operations`).

    kernels.rope        rotate                  rotary position embedding
    kernels.contract    contract                (1/R) Σ_r a_r ⊗ RoPE(b_r): Q, K or V from their factors
    kernels.attention   attention               softmax attention over full keys and values
    kernels.decode      decode                  TPA attention over a cache of factors
    kernels.loss        linear_cross_entropy    token losses without the float32 logits of all tokens
                        ..._sum                 their sum, for training

Every operation takes `backend="auto" | <name>` where there is a choice (see `kernels.dispatch`).
This file imports nothing, so that `import kernels` and `python -m kernels.bench --help` are immediate.
"""
