"""Cross-entropy of rows of logits and its gradient in Triton, in place.

Shapes: N tokens, V vocabulary.
"""

# Triton's own language is not Python's to a type checker, and the package may be absent.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportMissingImports=false

import torch
import triton
import triton.language as tl

# A finite stand-in for -inf, the maximum of no logits.
LOWEST = tl.constexpr(-1e30)
MOST_COLUMNS = 8192


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy(
    logits_ptr, targets_ptr, losses_ptr, row, ignore_index,
    V: tl.constexpr, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Losses (N,); with GRADIENT also softmax(logits) - onehot(target) over the logits (N, V)."""
    n = tl.program_id(0).to(tl.int64)
    at = logits_ptr + n * row
    target = tl.load(targets_ptr + n)
    columns = tl.arange(0, COLUMNS)
    counts = target != ignore_index
    # Before anything is overwritten: the reductions below are barriers.
    at_target = tl.load(at + tl.where(counts, target, 0)).to(tl.float32)
    highest = LOWEST + 0.0
    total = 0.0
    for start in range(0, V, COLUMNS):
        x = tl.load(at + start + columns, mask=start + columns < V, other=-float("inf")).to(tl.float32)
        new_highest = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - new_highest) + tl.sum(tl.exp(x - new_highest), 0)
        highest = new_highest
    log_sum = highest + tl.log(total)
    tl.store(losses_ptr + n, tl.where(counts, log_sum - at_target, 0.0))
    if GRADIENT:
        for start in range(0, V, COLUMNS):
            live = start + columns < V
            x = tl.load(at + start + columns, mask=live, other=-float("inf")).to(tl.float32)
            p = tl.exp(x - log_sum) - tl.where(start + columns == target, 1.0, 0.0)
            p = tl.where(counts, p, 0.0)
            tl.store(at + start + columns, p.to(logits_ptr.dtype.element_ty), mask=live)


def cross_entropy_(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, ignore_index: int, gradient: bool
) -> torch.Tensor:
    """Losses (N,) in float32; with `gradient` the logits become the gradient of their sum."""
    N, V = logits_NV.shape
    losses_N = torch.empty(N, dtype=torch.float32, device=logits_NV.device)
    columns = min(MOST_COLUMNS, triton.next_power_of_2(V))
    _cross_entropy[(N,)](
        logits_NV, targets_N.contiguous(), losses_N, logits_NV.stride(0), ignore_index,
        V=V, GRADIENT=gradient, COLUMNS=columns, num_warps=max(4, columns // 512),
    )  # fmt: skip
    return losses_N
