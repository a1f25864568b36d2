"""Linear layer and cross-entropy in chunks of tokens, each recomputed in the backward pass.

Why not torch's own F.linear_cross_entropy: its chunked path came after 2.11, returns half-precision losses
for half-precision inputs, breaks the graph under torch.compile, and was slower than these chunks on a CPU
(`python -m kernels.bench loss` times it beside them where torch has it).

Shapes: N tokens (flattened), C model dimension, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels.dispatch import check_floats, product_dtype, values_are_at_hand

# One chunk's float32 logits. The backward pass holds a few tensors of this size at a time.
CHUNK_LOGIT_BYTES = 256 * 2**20


def linear_cross_entropy(
    x_NC: torch.Tensor,
    weight_VC: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """-log softmax(x Wᵀ)[target] of every token.

    x_NC          (N, C) final hidden states
    weight_VC     (V, C) weight of the head
    targets_N     (N,) int64 token ids
    ignore_index  the target that marks a token without loss
    chunk_tokens  tokens whose logits exist at once; by default as many as 256 MiB of float32 hold
                  (rounded down to a multiple of 128: 1,280 at a vocabulary of 50,304)
    returns       (N,) float32 (float64 when x or the weight is), 0 where the target is ignored

    The product runs in autocast's dtype inside autocast, in the wider of the two dtypes outside; the softmax
    always in float32 or float64. With one chunk nothing is recomputed.
    Raises ValueError for chunk_tokens below 1, for shapes and dtypes that do not fit and, on a CPU, for a target that
    is none of 0 to V - 1 and not ignored. On a GPU nothing waits to look at targets: such a one gives a loss of no
    meaning, or torch's device-side assertion.
    """
    check_arguments("linear_cross_entropy", x_NC, weight_VC, targets_N, chunk_tokens, ignore_index)
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(weight_VC.shape[0])
    dtype = product_dtype(x_NC, weight_VC)
    if chunk_tokens >= x_NC.shape[0]:
        return _losses(x_NC, weight_VC, targets_N, ignore_index, dtype)
    chunks = zip(x_NC.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True)
    losses = [
        checkpoint(
            _losses, x, weight_VC, targets, ignore_index, dtype, use_reentrant=False, preserve_rng_state=False
        )
        for x, targets in chunks
    ]
    return torch.cat(losses)


def check_arguments(
    name: str,
    x_NC: torch.Tensor,
    weight_VC: torch.Tensor,
    targets_N: torch.Tensor,
    chunk_tokens: int | None,
    ignore_index: int,
) -> None:
    """ValueError in the name of a loss where its arguments do not fit together."""
    fits = x_NC.dim() == 2 and weight_VC.shape[1:] == x_NC.shape[1:] and targets_N.shape == x_NC.shape[:1]
    if not fits or weight_VC.shape[0] < 1:
        raise ValueError(
            f"{name}: x {tuple(x_NC.shape)}, weight {tuple(weight_VC.shape)}, targets {tuple(targets_N.shape)}"
            " must be (N, C), (V, C), (N,) with V of at least 1"
        )
    check_floats(name, {"x": x_NC, "weight": weight_VC})
    if targets_N.dtype != torch.int64:
        raise ValueError(f"{name}: targets must be int64, are {targets_N.dtype}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{name}: chunk_tokens must be at least 1, got {chunk_tokens}")
    if values_are_at_hand(targets_N):
        V = weight_VC.shape[0]
        wrong = targets_N[((targets_N < 0) | (targets_N >= V)) & (targets_N != ignore_index)]
        if len(wrong):
            raise ValueError(
                f"{name}: target {int(wrong[0])}; allowed: 0 to {V - 1}, or {ignore_index} for none"
            )


def default_chunk_tokens(vocabulary: int) -> int:
    """Tokens whose float32 logits fill CHUNK_LOGIT_BYTES: a multiple of 128, at least 128."""
    return max(1, CHUNK_LOGIT_BYTES // (4 * vocabulary) // 128) * 128


def _losses(
    x_NC: torch.Tensor,
    weight_VC: torch.Tensor,
    targets_N: torch.Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The losses of one chunk, all of whose logits exist at once."""
    # Cast here and not by autocast: its cached copy of the weight would be shared by all chunks, and their
    # gradients would be added up in half precision.
    logits_NV = F.linear(x_NC.to(dtype), weight_VC.to(dtype))
    logits_NV = logits_NV.to(torch.promote_types(dtype, torch.float32))
    return F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction="none")
